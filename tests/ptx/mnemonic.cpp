// From a mnemonic and its modifiers to an opcode. An instruction that is not known here stops the kernel.
#include <unordered_map>

#include "text.h"

namespace ptx {
namespace {

class Mnemonic {
 public:
  explicit Mnemonic(const std::string& text) : parts_(split(text, '.')) {
    for (std::string& part : parts_) {
      if (part == "shared::cta") part = "shared";
      if (part == "param::entry") part = "param";
      if (part == "shared::cluster" || part == "param::func") unknown();
    }
  }

  void read(Instruction& in) const {
    for (const std::string& part : parts_) {
      const Type type = type_from(part);
      if (type != Type::None) (in.type == Type::None ? in.type : in.second) = type;
    }
    in.flush = has("ftz");
    in.approximate = has("approx");
    in.vector = has("v4") ? 4 : has("v2") ? 2 : 1;
    in.space = static_cast<Space>(1 + which({"global", "shared", "local", "param", "const"}));
    in.saturate = has("sat");
    if (in.saturate && !is_float(in.type)) unknown();
    const bool packed = has("f16x2") || has("bf16x2") || has("u16x2") || has("s16x2");
    if (packed && parts_[0] != "cvt") unknown();
    in.op = opcode(in);
  }

 private:
  [[noreturn]] static void unknown() { throw UnknownInstruction(); }

  bool has(const char* part) const { return std::find(parts_.begin(), parts_.end(), part) != parts_.end(); }

  // Position in `names` of the modifier that the instruction has, or `otherwise`.
  int which(std::initializer_list<const char*> names, int otherwise = -1) const {
    int i = 0;
    for (const char* name : names) {
      if (has(name)) return i;
      ++i;
    }
    return otherwise;
  }

  Opcode opcode(Instruction& in) const {
    static const std::unordered_map<std::string, Opcode> plain{
        {"mov", Opcode::Mov},           {"add", Opcode::Add},    {"sub", Opcode::Sub},      {"div", Opcode::Div},
        {"rem", Opcode::Rem},           {"neg", Opcode::Neg},    {"abs", Opcode::Abs},      {"fma", Opcode::Fma},
        {"and", Opcode::And},           {"or", Opcode::Or},      {"xor", Opcode::Xor},      {"not", Opcode::Not},
        {"shl", Opcode::Shl},           {"shr", Opcode::Shr},    {"prmt", Opcode::Prmt},    {"bfe", Opcode::Bfe},
        {"bfi", Opcode::Bfi},           {"popc", Opcode::Popc},  {"clz", Opcode::Clz},      {"brev", Opcode::Brev},
        {"lop3", Opcode::Lop3},         {"selp", Opcode::Selp},  {"ex2", Opcode::Ex2},      {"lg2", Opcode::Lg2},
        {"rcp", Opcode::Rcp},           {"sqrt", Opcode::Sqrt},  {"rsqrt", Opcode::Rsqrt},  {"sin", Opcode::Sin},
        {"cos", Opcode::Cos},           {"ld", Opcode::Ld},      {"ldu", Opcode::Ld},       {"st", Opcode::St},
        {"bra", Opcode::Bra},           {"ret", Opcode::Ret},    {"exit", Opcode::Ret},     {"trap", Opcode::Trap},
        {"fence", Opcode::Nop},         {"membar", Opcode::Nop}, {"prefetch", Opcode::Nop}, {"prefetchu", Opcode::Nop},
        {"copysign", Opcode::Copysign},
    };
    const std::string& name = parts_[0];
    if (const auto found = plain.find(name); found != plain.end()) return found->second;
    if (name == "mul") return has("wide") ? Opcode::MulWide : has("hi") ? Opcode::MulHi : Opcode::Mul;
    if (name == "mad" && !has("hi")) return has("wide") ? Opcode::MadWide : Opcode::Mad;
    if (name == "min" || name == "max") {
      in.variant = has("NaN");
      return name == "min" ? Opcode::Min : Opcode::Max;
    }
    if (name == "cvt") {
      in.variant = 1 + which({"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna"});
      in.detail = has("tf32") ? 1 : has("f16x2") ? 2 : has("bf16x2") ? 3 : 0;  // kinds that are not a Type
      return Opcode::Cvt;
    }
    if (name == "cvta") return has("to") ? Opcode::CvtaTo : Opcode::Cvta;
    if (name == "bfind") {
      in.variant = has("shiftamt");
      return Opcode::Bfind;
    }
    if (name == "shf") {
      in.variant = has("r");
      in.detail = has("wrap");
      return Opcode::Shf;
    }
    if (name == "setp") {
      // lo, ls, hi, hs are lt, le, gt, ge of unsigned numbers
      int compare = which({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"});
      if (compare < 0 && has("lo")) compare = static_cast<int>(Compare::Lt);
      if (compare < 0 && has("ls")) compare = static_cast<int>(Compare::Le);
      if (compare < 0 && has("hi")) compare = static_cast<int>(Compare::Gt);
      if (compare < 0 && has("hs")) compare = static_cast<int>(Compare::Ge);
      if (compare < 0) unknown();
      in.variant = compare;
      in.detail = 1 + which({"and", "or", "xor"});
      return Opcode::Setp;
    }
    if (name == "bar" || name == "barrier") {
      if (has("warp")) return Opcode::WarpSync;
      if (has("cluster") || has("arrive")) unknown();
      if (!has("red")) return Opcode::Barrier;
      in.variant = which({"and", "or", "popc"});
      return Opcode::BarrierReduce;
    }
    if (name == "shfl" && has("sync")) {
      in.variant = which({"bfly", "idx", "up", "down"});
      return Opcode::Shfl;
    }
    if (name == "vote" && has("sync") && !has("uni")) {
      in.variant = which({"ballot", "any", "all"});
      return Opcode::Vote;
    }
    if (name == "match" && has("any")) return Opcode::Match;
    if (name == "atom" || name == "red") {
      const int operation = which({"add", "min", "max", "and", "or", "xor", "exch", "cas"});
      if (operation < 0) unknown();
      in.variant = operation;
      return name == "atom" ? Opcode::Atom : Opcode::Red;
    }
    if (name == "cp" && has("async") && !has("bulk") && !has("mbarrier")) {
      if (has("commit_group")) return Opcode::CpAsyncCommit;
      if (has("wait_group") || has("wait_all")) {
        in.variant = has("wait_all");
        return Opcode::CpAsyncWait;
      }
      return Opcode::CpAsync;
    }
    if (name == "ldmatrix" && has("m8n8") && has("b16")) {
      in.variant = has("trans");
      in.detail = has("x4") ? 4 : has("x2") ? 2 : 1;
      return Opcode::LdMatrix;
    }
    if (name == "mma" && in.type == Type::F32) {
      in.variant = has("m16n8k16") ? 16 : has("m16n8k8") ? 8 : 0;  // k
      in.detail = has("f16") ? 0 : has("bf16") ? 1 : has("tf32") ? 2 : 3;
      if ((in.variant == 16 && in.detail < 2) || (in.variant == 8 && in.detail == 2)) return Opcode::Mma;
    }
    unknown();
  }

  std::vector<std::string> parts_;
};

}  // namespace

void read_mnemonic(const std::string& text, Instruction& in) { Mnemonic(text).read(in); }

Class class_of(const Instruction& in) {
  switch (in.op) {
    case Opcode::Mma:
      return Class::Mma;
    case Opcode::LdMatrix:
      return Class::LdMatrix;
    case Opcode::CpAsync:
      return Class::AsyncCopy;
    case Opcode::Atom:
    case Opcode::Red:
      return Class::Atomic;
    case Opcode::Shfl:
    case Opcode::Vote:
    case Opcode::Match:
    case Opcode::WarpSync:
      return Class::Warp;
    case Opcode::Barrier:
    case Opcode::BarrierReduce:
    case Opcode::CpAsyncCommit:
    case Opcode::CpAsyncWait:
    case Opcode::Nop:
      return Class::Barrier;
    case Opcode::Bra:
    case Opcode::Ret:
    case Opcode::Trap:
      return Class::Control;
    case Opcode::Mov:
    case Opcode::Cvta:
    case Opcode::CvtaTo:
      return Class::Move;
    case Opcode::Cvt:
      return Class::Convert;
    case Opcode::Ld:
    case Opcode::St: {
      const bool load = in.op == Opcode::Ld;
      if (in.space == Space::Shared) return load ? Class::SharedLoad : Class::SharedStore;
      if (in.space == Space::Param || in.space == Space::Const) return Class::Parameter;
      if (in.space == Space::Local) return Class::Local;
      return load ? Class::GlobalLoad : Class::GlobalStore;
    }
    case Opcode::Ex2:
    case Opcode::Lg2:
    case Opcode::Rcp:
    case Opcode::Sqrt:
    case Opcode::Rsqrt:
    case Opcode::Sin:
    case Opcode::Cos:
      return Class::Special;
    default:
      break;
  }
  if (in.type == Type::F64) return in.op == Opcode::Div ? Class::Special : Class::Float64;
  if (is_float(in.type)) return in.op == Opcode::Div ? Class::Special : Class::Float32;
  return Class::Integer;
}

}  // namespace ptx
