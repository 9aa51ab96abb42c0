// Executes CUDA kernels on the CPU: grid, blocks, warps, shared memory, barriers, shuffles, votes, atomics.
//
// One fiber per device thread, one block after another, in the order that the environment variable
// CUDA_ON_HOST_SCHEDULE names: forward, reverse, interleaved (lane by lane across warps) or random:SEED. A thread runs
// until it waits for others, so an order that only a missing barrier permits is one of these or close to one. What it
// proves: index arithmetic, bounds (with AddressSanitizer), barriers, masks, independence of the order of threads and
// blocks. What it cannot prove: speed, memory model, registers, rounding of hardware instructions.
#pragma once

#include "fiber.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cuda_on_host {

// The chip that launches see.
#ifdef MSACORE_SMALL_SIZES
// The smallest limit of all chips from sm_80 on (that of 86, 89 and 120): a kernel that may use more asks
// shared_limit() in launch.cuh. Few multiprocessors, so that small inputs fill them.
constexpr size_t kSharedLimit = 99 * 1024;
constexpr int kMultiprocessors = 3;
#else
constexpr size_t kSharedLimit = 227 * 1024;  // sm_90
constexpr int kMultiprocessors = 132;
#endif
constexpr size_t kStaticSharedLimit = 48 * 1024;
constexpr int kWarp = 32;

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

enum class State : uint8_t { kReady, kInCollective, kAtBarrier, kReturned };

struct Wait {
  const char* name;
  unsigned mask;
  Site site;
  void* payload;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;  // otherwise zeros are written and nothing is read
};

struct Thread {
  Fiber fiber;
  State state;
  uint3 index;
  Wait wait;
  std::vector<std::vector<Copy>> copies;  // committed groups of cp.async, oldest first; the last is still open
};

struct SharedVariable {
  const void* key;
  void* memory;
};

class Machine {
 public:
  void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t count = size_t{block.x} * block.y * block.z;
    if (shared_bytes > kSharedLimit)
      throw std::runtime_error("cuda_on_host: dynamic shared memory above the chip's limit");
    ++launches_;
    kernel_ = &kernel;
    shared_bytes_ = shared_bytes;
    gridDim = grid;
    blockDim = block;
    threads_.resize(count);
    read_schedule();
    const size_t blocks = size_t{grid.x} * grid.y * grid.z;
    std::vector<size_t> block_order(blocks);
    arrange(block_order, 1);
    for (size_t b : block_order) {
      blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
      run_block();
    }
  }

  // Waits until every thread of the block is here; returns the sum of their votes.
  int barrier(const char* name, int vote, Site site) {
    Thread& self = *current_;
    self.state = State::kAtBarrier;
    self.wait = {name, 0, site, &vote};
    ++at_barrier_;
    run_next();
    return vote;
  }

  // Waits until every lane of `mask` is here, then `complete(lanes)` sees the 32 payloads (null outside the mask) once.
  template <typename Payload, typename Complete>
  void collective(const char* name, unsigned mask, Site site, Payload& payload, Complete complete) {
    Thread& self = *current_;
    const size_t self_index = &self - threads_.data(), first = self_index / kWarp * kWarp;
    const size_t lanes = std::min<size_t>(kWarp, threads_.size() - first);
    if (!(mask >> (self_index - first) & 1))
      fail(std::string(name) + " at " + site.text() + ": the calling lane is not in its mask");
    if (lanes < kWarp && mask >> lanes)
      fail(std::string(name) + " at " + site.text() + ": the mask names lanes this block does not have");
    self.state = State::kInCollective;
    self.wait = {name, mask, site, &payload};
    unsigned& waiting = waiting_[self_index / kWarp];
    waiting |= 1u << (self_index - first);
    if ((waiting & mask) != mask) return run_next();
    Payload* payloads[kWarp] = {};
    bool all = true;
    for (size_t lane = 0; all && lane < lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const Wait& other = threads_[first + lane].wait;
      all = other.mask == mask && other.site == site && (other.name == name || std::strcmp(other.name, name) == 0);
      payloads[lane] = static_cast<Payload*>(other.payload);
    }
    if (!all) return run_next();
    complete(payloads);
    waiting &= ~mask;
    for (size_t lane = 0; lane < lanes; ++lane) {
      if (mask >> lane & 1) threads_[first + lane].state = State::kReady;
    }
  }

  // A `__shared__` variable: created when the first thread reaches it, filled with NaN, freed with the block.
  void* shared_variable(const void* key, size_t bytes, size_t alignment) {
    for (const SharedVariable& v : variables_) {
      if (v.key == key) return v.memory;
    }
    static_bytes_ += bytes;
    if (static_bytes_ > kStaticSharedLimit) fail("more than 48 KiB of static shared memory");
    variables_.push_back({key, poisoned(bytes, alignment)});
    return variables_.back().memory;
  }

  void* dynamic_shared() { return dynamic_; }
  int64_t launches() const { return launches_; }
  Thread& current() { return *current_; }

  // Ends the launch with an error. The fibers are abandoned where they are.
  [[noreturn]] void fail(const std::string& what) {
    failure_ = what;
    switch_fiber(current_->fiber, scheduler_);
    std::abort();
  }

 private:
  void read_schedule() {
    const char* text = std::getenv("CUDA_ON_HOST_SCHEDULE");
    schedule_ = text ? text : "forward";
    shuffled_ = schedule_.rfind("random:", 0) == 0;
    if (shuffled_) random_.seed(std::stoul(schedule_.substr(7)));
    if (!shuffled_ && schedule_ != "forward" && schedule_ != "reverse" && schedule_ != "interleaved") {
      throw std::runtime_error("CUDA_ON_HOST_SCHEDULE: expected forward, reverse, interleaved or random:SEED, got " +
                               schedule_);
    }
  }

  void arrange(std::vector<size_t>& order, size_t warp) {
    std::iota(order.begin(), order.end(), size_t{0});
    if (schedule_ == "reverse") std::reverse(order.begin(), order.end());
    if (schedule_ == "interleaved") {
      std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return a % warp < b % warp; });
    }
    if (shuffled_) std::shuffle(order.begin(), order.end(), random_);
  }

  static void* poisoned(size_t bytes, size_t alignment) {
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), bytes) != 0) throw std::bad_alloc();
    std::memset(memory, 0xFF, bytes);  // a NaN in every floating type, -1 in every integer
    return memory;
  }

  void run_block() {
    const size_t count = threads_.size();
    dynamic_ = poisoned(shared_bytes_, 1024);
    waiting_.assign((count + kWarp - 1) / kWarp, 0);
    at_barrier_ = returned_ = static_bytes_ = 0;
    failure_.clear();
    for (size_t i = 0; i < count; ++i) {
      Thread& thread = threads_[i];
      stacks_.prepare(thread.fiber, i, &Machine::enter);
      thread.state = State::kReady;
      thread.index = {unsigned(i % blockDim.x), unsigned(i / blockDim.x % blockDim.y),
                      unsigned(i / blockDim.x / blockDim.y)};
      thread.copies.clear();
    }
    order_.resize(count);
    arrange(order_, kWarp);
    while (returned_ < count && failure_.empty()) {
      next_ = 0;
      if (Thread* thread = next_ready()) {
        switch_fiber(scheduler_, make_current(*thread));  // returns when all have had their turn, or on a failure
      } else {
        release_barrier();
      }
      if (shuffled_) std::shuffle(order_.begin(), order_.end(), random_);
    }
    std::free(dynamic_);
    for (const SharedVariable& v : variables_) std::free(v.memory);
    variables_.clear();
    if (!failure_.empty()) {
      stacks_.forget_frames();
      throw std::runtime_error("cuda_on_host: block (" + std::to_string(blockIdx.x) + ", " +
                               std::to_string(blockIdx.y) + ", " + std::to_string(blockIdx.z) + ") of " +
                               std::to_string(count) + " threads: " + failure_);
    }
  }

  // The next thread in this round's order that does not have to wait, or null.
  Thread* next_ready() {
    while (next_ < order_.size()) {
      Thread& thread = threads_[order_[next_++]];
      if (thread.state == State::kReady) return &thread;
    }
    return nullptr;
  }

  Fiber& make_current(Thread& thread) {
    current_ = &thread;
    threadIdx = thread.index;
    return thread.fiber;
  }

  // Switches directly from a thread that waits or, with `last`, has returned, to the one whose turn it is: a detour
  // through the scheduler would take most of the time of a barrier.
  void run_next(bool last = false) {
    Fiber& self = current_->fiber;
    Thread* thread = next_ready();
    switch_fiber(self, thread ? make_current(*thread) : scheduler_, last);
  }

  static void enter();

  // No thread can run: either all of them wait at one barrier, or the kernel is wrong.
  void release_barrier() {
    bool same = at_barrier_ == threads_.size();
    for (const Thread& t : threads_) same = same && t.wait.site == threads_[0].wait.site;
    if (!same) {
      failure_ = (at_barrier_ == threads_.size() ? "divergent barrier: " : "threads wait for ever: ") + describe();
      return;
    }
    int sum = 0;
    for (const Thread& t : threads_) sum += *static_cast<int*>(t.wait.payload);
    for (Thread& t : threads_) {
      *static_cast<int*>(t.wait.payload) = sum;
      t.state = State::kReady;
    }
    at_barrier_ = 0;
  }

  std::string describe() const {
    std::string text, previous;
    size_t first = 0;
    for (size_t i = 0; i <= threads_.size(); ++i) {
      const std::string what = i < threads_.size() ? where(threads_[i]) : "";
      if (what == previous) continue;
      if (i > 0) {
        text += (text.empty() ? "threads " : "; threads ") + std::to_string(first) + "-" + std::to_string(i - 1) + " " +
                previous;
      }
      first = i;
      previous = what;
    }
    return text;
  }

  static std::string where(const Thread& thread) {
    if (thread.state == State::kReturned) return "have returned";
    std::string text = std::string("wait at ") + thread.wait.name;
    char mask[32] = "";
    if (thread.state == State::kInCollective) std::snprintf(mask, sizeof mask, " with mask 0x%08x", thread.wait.mask);
    return text + mask + " (" + thread.wait.site.text() + ")";
  }

  std::mutex mutex_;
  Stacks stacks_;
  Fiber scheduler_;
  std::vector<Thread> threads_;
  Thread* current_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<size_t> order_;      // of this round, in which every ready thread has a turn
  size_t next_ = 0;                // the position in it
  std::vector<unsigned> waiting_;  // per warp, the lanes inside a collective
  std::vector<SharedVariable> variables_;
  void* dynamic_ = nullptr;
  size_t shared_bytes_ = 0, static_bytes_ = 0, at_barrier_ = 0, returned_ = 0;
  std::string failure_, schedule_;
  bool shuffled_ = false;
  int64_t launches_ = 0;
  std::mt19937 random_;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

inline void Machine::enter() {
  Machine& self = machine();
  arrive(nullptr, self.next_ == 1 ? &self.scheduler_ : nullptr);  // the others start when a thread before them waits
  (*self.kernel_)();
  self.current_->state = State::kReturned;
  ++self.returned_;
  self.run_next(/*last=*/true);
  std::abort();
}

#ifndef CUDA_ON_HOST_PTX
template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  const std::tuple<P...> parameters(static_cast<P>(args)...);
  machine().launch(grid, block, shared_bytes, [&] { std::apply(kernel, parameters); });
}
#endif

}  // namespace cuda_on_host

#ifdef CUDA_ON_HOST_PTX
#include "../ptx/launch.h"
#endif

// The number of kernels launched so far by the library that this is built into.
extern "C" __attribute__((visibility("default"), used)) inline int64_t cuda_on_host_launches() {
  return cuda_on_host::machine().launches();
}

#include "device_functions.h"
#include "tensor_functions.h"
