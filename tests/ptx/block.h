// The machine: a launch, and the execution of its blocks.
#pragma once

#include <memory>
#include <random>
#include <tuple>

#include "arithmetic.h"
#include "checks.h"
#include "ptx.h"
#include "statistics.h"
#include "tensor_cores.h"

namespace ptx {

struct State {
  MmaModel mma = MmaModel::Exact;
  std::string schedule = "forward";
  std::map<std::string, std::unique_ptr<Module>> modules;  // by the library whose launches run them
  std::unique_ptr<Statistics> statistics;
  SharedShadow shadow;
  // How often something was found, by kernel, module, message, instruction and the one it conflicts with.
  std::map<std::tuple<const Kernel*, const Module*, std::string, int, int>, uint64_t> findings;
  uint64_t launches = 0, instructions = 0;
};
State& state();
Allocations& allocations();
std::string place(const Module& module, const Instruction& in);

struct Launch {
  Module& module;
  Kernel& kernel;
  unsigned grid[3], block[3];
  size_t shared_bytes;
  const char* parameters;
};

struct Copy {
  uint32_t to;
  uint64_t from;
  int bytes, read;  // the rest is filled with zeros
};

struct Thread {
  enum State : uint8_t { Ready, AtBarrier, InWarp, Done } state;
  int index, pc;
  int syncs, meetings;  // see SharedShadow::Access
  unsigned position[3];
  uint32_t mask;  // of the warp operation that it waits in
  uint64_t* registers;
  char* local;
  std::vector<std::vector<Copy>> copies;  // committed groups of cp.async, oldest first; the last is still open
};

class Block {
 public:
  explicit Block(const Launch& launch);
  void run(unsigned x, unsigned y, unsigned z);

 private:
  static constexpr int kAlignment = 1024;

  // block.cpp
  void begin(unsigned x, unsigned y, unsigned z);
  [[noreturn]] void fail_at(const Thread& t, const std::string& kind, const std::string& what) const;
  void found(const std::string& what, int pc, int other) const;
  void move(Thread& t, const Instruction& in);
  void set_predicates(Thread& t, const Instruction& in);
  void run_thread(Thread& t);
  static void wait_in_warp(Thread& t, uint64_t mask);

  uint64_t special(const Thread& t, uint64_t number) const {  // in the order of decode.cpp
    if (number < 3) return t.position[number];
    if (number < 6) return launch_.block[number - 3];
    if (number < 9) return position_[number - 6];
    if (number < 12) return launch_.grid[number - 9];
    return t.index % 32;
  }

  uint64_t value(const Thread& t, const Operand& o) const {
    switch (o.kind) {
      case Operand::Register:
        return o.negated ? !t.registers[o.reg] : t.registers[o.reg];
      case Operand::Special:
        return special(t, o.value);
      case Operand::Symbol:
        if (o.space == Space::Param) return reinterpret_cast<uint64_t>(launch_.parameters) + o.value;
        if (o.space == Space::Local) return reinterpret_cast<uint64_t>(t.local) + o.value;
        return o.value;
      default:
        return o.value;
    }
  }

  // ---- memory
  // memory.cpp
  static bool inside(uint64_t address, uint64_t bytes, const char* begin, uint64_t size);
  char* shared_at(Thread& t, uint64_t offset, int bytes, bool write, bool atomic, bool in_flight = false);
  void check_alignment(const Thread& t, const char* what, uint64_t address, int bytes) const;
  void check_bounds(const Thread& t, uint64_t address, int bytes);
  char* locate(Thread& t, const Instruction& in, const Operand& o, int bytes, bool write, bool atomic = false);
  void load(Thread& t, const Instruction& in);
  void store(Thread& t, const Instruction& in);
  void atomic(Thread& t, const Instruction& in);
  void copy_async(Thread& t, const Instruction& in);
  void wait_for_copies(Thread& t, size_t keep, bool open_too);

  // warp.cpp
  bool complete_warp_operation(int first);
  static std::vector<int> members_of(uint32_t mask, int lanes);
  bool all_have_come(int first, int lanes, const Thread& t, int lane) const;
  void shuffle(int first, const std::vector<int>& members, const Instruction& in, uint32_t mask);
  void vote(int first, const std::vector<int>& members, const Instruction& in, uint32_t mask);
  void match(int first, const std::vector<int>& members, const Instruction& in);
  void load_matrices(int first, const Instruction& in);
  void release_barrier();

  const Launch& launch_;
  const std::vector<Instruction>& code_;
  Statistics* statistics_;
  int count_ = 0, local_stride_ = 0;
  unsigned position_[3] = {};
  std::vector<Thread> threads_;
  std::unique_ptr<uint64_t[]> registers_;
  std::vector<char> memory_, local_;
  char* shared_ = nullptr;
  std::pair<uint64_t, uint64_t> known_{0, 0};  // the allocation of the last global access
  uint32_t matches_[32] = {};
  std::vector<int> order_;
  bool shuffled_ = false;
  std::mt19937 random_;
};

}  // namespace ptx
