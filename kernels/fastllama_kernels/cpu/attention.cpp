// Rotary, KV write and attention over the live slots for a few query tokens a row: see ../attention.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "dispatch.h"
#include "ops.h"
#include "vec.h"

namespace fastllama {
namespace {

constexpr int64_t kBlock = 64;  // cache slots per step of the online softmax

struct Shape {
  int64_t tokens, heads, kv_heads, dim, slots;
  int64_t groups() const { return heads / kv_heads; }
  int64_t packed() const { return (heads + 2 * kv_heads) * dim; }  // one token's q, k and v side by side
};

// Rotates one head (half-split layout) into float32, times scale.
template <typename T>
void rotate(const T* x, const float* cos, const float* sin, int64_t dim, float scale, float* out) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = static_cast<float>(x[i]), b = static_cast<float>(x[i + half]);
    out[i] = (a * cos[i] - b * sin[i]) * scale;
    out[i + half] = (b * cos[i + half] + a * sin[i + half]) * scale;
  }
}

template <typename T>
float dot(const T* k, const float* q, int64_t n) {
  const T* rows[1] = {k};
  float out[1][1];
  dot_tile(rows, q, n, out);
  return out[0][0];
}

template <typename T>
void add_scaled(float* acc, const T* v, float p, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store16(acc + i, load16(acc + i) + load16(v + i) * p);
  for (; i < n; ++i) acc[i] += static_cast<float>(v[i]) * p;
}

// Online softmax (arXiv 2205.14135) of the query heads that share one KV head, over slots 0 .. length - 1.
template <typename T>
void attend(const float* q, const T* keys, const T* values, int64_t groups, int64_t dim, int64_t length, T* out) {
  std::vector<float> acc(groups * dim, 0.f), sum(groups, 0.f);
  std::vector<float> top(groups, -std::numeric_limits<float>::infinity());
  float scores[kBlock];
  for (int64_t begin = 0; begin < length; begin += kBlock) {
    const int64_t count = std::min(kBlock, length - begin);
    for (int64_t g = 0; g < groups; ++g) {
      float block_top = top[g];
      for (int64_t s = 0; s < count; ++s) {
        scores[s] = dot(keys + (begin + s) * dim, q + g * dim, dim);
        block_top = std::max(block_top, scores[s]);
      }
      const float decay = std::exp(top[g] - block_top);
      top[g] = block_top;
      sum[g] *= decay;
      float* a = acc.data() + g * dim;
      for (int64_t i = 0; i < dim; ++i) a[i] *= decay;
      for (int64_t s = 0; s < count; ++s) {
        const float p = std::exp(scores[s] - block_top);
        sum[g] += p;
        add_scaled(a, values + (begin + s) * dim, p, dim);
      }
    }
  }
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < dim; ++i) out[g * dim + i] = static_cast<T>(acc[g * dim + i] / sum[g]);
}

// Everything one KV head of one row needs: write its new keys and values, then attend with its query heads.
template <typename T>
void run_head(const Shape& shape, const T* qkv, const float* cos, const float* sin, const int64_t* positions, T* keys,
              T* values, int64_t kv_head, T* out) {
  const int64_t dim = shape.dim, groups = shape.groups();
  std::vector<float> q(groups * dim), k(dim);
  const float scale = 1.f / std::sqrt(static_cast<float>(dim));
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const T* token = qkv + t * shape.packed();
    const T *k_in = token + (shape.heads + kv_head) * dim, *v_in = k_in + shape.kv_heads * dim;
    const int64_t at = positions[t];
    rotate(k_in, cos + at * dim, sin + at * dim, dim, 1.f, k.data());
    for (int64_t i = 0; i < dim; ++i) keys[at * dim + i] = static_cast<T>(k[i]);
    std::copy(v_in, v_in + dim, values + at * dim);
  }
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const int64_t at = positions[t];
    for (int64_t g = 0; g < groups; ++g)
      rotate(qkv + t * shape.packed() + (kv_head * groups + g) * dim, cos + at * dim, sin + at * dim, dim, scale,
             q.data() + g * dim);
    attend(q.data(), keys, values, groups, dim, at + 1, out + (t * shape.heads + kv_head * groups) * dim);
  }
}

void check_arguments(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                     const Tensor& key_cache, const Tensor& value_cache, const Shape& shape) {
  using torch::headeronly::ScalarType;
  const int64_t batch = qkv.size(0), rows = key_cache.size(0), table = cos.size(0);
  STD_TORCH_CHECK(batch <= rows, "fastllama: qkv has ", batch, " rows, expected at most the cache's ", rows);
  STD_TORCH_CHECK(table >= shape.slots, "fastllama: cos has ", table, " rows, expected at least ", shape.slots);
  check(qkv, "qkv", qkv.scalar_type(), {batch, shape.tokens, shape.packed()});
  check(cos, "cos", ScalarType::Float, {table, shape.dim});
  check(sin, "sin", ScalarType::Float, {table, shape.dim});
  check(positions, "positions", ScalarType::Long, {batch, shape.tokens});
  for (const auto* cache : {&key_cache, &value_cache})
    check(*cache, "cache", qkv.scalar_type(), {rows, shape.kv_heads, shape.slots, shape.dim});
}

}  // namespace

Tensor rotary_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor key_cache, Tensor value_cache,
                        Tensor /* arrived: nobody waits here for other threads */) {
  const int64_t batch = qkv.size(0), kv_heads = key_cache.size(1), dim = key_cache.size(3);
  const Shape shape{qkv.size(1), qkv.size(2) / dim - 2 * kv_heads, kv_heads, dim, key_cache.size(2)};
  check_arguments(qkv, cos, sin, positions, key_cache, value_cache, shape);
  const int64_t* position = data<int64_t>(positions);
  for (int64_t i = 0; i < batch * shape.tokens; ++i)
    STD_TORCH_CHECK(position[i] >= 0 && position[i] < shape.slots, "fastllama: position ", position[i],
                    " lies outside the KV cache of ", shape.slots, " slots");
  Tensor out = empty_with_last(qkv, shape.heads * dim);
  dispatch(qkv, [&](auto zero) {
    using T = decltype(zero);
    T *keys = static_cast<T*>(key_cache.mutable_data_ptr()), *values = static_cast<T*>(value_cache.mutable_data_ptr());
    T* op = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, batch * kv_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / kv_heads, offset = i * shape.slots * dim;
        run_head(shape, data<T>(qkv) + b * shape.tokens * shape.packed(), data<float>(cos), data<float>(sin),
                 position + b * shape.tokens, keys + offset, values + offset, i % kv_heads,
                 op + b * shape.tokens * shape.heads * dim);
      }
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("rotary_attention", TORCH_BOX(&rotary_attention)); }

}  // namespace fastllama
