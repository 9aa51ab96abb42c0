// PTX as the interpreter holds it: types, instructions, kernels, and the modules (files) they come from.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

enum class Type : uint8_t { U8, U16, U32, U64, S8, S16, S32, S64, B8, B16, B32, B64, F16, BF16, F32, F64, Pred, None };
enum class Space : uint8_t { Generic, Global, Shared, Local, Param, Const };

inline int size_of(Type t) {
  static constexpr int sizes[] = {1, 2, 4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 2, 4, 8, 1, 8};
  return sizes[static_cast<int>(t)];
}
inline bool is_signed(Type t) { return t >= Type::S8 && t <= Type::S64; }
inline bool is_float(Type t) { return t >= Type::F16 && t <= Type::F64; }

// One per mnemonic that the interpreter distinguishes. To add one: here, in mnemonic.cpp, and where it is executed
// (arithmetic.h for what only reads and writes registers, block.cpp for everything else).
enum class Opcode : uint8_t {
  // registers only
  Mov,
  Cvt,
  Add,
  Sub,
  Mul,
  MulWide,
  MulHi,
  Div,
  Rem,
  Min,
  Max,
  Neg,
  Abs,
  Mad,
  MadWide,
  Fma,
  And,
  Or,
  Xor,
  Not,
  Shl,
  Shr,
  Shf,
  Prmt,
  Bfe,
  Bfi,
  Popc,
  Clz,
  Brev,
  Bfind,
  Lop3,
  Selp,
  Setp,
  Ex2,
  Lg2,
  Rcp,
  Sqrt,
  Rsqrt,
  Sin,
  Cos,
  Copysign,
  // memory
  Ld,
  St,
  Cvta,
  CvtaTo,
  Atom,
  Red,
  CpAsync,
  CpAsyncCommit,
  CpAsyncWait,
  LdMatrix,
  // control and other threads
  Bra,
  Ret,
  Trap,
  Nop,
  Barrier,
  BarrierReduce,
  WarpSync,
  Shfl,
  Vote,
  Match,
  Mma,
};

// What a warp instruction keeps busy; the columns of --stats. PTX is not machine code: see README.md.
enum class Class : uint8_t {
  Mma,
  LdMatrix,
  Float32,
  Float64,
  Special,
  Convert,
  Integer,
  Move,
  Control,
  Barrier,
  Warp,
  SharedLoad,
  SharedStore,
  GlobalLoad,
  GlobalStore,
  AsyncCopy,
  Atomic,
  Local,
  Parameter,
  Count,
};

enum class Rounding : uint8_t { None, Nearest, Zero, Down, Up, NearestInt, ZeroInt, DownInt, UpInt, NearestAway };
enum class Compare : uint8_t { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, NaN };
enum class Combine : uint8_t { None, And, Or, Xor };
enum class AtomicOp : uint8_t { Add, Min, Max, And, Or, Xor, Exch, Cas };
enum class Shuffle : uint8_t { Butterfly, Index, Up, Down };
enum class VoteKind : uint8_t { Ballot, Any, All };

struct Operand {
  enum Kind : uint8_t { None, Register, Immediate, Special, Memory, Symbol, Vector } kind = None;
  Space space = Space::Generic;  // of a symbol
  bool negated = false;          // !%p
  uint8_t count = 0;             // registers of a vector; 2 for `%p|%q`
  int reg = -1;                  // also the base of a memory operand, -1 for none
  int regs[4] = {-1, -1, -1, -1};
  uint64_t value = 0;  // immediate, offset, address of a symbol, or number of a special register
};

struct Instruction {
  Opcode op = Opcode::Nop;
  Class kind = Class::Move;
  Type type = Type::None, second = Type::None;  // in the order written
  Space space = Space::Generic;
  uint8_t vector = 1;   // elements of ld and st
  uint8_t variant = 0;  // Rounding, Compare, AtomicOp, Shuffle, VoteKind, or yes/no
  uint8_t detail = 0;   // a second modifier, described where it is read
  bool flush = false;   // .ftz
  bool approximate = false;
  bool saturate = false;  // .sat of a floating type: to [0, 1]
  bool predicate_negated = false;
  int predicate = -1;
  int target = -1;                  // of a branch
  int line = 0;                     // of the PTX file
  int source = 0, source_line = 0;  // of .loc: number of the file in Module::sources, and line
  Operand o[5];
  std::string text;
};

// An instruction as the inner loop reads it, next to the `Instruction` of the same index.
struct Step {
  // Executes an instruction that only reads and writes registers; null where a Step is not enough.
  using Run = void (*)(uint64_t* registers, const uint64_t* numbers, const Step& step);
  Run run = nullptr;
  int predicate = -1;
  bool predicate_negated = false;
  int to = -1;                     // the register that is written, or a branch's target
  int from[4] = {-1, -1, -1, -1};  // registers; ~i is the number i of Kernel::numbers_used
};

struct Parameter {
  int size = 0, offset = 0;
};

struct Kernel {
  std::string name, signature, file;  // mangled; demangled and comparable across compilers; PTX file
  std::map<std::string, int> parameter_offset;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  std::vector<std::string> lines;  // of the body, until it is decoded
  std::vector<int> numbers;
  std::vector<Instruction> code;  // filled by decode()
  int registers = 0, local_bytes = 0, shared_bytes = 0;
  std::vector<Step> steps;  // filled by make_steps(), as are the two below
  std::vector<uint64_t> numbers_used;
  std::vector<int> unwritten;  // registers that may be read before they are written: a block begins with NaN in them
  std::vector<std::pair<int, uint64_t>> constants;  // registers that hold a number from the start
  bool decoded = false;

  std::string short_name() const { return signature.substr(0, signature.find('(')); }
};

struct Module {
  struct Shared {
    int size, align;  // size 0: dynamic
  };
  std::map<std::string, std::unique_ptr<Kernel>> kernels;  // by signature
  std::map<std::string, std::vector<char>> globals;        // .global and .const
  std::map<std::string, Shared> shared;
  std::map<int, std::string> sources;  // by their number in .loc

  bool owns(uint64_t address, uint64_t bytes) const {
    for (const auto& [name, data] : globals) {
      const auto begin = reinterpret_cast<uint64_t>(data.data());
      if (address >= begin && address + bytes <= begin + data.size()) return true;
    }
    return false;
  }
};

// `kind` is a word by which a report sorts: "misaligned", "out of bounds", "barrier", "unsupported", ...
[[noreturn]] inline void fail(const std::string& kind, const std::string& what) {
  throw std::runtime_error("ptx [" + kind + "] " + what);
}

struct UnknownInstruction {};

// module.cpp
std::string comparable_signature(const std::string& mangled);
std::unique_ptr<Module> load(const std::string& path);

// decode.cpp
void decode(Module& module, Kernel& kernel);

// steps.cpp
void make_steps(Kernel& kernel);

// mnemonic.cpp; read_mnemonic() throws UnknownInstruction
void read_mnemonic(const std::string& text, Instruction& in);
Class class_of(const Instruction& in);

}  // namespace ptx
