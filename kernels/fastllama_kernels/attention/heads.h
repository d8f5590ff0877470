// What the attention kernels share: sizes, the keys and values of a head, the rotation, checks of their arguments.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "dispatch.h"
#include "vec.h"

namespace fastllama {

constexpr float kLowest = std::numeric_limits<float>::lowest();  // a score that no slot has

struct Shape {
  int64_t tokens, heads, kv_heads, dim, slots;
  int64_t groups() const { return heads / kv_heads; }
  int64_t packed() const { return (heads + 2 * kv_heads) * dim; }  // one token's q, k and v side by side
  int64_t queries() const { return tokens * groups(); }            // of one KV head
  int64_t state() const { return dim + 2; }                        // of one query: values, sum and top of its softmax
};

// The keys or values of one KV head: rows of dim numbers, or of dim codes and their scale (codes.py).
template <typename C>
struct Rows {
  static constexpr bool kCodes = std::is_same_v<C, int8_t>;
  C* first;
  int64_t dim;

  int64_t stride() const { return kCodes ? dim + static_cast<int64_t>(sizeof(float)) : dim; }
  C* at(int64_t slot) const { return first + slot * stride(); }

  float scale(int64_t slot) const {
    float scale = 1.f;
    if constexpr (kCodes) std::memcpy(&scale, at(slot) + dim, sizeof(scale));
    return scale;
  }

  void write(int64_t slot, const float* x) const {
    C* row = at(slot);
    if constexpr (kCodes) {
      float largest = 0.f;
      for (int64_t i = 0; i < dim; ++i) largest = x[i] == x[i] ? std::max(largest, std::abs(x[i])) : x[i];
      const float scale = largest / 127.f;
      for (int64_t i = 0; i < dim; ++i) {
        const float code = scale > 0.f ? std::nearbyint(x[i] / scale) : 0.f;
        row[i] = code == code ? static_cast<int8_t>(code) : 0;
      }
      std::memcpy(row + dim, &scale, sizeof(scale));
    } else {
      store_row(row, x, dim);
    }
  }
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

// The sizes of a call; refuses tensors that a kernel would misread, and positions outside the cache.
inline Shape checked(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                     const Tensor& key_cache, const Tensor& value_cache) {
  using torch::headeronly::ScalarType;
  const int64_t batch = qkv.size(0), rows = key_cache.size(0), table = cos.size(0), dim = cos.size(1);
  const int64_t kv_heads = key_cache.size(1), heads = dim > 0 ? qkv.size(2) / dim - 2 * kv_heads : 0;
  STD_TORCH_CHECK(dim > 0 && dim % 2 == 0 && kv_heads > 0 && heads > 0 && heads % kv_heads == 0, "fastllama: got ",
                  heads, " query heads of ", dim, " over ", kv_heads, ", expected a multiple of them, and an even size");
  const Shape shape{qkv.size(1), heads, kv_heads, dim, key_cache.size(2)};
  const bool codes = key_cache.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(batch <= rows, "fastllama: qkv has ", batch, " rows, expected at most the cache's ", rows);
  STD_TORCH_CHECK(table >= shape.slots, "fastllama: cos has ", table, " rows, expected at least ", shape.slots);
  check(qkv, "qkv", qkv.scalar_type(), {batch, shape.tokens, shape.packed()});
  check(cos, "cos", ScalarType::Float, {table, shape.dim});
  check(sin, "sin", ScalarType::Float, {table, shape.dim});
  check(positions, "positions", ScalarType::Long, {batch, shape.tokens});
  for (const auto* cache : {&key_cache, &value_cache})
    check(*cache, "cache", codes ? ScalarType::Char : qkv.scalar_type(),
          {rows, shape.kv_heads, shape.slots, Rows<int8_t>{nullptr, shape.dim}.stride() - (codes ? 0 : 4)});
  const int64_t* position = data<int64_t>(positions);
  for (int64_t i = 0; i < batch * shape.tokens; ++i)
    STD_TORCH_CHECK(position[i] >= 0 && position[i] < shape.slots, "fastllama: position ", position[i],
                    " lies outside the KV cache of ", shape.slots, " slots");
  return shape;
}

// Calls f with the typed pointers qkv, keys, values and out; the caches hold qkv's type or codes.
template <typename F>
void dispatch_heads(const Tensor& qkv, Tensor& key_cache, Tensor& value_cache, Tensor& out, const F& f) {
  void *keys = key_cache.mutable_data_ptr(), *values = value_cache.mutable_data_ptr();
  dispatch(qkv, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    if (key_cache.scalar_type() == torch::headeronly::ScalarType::Char)
      f(data<T>(qkv), static_cast<int8_t*>(keys), static_cast<int8_t*>(values), to);
    else
      f(data<T>(qkv), static_cast<T*>(keys), static_cast<T*>(values), to);
  });
}

}  // namespace fastllama
