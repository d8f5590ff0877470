// From tensors to typed pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <vector>

#include "vec.h"

namespace fastllama {

using torch::stable::Tensor;

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// Calls f with a zero of the tensor's element type.
template <typename F>
void dispatch(const Tensor& tensor, const F& f) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, "fastllama CPU kernels take float32, bfloat16 and float16 tensors");
  }
}

// An uninitialised tensor of x's shape but for its last dimension.
inline Tensor empty_with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return torch::stable::new_empty(x, shape);
}

}  // namespace fastllama
