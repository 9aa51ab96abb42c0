// A fiber is a stack and a saved position; one carries each device thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#include <sys/mman.h>

#if !defined(__x86_64__) || defined(CUDA_ON_HOST_UCONTEXT)
#define CUDA_ON_HOST_PORTABLE_SWITCH
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {

constexpr size_t kStackBytes = 256 * 1024;  // reserved per thread; only the pages in use cost memory
constexpr size_t kGuardBytes = 4096;

struct Fiber {
#ifdef CUDA_ON_HOST_PORTABLE_SWITCH
  ucontext_t position;
#else
  void* position = nullptr;  // stack pointer, the callee-saved registers pushed above it
#endif
  const void* stack = nullptr;  // lowest address; AddressSanitizer must be told of every stack that is switched to
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

#ifndef CUDA_ON_HOST_PORTABLE_SWITCH
// swapcontext makes a system call to save the signal mask, which would take most of the time of a barrier.
__attribute__((naked, noinline)) static void switch_stack(void** /*save*/, void* /*load*/) {
  __asm__ volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
#endif

// Called first on the stack that was switched to; `left` is the fiber that was left.
inline void arrive([[maybe_unused]] void* fake_stack, [[maybe_unused]] Fiber* left) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, left ? &left->stack : nullptr, left ? &left->stack_bytes : nullptr);
#endif
}

// `last`: `from` has returned and is never resumed.
inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last = false) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef CUDA_ON_HOST_PORTABLE_SWITCH
  swapcontext(&from.position, &to.position);
#else
  switch_stack(&from.position, to.position);
#endif
  arrive(from.fake_stack, nullptr);
}

// Stacks for the 1024 threads of the largest block, mapped once and reused by every block.
class Stacks {
 public:
  Stacks() {
    memory_ = static_cast<char*>(
        mmap(nullptr, kThreads * kStride, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::runtime_error("cuda_on_host: no address space for the threads' stacks");
    for (size_t i = 0; i < kThreads; ++i) mprotect(memory_ + i * kStride, kGuardBytes, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, kThreads * kStride); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  // Makes `fiber` start in `entry` on the i-th stack when first switched to.
  void prepare(Fiber& fiber, size_t i, void (*entry)()) {
    fiber.stack = memory_ + i * kStride + kGuardBytes;
    // Stack tops at equal offsets would all fall into one set of the cache.
    fiber.stack_bytes = kStackBytes - (i % 64) * 128;
    fiber.fake_stack = nullptr;
#ifdef CUDA_ON_HOST_PORTABLE_SWITCH
    getcontext(&fiber.position);
    fiber.position.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
    fiber.position.uc_stack.ss_size = fiber.stack_bytes;
    fiber.position.uc_link = nullptr;
    makecontext(&fiber.position, entry, 0);
#else
    auto** top = reinterpret_cast<void**>(static_cast<char*>(const_cast<void*>(fiber.stack)) + fiber.stack_bytes);
    top[-1] = nullptr;  // where `entry` would return to; it keeps the stack 16-byte aligned at the call
    top[-2] = reinterpret_cast<void*>(entry);
    for (int reg = 3; reg <= 8; ++reg) top[-reg] = nullptr;
    fiber.position = top - 8;
#endif
  }

  // After an abandoned launch the frames left on the stacks are still marked as live.
  void forget_frames() {
#ifdef __SANITIZE_ADDRESS__
    for (size_t i = 0; i < kThreads; ++i)
      __asan_unpoison_memory_region(memory_ + i * kStride + kGuardBytes, kStackBytes);
#endif
  }

 private:
  static constexpr size_t kThreads = 1024;
  static constexpr size_t kStride = kStackBytes + kGuardBytes;
  char* memory_;
};

}  // namespace cuda_on_host
