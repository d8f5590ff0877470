// What the products share: the norm before them, their threads, the checks of what they add and apply.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>

#include "activate.h"
#include "parallel.h"
#include "vec.h"

namespace fastllama {

using torch::stable::Tensor;

template <typename T>
T* maybe(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// A row of n values in float32, normalised (RMS, weighted) when a norm weight is given.
template <typename T>
void normalised(const T* x, const T* norm_weight, double eps, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(x[i]);
  if (norm_weight == nullptr) return;
  f32x16 squares = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) squares = squares + load16(out + i) * load16(out + i);
  float sum = sum16(squares);
  for (; i < n; ++i) sum += out[i] * out[i];
  const float scale = 1.f / std::sqrt(sum / n + static_cast<float>(eps));
  for (i = 0; i + kPartLanes <= n; i += kPartLanes)
    store_part(out + i, load_part(out + i) * scale * load_part(norm_weight + i));
  for (; i < n; ++i) out[i] = out[i] * scale * static_cast<float>(norm_weight[i]);
}

constexpr int kTile = 4;  // rows of activations per pass over the weights

// Calls f with each tile of rows, as large as they come: their number as a constant, and the first of them.
template <int kRows = kTile, typename F>
void for_each_tile(int64_t rows, const F& f, int64_t first = 0) {
  for (; first + kRows <= rows; first += kRows) f(std::integral_constant<int, kRows>{}, first);
  if constexpr (kRows > 1) for_each_tile<kRows / 2>(rows, f, first);
}

// parallel_each over groups of matrix rows, a thread for every 128 KiB: less is read before another one wakes. One that
// is at hand comes for less.
template <typename F>
void parallel_groups(int64_t groups, int64_t bytes_per_group, const F& f) {
  const int64_t least = Team::current() != nullptr ? 32 << 10 : 128 << 10;
  parallel_each(groups, std::max<int64_t>(1, least / std::max<int64_t>(1, bytes_per_group)), f);
}

inline void check_residual(const std::optional<Tensor>& residual, const Tensor& out) {
  if (!residual.has_value()) return;
  STD_TORCH_CHECK(residual->scalar_type() == out.scalar_type() && residual->is_contiguous() &&
                      std::equal(residual->sizes().begin(), residual->sizes().end(), out.sizes().begin(),
                                 out.sizes().end()),
                  "fastllama: expected a contiguous residual of the result's shape and dtype");
}

inline void check_activation(int64_t activation) {
  STD_TORCH_CHECK(activation >= kSilu && activation <= kSqrtSoftplus, "fastllama: activation is number ", activation,
                  ", expected 0 to ", static_cast<int>(kSqrtSoftplus));
}

}  // namespace fastllama
