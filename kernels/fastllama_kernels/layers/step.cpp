// A whole step in one operation, from ids to logits or to the next ids: see step.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "matrix.h"
#include "ops.h"
#include "team.h"

namespace fastllama {
namespace {

using torch::headeronly::ScalarType;

// The weights of a network: embedding, layers, norm, head.
struct Network {
  Matrix embedding;
  std::vector<Tensor> layers;
  std::vector<int64_t> kinds;  // of the layers' matrices
  Tensor norm;
  Matrix head;

  Network(const std::vector<Tensor>& weights, const std::vector<int64_t>& all_kinds)
      : embedding{Format(first_of(all_kinds)), weights.data()},
        head{Format(all_kinds.back()), weights.data() + weights.size() - Format(all_kinds.back()).tensors()} {
    const size_t before = embedding.format.tensors(), after = head.format.tensors() + 1;
    STD_TORCH_CHECK(weights.size() >= before + after, "fastllama: got ", weights.size(),
                    " weights, expected those of an embedding, layers, a norm and a head");
    kinds.assign(all_kinds.begin() + 1, all_kinds.end() - 1);
    layers.assign(weights.begin() + before, weights.end() - after);
    norm = weights[weights.size() - after];
  }

 private:
  static int64_t first_of(const std::vector<int64_t>& kinds) {
    STD_TORCH_CHECK(kinds.size() >= 2, "fastllama: got ", kinds.size(), " matrices, expected an embedding and a head");
    return kinds.front();
  }
};

// Rows `ids` of a dense table.
Tensor embed(const Tensor& table, const Tensor& ids) {
  const int64_t rows = table.size(0), columns = table.size(1);
  std::vector<int64_t> shape(ids.sizes().begin(), ids.sizes().end());
  shape.push_back(columns);
  Tensor out = torch::stable::new_empty(table, shape);
  dispatch(table, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t i = 0; i < ids.numel(); ++i) {
      const int64_t id = data<int64_t>(ids)[i];
      STD_TORCH_CHECK(id >= 0 && id < rows, "fastllama: id ", id, " of an embedding of ", rows, " rows");
      std::memcpy(to + i * columns, data<T>(table) + id * columns, columns * sizeof(T));
    }
  });
  return out;
}

// Logits [b, t, v], filled up to whole panels of the head, of what follows each of the ids.
Tensor logits(const Tensor& ids, const Tensor& positions, const Tensor& cos, const Tensor& sin,
              const std::vector<Tensor>& weights, const std::vector<int64_t>& kinds,
              const std::vector<Tensor>& key_caches, const std::vector<Tensor>& value_caches, double eps,
              int64_t activation) {
  const Network net(weights, kinds);
  check(ids, "ids", ScalarType::Long, {positions.size(0), positions.size(1)});
  const Tensor* table = net.embedding.tensors;
  std::optional<Tensor> offsets;
  if (net.embedding.format.has_offsets) offsets = table[2];
  Tensor x = net.embedding.format.is_packed ? embed_packed(net.norm, ids, table[0], table[1], offsets)
                                            : embed(table[0], ids);
  Team::during([&] {
    x = layers(x, cos, sin, positions, net.layers, net.kinds, key_caches, value_caches, eps, activation);
    x = net.head.multiply(x, net.norm, eps, std::nullopt);
  });
  return x;
}

void verify_step(Tensor ids, Tensor positions, Tensor cos, Tensor sin, std::vector<Tensor> weights,
                 std::vector<int64_t> kinds, std::vector<Tensor> key_caches, std::vector<Tensor> value_caches,
                 double eps, int64_t activation, Tensor out) {
  const Tensor all = logits(ids, positions, cos, sin, weights, kinds, key_caches, value_caches, eps, activation);
  const int64_t rows = ids.numel(), vocab = out.size(out.dim() - 1), padded = all.size(2);
  check(out, "logits", all.scalar_type(), {ids.size(0), ids.size(1), std::min(vocab, padded)});
  dispatch(all, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * vocab, data<T>(all) + r * padded, vocab * sizeof(T));
  });
}

// The buffers of some rows, in the order of step.py.
struct RowBuffers {
  Tensor ids, positions, finished, steps, output, limit, eos, pad;
  ProcessingSettings processing;
  SamplingSettings sampling;

  explicit RowBuffers(const std::vector<Tensor>& all) {
    constexpr size_t kPlain = 8, kSampling = kPlain + ProcessingSettings::kTensors, kAll = kSampling + 6;
    STD_TORCH_CHECK(all.size() == kAll, "fastllama: got ", all.size(), " buffers of rows, expected ", kAll);
    ids = all[0], positions = all[1], finished = all[2], steps = all[3];
    output = all[4], limit = all[5], eos = all[6], pad = all[7];
    const int64_t b = ids.size(0);
    processing = ProcessingSettings(all.data() + kPlain, b);
    const Tensor* last = all.data() + kSampling;
    sampling = {last[0], last[1], last[2], last[3], last[4], last[5]};
    check(positions, "positions", ScalarType::Long, {b, 1});
    check(finished, "finished", ScalarType::Bool, {b});
    check(steps, "steps", ScalarType::Long, {b});
    check(output, "output", ScalarType::Long, {b, output.size(1)});
    check(limit, "limit", ScalarType::Long, {b});
    check(eos, "eos", ScalarType::Long, {b, eos.size(1)});
    check(pad, "pad", ScalarType::Long, {b});
  }

  // Writes each row's newest token to its place among the row's tokens.
  void keep_newest() {
    const int64_t slots = processing.tokens.size(1);
    for (int64_t b = 0; b < ids.size(0); ++b) {
      const int64_t position = data<int64_t>(positions)[b];
      STD_TORCH_CHECK(position >= 0 && position < slots, "fastllama: position ", position, " of ", slots, " slots");
      of<int64_t>(processing.tokens)[b * slots + position] = data<int64_t>(ids)[b];
    }
  }

  // Every row that has not ended, and may move, takes its token and is one further.
  void advance(const std::vector<int64_t>& sampled, const std::vector<char>& may_move) {
    const int64_t count = eos.size(1), n = output.size(1);
    int64_t* step = of<int64_t>(steps);
    for (size_t b = 0; b < sampled.size(); ++b) {
      if (!may_move[b]) continue;
      bool& ended = of<bool>(finished)[b];
      const int64_t token = ended ? data<int64_t>(pad)[b] : sampled[b];
      STD_TORCH_CHECK(step[b] < n, "fastllama: row ", b, " has ", step[b], " new tokens and room for ", n);
      of<int64_t>(output)[b * n + step[b]] = token;
      of<int64_t>(ids)[b] = token;
      if (ended) continue;  // it stays where it is, inside its cache
      const int64_t vocab = processing.counts.size(1);
      if (token < vocab) of<int32_t>(processing.counts)[b * vocab + token] += 2;
      ++of<int64_t>(positions)[b];
      ++step[b];
      const int64_t* ends = data<int64_t>(eos) + b * count;
      ended = step[b] >= data<int64_t>(limit)[b] || std::find(ends, ends + count, token) != ends + count;
    }
  }

 private:
  template <typename T>
  static T* of(Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
  }
};

// Rows that may move go from logits [b, 1, v] of their newest tokens to their next ones.
void advance(RowBuffers& rows, const Tensor& logits, int64_t vocab, const std::vector<char>& may_move) {
  const int64_t batch = rows.ids.size(0);
  std::vector<int64_t> positions(batch), tokens(batch);
  for (int64_t b = 0; b < batch; ++b) positions[b] = data<int64_t>(rows.positions)[b] + 1;
  rows.keep_newest();
  const Tensor changed = processed(logits, rows.processing, rows.positions, rows.steps, rows.limit);
  sample_rows(changed, vocab, rows.sampling, positions.data(), tokens.data());
  rows.advance(tokens, may_move);
}

void decode_step(std::vector<Tensor> buffers, Tensor cos, Tensor sin, std::vector<Tensor> weights,
                 std::vector<int64_t> kinds, std::vector<Tensor> key_caches, std::vector<Tensor> value_caches,
                 double eps, int64_t activation, int64_t vocab) {
  RowBuffers rows(buffers);
  const Tensor all = logits(rows.ids, rows.positions, cos, sin, weights, kinds, key_caches, value_caches, eps,
                            activation);
  advance(rows, all, vocab, std::vector<char>(rows.ids.size(0), true));
}

// The logits [b, 1, v] of one of the tokens of each row.
Tensor of_token(const Tensor& all, int64_t token) {
  const int64_t batch = all.size(0), tokens = all.size(1), columns = all.size(2);
  Tensor out = torch::stable::new_empty(all, {batch, 1, columns});
  dispatch(all, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for (int64_t b = 0; b < batch; ++b)
      std::memcpy(to + b * columns, data<T>(all) + (b * tokens + token) * columns, columns * sizeof(T));
  });
  return out;
}

void draft_step(std::vector<Tensor> buffers, Tensor drafts, Tensor cos, Tensor sin, std::vector<Tensor> weights,
                std::vector<int64_t> kinds, std::vector<Tensor> key_caches, std::vector<Tensor> value_caches,
                double eps, int64_t activation, int64_t vocab) {
  RowBuffers rows(buffers);
  const int64_t batch = rows.ids.size(0), ahead = drafts.size(1), tokens = ahead + 1;
  check(drafts, "drafts", ScalarType::Long, {batch, ahead});
  Tensor ids = torch::stable::new_empty(drafts, {batch, tokens});
  Tensor positions = torch::stable::new_empty(drafts, {batch, tokens});
  std::vector<char> may_move(batch, true);
  for (int64_t b = 0; b < batch; ++b) {
    const bool ended = data<bool>(rows.finished)[b];  // it writes what its cache slot holds, over and over
    for (int64_t t = 0; t < tokens; ++t) {
      const bool is_draft = t > 0 && !ended;
      static_cast<int64_t*>(ids.mutable_data_ptr())[b * tokens + t] =
          is_draft ? data<int64_t>(drafts)[b * ahead + t - 1] : data<int64_t>(rows.ids)[b];
      static_cast<int64_t*>(positions.mutable_data_ptr())[b * tokens + t] =
          data<int64_t>(rows.positions)[b] + (is_draft ? t : 0);
    }
  }
  const Tensor all = logits(ids, positions, cos, sin, weights, kinds, key_caches, value_caches, eps, activation);
  for (int64_t t = 0; t < tokens; ++t) {
    advance(rows, of_token(all, t), vocab, may_move);
    bool any = false;
    for (int64_t b = 0; b < batch && t < ahead; ++b) {
      may_move[b] = may_move[b] && !data<bool>(rows.finished)[b] &&
                    data<int64_t>(rows.ids)[b] == data<int64_t>(drafts)[b * ahead + t];
      any = any || may_move[b];
    }
    if (!any) return;
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) {
  m.impl("decode_step", TORCH_BOX(&decode_step));
  m.impl("draft_step", TORCH_BOX(&draft_step));
  m.impl("verify_step", TORCH_BOX(&verify_step));
}

}  // namespace fastllama
