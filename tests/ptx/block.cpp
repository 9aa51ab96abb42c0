// Runs a block: its threads one by one, each until it waits for others.
#include "block.h"

#include <algorithm>
#include <numeric>

namespace ptx {

Block::Block(const Launch& launch) : launch_(launch), code_(launch.kernel.code), statistics_(state().statistics.get()) {
  count_ = launch.block[0] * launch.block[1] * launch.block[2];
  threads_.resize(count_);
  registers_ = std::make_unique_for_overwrite<uint64_t[]>(size_t(count_) * launch.kernel.registers);
  local_stride_ = (launch.kernel.local_bytes + 63) / 64 * 64;
  order_.resize(count_);
  const std::string& schedule = state().schedule;
  shuffled_ = schedule.rfind("random:", 0) == 0;
  if (shuffled_) random_.seed(std::stoul(schedule.substr(7)));
  std::iota(order_.begin(), order_.end(), 0);
  if (schedule == "reverse") std::reverse(order_.begin(), order_.end());
}

void Block::run(unsigned x, unsigned y, unsigned z) {
  begin(x, y, z);
  for (;;) {
    if (shuffled_) std::shuffle(order_.begin(), order_.end(), random_);
    bool progress = false;
    for (int i : order_) {
      if (threads_[i].state != Thread::Ready) continue;
      run_thread(threads_[i]);
      progress = true;
    }
    for (int first = 0; first < count_; first += 32) {
      while (complete_warp_operation(first)) progress = true;
    }
    if (progress) continue;
    if (std::all_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.state == Thread::Done; })) break;
    release_barrier();
  }
  for (const Thread& t : threads_) {
    for (const auto& group : t.copies) {
      if (!group.empty()) found("race: a thread returns while its cp.async is in flight", int(code_.size()) - 1, -1);
    }
  }
  if (statistics_) statistics_->end_block();
}

void Block::begin(unsigned x, unsigned y, unsigned z) {
  position_[0] = x, position_[1] = y, position_[2] = z;
  // Registers and memory start as NaN in every floating type and as -1 in every integer type; registers whose initial
  // value nothing can read are left as they are.
  memory_.assign(launch_.shared_bytes + kAlignment, char(0xff));
  const auto begin = reinterpret_cast<uint64_t>(memory_.data());
  shared_ = reinterpret_cast<char*>((begin + kAlignment - 1) / kAlignment * kAlignment);
  local_.assign(size_t(count_) * local_stride_ + 64, char(0xff));
  const auto local = reinterpret_cast<char*>((reinterpret_cast<uint64_t>(local_.data()) + 63) / 64 * 64);
  state().shadow.begin_block(launch_.shared_bytes);
  if (statistics_) statistics_->begin_block(count_);
  for (int i = 0; i < count_; ++i) {
    Thread& t = threads_[i];
    t.state = Thread::Ready;
    t.index = i, t.pc = 0, t.syncs = 0, t.meetings = 0, t.mask = 0;
    t.position[0] = i % launch_.block[0];
    t.position[1] = i / launch_.block[0] % launch_.block[1];
    t.position[2] = i / launch_.block[0] / launch_.block[1];
    t.registers = registers_.get() + size_t(i) * launch_.kernel.registers;
    t.local = local + size_t(i) * local_stride_;
    t.copies.clear();
    for (int reg : launch_.kernel.unwritten) t.registers[reg] = ~uint64_t{0};
    for (const auto& [reg, value] : launch_.kernel.constants) t.registers[reg] = value;
  }
}

void Block::fail_at(const Thread& t, const std::string& kind, const std::string& what) const {
  fail(kind, what + ": thread " + std::to_string(t.index) + " of block (" + std::to_string(position_[0]) + ", " +
                 std::to_string(position_[1]) + ", " + std::to_string(position_[2]) + ") of " +
                 launch_.kernel.short_name() + " at " + place(launch_.module, code_[t.pc]));
}

void Block::found(const std::string& what, int pc, int other) const {
  ++state().findings[{&launch_.kernel, &launch_.module, what, pc, other}];
}

// ---- one thread

void Block::move(Thread& t, const Instruction& in) {
  const Operand &to = in.o[0], &from = in.o[1];
  const int parts = std::max(to.kind == Operand::Vector ? to.count : 0, from.kind == Operand::Vector ? from.count : 0);
  const int bits = parts ? 8 * size_of(in.type) / parts : 64;
  const uint64_t mask = bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1;
  if (to.kind == Operand::Vector) {  // unpack
    const uint64_t whole = value(t, from);
    for (int i = 0; i < parts; ++i) t.registers[to.regs[i]] = (whole >> (bits * i)) & mask;
  } else if (from.kind == Operand::Vector) {  // pack
    uint64_t whole = 0;
    for (int i = 0; i < parts; ++i) whole |= (t.registers[from.regs[i]] & mask) << (bits * i);
    t.registers[to.reg] = whole;
  } else {
    t.registers[to.reg] = arithmetic(in, value(t, from), 0, 0, 0);
  }
}

void Block::set_predicates(Thread& t, const Instruction& in) {
  const bool result = compare(in, value(t, in.o[1]), value(t, in.o[2]));
  const bool third = in.detail ? value(t, in.o[3]) : false;
  const auto combined = [&](bool first) {
    switch (static_cast<Combine>(in.detail)) {
      case Combine::And:
        return first && third;
      case Combine::Or:
        return first || third;
      case Combine::Xor:
        return first != third;
      default:
        return first;
    }
  };
  t.registers[in.o[0].reg] = combined(result);
  if (in.o[0].count == 2) t.registers[in.o[0].regs[1]] = combined(!result);
}

void Block::run_thread(Thread& t) {
  struct Counter {
    ~Counter() { state().instructions += executed; }  // also where a check throws
    uint64_t executed = 0;
  } counter;
  const int size = static_cast<int>(code_.size());
  const Step* const steps = launch_.kernel.steps.data();
  const uint64_t* const numbers = launch_.kernel.numbers_used.data();
  uint64_t* const registers = t.registers;
  while (t.pc < size) {
    const Step& step = steps[t.pc];
    ++counter.executed;
    if (statistics_) statistics_->count(t.index, t.pc);
    if (step.predicate >= 0 && bool(registers[step.predicate]) == step.predicate_negated) {
      ++t.pc;
      continue;
    }
    if (step.run) {
      step.run(registers, numbers, step);
      ++t.pc;
      continue;
    }
    const Instruction& in = code_[t.pc];
    switch (in.op) {
      case Opcode::Bra:
        t.pc = step.to;
        continue;
      case Opcode::Ret:
        t.state = Thread::Done;
        return;
      case Opcode::Trap:
        fail_at(t, "trap", "the kernel gives up");
      case Opcode::Nop:
        break;
      case Opcode::Ld:
        load(t, in);
        break;
      case Opcode::St:
        store(t, in);
        break;
      case Opcode::Atom:
      case Opcode::Red:
        atomic(t, in);
        break;
      case Opcode::Mov:
        move(t, in);
        break;
      case Opcode::Setp:
        set_predicates(t, in);
        break;
      case Opcode::Cvta:
      case Opcode::CvtaTo: {
        uint64_t address = value(t, in.o[1]);
        const auto window = reinterpret_cast<uint64_t>(shared_);
        if (in.space == Space::Shared) address = in.op == Opcode::Cvta ? uint32_t(address) + window : address - window;
        t.registers[in.o[0].reg] = address;
        break;
      }
      case Opcode::CpAsync:
        copy_async(t, in);
        break;
      case Opcode::CpAsyncCommit:
        if (t.copies.empty()) t.copies.emplace_back();
        t.copies.emplace_back();
        break;
      case Opcode::CpAsyncWait:
        wait_for_copies(t, in.variant ? 0 : in.o[0].value, in.variant);
        break;
      case Opcode::Barrier:
      case Opcode::BarrierReduce:
        t.state = Thread::AtBarrier;
        return;
      case Opcode::WarpSync:
        return wait_in_warp(t, value(t, in.o[0]));
      case Opcode::Vote:
      case Opcode::Match:
        return wait_in_warp(t, value(t, in.o[2]));
      case Opcode::Shfl:
        return wait_in_warp(t, value(t, in.o[4]));
      case Opcode::LdMatrix:
      case Opcode::Mma:
        return wait_in_warp(t, 0xffffffffu);
      default:
        t.registers[in.o[0].reg] =
            arithmetic(in, value(t, in.o[1]), value(t, in.o[2]), value(t, in.o[3]), value(t, in.o[4]));
    }
    ++t.pc;
  }
  t.state = Thread::Done;
}

void Block::wait_in_warp(Thread& t, uint64_t mask) {
  t.mask = static_cast<uint32_t>(mask);
  t.state = Thread::InWarp;
}

}  // namespace ptx
