// Work shared out to torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>

namespace fastllama {

// Calls f(each) once on each thread; each(body) calls body(i) for indices i below count, `grain` of them in a row. A
// thread begins with a range of its own, and takes of the others' when it is done: cores differ, and so does what else
// they have to do.
template <typename F>
void parallel_each(int64_t count, int64_t grain, const F& f) {
  struct alignas(64) Range {  // of grains; a line of the cache each
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t grains = (count + grain - 1) / grain;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), grains);
  const std::unique_ptr<Range[]> ranges(new Range[threads]);
  for (int64_t t = 0; t < threads; ++t) ranges[t].next = t * grains / threads, ranges[t].end = (t + 1) * grains / threads;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    f([&](const auto& body) {
      for (int64_t t = 0; t < threads; ++t) {
        Range& range = ranges[(own + t) % threads];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
          for (int64_t at = i * grain; at < std::min(count, (i + 1) * grain); ++at) body(at);
      }
    });
  });
}

}  // namespace fastllama
