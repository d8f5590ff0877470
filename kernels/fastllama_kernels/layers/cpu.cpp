// All decoder layers in one operation: see op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "ops.h"

namespace fastllama {
namespace {

constexpr size_t kTensors = 10;  // of a layer, in the order of FIELDS of op.py

std::optional<Tensor> unless_empty(const Tensor& tensor) {
  return tensor.numel() == 0 ? std::nullopt : std::optional<Tensor>(tensor);
}

Tensor layers(Tensor x, Tensor cos, Tensor sin, Tensor positions, std::vector<Tensor> weights,
              std::vector<Tensor> key_caches, std::vector<Tensor> value_caches, double eps, int64_t activation) {
  const size_t count = key_caches.size();
  STD_TORCH_CHECK(value_caches.size() == count && weights.size() == count * kTensors, "fastllama: got ",
                  weights.size(), " weights and ", value_caches.size(), " value caches for ", count,
                  " key caches, expected ", kTensors, " and 1 for each");
  for (size_t i = 0; i < count; ++i) {
    const Tensor* w = weights.data() + i * kTensors;
    const Tensor qkv = linear(x, w[1], unless_empty(w[2]), w[0], eps, std::nullopt);
    const Tensor heads =
        rotary_attention(qkv, cos, sin, positions, key_caches[i], value_caches[i], /*arrived=*/positions);
    x = linear(heads, w[3], unless_empty(w[4]), std::nullopt, 0.0, x);
    const Tensor ffn = gate_up(x, w[6], unless_empty(w[7]), w[5], eps, activation);
    x = linear(ffn, w[8], unless_empty(w[9]), std::nullopt, 0.0, x);
  }
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("layers", TORCH_BOX(&layers)); }

}  // namespace fastllama
