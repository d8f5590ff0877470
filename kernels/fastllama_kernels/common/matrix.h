// A matrix by its kind: which tensors it has, and what multiplies with it. Kinds are numbered as in ../layers/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "ops.h"

namespace fastllama {

enum Kind : int64_t { kDense, kDenseBias };

// How many tensors a matrix of this kind has.
inline size_t tensors_of(int64_t kind) {
  switch (kind) {
    case kDense: return 1;      // weight
    case kDenseBias: return 2;  // weight, bias
    default: STD_TORCH_CHECK(false, "fastllama: there is no matrix of kind ", kind);
  }
}

struct Matrix {
  int64_t kind;
  const Tensor* tensors;  // as many as tensors_of says

  Tensor multiply(Tensor x, std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual) const {
    return linear(x, tensors[0], bias(), norm_weight, eps, residual);
  }

  Tensor multiply_gated(Tensor x, std::optional<Tensor> norm_weight, double eps, int64_t activation) const {
    return gate_up(x, tensors[0], bias(), norm_weight, eps, activation);
  }

 private:
  std::optional<Tensor> bias() const { return kind == kDenseBias ? std::optional<Tensor>(tensors[1]) : std::nullopt; }
};

}  // namespace fastllama
