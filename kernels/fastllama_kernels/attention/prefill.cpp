// Rotary, KV write and attention for the many query tokens of a prompt: see op.py.
//
// Lanes are queries: sixteen tokens of a head make a vector, and kQueries lanes of one KV head are worked on together.
// So keys and values are taken as they lie, an element at a time for all lanes, and the softmax needs no sums across a
// register. Each lane is computed alike whatever lies next to it, as long as that is finite.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "dispatch.h"
#include "heads.h"
#include "parallel.h"
#include "vec.h"

namespace fastllama {
namespace {

constexpr int64_t kQueryVectors = 4, kQueries = kQueryVectors * kLanes;  // of a task
constexpr int64_t kStepSlots = 32;  // cache slots per step of the online softmax
constexpr int kTileRows = 4;  // keys, or dimensions, that are summed up together
constexpr int kTileParts = kRegisters / 8;  // of registers of queries
constexpr int64_t kTileLanes = kTileParts * kPartLanes;
static_assert(kStepSlots % kTileRows == 0 && kQueries % kTileLanes == 0);

// to[n] = the numbers of row `at` of a head's keys or values.
template <typename C>
void load_row(const Rows<C>& rows, int64_t at, float* to) {
  const C* from = rows.at(at);
  const float scale = rows.scale(at);
  int64_t i = 0;
  for (; i + kPartLanes <= rows.dim; i += kPartLanes) {
    const FloatPart x = load_part(from + i);
    store_part(to + i, Rows<C>::kCodes ? x * scale : x);
  }
  for (; i < rows.dim; ++i) to[i] = static_cast<float>(from[i]) * scale;
}

// sums[r][lane] = the sum over i < count of x[i][lane] * w[r * row + i * column], after first[r][lane].
template <int R, typename First>
__attribute__((always_inline)) inline void add_tile(const float* x, const float* w, int64_t row, int64_t column,
                                                    int64_t count, const First& first, float* sums) {
  for (int64_t lane = 0; lane < kQueries; lane += kTileLanes) {
    FloatPart acc[R][kTileParts];
    FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
      FASTLLAMA_UNROLL for (int p = 0; p < kTileParts; ++p) acc[r][p] = first(r, lane + p * kPartLanes);
    for (int64_t i = 0; i < count; ++i) {
      FloatPart parts[kTileParts];
      FASTLLAMA_UNROLL for (int p = 0; p < kTileParts; ++p) {
        parts[p] = load_part(x + i * kQueries + lane + p * kPartLanes);
        keep(parts[p]);
      }
      FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
        FASTLLAMA_UNROLL for (int p = 0; p < kTileParts; ++p) acc[r][p] += parts[p] * w[r * row + i * column];
    }
    FASTLLAMA_UNROLL for (int r = 0; r < R; ++r)
      FASTLLAMA_UNROLL for (int p = 0; p < kTileParts; ++p)
        store_part(sums + r * kQueries + lane + p * kPartLanes, acc[r][p]);
  }
}

// Up to kQueries queries of one KV head: what a task computes, in memory that is used again.
struct QueryBlock {
  const int64_t dim;
  std::vector<float> queries, values;  // [dim, kQueries]: rotated and scaled; the sums of weighted values
  std::vector<float> keys_f, values_f;  // [kStepSlots, dim]
  alignas(64) float weights[kStepSlots * kQueries];
  alignas(64) float top[kQueries], sum[kQueries], decay[kQueries];  // of each query's softmax
  alignas(64) int32_t limits[kQueries];                             // slots that each query sees

  explicit QueryBlock(int64_t head_dim)
      : dim(head_dim), queries(dim * kQueries), values(dim * kQueries), keys_f(kStepSlots * dim),
        values_f(kStepSlots * dim) {}

  void clear() {
    std::fill(queries.begin(), queries.end(), 0.f);
    std::fill(values.begin(), values.end(), 0.f);
    std::fill_n(top, kQueries, kLowest);
    std::fill_n(sum, kQueries, 0.f);
    std::fill_n(limits, kQueries, 1);
  }

  // Attends over the slots that any query sees.
  template <typename C>
  void run(const Rows<C>& keys, const Rows<C>& cached) {
    const auto [least, most] = std::minmax_element(limits, limits + kQueries);
    for (int64_t begin = 0; begin < *most; begin += kStepSlots) {
      const int64_t count = std::min<int64_t>(kStepSlots, *most - begin);
      for (int64_t s = 0; s < count; ++s) {
        load_row(keys, begin + s, keys_f.data() + s * dim);
        load_row(cached, begin + s, values_f.data() + s * dim);
      }
      const int64_t rows = (count + kTileRows - 1) / kTileRows * kTileRows;
      for (auto* x : {&keys_f, &values_f}) std::fill(x->begin() + count * dim, x->begin() + rows * dim, 0.f);
      step(begin, rows, begin + rows > *least);
    }
  }

 private:
  // One step of the online softmax (arXiv 2205.14135).
  void step(int64_t begin, int64_t rows, bool is_masked) {
    const auto nothing = [](int, int64_t) { return FloatPart{}; };
    for (int64_t s = 0; s < rows; s += kTileRows)
      add_tile<kTileRows>(queries.data(), keys_f.data() + s * dim, dim, 1, dim, nothing, weights + s * kQueries);
    for (int64_t lane = 0; lane < kQueries; lane += kPartLanes) soften(begin, rows, is_masked, lane);
    int64_t d = 0;
    for (; d + kTileRows <= dim; d += kTileRows) add_values<kTileRows>(d, rows);
    for (; d < dim; ++d) add_values<1>(d, rows);
  }

  template <int D>
  void add_values(int64_t d, int64_t rows) {
    float* to = values.data() + d * kQueries;
    const auto first = [&](int r, int64_t lane) {
      return load_part(to + r * kQueries + lane) * load_part(decay + lane);
    };
    add_tile<D>(weights, values_f.data() + d, 1, dim, rows, first, to);
  }

  // Scores of a register of queries become weights, e^(score - top); what was summed up before is to be `decay` of it.
  void soften(int64_t begin, int64_t rows, bool is_masked, int64_t lane) {
    float* column = weights + lane;
    const FloatPart before = load_part(top + lane);
    IntPart limit;
    std::memcpy(&limit, limits + lane, sizeof(limit));
    const auto seen = [&](int64_t s, FloatPart x, float otherwise) {
      return is_masked ? (limit > static_cast<int32_t>(begin + s) ? x : FloatPart{} + otherwise) : x;
    };
    FloatPart largest = before;
    for (int64_t s = 0; s < rows; ++s) {
      const FloatPart score = seen(s, load_part(column + s * kQueries), kLowest);
      largest = score > largest ? score : largest;
    }
    const FloatPart share = exp_part(before - largest);
    FloatPart total = load_part(sum + lane) * share;
    for (int64_t s = 0; s < rows; ++s) {
      const FloatPart weight = seen(s, exp_part(load_part(column + s * kQueries) - largest), 0.f);
      store_part(column + s * kQueries, weight);
      total += weight;
    }
    store_part(top + lane, largest);
    store_part(decay + lane, share);
    store_part(sum + lane, total);
  }
};

// One call: vectors of queries are numbered by block of tokens, then by the query heads of a KV head.
template <typename T, typename C>
struct Prompts {
  const Shape& shape;
  const T* qkv;
  const float *cos, *sin;
  const int64_t* positions;
  C *keys, *values;
  T* out;

  int64_t vectors() const { return (shape.tokens + kLanes - 1) / kLanes * shape.groups(); }
  int64_t tasks() const { return (vectors() + kQueryVectors - 1) / kQueryVectors; }  // of a KV head of a row

  Rows<C> rows(C* cache, int64_t row, int64_t kv_head) const {
    Rows<C> found{cache, shape.dim};
    found.first = found.at((row * shape.kv_heads + kv_head) * shape.slots);
    return found;
  }

  // Writes the keys and values of a token to the cache.
  void write(int64_t row, int64_t t, float* x) const {
    const int64_t dim = shape.dim, at = positions[row * shape.tokens + t];
    for (int64_t head = 0; head < shape.kv_heads; ++head) {
      const T* k = qkv + (row * shape.tokens + t) * shape.packed() + (shape.heads + head) * dim;
      rotate(k, cos + at * dim, sin + at * dim, dim, 1.f, x);
      rows(keys, row, head).write(at, x);
      std::copy(k + shape.kv_heads * dim, k + shape.kv_heads * dim + dim, x);
      rows(values, row, head).write(at, x);
    }
  }

  // Calls f(token, query head of the KV head, lane) for every query of a task.
  template <typename F>
  void for_each_query(int64_t task, const F& f) const {
    const int64_t groups = shape.groups();
    for (int64_t v = task * kQueryVectors; v < std::min(vectors(), (task + 1) * kQueryVectors); ++v) {
      const int64_t first = v / groups * kLanes;
      for (int64_t t = first; t < std::min(shape.tokens, first + kLanes); ++t)
        f(t, v % groups, (v - task * kQueryVectors) * kLanes + t - first);
    }
  }

  void run(int64_t row, int64_t kv_head, int64_t task, QueryBlock& block) const {
    const int64_t dim = shape.dim, groups = shape.groups();
    const float scale = 1.f / std::sqrt(static_cast<float>(dim));
    std::vector<float> x(dim);
    block.clear();
    for_each_query(task, [&](int64_t t, int64_t g, int64_t lane) {
      const int64_t at = positions[row * shape.tokens + t];
      const T* q = qkv + (row * shape.tokens + t) * shape.packed() + (kv_head * groups + g) * dim;
      rotate(q, cos + at * dim, sin + at * dim, dim, scale, x.data());
      for (int64_t i = 0; i < dim; ++i) block.queries[i * kQueries + lane] = x[i];
      block.limits[lane] = static_cast<int32_t>(at + 1);
    });
    block.run(rows(keys, row, kv_head), rows(values, row, kv_head));
    for_each_query(task, [&](int64_t t, int64_t g, int64_t lane) {
      T* to = out + ((row * shape.tokens + t) * shape.heads + kv_head * groups + g) * dim;
      for (int64_t i = 0; i < dim; ++i) to[i] = static_cast<T>(block.values[i * kQueries + lane] / block.sum[lane]);
    });
  }
};

template <typename T, typename C>
void run(const Prompts<T, C>& prompts, int64_t batch) {
  const Shape& shape = prompts.shape;
  torch::stable::parallel_for(0, batch * shape.tokens, 32, [&](int64_t begin, int64_t end) {
    std::vector<float> x(shape.dim);
    for (int64_t i = begin; i < end; ++i) prompts.write(i / shape.tokens, i % shape.tokens, x.data());
  });
  const int64_t tasks = prompts.tasks();
  parallel_each(batch * shape.kv_heads * tasks, 1, [&](const auto& each) {
    QueryBlock block(shape.dim);
    each([&](int64_t i) {
      const int64_t head = i / tasks;
      prompts.run(head / shape.kv_heads, head % shape.kv_heads, i % tasks, block);
    });
  });
}

}  // namespace

Tensor prefill_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor key_cache, Tensor value_cache) {
  const Shape shape = checked(qkv, cos, sin, positions, key_cache, value_cache);
  Tensor out = empty_with_last(qkv, shape.heads * shape.dim);
  dispatch_heads(qkv, key_cache, value_cache, out, [&](auto* from, auto* keys, auto* values, auto* to) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(from)>>;
    using C = std::remove_pointer_t<decltype(keys)>;
    run(Prompts<T, C>{shape, from, data<float>(cos), data<float>(sin), data<int64_t>(positions), keys, values, to},
        qkv.size(0));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("prefill_attention", TORCH_BOX(&prefill_attention)); }

}  // namespace fastllama
