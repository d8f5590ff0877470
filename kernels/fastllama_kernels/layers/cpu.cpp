// All decoder layers in one operation: see op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "matrix.h"
#include "ops.h"

namespace fastllama {
namespace {

constexpr size_t kMatrices = 4;  // of a layer
constexpr size_t kNorms = 2;

struct Layer {
  Tensor input_norm;
  Matrix qkv, o;
  Tensor post_norm;
  Matrix gate_up, down;
};

// Takes tensors and kinds from their lists, in the order of Layer.
class Reader {
 public:
  Reader(const std::vector<Tensor>& tensors, const std::vector<int64_t>& kinds)
      : tensor_(tensors.data()), kind_(kinds.data()) {}

  Layer layer() {  // braces are read from left to right
    return Layer{norm(), matrix(), matrix(), norm(), matrix(), matrix()};
  }

 private:
  const Tensor& norm() { return *tensor_++; }

  Matrix matrix() {
    const Matrix next{Format(*kind_++), tensor_};
    tensor_ += next.format.tensors();
    return next;
  }

  const Tensor* tensor_;
  const int64_t* kind_;
};

void check_lists(const std::vector<Tensor>& weights, const std::vector<int64_t>& kinds,
                 const std::vector<Tensor>& key_caches, const std::vector<Tensor>& value_caches) {
  const size_t count = key_caches.size();
  STD_TORCH_CHECK(value_caches.size() == count && kinds.size() == count * kMatrices, "fastllama: got ", kinds.size(),
                  " matrices and ", value_caches.size(), " value caches for ", count, " key caches, expected ",
                  kMatrices, " and 1 for each");
  size_t expected = count * kNorms;
  for (const int64_t kind : kinds) expected += Format(kind).tensors();
  STD_TORCH_CHECK(weights.size() == expected, "fastllama: got ", weights.size(), " weights for matrices of these kinds "
                  "and their norms, expected ", expected);
}

}  // namespace

Tensor layers(Tensor x, Tensor cos, Tensor sin, Tensor positions, std::vector<Tensor> weights,
              std::vector<int64_t> kinds, std::vector<Tensor> key_caches, std::vector<Tensor> value_caches, double eps,
              int64_t activation) {
  check_lists(weights, kinds, key_caches, value_caches);
  Reader reader(weights, kinds);
  for (size_t i = 0; i < key_caches.size(); ++i) {
    const Layer layer = reader.layer();
    const Tensor qkv = layer.qkv.multiply(x, layer.input_norm, eps, std::nullopt);
    const Tensor heads = rotary_attention(qkv, cos, sin, positions, key_caches[i], value_caches[i]);
    x = layer.o.multiply(heads, std::nullopt, 0.0, x);
    const Tensor ffn = layer.gate_up.multiply_gated(x, layer.post_norm, eps, activation);
    x = layer.down.multiply(ffn, std::nullopt, 0.0, x);
  }
  return x;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("layers", TORCH_BOX(&layers)); }

}  // namespace fastllama
