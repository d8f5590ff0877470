// Matrices of 4- and 8-bit codes times a few vectors: see packed.py for the layout, the formulas and the schema.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "activate.h"
#include "codes.h"
#include "dispatch.h"
#include "ops.h"
#include "panels.h"
#include "prologue.h"
#include "vec.h"

namespace fastllama {
namespace {

// Activations as the products take them: 8-bit codes with a scale for each kGroup of them, or float32.
template <typename X>
struct Inputs {
  using Sum = std::conditional_t<std::is_same_v<X, float>, float, int32_t>;
  int64_t k;
  Sum middle;                        // what the matrix's codes have for zero
  std::vector<X> values;             // [rows, k]
  std::vector<float> scales, sums;   // [rows, k / kGroup]; the sums are those of what the values stand for
  std::vector<Sum> less;             // likewise: the sum of the values, `middle` times

  Inputs(int64_t rows, const Panels& w)
      : k(w.k), middle(1 << (w.bits - 1)), values(rows * k), scales(rows * k / kGroup, 1.f), sums(scales.size()),
        less(scales.size()) {}

  void set(int64_t row, const float* x) {
    for (int64_t g = 0; g < k / kGroup; ++g, x += kGroup) {
      X* to = values.data() + row * k + g * kGroup;
      const int64_t at = row * (k / kGroup) + g;
      Sum sum;
      if constexpr (std::is_same_v<X, float>) {
        std::copy(x, x + kGroup, to);
        sum = sum16(load16(x) + load16(x + kLanes));
      } else {
        scales[at] = encode(x, to, sum);
      }
      sums[at] = sum * scales[at];
      less[at] = middle * sum;
    }
  }
};

// Panels that are multiplied together with M rows of activations, where there are registers for it: what is loaded of
// the activations serves them all. Fewer rows wait for memory, and that is read best panel after panel.
template <typename X, int M>
constexpr int together() {
#ifdef __AVX512F__
  return M < kTile || std::is_same_v<X, float> ? 1 : 2;
#else
  return 1;
#endif
}

// out[p][m] = the 16 rows of panel `panel` + p * stride times row `first` + m of the activations. A function of its own:
// inlined into a larger one, gcc 12 keeps the sums in memory for AVX2.
template <int kBits, bool kOffsets, int P, int M, typename X>
__attribute__((noinline)) void multiply(const Panels& w, int64_t panel, int64_t stride, const Inputs<X>& x,
                                        int64_t first, f32x16 (*out)[M]) {
  constexpr bool kCodes = !std::is_same_v<X, float>;
  using Split = std::conditional_t<kCodes, Codes<kBits>, FloatCodes<kBits>>;
  using Dot = BlockSum<kBits, X, (P * M < kRegisters / 4)>;
  constexpr int64_t kColumns = 32 / kBits, kLines = kGroup / kColumns;  // of a line, of a block
  // Parts of a line that are worked on together: all, where their sums fit half of the registers.
  constexpr bool kFit = Dot::kSums * kParts * M <= kRegisters / 2;
  constexpr int kPartsAtOnce = kFit && kBits == 4 && kCodes ? kParts : 1;
  const int64_t blocks = w.k / kGroup, blocks_a_group = w.group / kGroup;
  const uint8_t* lines[P];
  const Half *scale[P], *offset[P];
  for (int p = 0; p < P; ++p, panel += stride) {
    lines[p] = w.codes + panel * w.bytes();
    scale[p] = w.scales + panel * w.scales_each();
    offset[p] = kOffsets ? w.offsets + panel * w.scales_each() : nullptr;
  }
  const X* values = x.values.data() + first * w.k;
  const float *scales = x.scales.data() + first * blocks, *sums = x.sums.data() + first * blocks;
  const auto* less = x.less.data() + first * blocks;
  FloatPart total[P][kParts][M] = {};
  int64_t at = 0, next = 0;  // bytes of a panel, scales
  // Where to prefetch from: at the end of panels that lie one behind the other, from the beginning of the next ones.
  const auto ahead = [&](int64_t place, int64_t distance, int64_t panel_size) {
    const bool is_next = P > 1 && stride == 1 && place + distance >= panel_size;
    return place + distance + (is_next ? (P - 1) * panel_size : 0);
  };
  for (int64_t block = 0; block < blocks; next += kLanes) {
    FloatPart scale_p[P][kParts], offset_p[P][kParts];
    FASTLLAMA_UNROLL for (int p = 0; p < P; ++p) {
      FASTLLAMA_UNROLL for (int part = 0; part < kParts; ++part) {
        scale_p[p][part] = load_part(scale[p] + next + part * kPartLanes);
        if constexpr (kOffsets) offset_p[p][part] = load_part(offset[p] + next + part * kPartLanes);
      }
    }
    for (const int64_t end = block + blocks_a_group; block < end; ++block, at += kLines * kLine) {
      const int64_t codes_ahead = ahead(at, kAheadCodes, w.bytes());
      const int64_t scales_ahead = ahead(next, kAheadScales / sizeof(Half), w.scales_each());
      FASTLLAMA_UNROLL for (int p = 0; p < P; ++p) {
        FASTLLAMA_UNROLL for (int64_t l = 0; l < kLines; ++l) __builtin_prefetch(lines[p] + codes_ahead + l * kLine);
        if constexpr (kAheadScales > 0) __builtin_prefetch(scale[p] + scales_ahead);
        if constexpr (kAheadScales > 0 && kOffsets) __builtin_prefetch(offset[p] + scales_ahead);
      }
      for (int first_part = 0; first_part < kParts; first_part += kPartsAtOnce) {
        Dot dot[P][kPartsAtOnce][M];
        FASTLLAMA_UNROLL for (int64_t l = 0; l < kLines; ++l) {
          FASTLLAMA_UNROLL for (int i = 0; i < kPartsAtOnce; ++i) {
            Split codes[P];
            FASTLLAMA_UNROLL for (int p = 0; p < P; ++p)
              codes[p] = Split(load_part(lines[p] + at + l * kLine + (first_part + i) * kPartBytes));
            FASTLLAMA_UNROLL for (int m = 0; m < M; ++m)
              FASTLLAMA_UNROLL for (int p = 0; p < P; ++p)
                dot[p][i][m].add(codes[p], values + m * w.k + block * kGroup + l * kColumns);
          }
        }
        FASTLLAMA_UNROLL for (int m = 0; m < M; ++m) {
          const int64_t of = m * blocks + block;
          FASTLLAMA_UNROLL for (int p = 0; p < P; ++p) {
            FASTLLAMA_UNROLL for (int i = 0; i < kPartsAtOnce; ++i) {
              const int part = first_part + i;
              if constexpr (kOffsets) total[p][part][m] += offset_p[p][part] * sums[of];
              const FloatPart product = kOffsets ? dot[p][i][m].value() : dot[p][i][m].value(less[of]);
              total[p][part][m] += product * (scale_p[p][part] * scales[of]);
            }
          }
        }
      }
    }
  }
  FASTLLAMA_UNROLL for (int p = 0; p < P; ++p)
    FASTLLAMA_UNROLL for (int m = 0; m < M; ++m)
      FASTLLAMA_UNROLL for (int part = 0; part < kParts; ++part) out[p][m].parts[part] = total[p][part][m];
}

// The same for any number of panels.
template <int kBits, bool kOffsets, int M, typename X>
void multiply_all(const Panels& w, int64_t panel, int64_t stride, int64_t panels, const Inputs<X>& x, int64_t first,
                  f32x16 (*out)[M]) {
  constexpr int P = together<X, M>();
  int64_t p = 0;
  for (; p + P <= panels; p += P) multiply<kBits, kOffsets, P, M>(w, panel + p * stride, stride, x, first, out + p);
  for (; p < panels; ++p) multiply<kBits, kOffsets, 1, M>(w, panel + p * stride, stride, x, first, out + p);
}

// Reads rows `begin` to `end` - 1 of the activations x [rows, k], normalised when a norm weight is given.
template <typename X>
void read_inputs(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps, int64_t begin, int64_t end,
                 Inputs<X>& inputs) {
  const int64_t k = inputs.k;
  std::vector<float> row(k);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = begin; r < end; ++r) {
      normalised(data<T>(x) + r * k, static_cast<const T*>(maybe<T>(norm_weight)), eps, k, row.data());
      inputs.set(r, row.data());
    }
  });
}

// What is asked for, apart from the product.
struct Call {
  Tensor x;
  std::optional<Tensor> bias, norm_weight, residual;
  double eps;
  std::optional<int64_t> activation;  // then the first half of the panels is gate, the second up

  f32x16 biased(const f32x16& y, int64_t column) const {
    return bias.has_value() ? y + load(*bias, column) : y;
  }

  f32x16 gated(const f32x16& gate, const f32x16& up) const {
    return by_parts([&](FloatPart x) { return activate(x, *activation); }, gate) * up;
  }

  void store(Tensor& out, int64_t row, int64_t column, f32x16 y) const {
    const int64_t at = row * out.size(out.dim() - 1) + column;
    if (residual.has_value()) y = y + load(*residual, at);
    dispatch(out, [&](auto zero) { store16(static_cast<decltype(zero)*>(out.mutable_data_ptr()) + at, y); });
  }

 private:
  static f32x16 load(const Tensor& tensor, int64_t at) {
    f32x16 values;
    dispatch(tensor, [&](auto zero) { values = load16(data<decltype(zero)>(tensor) + at); });
    return values;
  }
};

template <int kBits, bool kOffsets, typename X>
void run(const Panels& w, const Call& call, Tensor& out) {
  const int64_t rows = call.x.numel() / w.k;
  const bool is_shared = rows > kTile;  // few rows are read by every thread, which saves a wait for the others
  Inputs<X> shared(is_shared ? rows : 0, w);
  if (is_shared)
    parallel_each(rows, 4, [&](const auto& each) {
      each([&](int64_t row) { read_inputs<X>(call.x, call.norm_weight, call.eps, row, row + 1, shared); });
    });
  // A gated product multiplies gate's and up's panel together, others such as follow each other.
  const int64_t stride = call.activation ? w.count / 2 : 1, most = call.activation ? 2 : together<X, kTile>();
  const int64_t groups = call.activation ? stride : (w.count + most - 1) / most;
  parallel_groups(groups, most * w.bytes() * std::max<int64_t>(1, rows / kTile), [&](const auto& each) {
    Inputs<X> own(is_shared ? 0 : rows, w);
    if (!is_shared) read_inputs<X>(call.x, call.norm_weight, call.eps, 0, rows, own);
    const Inputs<X>& inputs = is_shared ? shared : own;
    each([&](int64_t group) {
      const int64_t panel = call.activation ? group : group * most, panels = std::min(most, w.count - panel);
      for_each_tile(rows, [&](auto tile, int64_t first) {
        constexpr int M = decltype(tile)::value;
        f32x16 y[2][M];
        multiply_all<kBits, kOffsets, M>(w, panel, stride, panels, inputs, first, y);
        for (int m = 0; m < M; ++m) {
          for (int64_t p = 0; p < panels; ++p) y[p][m] = call.biased(y[p][m], (panel + p * stride) * kLanes);
          if (call.activation)
            call.store(out, first + m, panel * kLanes, call.gated(y[0][m], y[1][m]));
          else
            for (int64_t p = 0; p < panels; ++p) call.store(out, first + m, (panel + p) * kLanes, y[p][m]);
        }
      });
    });
  });
}

// Calls f with constants of what matrices and calls differ in.
template <typename F>
void choose(int64_t bits, bool has_offsets, bool codes_inputs, const F& f) {
  const auto by_inputs = [&](auto b, auto offsets) { codes_inputs ? f(b, offsets, int8_t{}) : f(b, offsets, float{}); };
  const auto by_offsets = [&](auto b) {
    has_offsets ? by_inputs(b, std::true_type{}) : by_inputs(b, std::false_type{});
  };
  bits == 4 ? by_offsets(std::integral_constant<int, 4>{}) : by_offsets(std::integral_constant<int, 8>{});
}

Tensor run_call(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& offsets, bool codes_inputs,
                const Call& call) {
  const Tensor& x = call.x;
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(), "fastllama: x is strided, expected a contiguous tensor");
  const int64_t k = x.size(x.dim() - 1);
  const Panels w = panels(codes, scales, offsets, k);
  const int64_t features = w.count * kLanes;
  if (call.bias.has_value()) check(*call.bias, "bias", x.scalar_type(), {features});
  if (call.norm_weight.has_value()) check(*call.norm_weight, "norm_weight", x.scalar_type(), {k});
  Tensor out = empty_with_last(x, call.activation ? features / 2 : features);
  check_residual(call.residual, out);
  choose(w.bits, offsets.has_value(), codes_inputs, [&](auto bits, auto has_offsets, auto input) {
    run<decltype(bits)::value, decltype(has_offsets)::value, decltype(input)>(w, call, out);
  });
  return out;
}

}  // namespace

Tensor linear_packed(Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> offsets, std::optional<Tensor> bias,
                     std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual,
                     bool codes_inputs) {
  return run_call(codes, scales, offsets, codes_inputs, {x, bias, norm_weight, residual, eps, std::nullopt});
}

Tensor gate_up_packed(Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> offsets, std::optional<Tensor> bias,
                      std::optional<Tensor> norm_weight, double eps, int64_t activation, bool codes_inputs) {
  check_activation(activation);
  STD_TORCH_CHECK(codes.size(0) % 2 == 0, "fastllama: got ", codes.size(0), " panels, expected gate's and up's");
  return run_call(codes, scales, offsets, codes_inputs, {x, bias, norm_weight, std::nullopt, eps, activation});
}

Tensor embed_packed(Tensor like, Tensor ids, Tensor codes, Tensor scales, std::optional<Tensor> offsets) {
  STD_TORCH_CHECK(ids.scalar_type() == torch::headeronly::ScalarType::Long && ids.is_contiguous() && like.dim() == 1,
                  "fastllama: expected contiguous ids of int64, and like with one dimension");
  const Panels w = panels(codes, scales, offsets, like.size(0));
  const int64_t columns = 32 / w.bits, rows = w.count * kLanes;
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(w.k);
  Tensor out = torch::stable::new_empty(like, shape);
  dispatch(like, [&](auto zero) {
    auto* to = static_cast<decltype(zero)*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < ids.numel(); ++i) {
      const int64_t id = data<int64_t>(ids)[i], panel = id / kLanes, r = id % kLanes;
      STD_TORCH_CHECK(id >= 0 && id < rows, "fastllama: id ", id, " of an embedding of ", rows, " rows");
      for (int64_t c = 0; c < w.k; ++c) {
        const int64_t in_line = c % columns, at = panel * w.scales_each() + c / w.group * kLanes + r;
        const uint8_t byte = w.codes[panel * w.bytes() + c / columns * kLine + 4 * r + in_line % 4];
        const float code = w.bits == 8 ? byte : in_line < 4 ? byte & 15 : byte >> 4;
        const float scale = static_cast<float>(w.scales[at]), middle = 1 << (w.bits - 1);
        *to++ = w.offsets ? code * scale + static_cast<float>(w.offsets[at]) : (code - middle) * scale;
      }
    }
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) {
  m.impl("embed_packed", TORCH_BOX(&embed_packed));
  m.impl("linear_packed", TORCH_BOX(&linear_packed));
  m.impl("gate_up_packed", TORCH_BOX(&gate_up_packed));
}

}  // namespace fastllama
