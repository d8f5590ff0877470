// The operations as C++ functions, for those that are made of others. Formulas: ../linear/op.py and so on.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

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
Tensor embed_packed(Tensor like, Tensor ids, Tensor codes, Tensor scales, std::optional<Tensor> offsets);
Tensor rotary_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor key_cache, Tensor value_cache);
Tensor layers(Tensor x, Tensor cos, Tensor sin, Tensor positions, std::vector<Tensor> weights,
              std::vector<int64_t> kinds, std::vector<Tensor> key_caches, std::vector<Tensor> value_caches, double eps,
              int64_t activation);

struct SamplingSettings {
  Tensor temperature, top_k, top_p, min_p, typical_p, seed;  // of each row
};

struct ProcessingSettings {  // of each row, in the order of ../sampling/processing.py
  static constexpr size_t kTensors = 12;
  Tensor repetition_penalty, presence_penalty, frequency_penalty, no_repeat_ngram_size, forced_first, forced_last;
  Tensor bias_tokens, bias_values, bias_until, allowed, tokens, counts;

  ProcessingSettings() = default;
  // The first kTensors of some tensors.
  ProcessingSettings(const Tensor* all, int64_t batch);
};

// Float32 logits [rows, vocab] after what changes them; the same logits where nothing does. Logits may have more columns
// than the vocabulary, which fill up a panel.
Tensor processed(const Tensor& logits, const ProcessingSettings& settings, const Tensor& positions, const Tensor& steps,
                 const Tensor& limits);

// A token of each row of logits [rows, ..., at least vocab], at these positions.
void sample_rows(const Tensor& logits, int64_t vocab, const SamplingSettings& settings, const int64_t* positions,
                 int64_t* tokens);

}  // namespace fastllama
