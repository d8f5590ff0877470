// From weights to 8- and 4-bit codes and their scales: see quantize.py for the formulas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "codes.h"
#include "dispatch.h"
#include "prologue.h"

namespace fastllama {
namespace {

constexpr int kCuts = 4;  // as in quantize.py
constexpr float kCut = 0.04f;
constexpr float kDivisors[] = {5.5f, 6.f, 6.5f, 7.f, 7.5f, 8.f, 8.5f, 9.f};  // as in quantize.py

FloatPart largest(FloatPart a, FloatPart b) { return a > b ? a : b; }

// The nearest integers, ties to even, of numbers between the bounds; beyond them, the bounds.
FloatPart rounded_between(FloatPart x, float lowest, float highest) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  x = largest(x, FloatPart{} + lowest);
  return ((x < highest ? x : FloatPart{} + highest) + kRound) - kRound;
}

// A group's columns of some rows: column i of them lies at x + i * kLanes.
FloatPart largest_of(const float* x, int64_t group) {
  FloatPart result = {};
  for (int64_t i = 0; i < group; ++i) {
    const FloatPart column = load_part(x + i * kLanes);
    result = largest(result, largest(column, -column));
  }
  return result;
}

// The scales with which codes from -8 to 7 stand for such columns with the least squared error among those tried.
FloatPart scales_of_nibbles(const float* x, int64_t group, FloatPart extent) {
  FloatPart best = {}, best_gain = {};
  for (const float divisor : kDivisors) {
    for (const float signed_divisor : {divisor, -divisor}) {
      const FloatPart inverse = extent > 0.f ? signed_divisor / extent : FloatPart{};
      FloatPart product = {}, square = {};
      for (int64_t i = 0; i < group; ++i) {
        const FloatPart column = load_part(x + i * kLanes), code = rounded_between(column * inverse, -8.f, 7.f);
        product += column * code;
        square += code * code;
      }
      const FloatPart gain = square > 0.f ? product * product / square : FloatPart{};
      best = gain > best_gain ? product / square : best;
      best_gain = largest(best_gain, gain);
    }
  }
  return best;
}

struct Line {  // x ~ scale * code + offset
  FloatPart scale, offset;
};

// The scales and offsets with which codes from 0 to 15 stand for such columns with the least squared error.
Line lines_of_nibbles(const float* x, int64_t group) {
  const float n = static_cast<float>(group);
  FloatPart low = load_part(x), high = low, sum = {};
  for (int64_t i = 0; i < group; ++i) {
    const FloatPart column = load_part(x + i * kLanes);
    low = -largest(-low, -column);
    high = largest(high, column);
    sum += column;
  }
  Line best{FloatPart{}, low};
  FloatPart best_gain = FloatPart{} - 1.f;
  for (int a = 0; a < kCuts; ++a) {
    for (int b = 0; b < kCuts; ++b) {
      const FloatPart from = low + a * kCut * (high - low), to = high - b * kCut * (high - low);
      const FloatPart inverse = to > from ? 15.f / (to - from) : FloatPart{};
      FloatPart codes = {}, squares = {}, products = {};
      for (int64_t i = 0; i < group; ++i) {
        const FloatPart column = load_part(x + i * kLanes), code = rounded_between((column - from) * inverse, 0.f, 15.f);
        codes += code;
        squares += code * code;
        products += column * code;
      }
      const FloatPart spread = n * squares - codes * codes;
      const FloatPart scale = spread > 0.f ? (n * products - sum * codes) / spread : FloatPart{};
      const FloatPart offset = (sum - scale * codes) / n, gain = offset * sum + scale * products;
      best.scale = gain > best_gain ? scale : best.scale;
      best.offset = gain > best_gain ? offset : best.offset;
      best_gain = largest(best_gain, gain);
    }
  }
  return best;
}

FloatPart rounded_to_half(FloatPart x, Half* to) {
  for (int i = 0; i < kPartLanes; ++i) to[i] = static_cast<Half>(x[i]);
  return load_part(to);
}

// Writes the lines of a group of a panel, its scales, and its offsets where there are some.
void quantize_group(const float* x, int64_t group, int64_t bits, uint8_t* line, Half* scale, Half* offset) {
  const int64_t columns = 32 / bits;
  const int32_t middle = offset != nullptr ? 0 : 1 << (bits - 1);
  const int32_t lowest = offset != nullptr ? 0 : bits == 8 ? -127 : -8, highest = (1 << bits) - 1 - middle;
  for (int part = 0; part < kParts; ++part, x += kPartLanes, line += kPartBytes, scale += kPartLanes) {
    Line exact{};
    if (offset != nullptr) {
      exact = lines_of_nibbles(x, group);
    } else {
      const FloatPart extent = largest_of(x, group);
      exact.scale = bits == 8 ? extent / 127.f : scales_of_nibbles(x, group, extent);
    }
    const FloatPart step = rounded_to_half(exact.scale, scale), inverse = step != 0.f ? 1.f / step : FloatPart{};
    const FloatPart zero = offset == nullptr ? FloatPart{} : rounded_to_half(exact.offset, offset + part * kPartLanes);
    for (int64_t i = 0; i < group; i += columns) {
      IntPart bytes = {};
      for (int64_t j = 0; j < columns; ++j) {
        const FloatPart code = rounded_between((load_part(x + (i + j) * kLanes) - zero) * inverse, lowest, highest);
        bytes |= (__builtin_convertvector(code, IntPart) + middle) << (8 * (j % 4) + 4 * (j / 4));
      }
      std::memcpy(line + i / columns * kLine, &bytes, sizeof(bytes));
    }
  }
}

template <typename T>
void quantize_panels(const Tensor& weight, int64_t bits, int64_t group, Tensor& codes, Tensor& scales, Tensor* zeros) {
  const int64_t k = weight.size(1), groups = k / group, bytes = codes.size(1) * kLine;
  const T* w = data<T>(weight);
  auto* code = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* scale = static_cast<Half*>(scales.mutable_data_ptr());
  auto* zero = zeros == nullptr ? nullptr : static_cast<Half*>(zeros->mutable_data_ptr());
  parallel_groups(codes.size(0), bytes, [&](const auto& each) {
    std::vector<float> x(group * kLanes);
    each([&](int64_t panel) {
      for (int64_t g = 0; g < groups; ++g) {
        for (int64_t r = 0; r < kLanes; ++r)
          for (int64_t i = 0; i < group; ++i)
            x[i * kLanes + r] = static_cast<float>(w[(panel * kLanes + r) * k + g * group + i]);
        quantize_group(x.data(), group, bits, code + panel * bytes + g * (bytes / groups),
                       scale + (panel * groups + g) * kLanes,
                       zero == nullptr ? nullptr : zero + (panel * groups + g) * kLanes);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor> quantize(Tensor weight, int64_t bits, int64_t group, bool has_offsets) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(0) % kLanes == 0,
                  "fastllama: expected a contiguous weight of a multiple of ", kLanes, " rows");
  STD_TORCH_CHECK((bits == 4 || bits == 8) && group > 0 && group % kGroup == 0 && weight.size(1) % group == 0,
                  "fastllama: got ", bits, " bits in groups of ", group, " for ", weight.size(1), " columns");
  STD_TORCH_CHECK(!has_offsets || bits == 4, "fastllama: offsets are for codes of 4 bits");
  const int64_t panels = weight.size(0) / kLanes, k = weight.size(1);
  using torch::headeronly::ScalarType;
  Tensor codes = torch::stable::new_empty(weight, {panels, k * bits / 32, kLine}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(weight, {panels, k / group, kLanes}, ScalarType::Half);
  Tensor zeros = torch::stable::new_empty(weight, {has_offsets ? panels : 0, k / group, kLanes}, ScalarType::Half);
  dispatch(weight, [&](auto zero) {
    quantize_panels<decltype(zero)>(weight, bits, group, codes, scales, has_offsets ? &zeros : nullptr);
  });
  return {codes, scales, zeros};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace fastllama
