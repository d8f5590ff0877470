// A streaming read of memory with all of torch's threads: see bandwidth.py for the schema and the checksum.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace fastllama {
namespace {

using torch::stable::Tensor;
typedef uint64_t u64x8 __attribute__((vector_size(64)));

constexpr int kStreams = 4;                      // places read side by side: enough to keep the load queues full
constexpr int64_t kStream = 64 << 10;            // bytes that each of them covers in a block
constexpr int64_t kBlock = kStreams * kStream;
constexpr int64_t kReadAhead = 2 << 10;              // bytes between a load and the prefetch before it

u64x8 load(const char* p) {
  u64x8 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

uint64_t sum_block(const char* p) {
  u64x8 sums[kStreams][2] = {};
  for (int64_t i = 0; i < kStream; i += 2 * sizeof(u64x8)) {
    for (int s = 0; s < kStreams; ++s) {
      const char* q = p + s * kStream + i;
      __builtin_prefetch(q + kReadAhead);
      __builtin_prefetch(q + kReadAhead + sizeof(u64x8));
      sums[s][0] += load(q);
      sums[s][1] += load(q + sizeof(u64x8));
    }
  }
  uint64_t total = 0;
  for (const auto& pair : sums)
    for (const u64x8& sum : pair)
      for (int lane = 0; lane < 8; ++lane) total += sum[lane];
  return total;
}

// What does not fill a block: whole words, then the last one filled up with zeros.
uint64_t sum_rest(const char* p, int64_t nbytes) {
  uint64_t total = 0;
  for (int64_t i = 0; i < nbytes; i += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, p + i, std::min<int64_t>(sizeof(word), nbytes - i));
    total += word;
  }
  return total;
}

}  // namespace

int64_t read_bytes(Tensor buffer) {
  STD_TORCH_CHECK(buffer.is_contiguous(), "fastllama: read_bytes takes a contiguous buffer");
  const auto* p = static_cast<const char*>(buffer.data_ptr());
  const int64_t nbytes = buffer.numel() * buffer.element_size(), blocks = nbytes / kBlock;
  std::atomic<uint64_t> total{sum_rest(p + blocks * kBlock, nbytes - blocks * kBlock)};
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    uint64_t own = 0;
    for (int64_t block = begin; block < end; ++block) own += sum_block(p + block * kBlock);
    total += own;
  });
  return static_cast<int64_t>(total.load());
}

STABLE_TORCH_LIBRARY_IMPL(fastllama, CPU, m) { m.impl("read_bytes", TORCH_BOX(&read_bytes)); }

}  // namespace fastllama
