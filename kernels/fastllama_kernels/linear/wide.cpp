// The norm and the gated activation around a GEMM of many rows: see op.py for the formulas and the schemas.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "activate.h"
#include "dispatch.h"
#include "prologue.h"
#include "vec.h"

namespace fastllama {
namespace {

// Calls f(row, its floats) for some rows of n columns, on all threads; f fills the floats, which become the row of out.
template <typename T, typename F>
void for_each_out_row(Tensor& out, int64_t n, const F& f) {
  T* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, out.numel() / n, 4, [&](int64_t begin, int64_t end) {
    std::vector<float> row(n);
    for (int64_t r = begin; r < end; ++r) {
      f(r, row.data());
      store_row(to + r * n, row.data(), n);
    }
  });
}

}  // namespace

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous() && x.size(x.dim() - 1) > 0,
                  "fastllama: x is strided or empty, expected a contiguous tensor");
  const int64_t n = x.size(x.dim() - 1);
  check(weight, "weight", x.scalar_type(), {n});
  Tensor out = empty_with_last(x, n);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    for_each_out_row<T>(out, n, [&](int64_t r, float* row) {
      normalised(data<T>(x) + r * n, data<T>(weight), eps, n, row);
    });
  });
  return out;
}

Tensor silu_mul(Tensor x, int64_t activation) {
  check_activation(activation);
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous() && x.size(x.dim() - 1) > 0 && x.size(x.dim() - 1) % 2 == 0,
                  "fastllama: x is strided or has an odd number of columns, expected gate and up side by side");
  const int64_t n = x.size(x.dim() - 1) / 2;
  Tensor out = empty_with_last(x, n);
  dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    for_each_out_row<T>(out, n, [&](int64_t r, float* row) {
      const T *gate = data<T>(x) + 2 * r * n, *up = gate + n;
      int64_t i = 0;
      for (; i + kPartLanes <= n; i += kPartLanes)
        store_part(row + i, activate(load_part(gate + i), activation) * load_part(up + i));
      for (; i < n; ++i) {
        FloatPart last = {};
        last[0] = static_cast<float>(gate[i]);
        row[i] = activate(last, activation, 1)[0] * static_cast<float>(up[i]);
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
}

}  // namespace fastllama
