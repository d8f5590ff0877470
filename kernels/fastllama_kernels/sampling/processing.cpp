// What changes the logits of rows before a token is sampled: see processing.py for the definition.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "ops.h"
#include "parallel.h"
#include "vec.h"

namespace fastllama {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kWord = 32;  // bits of a token mask

// What one row asks for.
struct Row {
  float repetition_penalty, presence_penalty, frequency_penalty;
  int64_t ngram, forced, position, step;
  const int64_t *bias_tokens, *bias_until, *tokens;
  const float* bias_values;
  const int32_t *allowed, *counts;
  int64_t biases, bias_length, vocab;

  Row(const ProcessingSettings& all, int64_t b, int64_t position, int64_t step, int64_t limit, int64_t vocab)
      : repetition_penalty(data<float>(all.repetition_penalty)[b]),
        presence_penalty(data<float>(all.presence_penalty)[b]),
        frequency_penalty(data<float>(all.frequency_penalty)[b]),
        ngram(data<int64_t>(all.no_repeat_ngram_size)[b]),
        forced(step == 0 ? data<int64_t>(all.forced_first)[b] : -1),
        position(position),
        step(step),
        bias_tokens(data<int64_t>(all.bias_tokens) + b * all.bias_tokens.size(1) * all.bias_tokens.size(2)),
        bias_until(data<int64_t>(all.bias_until) + b * all.bias_until.size(1)),
        tokens(data<int64_t>(all.tokens) + b * all.tokens.size(1)),
        bias_values(data<float>(all.bias_values) + b * all.bias_values.size(1)),
        allowed(data<int32_t>(all.allowed) + b * all.allowed.size(1)),
        counts(data<int32_t>(all.counts) + b * vocab),
        biases(all.bias_tokens.size(1)),
        bias_length(all.bias_tokens.size(2)),
        vocab(vocab) {
    const int64_t last = data<int64_t>(all.forced_last)[b];
    if (step == limit - 1 && last >= 0) forced = last;
  }

  bool has_biases() const { return bias_tokens[bias_length - 1] >= 0; }
  bool has_mask() const { return !std::all_of(allowed, allowed + words(), [](int32_t word) { return word == -1; }); }
  bool changes_anything() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0 || ngram > 0 || forced >= 0 ||
           has_biases() || has_mask();
  }

  void process(float* logits) const {
    if (forced >= 0) {
      std::fill(logits, logits + vocab, -kInfinity);
      if (forced < vocab) logits[forced] = 0;
      return;
    }
    add_biases(logits);
    if (repetition_penalty != 1)
      for (int64_t i = 0; i < vocab; ++i) {
        const float changed = logits[i] < 0 ? logits[i] * repetition_penalty : logits[i] / repetition_penalty;
        logits[i] = counts[i] > 0 ? changed : logits[i];
      }
    if (presence_penalty != 0 || frequency_penalty != 0)
      for (int64_t i = 0; i < vocab; ++i) {
        const int32_t uses = counts[i] >> 1;
        logits[i] = logits[i] - frequency_penalty * static_cast<float>(uses) - (uses > 0 ? presence_penalty : 0.f);
      }
    if (ngram > 0) ban_ngrams(logits);
    if (has_mask()) apply_mask(logits);
  }

 private:
  int64_t words() const { return (vocab + kWord - 1) / kWord; }

  void add_biases(float* logits) const {
    const int64_t before = bias_length - 1;
    const int64_t* sequence = bias_tokens;
    for (int64_t e = 0; e < biases && sequence[before] >= 0; ++e, sequence += bias_length) {
      bool matches = step < bias_until[e] && sequence[before] < vocab;
      int64_t at = position;
      for (int64_t j = before - 1; j >= 0 && matches && sequence[j] >= 0; --j, --at)
        matches = at >= 0 && tokens[at] == sequence[j];
      if (matches) logits[sequence[before]] += bias_values[e];
    }
  }

  void ban_ngrams(float* logits) const {
    for (int64_t last = ngram - 1; last <= position; ++last) {
      bool repeats = true;
      for (int64_t back = 0; back < ngram - 1 && repeats; ++back)
        repeats = tokens[last - 1 - back] == tokens[position - back];
      if (repeats && tokens[last] >= 0 && tokens[last] < vocab) logits[tokens[last]] = -kInfinity;
    }
  }

  void apply_mask(float* logits) const {
    for (int64_t word = 0; word < words(); ++word) {
      if (allowed[word] == -1) continue;
      for (int64_t i = word * kWord; i < std::min((word + 1) * kWord, vocab); ++i)
        if (!(static_cast<uint32_t>(allowed[word]) >> (i % kWord) & 1)) logits[i] = -kInfinity;
    }
  }
};

}  // namespace

ProcessingSettings::ProcessingSettings(const Tensor* all, int64_t batch)
    : repetition_penalty(all[0]),
      presence_penalty(all[1]),
      frequency_penalty(all[2]),
      no_repeat_ngram_size(all[3]),
      forced_first(all[4]),
      forced_last(all[5]),
      bias_tokens(all[6]),
      bias_values(all[7]),
      bias_until(all[8]),
      allowed(all[9]),
      tokens(all[10]),
      counts(all[11]) {
  check(repetition_penalty, "repetition_penalty", ScalarType::Float, {batch});
  check(presence_penalty, "presence_penalty", ScalarType::Float, {batch});
  check(frequency_penalty, "frequency_penalty", ScalarType::Float, {batch});
  check(no_repeat_ngram_size, "no_repeat_ngram_size", ScalarType::Long, {batch});
  check(forced_first, "forced_first", ScalarType::Long, {batch});
  check(forced_last, "forced_last", ScalarType::Long, {batch});
  const int64_t biases = bias_values.size(1), vocab = counts.size(1);
  check(bias_tokens, "bias_tokens", ScalarType::Long, {batch, biases, bias_tokens.size(2)});
  check(bias_values, "bias_values", ScalarType::Float, {batch, biases});
  check(bias_until, "bias_until", ScalarType::Long, {batch, biases});
  check(allowed, "allowed", ScalarType::Int, {batch, (vocab + kWord - 1) / kWord});
  check(tokens, "tokens", ScalarType::Long, {batch, tokens.size(1)});
  check(counts, "counts", ScalarType::Int, {batch, vocab});
}

Tensor processed(const Tensor& logits, const ProcessingSettings& settings, const Tensor& positions,
                 const Tensor& steps, const Tensor& limits) {
  const int64_t batch = logits.size(0), stride = logits.numel() / batch, vocab = settings.counts.size(1);
  STD_TORCH_CHECK(vocab <= stride && logits.is_contiguous(), "fastllama: got ", stride, " logits a row, expected ",
                  vocab, " or more, contiguous");
  std::vector<Row> rows;
  bool any = false;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t position = data<int64_t>(positions)[b];
    STD_TORCH_CHECK(position >= 0 && position < settings.tokens.size(1), "fastllama: position ", position, " of ",
                    settings.tokens.size(1), " slots");
    rows.emplace_back(settings, b, position, data<int64_t>(steps)[b], data<int64_t>(limits)[b], vocab);
    any |= rows.back().changes_anything();
  }
  if (!any) return logits;
  Tensor out = torch::stable::new_empty(logits, {batch, vocab}, ScalarType::Float);
  dispatch(logits, [&](auto zero) {
    const auto* from = data<decltype(zero)>(logits);
    float* to = static_cast<float*>(out.mutable_data_ptr());
    parallel_each(batch, 1, [&](const auto& each) {
      each([&](int64_t b) {
        for (int64_t i = 0; i < vocab; ++i) to[b * vocab + i] = static_cast<float>(from[b * stride + i]);
        if (rows[b].changes_anything()) rows[b].process(to + b * vocab);
      });
    });
  });
  return out;
}

namespace {

Tensor processed_op(Tensor logits, std::vector<Tensor> settings, Tensor positions, Tensor steps, Tensor limits) {
  STD_TORCH_CHECK(settings.size() == ProcessingSettings::kTensors && logits.dim() == 2, "fastllama: got ",
                  settings.size(), " settings of logits with ", logits.dim(), " dimensions, expected ",
                  ProcessingSettings::kTensors, " of [rows, vocabulary]");
  const int64_t batch = logits.size(0), vocab = logits.size(1);
  const ProcessingSettings checked(settings.data(), batch);
  check(checked.counts, "counts", ScalarType::Int, {batch, vocab});
  for (const Tensor* each : {&positions, &steps, &limits}) check(*each, "a position, step or limit", ScalarType::Long, {batch});
  const Tensor out = processed(logits, checked, positions, steps, limits);
  if (out.const_data_ptr() != logits.const_data_ptr()) return out;
  Tensor same = torch::stable::new_empty(logits, {batch, vocab}, ScalarType::Float);  // an operation gives what is its own
  dispatch(logits, [&](auto zero) {
    const auto* from = data<decltype(zero)>(logits);
    std::copy(from, from + batch * vocab, static_cast<float*>(same.mutable_data_ptr()));
  });
  return same;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("processed", TORCH_BOX(&processed_op)); }

}  // namespace fastllama
