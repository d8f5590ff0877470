// A matrix by its kind: which tensors it has, and what multiplies with it. Kinds are numbered as in ../layers/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "ops.h"

namespace fastllama {

enum Kind : int64_t { kDense, kDenseBias, kPacked, kEnd = kPacked + 8 };

struct Format {
  bool is_packed, has_bias, has_offsets, codes_inputs;

  explicit Format(int64_t kind)
      : is_packed(kind >= kPacked),
        has_bias((kind - kDense) % 2 == 1),
        has_offsets(is_packed && (kind - kPacked) / 2 % 2 == 1),
        codes_inputs(is_packed && (kind - kPacked) / 4 == 1) {
    STD_TORCH_CHECK(kind >= kDense && kind < kEnd, "fastllama: there is no matrix of kind ", kind);
  }

  // Weight; or codes, scales and perhaps offsets; then perhaps bias.
  size_t tensors() const { return (is_packed ? 2 + has_offsets : 1) + has_bias; }
};

struct Matrix {
  Format format;
  const Tensor* tensors;  // as many as the format says

  Tensor multiply(Tensor x, std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual) const {
    if (format.is_packed)
      return linear_packed(x, tensors[0], tensors[1], offsets(), bias(), norm_weight, eps, residual,
                           format.codes_inputs);
    return linear(x, tensors[0], bias(), norm_weight, eps, residual);
  }

  Tensor multiply_gated(Tensor x, std::optional<Tensor> norm_weight, double eps, int64_t activation) const {
    if (format.is_packed)
      return gate_up_packed(x, tensors[0], tensors[1], offsets(), bias(), norm_weight, eps, activation,
                            format.codes_inputs);
    return gate_up(x, tensors[0], bias(), norm_weight, eps, activation);
  }

 private:
  std::optional<Tensor> offsets() const {
    return format.has_offsets ? std::optional<Tensor>(tensors[2]) : std::nullopt;
  }
  std::optional<Tensor> bias() const {
    return format.has_bias ? std::optional<Tensor>(tensors[format.tensors() - 1]) : std::nullopt;
  }
};

}  // namespace fastllama
