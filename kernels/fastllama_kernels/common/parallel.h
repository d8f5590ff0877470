// Work shared out to torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <memory>

#include "team.h"

namespace fastllama {

// Calls f(each) once on each thread, or on fewer: one for every `grain` indices that there are. each(body) calls body(i)
// for indices i below count, at most `grain` of them in a row. A thread begins with a range of its own, and takes pieces
// of the others' when it is done: cores differ, and so does what else they have to do.
template <typename F>
void parallel_each(int64_t count, int64_t grain, const F& f) {
  struct alignas(64) Range {  // of pieces; a line of the cache each
    std::atomic<int64_t> next;
    int64_t end;
  };
  Team* const team = Team::current();
  const int64_t most = team != nullptr ? team->threads() : torch::stable::get_num_threads();
  const int64_t threads = std::min<int64_t>(most, (count + grain - 1) / grain);
  if (threads == 0) return;
  const int64_t piece = std::clamp<int64_t>(count / (4 * threads), 1, grain), pieces = (count + piece - 1) / piece;
  const std::unique_ptr<Range[]> ranges(new Range[threads]);
  for (int64_t t = 0; t < threads; ++t) {
    ranges[t].next = t * pieces / threads;
    ranges[t].end = (t + 1) * pieces / threads;
  }
  const auto work = [&](int64_t own) {
    if (own >= threads) return;
    f([&](const auto& body) {
      for (int64_t t = 0; t < threads; ++t) {
        Range& range = ranges[(own + t) % threads];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
          for (int64_t at = i * piece; at < std::min(count, (i + 1) * piece); ++at) body(at);
      }
    });
  };
  if (threads == 1)
    work(0);
  else if (team != nullptr)
    team->share(work);
  else
    torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) { work(own); });
}

}  // namespace fastllama
