// What a thread does to memory: every access goes through locate() or shared_at(), which check it.
#include "block.h"

#include <cstring>

namespace ptx {

bool Block::inside(uint64_t address, uint64_t bytes, const char* begin, uint64_t size) {
  const auto first = reinterpret_cast<uint64_t>(begin);
  return address >= first && address + bytes <= first + size;
}

char* Block::shared_at(Thread& t, uint64_t offset, int bytes, bool write, bool atomic, bool in_flight) {
  if (offset + bytes > launch_.shared_bytes) {
    fail_at(t, "out of bounds",
            "shared access at " + std::to_string(offset) + " of " + std::to_string(launch_.shared_bytes) + " bytes");
  }
  check_alignment(t, "shared", offset, bytes);
  const SharedShadow::Access access{t.index, t.pc, t.syncs, t.meetings, atomic, in_flight};
  const auto report = [&](const char* what, int other) { found(what, t.pc, other); };
  if (write) {
    state().shadow.write(offset, bytes, access, report);
  } else {
    state().shadow.read(offset, bytes, access, report);
  }
  return shared_ + offset;
}

void Block::check_alignment(const Thread& t, const char* what, uint64_t address, int bytes) const {
  if ((address & (unsigned(bytes) - 1)) == 0) return;  // a power of two: no division
  fail_at(t, "misaligned",
          std::string(what) + " access of " + std::to_string(bytes) + " bytes, " + std::to_string(address % bytes) +
              " beyond a multiple");
}

void Block::check_bounds(const Thread& t, uint64_t address, int bytes) {
  if (address >= known_.first && address + bytes <= known_.second) return;
  const auto range = allocations().holding(address, bytes);
  if (range.second != 0) {
    known_ = range;
    return;
  }
  if (launch_.module.owns(address, bytes)) return;
  const auto near = allocations().holding(address - 1, 1);
  fail_at(t, "out of bounds",
          "global access of " + std::to_string(bytes) + " bytes" +
              (near.second ? " at byte " + std::to_string(address - near.first) + " of an array of " +
                                 std::to_string(near.second - near.first)
                           : " where no array is"));
}

// Where the bytes of a memory operand lie on the host, after all checks.
char* Block::locate(Thread& t, const Instruction& in, const Operand& o, int bytes, bool write, bool atomic) {
  uint64_t address = o.value + (o.reg >= 0 ? t.registers[o.reg] : 0);
  const bool symbol = o.reg < 0;
  if (in.space == Space::Param || in.space == Space::Local) {
    const bool param = in.space == Space::Param;
    const char* begin = param ? launch_.parameters : t.local;
    if (symbol) address += reinterpret_cast<uint64_t>(begin);
    const int size = param ? launch_.kernel.parameter_bytes : launch_.kernel.local_bytes;
    if (!inside(address, bytes, begin, size)) fail_at(t, "out of bounds", param ? "parameter" : "local access");
    return reinterpret_cast<char*>(address);
  }
  if (in.space == Space::Shared) {
    address = static_cast<uint32_t>(address);
    if (statistics_) statistics_->access(t.index, t.pc, address);
    return shared_at(t, address, bytes, write, atomic);
  }
  if (in.space == Space::Generic) {
    if (inside(address, bytes, shared_, launch_.shared_bytes)) {
      return shared_at(t, address - reinterpret_cast<uint64_t>(shared_), bytes, write, atomic);
    }
    const bool own = inside(address, bytes, t.local, launch_.kernel.local_bytes) ||
                     inside(address, bytes, launch_.parameters, launch_.kernel.parameter_bytes);
    if (own) return reinterpret_cast<char*>(address);
  }
  check_alignment(t, "global", address, bytes);
  check_bounds(t, address, bytes);
  if (statistics_ && in.space != Space::Const) statistics_->access(t.index, t.pc, address);
  return reinterpret_cast<char*>(address);
}

void Block::load(Thread& t, const Instruction& in) {
  const int size = size_of(in.type);
  const char* from = locate(t, in, in.o[1], size * in.vector, false);
  for (int i = 0; i < in.vector; ++i) {
    uint64_t bits = 0;
    std::memcpy(&bits, from + i * size, size);
    if (is_signed(in.type)) bits = static_cast<uint64_t>(signed_low(in.type, bits));
    t.registers[in.o[0].kind == Operand::Vector ? in.o[0].regs[i] : in.o[0].reg] = bits;
  }
}

void Block::store(Thread& t, const Instruction& in) {
  const int size = size_of(in.type);
  char* to = locate(t, in, in.o[0], size * in.vector, true);
  for (int i = 0; i < in.vector; ++i) {
    const uint64_t bits = in.o[1].kind == Operand::Vector ? t.registers[in.o[1].regs[i]] : value(t, in.o[1]);
    std::memcpy(to + i * size, &bits, size);
  }
}

void Block::atomic(Thread& t, const Instruction& in) {
  const int at = in.op == Opcode::Atom;  // `red` has no destination
  const int size = size_of(in.type);
  char* where = locate(t, in, in.o[at], size, true, true);
  const Type type = in.type;
  uint64_t old = 0, b = low(type, value(t, in.o[at + 1])), next = 0;
  std::memcpy(&old, where, size);
  const bool less = is_signed(type) ? signed_low(type, b) < signed_low(type, old) : b < old;
  switch (static_cast<AtomicOp>(in.variant)) {
    case AtomicOp::Add:
      next = is_float(type) ? real(in, old, b, 0, [](auto x, auto y, auto) { return x + y; }) : old + b;
      break;
    case AtomicOp::Min:
      next = less ? b : old;
      break;
    case AtomicOp::Max:
      next = less ? old : b;
      break;
    case AtomicOp::And:
      next = old & b;
      break;
    case AtomicOp::Or:
      next = old | b;
      break;
    case AtomicOp::Xor:
      next = old ^ b;
      break;
    case AtomicOp::Exch:
      next = b;
      break;
    case AtomicOp::Cas:
      next = old == b ? value(t, in.o[at + 2]) : old;
      break;
  }
  std::memcpy(where, &next, size);
  if (at) t.registers[in.o[0].reg] = is_signed(type) ? static_cast<uint64_t>(signed_low(type, old)) : old;
}

// The copy happens when it is waited for: a read that comes too early sees what was there before.
void Block::copy_async(Thread& t, const Instruction& in) {
  const auto to = static_cast<uint32_t>(in.o[0].value + (in.o[0].reg >= 0 ? t.registers[in.o[0].reg] : 0));
  const uint64_t from = in.o[1].value + (in.o[1].reg >= 0 ? t.registers[in.o[1].reg] : 0);
  const int bytes = static_cast<int>(in.o[2].value);
  const int read = in.o[3].kind == Operand::None ? bytes : static_cast<int>(value(t, in.o[3]));
  if (read < 0 || read > bytes) fail_at(t, "out of bounds", "cp.async of " + std::to_string(read) + " bytes");
  shared_at(t, to, bytes, true, false, true);
  check_alignment(t, "global", from, bytes);
  if (read > 0) {
    check_bounds(t, from, read);
    if (statistics_) statistics_->access(t.index, t.pc, from);
  }
  if (t.copies.empty()) t.copies.emplace_back();
  t.copies.back().push_back({to, from, bytes, read});
}

void Block::wait_for_copies(Thread& t, size_t keep, bool open_too) {
  if (open_too && !t.copies.empty()) t.copies.emplace_back();
  while (t.copies.size() > keep + 1) {
    for (const Copy& copy : t.copies.front()) {
      state().shadow.land(copy.to, copy.bytes);
      char* to = shared_at(t, copy.to, copy.bytes, true, false);
      std::memcpy(to, reinterpret_cast<const char*>(copy.from), copy.read);
      std::memset(to + copy.read, 0, copy.bytes - copy.read);
    }
    t.copies.erase(t.copies.begin());
  }
}

}  // namespace ptx
