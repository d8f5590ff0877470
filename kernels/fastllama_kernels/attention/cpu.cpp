// Rotary, KV write and attention over the live slots for a few query tokens a row: see op.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "heads.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace fastllama {
namespace {

constexpr int64_t kSlots = 64;    // cache slots per step of the online softmax
constexpr int64_t kChunk = 2 * kSlots;  // of a task; threads share out tasks, so a result does not depend on their number
constexpr int kHeads = 4;         // query heads that take a key or value together, of those that share it
// Keys, and vectors of a value, that these heads take together: as many as there are registers for.
constexpr int kKeys = kRegisters / 8, kVectors = kRegisters / 8;

// scores[g][s] = q_g · k_s for G query heads and some slots.
template <int G, typename C>
void block_scores(const float* q, const Rows<C>& keys, int64_t begin, int64_t count, float (&scores)[kHeads][kSlots]) {
  for (int64_t s = 0; s < count; s += kKeys) {
    int64_t slots[kKeys];
    const C* rows[kKeys];
    for (int r = 0; r < kKeys; ++r) rows[r] = keys.at(slots[r] = begin + std::min(s + r, count - 1));
    float out[kKeys][G];
    dot_tile(rows, q, keys.dim, out);
    for (int r = 0; r < kKeys; ++r)
      for (int g = 0; g < G; ++g) scores[g][s + r] = Rows<C>::kCodes ? out[r][g] * keys.scale(slots[r]) : out[r][g];
  }
  for (int g = 0; g < G; ++g) std::fill(scores[g] + count, scores[g] + kSlots, kLowest);
}

// acc[g] += Σ_s p[g][s] v_s over N vectors of dimensions, held in registers.
template <int G, int N, typename C>
void add_values(const float (&p)[kHeads][kSlots], const C* values, int64_t stride, int64_t count, float* acc,
                int64_t state) {
  FloatPart sums[G][N] = {};
  for (int64_t s = 0; s < count; ++s) {
    FloatPart v[N];
    FASTLLAMA_UNROLL for (int i = 0; i < N; ++i) {
      v[i] = load_part(values + s * stride + i * kPartLanes);
      keep(v[i]);
    }
    FASTLLAMA_UNROLL for (int g = 0; g < G; ++g)
      FASTLLAMA_UNROLL for (int i = 0; i < N; ++i) sums[g][i] += p[g][s] * v[i];
  }
  FASTLLAMA_UNROLL for (int g = 0; g < G; ++g)
    FASTLLAMA_UNROLL for (int i = 0; i < N; ++i) {
      float* to = acc + g * state + i * kPartLanes;
      store_part(to, load_part(to) + sums[g][i]);
    }
}

// p = e^(scores - top) for the largest score so far; what was summed up before is brought to that top.
inline void soften(float (&p)[kSlots], int64_t dim, float* acc) {
  float &sum = acc[dim], &top = acc[dim + 1];
  f32x16 largest = load16(p);
  for (int64_t s = kLanes; s < kSlots; s += kLanes) largest = max16(load16(p + s), largest);
  const float before = top;
  for (int i = 0; i < kLanes; ++i) top = std::max(top, largest[i]);
  f32x16 sums = {};
  for (int64_t s = 0; s < kSlots; s += kLanes) {
    const auto weight = [&](FloatPart score) { return exp_part(score - top); };  // about 1e-38 where there is no slot
    const f32x16 weights = by_parts(weight, load16(p + s));
    store16(p + s, weights);
    sums = sums + weights;
  }
  if (before != top) {
    const float decay = std::exp(before - top);
    sum *= decay;
    for (int64_t i = 0; i < dim; ++i) acc[i] *= decay;
  }
  sum += sum16(sums);
}

// One step of the online softmax (arXiv 2205.14135) of G query heads that share a KV head, over at most kSlots slots.
template <int G, typename C>
void attend(const float* q, const Rows<C>& keys, const Rows<C>& values, int64_t begin, int64_t count, float* acc) {
  const int64_t dim = keys.dim, state = dim + 2, stride = values.stride();
  float p[kHeads][kSlots];
  block_scores<G>(q, keys, begin, count, p);
  for (int g = 0; g < G; ++g) {
    soften(p[g], dim, acc + g * state);
    if (Rows<C>::kCodes)
      for (int64_t s = 0; s < count; ++s) p[g][s] *= values.scale(begin + s);
  }
  const C* block = values.at(begin);
  int64_t i = 0;
  for (; i + kVectors * kPartLanes <= dim; i += kVectors * kPartLanes)
    add_values<G, kVectors>(p, block + i, stride, count, acc + i, state);
  for (; i + kPartLanes <= dim; i += kPartLanes) add_values<G, 1>(p, block + i, stride, count, acc + i, state);
  for (; i < dim; ++i)
    for (int g = 0; g < G; ++g)
      for (int64_t s = 0; s < count; ++s) acc[g * state + i] += p[g][s] * static_cast<float>(block[s * stride + i]);
}

// Everything of one KV head of one row.
template <typename T, typename C>
struct Head {
  const Shape& shape;
  const T* qkv;  // of the row
  const float *cos, *sin;
  const int64_t* positions;
  Rows<C> keys, values;
  int64_t kv_head;

  // Writes the new keys and values of the slots from begin to before end, and attends over these slots with every
  // query that sees them: queries() states.
  void run(int64_t begin, int64_t end, float* states) const {
    const int64_t dim = shape.dim, groups = shape.groups();
    std::vector<float> q(shape.queries() * dim);
    for (int64_t t = 0; t < shape.tokens; ++t)
      if (positions[t] >= begin) {
        if (positions[t] < end) write(t);
        for (int64_t g = 0; g < groups; ++g) rotate_query(t, g, q.data() + (t * groups + g) * dim);
      }
    for (int64_t i = 0; i < shape.queries(); ++i) {
      std::fill_n(states + i * shape.state(), dim + 1, 0.f);
      states[i * shape.state() + dim + 1] = kLowest;
    }
    for (; begin < end; begin += kSlots)
      for (int64_t t = 0; t < shape.tokens; ++t) {
        const int64_t count = std::min(std::min(kSlots, end - begin), positions[t] + 1 - begin);
        const auto take = [&](auto heads, int64_t g) {
          const int64_t i = t * groups + g;
          attend<decltype(heads)::value>(q.data() + i * dim, keys, values, begin, count, states + i * shape.state());
        };
        for (int64_t g = 0; count > 0 && g < groups; g += kHeads) switch (std::min<int64_t>(kHeads, groups - g)) {
            case 1: take(std::integral_constant<int, 1>{}, g); break;
            case 2: take(std::integral_constant<int, 2>{}, g); break;
            case 3: take(std::integral_constant<int, 3>{}, g); break;
            default: take(std::integral_constant<int, kHeads>{}, g);
          }
      }
  }

  // Joins the states of chunks of slots, one behind the other, in this order.
  void join(const float* states, int64_t chunks, T* out) const {
    const int64_t dim = shape.dim, groups = shape.groups(), size = shape.state();
    std::vector<float> acc(dim);
    for (int64_t i = 0; i < shape.queries(); ++i) {
      const auto at = [&](int64_t c) { return states + (c * shape.queries() + i) * size; };
      float top = kLowest, sum = 0.f;
      for (int64_t c = 0; c < chunks; ++c) top = std::max(top, at(c)[dim + 1]);
      std::fill(acc.begin(), acc.end(), 0.f);
      for (int64_t c = 0; c < chunks; ++c) {
        const float weight = std::exp(at(c)[dim + 1] - top);
        sum += weight * at(c)[dim];
        for (int64_t d = 0; d < dim; ++d) acc[d] += weight * at(c)[d];
      }
      T* to = out + (i / groups * shape.heads + kv_head * groups + i % groups) * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(acc[d] / sum);
    }
  }

 private:
  void write(int64_t t) const {
    const int64_t dim = shape.dim, at = positions[t];
    const T* k = qkv + t * shape.packed() + (shape.heads + kv_head) * dim;
    const T* v = k + shape.kv_heads * dim;
    std::vector<float> x(dim);
    rotate(k, cos + at * dim, sin + at * dim, dim, 1.f, x.data());
    keys.write(at, x.data());
    std::copy(v, v + dim, x.begin());
    values.write(at, x.data());
  }

  void rotate_query(int64_t t, int64_t g, float* out) const {
    const int64_t dim = shape.dim, at = positions[t];
    const float scale = 1.f / std::sqrt(static_cast<float>(dim));
    rotate(qkv + t * shape.packed() + (kv_head * shape.groups() + g) * dim, cos + at * dim, sin + at * dim, dim, scale,
           out);
  }
};

// A task: some slots of a KV head of a row.
struct Task {
  int64_t head, chunk, chunks;  // of all heads of all rows; of the head's slots; how many chunks it has
};

// The tasks of all rows, those of a head one behind the other.
std::vector<Task> tasks_of(const Shape& shape, const int64_t* positions, int64_t batch) {
  std::vector<Task> tasks;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t* row = positions + b * shape.tokens;
    const int64_t chunks = *std::max_element(row, row + shape.tokens) / kChunk + 1;
    for (int64_t k = 0; k < shape.kv_heads; ++k)
      for (int64_t c = 0; c < chunks; ++c) tasks.push_back({b * shape.kv_heads + k, c, chunks});
  }
  return tasks;
}

template <typename T, typename C>
void run(const Shape& shape, int64_t batch, const T* qkv, const float* cos, const float* sin, const int64_t* positions,
         C* keys, C* values, T* out) {
  const std::vector<Task> tasks = tasks_of(shape, positions, batch);
  const int64_t size = shape.queries() * shape.state();
  const std::unique_ptr<float[]> states(new float[tasks.size() * size]);
  std::vector<std::atomic<int64_t>> done(batch * shape.kv_heads);
  parallel_each(static_cast<int64_t>(tasks.size()), 1, [&](const auto& each) {
    each([&](int64_t i) {
      const Task& task = tasks[i];
      const int64_t b = task.head / shape.kv_heads;
      Rows<C> k{keys, shape.dim}, v{values, shape.dim};
      k.first = k.at(task.head * shape.slots);
      v.first = v.at(task.head * shape.slots);
      const Head<T, C> head{shape, qkv + b * shape.tokens * shape.packed(), cos, sin, positions + b * shape.tokens,
                            k, v, task.head % shape.kv_heads};
      const int64_t begin = task.chunk * kChunk;
      head.run(begin, std::min(begin + kChunk, shape.slots), states.get() + i * size);
      if (done[task.head].fetch_add(1) + 1 == task.chunks)
        head.join(states.get() + (i - task.chunk) * size, task.chunks, out + b * shape.tokens * shape.heads * shape.dim);
    });
  });
}

}  // namespace

Tensor rotary_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor key_cache, Tensor value_cache) {
  const Shape shape = checked(qkv, cos, sin, positions, key_cache, value_cache);
  Tensor out = empty_with_last(qkv, shape.heads * shape.dim);
  dispatch_heads(qkv, key_cache, value_cache, out, [&](auto* from, auto* keys, auto* values, auto* to) {
    run(shape, qkv.size(0), from, data<float>(cos), data<float>(sin), data<int64_t>(positions), keys, values, to);
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("rotary_attention", TORCH_BOX(&rotary_attention)); }

}  // namespace fastllama
