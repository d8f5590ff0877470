// torch's threads kept at hand: for many small pieces of work one after the other, each of which would have to wake them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>

namespace fastllama {

// While a body runs, torch's other threads wait for what it shares out. One that comes late, or never, is not missed:
// `share` asks for work that one thread can do alone. One that has begun and then has to leave its core to something
// else is waited for; after that everything is done on the calling thread for some time.
class Team {
 public:
  // Calls body on this thread, in one parallel region of torch's.
  template <typename F>
  static void during(const F& body) {
    const int64_t threads = torch::stable::get_num_threads();
    if (threads == 1 || current() != nullptr) return body();
    Team team(threads);
    if (now() < alone_until().load(std::memory_order_relaxed)) {
      team.is_alone_ = true;
      current() = &team;
      const Leave leave;
      return body();
    }
    int64_t ended = 0;
    std::exception_ptr error;  // an exception keeps its text only if it does not pass through torch's region
    torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
      if (thread > 0) return team.help(thread);
      current() = &team;
      try {
        body();
      } catch (...) {
        error = std::current_exception();
      }
      current() = nullptr;
      team.set(kEnd);
      ended = now();
    });
    team.stayed_away(now() - ended);
    if (error) std::rethrow_exception(error);
  }

  // The team whose body runs on this thread; none elsewhere.
  static Team*& current() {
    thread_local Team* team = nullptr;
    return team;
  }

  // That may share work.
  int64_t threads() const { return is_alone_ ? 1 : threads_; }

  // Calls work(thread) here with 0 and on those others that have time with their numbers; returns when all have ended.
  template <typename F>
  void share(const F& work) {
    work_ = [](const void* f, int64_t thread) { (*static_cast<const F*>(f))(thread); };
    context_ = &work;
    left_.store(0, std::memory_order_relaxed);
    has_error_.store(false, std::memory_order_relaxed);
    error_ = nullptr;
    round_ += kRound;
    set(round_ | kOpen);
    current() = nullptr;  // what the work itself shares out stays on this thread
    std::exception_ptr error;
    try {
      work(0);
    } catch (...) {
      error = std::current_exception();
    }
    current() = this;
    const uint64_t entered = state_.fetch_and(~kOpen, std::memory_order_acq_rel) & kEntered;
    if (left_.load(std::memory_order_acquire) != entered) {
      const int64_t began = now();
      wait(left_, [&](uint64_t left) { return left == entered; });
      stayed_away(now() - began);
    }
    if (!error) error = error_;
    if (error) std::rethrow_exception(error);
  }

 private:
  // state_: a number of the round, whether threads may enter it, how many have; kEnd: no round comes any more.
  static constexpr uint64_t kEntered = (1 << 16) - 1, kOpen = 1 << 16, kRound = 1 << 17, kEnd = ~uint64_t{0};

  static constexpr int kSpins = 1000;
  static constexpr int64_t kLate = 300'000, kTimesAlone = 16;  // nanoseconds; how many times as long as was waited

  struct Leave {
    ~Leave() { current() = nullptr; }
  };

  static int64_t now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  }

  // Until when nothing is shared out.
  static std::atomic<int64_t>& alone_until() {
    static std::atomic<int64_t> time{0};
    return time;
  }

  // Threads were waited for so long: if they were not running, they are left alone for some time.
  void stayed_away(int64_t waited) {
    if (waited < kLate) return;
    is_alone_ = true;
    alone_until().store(now() + kTimesAlone * waited, std::memory_order_relaxed);
  }

  explicit Team(int64_t threads) : threads_(threads) {}

  void help(int64_t thread) {
    for (uint64_t seen = 0;;) {
      uint64_t state = wait(state_, [&](uint64_t state) {
        return state == kEnd || ((state & kOpen) && state / kRound != seen);
      });
      if (state == kEnd) return;
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) continue;
      seen = state / kRound;
      try {
        work_(context_, thread);
      } catch (...) {
        if (!has_error_.exchange(true)) error_ = std::current_exception();
      }
      left_.fetch_add(1, std::memory_order_release);
      left_.notify_one();
    }
  }

  void set(uint64_t state) {
    state_.store(state, std::memory_order_release);
    state_.notify_all();
  }

  // The value that is waited for: spinning for some tens of microseconds, then asleep, as what changes it may need this
  // very core.
  template <typename F>
  static uint64_t wait(const std::atomic<uint64_t>& value, const F& is_it) {
    for (int spins = 0;; ++spins) {
      const uint64_t found = value.load(std::memory_order_acquire);
      if (is_it(found)) return found;
      if (spins >= kSpins) value.wait(found, std::memory_order_acquire);
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    }
  }

  const int64_t threads_;
  bool is_alone_ = false;
  void (*work_)(const void*, int64_t) = nullptr;
  const void* context_ = nullptr;
  uint64_t round_ = 0;
  std::exception_ptr error_;
  std::atomic<bool> has_error_{false};
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<uint64_t> left_{0};
};

}  // namespace fastllama
