// A token of each row sampled from its logits, without sorting them: see op.py for the definition.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace fastllama {
namespace {

constexpr int64_t kTokens = 64;  // tokens whose maximum is kept, to pass over them when none of them matters
constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;

struct Settings {
  float temperature, top_p, min_p, typical_p;
  int64_t top_k;
  uint64_t key;  // hash of seed and position
};

// Tokens that may still win.
struct Pool {
  std::vector<float> logit, weight;
  std::vector<int32_t> token;
  int64_t size() const { return static_cast<int64_t>(logit.size()); }

  // Forgets the tokens below a logit.
  void drop_below(float least) {
    int64_t kept = 0;
    for (int64_t i = 0; i < size(); ++i) {
      if (logit[i] < least) continue;
      logit[kept] = logit[i], token[kept] = token[i];
      if (!weight.empty()) weight[kept] = weight[i];
      ++kept;
    }
    logit.resize(kept), token.resize(kept);
    if (!weight.empty()) weight.resize(kept);
  }
};

uint64_t mix(uint64_t z) {  // splitmix64
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

float uniform(uint64_t key, int64_t token) {
  const auto high = static_cast<uint32_t>(mix((key + static_cast<uint64_t>(token)) * kGolden) >> 32);
  return std::min((static_cast<float>(high) + 0.5f) * 0x1p-32f, 1.f - 0x1p-24f);
}

template <typename T>
std::vector<float> block_maxima(const T* logits, int64_t vocab) {
  std::vector<float> maxima((vocab + kTokens - 1) / kTokens, -kInfinity);
  for (int64_t begin = 0; begin < vocab; begin += kTokens) {
    float top = -kInfinity;
    int64_t i = begin;
    const int64_t end = std::min(begin + kTokens, vocab);
    if (end - begin == kTokens) {
      f32x16 top16 = load16(logits + i);
      for (i += kLanes; i < end; i += kLanes) top16 = max16(top16, load16(logits + i));
      for (int64_t lane = 0; lane < kLanes; ++lane) top = std::max(top, top16[lane]);
    }
    for (; i < end; ++i) top = std::max(top, static_cast<float>(logits[i]));
    maxima[begin / kTokens] = top;
  }
  return maxima;
}

float kth_largest(std::vector<float> values, int64_t k) {
  std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
  return values[k - 1];
}

// The tokens of at least this logit; blocks that have none are not looked at.
template <typename T>
Pool gather(const T* logits, int64_t vocab, const std::vector<float>& maxima, float least) {
  const auto holds_some = [&](float maximum) { return maximum >= least; };
  const int64_t most = kTokens * std::count_if(maxima.begin(), maxima.end(), holds_some);
  Pool pool;
  pool.logit.resize(most), pool.token.resize(most);
  int64_t size = 0;
  for (int64_t block = 0; block < static_cast<int64_t>(maxima.size()); ++block) {
    if (!holds_some(maxima[block])) continue;
    for (int64_t token = block * kTokens; token < std::min((block + 1) * kTokens, vocab); ++token) {
      const float logit = static_cast<float>(logits[token]);
      pool.logit[size] = logit, pool.token[size] = static_cast<int32_t>(token);  // overwritten unless it counts
      size += logit >= least;
    }
  }
  pool.logit.resize(size), pool.token.resize(size);
  return pool;
}

// Where in the pool the token of the highest score is. A score takes two logarithms; that -log(1 - u) >= u shows
// of nearly all tokens that they cannot have it.
int64_t highest_score(const Pool& pool, const Settings& settings) {
  int64_t best = 0;
  float best_score = -kInfinity, limit = kInfinity;
  for (int64_t begin = 0; begin < pool.size(); begin += kLanes) {
    const int64_t count = std::min(kLanes, pool.size() - begin);
    float u[kLanes];
    bool any = false;
    for (int64_t i = 0; i < count; ++i) {
      u[i] = uniform(settings.key, pool.token[begin + i]);
      any |= !(u[i] > limit * pool.weight[begin + i]);
    }
    if (!any) continue;
    for (int64_t i = 0; i < count; ++i) {
      const float race = -std::log1p(-u[i]);
      const float score = pool.logit[begin + i] / settings.temperature - std::log(race);
      if (!(score > best_score)) continue;
      best = begin + i, best_score = score;
      limit = 1.001f * race / pool.weight[best];  // a little more, for weights are rounded
    }
  }
  return best;
}

float weight_above(const Pool& pool, float logit) {
  f32x16 sums = {};
  int64_t i = 0;
  for (; i + kLanes <= pool.size(); i += kLanes)
    sums = sums + by_parts([&](FloatPart logits, FloatPart weights) { return logits > logit ? weights : FloatPart{}; },
                           load16(pool.logit.data() + i), load16(pool.weight.data() + i));
  float sum = sum16(sums);
  for (; i < pool.size(); ++i) sum += pool.logit[i] > logit ? pool.weight[i] : 0.f;
  return sum;
}

void weigh(Pool& pool, float top, float temperature) {
  pool.weight.resize(pool.size());
  int64_t i = 0;
  for (; i + kPartLanes <= pool.size(); i += kPartLanes)
    store_part(pool.weight.data() + i, exp_part((load_part(pool.logit.data() + i) - top) / temperature));
  for (; i < pool.size(); ++i) pool.weight[i] = std::exp((pool.logit[i] - top) / temperature);
}

// Keeps those that come before as much of the weight as `limit` is reached, in the order of some keys; those of equal keys
// are kept or dropped together.
void keep_first(Pool& pool, const std::vector<float>& keys, float limit) {
  std::vector<int64_t> order(pool.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return keys[i] < keys[j]; });
  double before = 0, weight = 0;  // of smaller keys; of the same and smaller ones
  int64_t kept = 0;
  for (; kept < pool.size(); ++kept) {
    if (kept > 0 && keys[order[kept]] != keys[order[kept - 1]]) before = weight;
    if (kept > 0 && !(before < limit)) break;
    weight += pool.weight[order[kept]];
  }
  Pool rest;
  for (int64_t i = 0; i < kept; ++i) {
    rest.logit.push_back(pool.logit[order[i]]), rest.weight.push_back(pool.weight[order[i]]);
    rest.token.push_back(pool.token[order[i]]);
  }
  pool = std::move(rest);
}

// Keeps the nucleus, and of it what is likely enough and typical.
void keep_typical(Pool& pool, float top, float least, float total, const Settings& settings) {
  std::vector<float> keys(pool.size());
  if (settings.top_p < 1) {
    std::transform(pool.logit.begin(), pool.logit.end(), keys.begin(), std::negate<float>());
    keep_first(pool, keys, settings.top_p * total);
  }
  pool.drop_below(least);
  total = weight_above(pool, -kInfinity);
  const auto surprise = [&](int64_t i) { return (top - pool.logit[i]) / settings.temperature + std::log(total); };
  float entropy = 0;
  for (int64_t i = 0; i < pool.size(); ++i) entropy += pool.weight[i] > 0 ? pool.weight[i] / total * surprise(i) : 0;
  keys.resize(pool.size());
  for (int64_t i = 0; i < pool.size(); ++i) keys[i] = std::abs(surprise(i) - entropy);
  keep_first(pool, keys, settings.typical_p * total);
}

template <typename T>
int64_t sample_row(const T* logits, int64_t vocab, const Settings& settings) {
  const std::vector<float> maxima = block_maxima(logits, vocab);
  const auto top_block = std::max_element(maxima.begin(), maxima.end());
  const float top = *top_block;
  if (!(settings.temperature > 0) || !(std::abs(top) < kInfinity)) {  // the first of the most likely tokens
    const int64_t begin = (top_block - maxima.begin()) * kTokens;
    const auto is_top = [&](int64_t i) { return static_cast<float>(logits[i]) == top; };
    for (int64_t i = begin; i < std::min(begin + kTokens, vocab); ++i)
      if (is_top(i)) return i;
    return begin;
  }
  const bool by_rank = settings.top_k > 0 && settings.top_k < vocab, by_mass = settings.top_p < 1;
  const float least = std::min(top, top + settings.temperature * std::log(settings.min_p));
  float first = by_mass ? -kInfinity : least;
  if (by_rank) {  // as many blocks hold at least one token of this logit
    const bool blocks = settings.top_k <= static_cast<int64_t>(maxima.size());
    first = blocks ? kth_largest(maxima, settings.top_k) : -kInfinity;
  }
  Pool pool = gather(logits, vocab, maxima, first);
  if (by_rank) pool.drop_below(kth_largest(pool.logit, std::min(settings.top_k, pool.size())));  // NaNs are not in it
  weigh(pool, top, settings.temperature);
  const float total = by_mass ? weight_above(pool, -kInfinity) : 0;
  if (settings.typical_p < 1) {
    keep_typical(pool, top, least, total, settings);
    return pool.token[highest_score(pool, settings)];
  }
  pool.drop_below(least);
  while (true) {
    const int64_t winner = highest_score(pool, settings);
    const float logit = pool.logit[winner];
    if (!by_mass || logit == top || weight_above(pool, logit) < settings.top_p * total) return pool.token[winner];
    pool.drop_below(std::nextafter(logit, kInfinity));
  }
}

}  // namespace

void sample_rows(const Tensor& logits, int64_t vocab, const SamplingSettings& settings, const int64_t* positions,
                 int64_t* tokens) {
  using torch::headeronly::ScalarType;
  const int64_t batch = logits.size(0), stride = logits.numel() / batch;
  STD_TORCH_CHECK(vocab > 0 && vocab <= stride && logits.is_contiguous(), "fastllama: got ", stride,
                  " logits a row, expected ", vocab, " or more, contiguous");
  check(settings.temperature, "temperature", ScalarType::Float, {batch});
  check(settings.top_k, "top_k", ScalarType::Long, {batch});
  check(settings.top_p, "top_p", ScalarType::Float, {batch});
  check(settings.min_p, "min_p", ScalarType::Float, {batch});
  check(settings.typical_p, "typical_p", ScalarType::Float, {batch});
  check(settings.seed, "seed", ScalarType::Long, {batch});
  dispatch(logits, [&](auto zero) {
    using T = decltype(zero);
    parallel_each(batch, 1, [&](const auto& each) {
      each([&](int64_t b) {
        const uint64_t key = mix(static_cast<uint64_t>(data<int64_t>(settings.seed)[b]) +
                                 static_cast<uint64_t>(positions[b]) * kGolden);
        const Settings row{data<float>(settings.temperature)[b], data<float>(settings.top_p)[b],
                           data<float>(settings.min_p)[b], data<float>(settings.typical_p)[b],
                           data<int64_t>(settings.top_k)[b], key};
        tokens[b] = sample_row(data<T>(logits) + b * stride, vocab, row);
      });
    });
  });
}

Tensor sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor typical_p,
              Tensor seed, Tensor positions) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "fastllama: logits have ", logits.dim(),
                  " dimensions, expected rows of a vocabulary");
  check(logits, "logits", logits.scalar_type(), {logits.size(0), logits.size(1)});
  check(positions, "positions", torch::headeronly::ScalarType::Long, {logits.size(0)});
  Tensor out = torch::stable::empty_like(positions);
  sample_rows(logits, logits.size(1), {temperature, top_k, top_p, min_p, typical_p, seed}, data<int64_t>(positions),
              static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace fastllama
