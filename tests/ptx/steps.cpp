// Turns decoded instructions into steps: code for their operation and type, and operands that are already looked up.
// Also finds the registers that have to be cleared. Runs once for each kernel.
#include <algorithm>
#include <unordered_map>

#include "arithmetic.h"

namespace ptx {
namespace {

// ---- code for one operation and type: arithmetic() itself, whose branches the compiler resolves

template <Opcode kOp, Type kType, int kVariant, Type kSecond>
struct Fixed {  // what arithmetic() reads of an Instruction
  static constexpr Opcode op = kOp;
  static constexpr Type type = kType, second = kSecond;
  static constexpr uint8_t variant = kVariant, detail = 0;
  static constexpr bool flush = false, approximate = false, saturate = false;
  static constexpr const char* text = "";
};

template <typename In>
void run_fixed(uint64_t* registers, const uint64_t* numbers, const Step& s) {
  const auto get = [&](int i) { return i >= 0 ? registers[i] : numbers[~i]; };
  if constexpr (In::op == Opcode::Setp) {
    registers[s.to] = compare(In{}, get(s.from[0]), get(s.from[1]));
  } else {
    registers[s.to] = arithmetic(In{}, get(s.from[0]), get(s.from[1]), get(s.from[2]), get(s.from[3]));
  }
}

uint32_t key(Opcode op, Type type, int variant, Type second) {
  return uint32_t(op) << 24 | uint32_t(type) << 16 | uint32_t(variant) << 8 | uint32_t(second);
}

using Table = std::unordered_map<uint32_t, Step::Run>;

template <Opcode kOp, int kVariant, Type... kTypes>
void add(Table& table) {
  ((table[key(kOp, kTypes, kVariant, Type::None)] = run_fixed<Fixed<kOp, kTypes, kVariant, Type::None>>), ...);
}

template <Type kTo, Type kFrom, Rounding... kRoundings>
void add_conversion(Table& table) {
  ((table[key(Opcode::Cvt, kTo, int(kRoundings), kFrom)] = run_fixed<Fixed<Opcode::Cvt, kTo, int(kRoundings), kFrom>>),
   ...);
}

template <Compare... kCompares>
void add_comparisons_of_integers(Table& table) {
  using enum Type;
  (add<Opcode::Setp, int(kCompares), U16, S16, B16, U32, S32, B32, U64, S64, B64>(table), ...);
}
template <Compare... kCompares>
void add_comparisons_of_floats(Table& table) {
  (add<Opcode::Setp, int(kCompares), Type::F32, Type::F64>(table), ...);
}

// The instructions that make up most of nvcc's code. An instruction that is not here runs too, only slower.
const Table& table() {
  static const Table made = [] {
    using enum Type;
    Table t;
    add<Opcode::Mov, 0, U16, B16, U32, S32, B32, F32, U64, S64, B64, F64, Pred>(t);
    add<Opcode::Add, 0, U16, S16, U32, S32, U64, S64, F32, F64>(t);
    add<Opcode::Sub, 0, U16, S16, U32, S32, U64, S64, F32, F64>(t);
    add<Opcode::Mul, 0, U16, S16, U32, S32, U64, S64, F32, F64>(t);
    add<Opcode::Mad, 0, U16, S16, U32, S32, U64, S64>(t);
    add<Opcode::MulWide, 0, U16, S16, U32, S32>(t);
    add<Opcode::MadWide, 0, U16, S16, U32, S32>(t);
    add<Opcode::MulHi, 0, U32, S32, U64, S64>(t);
    add<Opcode::Div, 0, U32, S32, U64, S64, F32, F64>(t);
    add<Opcode::Rem, 0, U32, S32, U64, S64>(t);
    add<Opcode::Fma, 0, F32, F64>(t);
    add<Opcode::Min, 0, U32, S32, U64, S64, F32, F64>(t);
    add<Opcode::Max, 0, U32, S32, U64, S64, F32, F64>(t);
    add<Opcode::Min, 1, F32>(t);
    add<Opcode::Max, 1, F32>(t);
    add<Opcode::Neg, 0, S32, S64, F32, F64>(t);
    add<Opcode::Abs, 0, S32, S64, F32, F64>(t);
    add<Opcode::And, 0, B16, B32, B64, Pred>(t);
    add<Opcode::Or, 0, B16, B32, B64, Pred>(t);
    add<Opcode::Xor, 0, B16, B32, B64, Pred>(t);
    add<Opcode::Not, 0, B16, B32, B64, Pred>(t);
    add<Opcode::Shl, 0, B16, B32, B64>(t);
    add<Opcode::Shr, 0, U16, S16, B16, U32, S32, B32, U64, S64, B64>(t);
    add<Opcode::Selp, 0, U16, S16, B16, U32, S32, B32, F32, U64, S64, B64, F64>(t);
    add<Opcode::Ex2, 0, F32>(t);
    add<Opcode::Lg2, 0, F32>(t);
    add<Opcode::Sqrt, 0, F32, F64>(t);
    add_conversion<U16, U32, Rounding::None>(t);
    add_conversion<U32, U16, Rounding::None>(t);
    add_conversion<U32, U64, Rounding::None>(t);
    add_conversion<U64, U32, Rounding::None>(t);
    add_conversion<S64, S32, Rounding::None>(t);
    add_conversion<S32, S16, Rounding::None>(t);
    add_conversion<S32, S64, Rounding::None>(t);
    add_conversion<F32, F16, Rounding::None>(t);
    add_conversion<F64, F32, Rounding::None>(t);
    add_conversion<F16, F32, Rounding::Nearest>(t);
    add_conversion<BF16, F32, Rounding::Nearest>(t);
    add_conversion<F32, F64, Rounding::Nearest>(t);
    add_conversion<F32, S32, Rounding::Nearest>(t);
    add_conversion<F32, U32, Rounding::Nearest>(t);
    add_conversion<F64, S32, Rounding::Nearest>(t);
    add_conversion<F64, S64, Rounding::Nearest>(t);
    using enum Compare;
    add_comparisons_of_integers<Eq, Ne, Lt, Le, Gt, Ge>(t);
    add_comparisons_of_floats<Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Compare::NaN>(t);
    return t;
  }();
  return made;
}

Step::Run code_for(const Instruction& in) {
  const bool plain = !in.flush && !in.saturate && !(in.approximate && in.type == Type::F64) && in.detail == 0;
  const bool one = in.o[0].kind == Operand::Register && in.o[0].count != 2;
  if (!plain || !one) return nullptr;
  const auto found = table().find(key(in.op, in.type, in.variant, in.second));
  return found == table().end() ? nullptr : found->second;
}

// ---- which registers may be read before they are written

bool writes_first_operand(Opcode op) {
  switch (op) {
    case Opcode::St:
    case Opcode::Red:
    case Opcode::CpAsync:
    case Opcode::CpAsyncCommit:
    case Opcode::CpAsyncWait:
    case Opcode::Bra:
    case Opcode::Ret:
    case Opcode::Trap:
    case Opcode::Nop:
    case Opcode::Barrier:
    case Opcode::WarpSync:
      return false;
    default:
      return true;
  }
}

template <typename Visit>
void for_registers_of(const Operand& o, Visit visit) {
  if (o.kind == Operand::Vector) {
    for (int i = 0; i < o.count; ++i) visit(o.regs[i]);
  } else if (o.kind == Operand::Register || o.kind == Operand::Memory) {
    if (o.reg >= 0) visit(o.reg);
    if (o.count == 2) visit(o.regs[1]);
  }
}

// Removes from the set what an instruction certainly writes, and adds what it reads.
void step_back(const Instruction& in, std::vector<bool>& live) {
  const bool writes = writes_first_operand(in.op) && in.o[0].kind != Operand::Memory;
  if (writes && in.predicate < 0) for_registers_of(in.o[0], [&](int r) { live[r] = false; });
  for (int i = writes; i < int(std::size(in.o)); ++i) for_registers_of(in.o[i], [&](int r) { live[r] = true; });
  if (in.predicate >= 0) live[in.predicate] = true;
}

// The registers that are live at the kernel's entry, found by going backwards over the control flow until nothing
// changes. All others are written on every path to a read, so that their initial values cannot be seen.
std::vector<int> read_before_written(const Kernel& kernel) {
  const int size = static_cast<int>(kernel.code.size());
  std::vector<bool> begins(size + 1, false);  // whether a basic block begins here
  begins[0] = begins[size] = true;
  for (int i = 0; i < size; ++i) {
    const Instruction& in = kernel.code[i];
    if (in.op == Opcode::Bra) begins[in.target] = true;
    if (in.op == Opcode::Bra || in.op == Opcode::Ret) begins[i + 1] = true;
  }
  std::vector<int> starts;
  for (int i = 0; i <= size; ++i) {
    if (begins[i]) starts.push_back(i);
  }
  std::vector<std::vector<bool>> live(size + 1);  // at the start of each basic block
  for (int start : starts) live[start].assign(kernel.registers, false);
  for (bool changed = true; changed;) {
    changed = false;
    for (int s = int(starts.size()) - 2; s >= 0; --s) {
      const int begin = starts[s], end = starts[s + 1];
      const Instruction& last = kernel.code[end - 1];
      const bool leaves = last.op == Opcode::Ret || last.op == Opcode::Bra;
      std::vector<bool> now(kernel.registers, false);
      if (!leaves || last.predicate >= 0) now = live[end];
      if (last.op == Opcode::Bra) {
        const std::vector<bool>& there = live[last.target];
        for (int r = 0; r < kernel.registers; ++r) now[r] = now[r] || there[r];
      }
      for (int i = end - 1; i >= begin; --i) step_back(kernel.code[i], now);
      if (now != live[begin]) live[begin].swap(now), changed = true;
    }
  }
  std::vector<int> found;
  for (int r = 0; r < kernel.registers; ++r) {
    if (live[0][r]) found.push_back(r);
  }
  return found;
}

}  // namespace

void make_steps(Kernel& kernel) {
  for (const Instruction& in : kernel.code) {
    Step s;
    s.predicate = in.predicate, s.predicate_negated = in.predicate_negated;
    s.run = code_for(in);
    for (int i = 0; s.run && i < 4; ++i) {
      const Operand& o = in.o[i + 1];
      const bool number = o.kind == Operand::None || o.kind == Operand::Immediate ||
                          (o.kind == Operand::Symbol && o.space != Space::Param && o.space != Space::Local);
      if (o.kind == Operand::Register && !o.negated) {
        s.from[i] = o.reg;
      } else if (number) {
        s.from[i] = ~static_cast<int>(kernel.numbers_used.size());
        kernel.numbers_used.push_back(o.value);
      } else {
        s.run = nullptr;  // differs by thread or launch: Block::value() finds it
      }
    }
    s.to = in.op == Opcode::Bra ? in.target : in.o[0].reg;
    kernel.steps.push_back(s);
  }
  kernel.unwritten = read_before_written(kernel);
}

}  // namespace ptx
