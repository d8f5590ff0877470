// From tensors to typed pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
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
    default:
      STD_TORCH_CHECK(false, "fastllama: got a tensor of dtype number ", static_cast<int>(tensor.scalar_type()),
                      ", expected float32, bfloat16 or float16");
  }
}

// Refuses a tensor that a kernel would misread: what was got, what was expected.
inline void check(const Tensor& tensor, const char* name, torch::headeronly::ScalarType dtype,
                  std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "fastllama: ", name, " has dtype number ",
                  static_cast<int>(tensor.scalar_type()), ", expected ", static_cast<int>(dtype));
  STD_TORCH_CHECK(tensor.is_contiguous(), "fastllama: ", name, " is strided, expected a contiguous tensor");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), "fastllama: ", name, " has ", tensor.dim(),
                  " dimensions, expected ", shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(i) == size, "fastllama: dimension ", i, " of ", name, " is ", tensor.size(i),
                    ", expected ", size);
    ++i;
  }
}

// An uninitialised contiguous tensor of x's shape but for its last dimension, on a CPU: without torch's dispatcher, for
// a step makes a few of them in each layer.
inline Tensor empty_with_last(const Tensor& x, int64_t last) {
  const int64_t dims = x.dim();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), strides(dims);
  shape.back() = last;
  for (int64_t d = dims - 1, stride = 1; d >= 0; stride *= std::max<int64_t>(1, shape[d--])) strides[d] = stride;
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace fastllama
