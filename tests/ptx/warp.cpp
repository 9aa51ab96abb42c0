// What threads do together: operations of a warp, and barriers of a block.
#include "block.h"

#include <algorithm>
#include <cstring>

namespace ptx {

// Completes one operation of the warp for which all lanes of its mask have arrived; false if there is none.
bool Block::complete_warp_operation(int first) {
  const int lanes = std::min(32, count_ - first);
  for (int lane = 0; lane < lanes; ++lane) {
    Thread& t = threads_[first + lane];
    if (t.state != Thread::InWarp || !all_have_come(first, lanes, t, lane)) continue;
    const Instruction& in = code_[t.pc];
    const std::vector<int> members = members_of(t.mask, lanes);
    switch (in.op) {
      case Opcode::WarpSync:
        for (int m : members) ++threads_[first + m].syncs;
        break;
      case Opcode::Shfl:
        shuffle(first, members, in, t.mask);
        break;
      case Opcode::Vote:
        vote(first, members, in, t.mask);
        break;
      case Opcode::Match:
        match(first, members, in);
        break;
      case Opcode::LdMatrix:
        load_matrices(first, in);
        break;
      default: {
        uint64_t* registers[32];
        for (int m : members) registers[m] = threads_[first + m].registers;
        multiply_matrices(in, state().mma, registers);
      }
    }
    for (int m : members) {
      ++threads_[first + m].pc;
      ++threads_[first + m].meetings;
      threads_[first + m].state = Thread::Ready;
    }
    return true;
  }
  return false;
}

std::vector<int> Block::members_of(uint32_t mask, int lanes) {
  std::vector<int> members;
  for (int lane = 0; lane < lanes; ++lane) {
    if (mask >> lane & 1) members.push_back(lane);
  }
  return members;
}

bool Block::all_have_come(int first, int lanes, const Thread& t, int lane) const {
  if (!(t.mask >> lane & 1)) fail_at(t, "warp", "the calling lane is not in its mask");
  if (lanes < 32 && t.mask >> lanes) fail_at(t, "warp", "the mask names lanes this block does not have");
  for (int other = 0; other < lanes; ++other) {
    if (!(t.mask >> other & 1)) continue;
    const Thread& o = threads_[first + other];
    if (o.state == Thread::Done) fail_at(t, "warp", "the mask names a lane that has returned");
    if (o.state != Thread::InWarp || o.pc != t.pc || o.mask != t.mask) return false;
  }
  return true;
}

void Block::shuffle(int first, const std::vector<int>& members, const Instruction& in, uint32_t mask) {
  uint64_t values[32] = {};
  for (int m : members) values[m] = value(threads_[first + m], in.o[1]);
  for (int m : members) {
    Thread& t = threads_[first + m];
    const int by = static_cast<int>(value(t, in.o[2]) & 31), clamp = static_cast<int>(value(t, in.o[3]));
    const int segment = (clamp >> 8) & 31;
    const int lowest = m & segment, highest = (m & segment) | (clamp & 31 & ~segment);
    int source = 0;
    bool valid = true;
    switch (static_cast<Shuffle>(in.variant)) {
      case Shuffle::Butterfly:
        source = m ^ by, valid = source <= highest;
        break;
      case Shuffle::Index:
        source = lowest | (by & ~segment), valid = source <= highest;
        break;
      case Shuffle::Up:
        source = m - by, valid = source >= highest;
        break;  // here the clamp is the lower end
      case Shuffle::Down:
        source = m + by, valid = source <= highest;
        break;
    }
    if (!valid) source = m;
    if (!(mask >> source & 1)) fail_at(t, "warp", "a shuffle reads a lane outside its mask");
    t.registers[in.o[0].reg] = static_cast<uint32_t>(values[source]);
    if (in.o[0].count == 2) t.registers[in.o[0].regs[1]] = valid;
  }
}

void Block::vote(int first, const std::vector<int>& members, const Instruction& in, uint32_t mask) {
  uint32_t yes = 0;
  for (int m : members) yes |= uint32_t(value(threads_[first + m], in.o[1]) != 0) << m;
  const auto kind = static_cast<VoteKind>(in.variant);
  const uint32_t result = kind == VoteKind::Ballot ? yes : kind == VoteKind::Any ? yes != 0 : yes == mask;
  for (int m : members) threads_[first + m].registers[in.o[0].reg] = result;
}

void Block::match(int first, const std::vector<int>& members, const Instruction& in) {
  for (int m : members) {
    uint32_t equal = 0;
    for (int other : members) {
      const auto of = [&](int lane) { return low(in.type, value(threads_[first + lane], in.o[1])); };
      equal |= uint32_t(of(other) == of(m)) << other;
    }
    matches_[m] = equal;
  }
  for (int m : members) threads_[first + m].registers[in.o[0].reg] = matches_[m];
}

// Lane 8m + i gives the address of row i of matrix m; every lane gets two adjacent elements of each matrix.
void Block::load_matrices(int first, const Instruction& in) {
  uint16_t rows[4][8][8];
  for (int lane = 0; lane < 8 * in.detail; ++lane) {
    Thread& t = threads_[first + lane];
    const auto address = static_cast<uint32_t>(in.o[1].value + (in.o[1].reg >= 0 ? t.registers[in.o[1].reg] : 0));
    if (statistics_) statistics_->access(t.index, t.pc, address);
    std::memcpy(rows[lane / 8][lane % 8], shared_at(t, address, 16, false, false), 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < in.detail; ++m) {
      const int i = lane / 4, j = 2 * (lane % 4);
      const uint32_t left = in.variant ? rows[m][j][i] : rows[m][i][j];
      const uint32_t right = in.variant ? rows[m][j + 1][i] : rows[m][i][j + 1];
      const Operand& to = in.o[0];
      threads_[first + lane].registers[to.kind == Operand::Vector ? to.regs[m] : to.reg] = left | right << 16;
    }
  }
}

// No thread can run: either all of them wait at one barrier, or the kernel is wrong.
void Block::release_barrier() {
  const auto first =
      std::find_if(threads_.begin(), threads_.end(), [](auto& t) { return t.state == Thread::AtBarrier; });
  int sum = 0;
  for (const Thread& t : threads_) {
    if (t.state == Thread::InWarp) fail_at(t, "barrier", "waits for lanes that never come");
    if (first == threads_.end()) continue;
    if (t.state == Thread::Done) fail_at(*first, "barrier", "waits for a thread that has returned");
    if (t.pc != first->pc) fail_at(t, "barrier", "threads wait at different barriers");
    const Instruction& in = code_[t.pc];
    if (in.op == Opcode::BarrierReduce) sum += value(t, in.o[2]) != 0;
  }
  for (Thread& t : threads_) {
    const Instruction& in = code_[t.pc];
    // variant: and, or, popc
    if (in.op == Opcode::BarrierReduce) {
      t.registers[in.o[0].reg] = in.variant == 0 ? sum == count_ : in.variant == 1 ? sum > 0 : sum;
    }
    t.state = Thread::Ready;
    ++t.pc;
  }
  state().shadow.barrier();
}

}  // namespace ptx
