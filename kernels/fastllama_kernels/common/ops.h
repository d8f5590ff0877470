// The operations as C++ functions, for those that are made of others. Formulas: ../linear/op.py and ../attention/op.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastllama {

using torch::stable::Tensor;

Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight, double eps,
              std::optional<Tensor> residual);
Tensor gate_up(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight, double eps,
               int64_t activation);
Tensor linear_packed(Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> offsets, std::optional<Tensor> bias,
                     std::optional<Tensor> norm_weight, double eps, std::optional<Tensor> residual,
                     bool codes_inputs);
Tensor gate_up_packed(Tensor x, Tensor codes, Tensor scales, std::optional<Tensor> offsets, std::optional<Tensor> bias,
                      std::optional<Tensor> norm_weight, double eps, int64_t activation,
                      bool codes_inputs);
Tensor rotary_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor key_cache, Tensor value_cache);

}  // namespace fastllama
