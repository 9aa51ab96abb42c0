// Signals such as Ctrl-C can interrupt long loops on the CPU: the Python module sets a hook that asks its interpreter.
#pragma once
#include <atomic>
#include <chrono>
#include <thread>

#include "core/check.h"

namespace msacore::cpu {

// Whether the caller wants the running operator to stop. Null in programs without Python: nothing interrupts their
// operators. The symbol is exported, so that the operator library and the Python module share one hook.
__attribute__((visibility("default"))) inline std::atomic<bool (*)()> interrupt_hook{nullptr};

// One call of an operator. Its threads report their work with `stop`; only the calling thread, which alone may wait for
// the interpreter, calls the hook, and at most ten times a second.
class Interruption {
 public:
  // What one thread has counted since it last checked.
  struct Work {
    int64_t done = 0;
  };

  // Adds `work`, measured in rows of about a cache line, and returns whether the loop has to end.
  bool stop(Work& counted, int64_t work) {
    counted.done += work;
    if (counted.done < kBetweenLooks) return false;
    counted.done = 0;
    if (!stopped_.load(std::memory_order_relaxed) && std::this_thread::get_id() == caller_) ask();
    return stopped_.load(std::memory_order_relaxed);
  }

  // After an interruption, raises an error that Python replaces with the exception of the signal handler.
  void check(const char* op) const {
    if (stopped_.load(std::memory_order_relaxed)) fail(op, "interrupted");
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kBetweenLooks = 1 << 16;  // a few hundred microseconds of work
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
