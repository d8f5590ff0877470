// Rotary, KV write and attention over the live slots for a few query tokens a row: see op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "ops.h"
#include "vec.h"

namespace fastllama {
namespace {

constexpr int64_t kSlots = 64;  // cache slots per step of the online softmax
constexpr int kHeads = 4;       // query heads that take a key or value together, of those that share it
constexpr float kLowest = std::numeric_limits<float>::lowest();

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

// scores[g][s] = q_g · k_s for G query heads and the slots of a block.
template <int G, typename T>
void block_scores(const float* q, const T* keys, int64_t dim, int64_t count, float (&scores)[kHeads][kSlots]) {
  constexpr int kRows = 4;
  for (int64_t s = 0; s < count; s += kRows) {
    const T* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = keys + std::min(s + r, count - 1) * dim;
    float out[kRows][G];
    dot_tile(rows, q, dim, out);
    for (int r = 0; r < kRows; ++r)
      for (int g = 0; g < G; ++g) scores[g][s + r] = out[r][g];
  }
  for (int g = 0; g < G; ++g) std::fill(scores[g] + count, scores[g] + kSlots, kLowest);
}

// acc[g] += Σ_s p[g][s] v_s over N vectors of dimensions, held in registers.
template <int G, int N, typename T>
void add_values(const float (&p)[kHeads][kSlots], const T* values, int64_t dim, int64_t count, float* acc) {
  f32x16 sums[G][N];
  FASTLLAMA_UNROLL for (int g = 0; g < G; ++g)
    FASTLLAMA_UNROLL for (int i = 0; i < N; ++i) sums[g][i] = load16(acc + g * dim + i * kLanes);
  for (int64_t s = 0; s < count; ++s) {
    f32x16 v16[N];
    FASTLLAMA_UNROLL for (int i = 0; i < N; ++i) v16[i] = load16(values + s * dim + i * kLanes);
    FASTLLAMA_UNROLL for (int g = 0; g < G; ++g)
      FASTLLAMA_UNROLL for (int i = 0; i < N; ++i) sums[g][i] += p[g][s] * v16[i];
  }
  FASTLLAMA_UNROLL for (int g = 0; g < G; ++g)
    FASTLLAMA_UNROLL for (int i = 0; i < N; ++i) store16(acc + g * dim + i * kLanes, sums[g][i]);
}

// Online softmax (arXiv 2205.14135) of G query heads that share a KV head, over slots 0 .. length - 1.
template <int G, typename T>
void attend(const float* q, const T* keys, const T* values, int64_t dim, int64_t length, T* out) {
  std::vector<float> acc(G * dim, 0.f);
  float sum[G] = {}, top[G], p[kHeads][kSlots];
  std::fill(top, top + G, kLowest);
  for (int64_t begin = 0; begin < length; begin += kSlots) {
    const int64_t count = std::min(kSlots, length - begin);
    block_scores<G>(q, keys + begin * dim, dim, count, p);
    for (int g = 0; g < G; ++g) {
      const float before = top[g];
      for (int64_t s = 0; s < kSlots; ++s) top[g] = std::max(top[g], p[g][s]);
      f32x16 sums = {};
      for (int64_t s = 0; s < kSlots; s += kLanes) {
        const f32x16 p16 = exp16(load16(p[g] + s) - top[g]);  // about 1e-38 beyond the block's slots
        store16(p[g] + s, p16);
        sums += p16;
      }
      const float decay = std::exp(before - top[g]);
      sum[g] = sum[g] * decay + sum16(sums);
      for (int64_t i = 0; i < dim; ++i) acc[g * dim + i] *= decay;
    }
    const T* block = values + begin * dim;
    int64_t i = 0;
    for (; i + 4 * kLanes <= dim; i += 4 * kLanes) add_values<G, 4>(p, block + i, dim, count, acc.data() + i);
    for (; i + kLanes <= dim; i += kLanes) add_values<G, 1>(p, block + i, dim, count, acc.data() + i);
    for (; i < dim; ++i)
      for (int g = 0; g < G; ++g)
        for (int64_t s = 0; s < count; ++s) acc[g * dim + i] += p[g][s] * static_cast<float>(block[s * dim + i]);
  }
  for (int g = 0; g < G; ++g)
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
    T* heads = out + (t * shape.heads + kv_head * groups) * dim;
    const auto take = [&](auto count, int64_t g) {
      attend<decltype(count)::value>(q.data() + g * dim, keys, values, dim, at + 1, heads + g * dim);
    };
    for (int64_t g = 0; g < groups; g += kHeads) switch (std::min<int64_t>(kHeads, groups - g)) {
        case 1: take(std::integral_constant<int, 1>{}, g); break;
        case 2: take(std::integral_constant<int, 2>{}, g); break;
        case 3: take(std::integral_constant<int, 3>{}, g); break;
        default: take(std::integral_constant<int, kHeads>{}, g);
      }
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

Tensor rotary_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor key_cache, Tensor value_cache) {
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
