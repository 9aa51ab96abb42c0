// Long loops on the CPU hear Ctrl-C: the Python module sets a hook that asks its interpreter.
#pragma once
#include <atomic>
#include <chrono>
#include <thread>

#include "core/check.h"

namespace msacore::cpu {

// Whether the caller wants the running operator to stop. Null in programs without Python: nothing interrupts them.
// Visible outside, so that the library of the operators and the Python module have one between them.
__attribute__((visibility("default"))) inline std::atomic<bool (*)()> interrupt_hook{nullptr};

// One call of an operator. Its threads report their work with `stop`; the hook is asked by the calling thread alone,
// the only one that may wait for the interpreter, and a few times a second at most.
class Interruption {
 public:
  // A thread's share of the counting.
  struct Work {
    int64_t done = 0;
  };

  // Adds `work`, in rows of a cache line or so, and says whether the loop has to end.
  bool stop(Work& counted, int64_t work) {
    counted.done += work;
    if (counted.done < kBetweenLooks) return false;
    counted.done = 0;
    if (!stopped_.load(std::memory_order_relaxed) && std::this_thread::get_id() == caller_) ask();
    return stopped_.load(std::memory_order_relaxed);
  }

  // Raises what the Python side turns into the exception of the signal's handler.
  void check(const char* op) const {
    if (stopped_.load(std::memory_order_relaxed)) fail(op, "interrupted");
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kBetweenLooks = 1 << 16;  // some hundred microseconds of work
  static constexpr std::chrono::milliseconds kBetweenQuestions{100};

  void ask() {
    const Clock::time_point now = Clock::now();
    if (now - asked_ < kBetweenQuestions) return;
    asked_ = now;
    bool (*const hook)() = interrupt_hook.load();
    if (hook && hook()) stopped_.store(true, std::memory_order_relaxed);
  }

  const std::thread::id caller_ = std::this_thread::get_id();
  Clock::time_point asked_ = Clock::now();
  std::atomic<bool> stopped_{false};
};

}  // namespace msacore::cpu
