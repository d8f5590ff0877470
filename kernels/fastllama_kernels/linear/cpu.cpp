// Matrix times a few vectors, limited by reading the matrix once: see op.py for the formulas and the schema.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "activate.h"
#include "dispatch.h"
#include "ops.h"
#include "prologue.h"
#include "vec.h"

namespace fastllama {
namespace {

#ifdef __AVX512F__
constexpr int kWeightRows = 4;  // matrix rows streamed side by side: enough to keep the load queues full
#else
constexpr int kWeightRows = 6;
#endif
// Of these, as many at once as there are registers for.
constexpr int at_once(int activation_rows) { return kRegisters == 16 && activation_rows > 2 ? 3 : kWeightRows; }
// Columns from which on a single row of bfloat16 activations, where the processor multiplies them, takes one row of the
// matrix after the other: memory is read best in order. Models with shorter rows lie in the caches, where four rows at
// once are faster.
constexpr int64_t kInOrder = 1024;

// The activations [rows, n] as the products take them, normalised (RMS, weighted) when a norm weight is given.
template <typename T>
std::vector<typename Activations<T>::type> prologue(const T* x, const T* norm_weight, double eps, int64_t rows,
                                                    int64_t n) {
  using X = typename Activations<T>::type;
  std::vector<X> out(rows * n);
  std::vector<float> row(std::is_same_v<X, float> ? 0 : n);
  for (int64_t r = 0; r < rows; ++r) {
    if constexpr (std::is_same_v<X, float>) {
      normalised(x + r * n, norm_weight, eps, n, out.data() + r * n);
    } else {
      normalised(x + r * n, norm_weight, eps, n, row.data());
      store_row(out.data() + r * n, row.data(), n);
    }
  }
  return out;
}

// out[r][m] = w_r · x_m, R rows of w at once.
template <int R, int M, typename T, typename X>
void dot_rows(const T* const (&w)[kWeightRows], const X* x, int64_t n, float (&out)[kWeightRows][M]) {
  if constexpr (R == kWeightRows) {
    dot_tile(w, x, n, out);
  } else {
    for (int r = 0; r < kWeightRows; r += R) {
      const T* rows_w[R];
      float products[R][M];
      std::copy(w + r, w + r + R, rows_w);
      dot_tile(rows_w, x, n, products);
      std::copy(&products[0][0], &products[0][0] + R * M, &out[r][0]);
    }
  }
}

// Calls emit(row of x, index in w, values) with the dot products of w's kWeightRows matrix rows and every row of x.
template <typename T, typename X, typename Emit>
void for_each_row(const T* const (&w)[kWeightRows], const X* x, int64_t rows, int64_t n, const Emit& emit) {
  for_each_tile(rows, [&](auto tile, int64_t first) {
    constexpr int M = decltype(tile)::value;
    float out[kWeightRows][M];
    if (std::is_same_v<X, BFloat16> && M == 1 && n >= kInOrder)
      dot_rows<1>(w, x + first * n, n, out);
    else
      dot_rows<at_once(M)>(w, x + first * n, n, out);
    for (int m = 0; m < M; ++m) {
      float values[kWeightRows];
      for (int r = 0; r < kWeightRows; ++r) values[r] = out[r][m];
      emit(first + m, values);
    }
  });
}

template <typename T>
void linear_kernel(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& norm_weight, double eps, const std::optional<Tensor>& residual,
                   Tensor& out) {
  const int64_t out_features = weight.size(0), n = weight.size(1), rows = x.numel() / n;
  const T *xp = data<T>(x), *wp = data<T>(weight), *np = maybe<T>(norm_weight);
  const T *bp = maybe<T>(bias), *rp = maybe<T>(residual);
  T* op = static_cast<T*>(out.mutable_data_ptr());
  const int64_t groups = (out_features + kWeightRows - 1) / kWeightRows;
  parallel_groups(groups, kWeightRows * n * sizeof(T), [&](const auto& each) {
    const auto activations = prologue(xp, np, eps, rows, n);
    each([&](int64_t g) {
      const int64_t first = g * kWeightRows, count = std::min<int64_t>(kWeightRows, out_features - first);
      const T* w[kWeightRows];
      for (int i = 0; i < kWeightRows; ++i) w[i] = wp + std::min<int64_t>(first + i, out_features - 1) * n;
      for_each_row(w, activations.data(), rows, n, [&](int64_t r, const float(&values)[kWeightRows]) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t at = r * out_features + first + i;
          float y = values[i];
          if (bp) y += static_cast<float>(bp[first + i]);
          if (rp) y += static_cast<float>(rp[at]);
          op[at] = static_cast<T>(y);
        }
      });
    });
  });
}

template <typename T>
void gate_up_kernel(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& norm_weight, double eps, int64_t activation, Tensor& out) {
  constexpr int kPairs = kWeightRows / 2;
  static_assert(kPairs <= kPartLanes);
  const int64_t features = weight.size(0) / 2, n = weight.size(1), rows = x.numel() / n;
  const T *xp = data<T>(x), *wp = data<T>(weight), *np = maybe<T>(norm_weight), *bp = maybe<T>(bias);
  T* op = static_cast<T*>(out.mutable_data_ptr());
  const int64_t groups = (features + kPairs - 1) / kPairs;
  parallel_groups(groups, kWeightRows * n * sizeof(T), [&](const auto& each) {
    const auto activations = prologue(xp, np, eps, rows, n);
    each([&](int64_t g) {
      const int64_t first = g * kPairs, count = std::min<int64_t>(kPairs, features - first);
      const T* w[kWeightRows];
      for (int i = 0; i < kPairs; ++i) {
        w[i] = wp + std::min<int64_t>(first + i, features - 1) * n;
        w[kPairs + i] = w[i] + features * n;
      }
      for_each_row(w, activations.data(), rows, n, [&](int64_t r, const float(&values)[kWeightRows]) {
        FloatPart gate = {}, up = {};
        for (int64_t i = 0; i < count; ++i) {
          gate[i] = values[i] + (bp ? static_cast<float>(bp[first + i]) : 0.f);
          up[i] = values[kPairs + i] + (bp ? static_cast<float>(bp[features + first + i]) : 0.f);
        }
        const FloatPart y = activate(gate, activation, count) * up;
        for (int64_t i = 0; i < count; ++i) op[r * features + first + i] = static_cast<T>(y[i]);
      });
    });
  });
}

void check_arguments(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& norm_weight) {
  const auto dtype = x.scalar_type();
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(), "fastllama: x is strided, expected a contiguous tensor");
  const int64_t n = x.size(x.dim() - 1), out_features = weight.size(0);
  STD_TORCH_CHECK(n > 0, "fastllama: x has 0 columns, expected some");
  check(weight, "weight", dtype, {out_features, n});
  if (bias.has_value()) check(*bias, "bias", dtype, {out_features});
  if (norm_weight.has_value()) check(*norm_weight, "norm_weight", dtype, {n});
}

}  // namespace

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight, double eps,
              std::optional<Tensor> residual) {
  check_arguments(x, weight, bias, norm_weight);
  Tensor out = empty_with_last(x, weight.size(0));
  check_residual(residual, out);
  dispatch(x, [&](auto zero) {
    linear_kernel<decltype(zero)>(x, weight, bias, norm_weight, eps, residual, out);
  });
  return out;
}

Tensor gate_up(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight, double eps,
               int64_t activation) {
  check_arguments(x, weight, bias, norm_weight);
  STD_TORCH_CHECK(weight.size(0) % 2 == 0, "fastllama: weight has ", weight.size(0), " rows, expected gate and up");
  check_activation(activation);
  Tensor out = empty_with_last(x, weight.size(0) / 2);
  dispatch(x, [&](auto zero) {
    gate_up_kernel<decltype(zero)>(x, weight, bias, norm_weight, eps, activation, out);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("gate_up", TORCH_BOX(&gate_up));
}

}  // namespace fastllama
