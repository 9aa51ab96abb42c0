// Reads the body of a kernel into instructions at its first launch.
#include <set>

#include "text.h"

namespace ptx {
namespace {

class Decoder {
 public:
  Decoder(Module& module, Kernel& kernel) : module_(module), kernel_(kernel) {}

  void run() {
    split_statements();
    place_variables();
    for (const Statement& s : statements_) read(s);
    for (auto& [index, label] : branches_) {
      const auto found = labels_.find(label);
      if (found == labels_.end()) unsupported(kernel_.code[index].text);
      kernel_.code[index].target = found->second;
    }
    kernel_.registers = static_cast<int>(registers_.size());
    make_steps(kernel_);
    kernel_.decoded = true;
  }

 private:
  struct Statement {
    std::string text;
    int line;
  };

  [[noreturn]] void unsupported(const std::string& text) {
    fail("unsupported",
         "`" + text + "` in " + kernel_.short_name() + "; how to add an instruction: tests/ptx/README.md");
  }

  // Splits at `;` and `:`. A brace opens a scope at the beginning of a statement, and a vector inside one.
  void split_statements() {
    std::string current;
    bool in_vector = false;
    for (size_t i = 0; i < kernel_.lines.size(); ++i) {
      const int line = kernel_.numbers[i];
      if (starts(kernel_.lines[i], ".loc")) {  // the one directive without a terminator
        statements_.push_back({kernel_.lines[i], line});
        continue;
      }
      for (char c : kernel_.lines[i]) {
        const bool opens_vector = c == '{' && !trim(current).empty(), closes_vector = c == '}' && in_vector;
        if (opens_vector || closes_vector) in_vector = opens_vector;
        if ((c == '{' && !opens_vector) || (c == '}' && !closes_vector)) {
          statements_.push_back({std::string(1, c), line});
        } else if (c == ';') {
          statements_.push_back({trim(current), line});
          current.clear();
        } else {
          current += c;
        }
      }
      current += ' ';
      if (const std::string text = trim(current); !text.empty() && text.back() == ':') {
        statements_.push_back({text, line});
        current.clear();
      }
    }
  }

  void place_variables() {
    std::string body;
    for (const Statement& s : statements_) {
      body += s.text + '\n';
      if (!starts(s.text, ".shared") && !starts(s.text, ".local")) continue;
      const Declaration d = declaration(s.text);
      const bool shared = starts(s.text, ".shared");
      int& used = shared ? kernel_.shared_bytes : kernel_.local_bytes;
      used = aligned(used, d.align);
      symbols_[d.name] = {shared ? Space::Shared : Space::Local, static_cast<uint64_t>(used)};
      used += d.bytes();
    }
    std::vector<std::string> dynamic;
    for (const auto& [name, variable] : module_.shared) {
      if (body.find(name) == std::string::npos) continue;
      if (variable.size == 0) {
        dynamic.push_back(name);
        continue;
      }
      kernel_.shared_bytes = aligned(kernel_.shared_bytes, variable.align);
      symbols_[name] = {Space::Shared, static_cast<uint64_t>(kernel_.shared_bytes)};
      kernel_.shared_bytes += variable.size;
    }
    // Dynamic shared memory follows the static part; a declaration may rely on an alignment of 16, but not more.
    if (!dynamic.empty()) kernel_.shared_bytes = aligned(kernel_.shared_bytes, 16);
    for (const std::string& name : dynamic) symbols_[name] = {Space::Shared, uint64_t(kernel_.shared_bytes)};
    for (const auto& [name, offset] : kernel_.parameter_offset) symbols_[name] = {Space::Param, uint64_t(offset)};
    for (auto& [name, data] : module_.globals)
      symbols_[name] = {Space::Global, reinterpret_cast<uint64_t>(data.data())};
  }

  // ---- registers: numbered as they are met; names of an inner scope (inline assembly) hide outer ones

  void declare_registers(const std::string& text) {
    const size_t type = text.find('.', 1);
    for (const std::string& name : split(text.substr(text.find_first_of(" \t", type)), ',')) {
      if (const size_t range = name.find('<'); range != std::string::npos) {
        prefixes_.insert(name.substr(0, range));
      } else {
        const std::string unique = scopes_.empty() ? name : name + "@" + std::to_string(++unique_);
        if (!scopes_.empty()) scopes_.back()[name] = unique;
        names_.insert(unique);
      }
    }
  }

  // The name that an inner scope gives a register, or none.
  std::string name_in_scope(const std::string& written) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      if (const auto found = scope->find(written); found != scope->end()) return found->second;
    }
    return "";
  }

  int register_of(const std::string& written) {
    const std::string inner = name_in_scope(written), name = inner.empty() ? written : inner;
    // A special register that is not known here must not pass for an ordinary one.
    const bool declared = names_.count(name) || prefixes_.count(name.substr(0, name.find_first_of("0123456789")));
    if (!declared) unsupported(written);
    return numbered(name);
  }
  int numbered(const std::string& name) {
    return registers_.emplace(name, static_cast<int>(registers_.size())).first->second;
  }

  // ---- operands

  Operand operand(const std::string& text) {
    Operand o;
    if (text.empty() || text == "_") return o;
    if (text[0] == '!') {
      o = operand(trim(text.substr(1)));
      o.negated = true;
    } else if (text[0] == '{') {
      o.kind = Operand::Vector;
      for (const std::string& element : split(text.substr(1, text.size() - 2), ',')) {
        if (o.count == 4) unsupported(text);
        o.regs[o.count++] = element_of_vector(element);
      }
    } else if (text[0] == '[') {
      o = memory_operand(trim(text.substr(1, text.size() - 2)));
    } else if (text[0] == '%' || !name_in_scope(text).empty()) {
      return register_operand(text);
    } else if (is_float_literal(text)) {
      o.kind = Operand::Immediate;
      o.value = std::stoull(text.substr(2), nullptr, 16);
    } else if (std::isdigit(text[0]) || text[0] == '-') {
      o.kind = Operand::Immediate;
      o.value = integer(text);
    } else if (const auto symbol = symbols_.find(text); symbol != symbols_.end()) {
      o.kind = Operand::Symbol;
      o.space = symbol->second.first;
      o.value = symbol->second.second;
    } else {
      unsupported(text);
    }
    return o;
  }

  // A number inside a vector becomes a register that holds it from the start; `_` becomes one that is never read.
  int element_of_vector(const std::string& text) {
    if (text == "_") return numbered("_");
    const Operand e = operand(text);
    if (e.kind == Operand::Register) return e.reg;
    if (e.kind != Operand::Immediate) unsupported(text);
    const int reg = numbered("=" + text);
    kernel_.constants.emplace_back(reg, e.value);
    return reg;
  }

  Operand memory_operand(const std::string& text) {
    size_t sign = text.find('+');
    if (sign == std::string::npos) sign = text.find('-', 1);
    Operand o = operand(trim(text.substr(0, sign)));
    if (sign != std::string::npos) {
      o.value += integer(trim(text.substr(text[sign] == '+' ? sign + 1 : sign)));
    }
    o.kind = Operand::Memory;
    return o;
  }

  Operand register_operand(const std::string& text) {
    static const char* const special[] = {"%tid.x",    "%tid.y",    "%tid.z",   "%ntid.x",  "%ntid.y",
                                          "%ntid.z",   "%ctaid.x",  "%ctaid.y", "%ctaid.z", "%nctaid.x",
                                          "%nctaid.y", "%nctaid.z", "%laneid"};  // numbers: Block::special()
    Operand o;
    for (size_t i = 0; i < std::size(special); ++i) {
      if (text != special[i]) continue;
      o.kind = Operand::Special;
      o.value = i;
      return o;
    }
    o.kind = Operand::Register;
    const size_t bar = text.find('|');
    o.reg = register_of(trim(text.substr(0, bar)));
    if (bar != std::string::npos) {
      o.count = 2;
      o.regs[1] = register_of(trim(text.substr(bar + 1)));
    }
    return o;
  }

  // ---- statements

  void read(const Statement& s) {
    std::string text = s.text;
    if (text == "{") return scopes_.emplace_back(), void();
    if (text == "}") return scopes_.empty() ? void() : scopes_.pop_back();
    if (starts(text, ".reg")) return declare_registers(text);
    if (starts(text, ".loc")) {
      int source = 0, line = 0;
      std::stringstream(text.substr(4)) >> source >> line;
      if (line > 0) source_ = source, source_line_ = line;
      return;
    }
    if (text.empty() || text[0] == '.') return;  // .pragma, variables
    if (text.back() == ':') {
      labels_[text.substr(0, text.size() - 1)] = static_cast<int>(kernel_.code.size());
      return;
    }
    Instruction in;
    in.text = text;
    in.line = s.line;
    in.source = source_;
    in.source_line = source_line_;
    if (text[0] == '@') {
      const size_t end = text.find_first_of(" \t");
      in.predicate_negated = text[1] == '!';
      in.predicate = register_of(text.substr(1 + in.predicate_negated, end - 1 - in.predicate_negated));
      text = trim(text.substr(end));
    }
    const size_t end = text.find_first_of(" \t");
    const std::string rest = end == std::string::npos ? "" : trim(text.substr(end));
    try {
      read_mnemonic(text.substr(0, end), in);
    } catch (const UnknownInstruction&) {
      unsupported(in.text);
    }
    if (in.op == Opcode::Bra) {
      branches_.emplace_back(kernel_.code.size(), rest);
    } else {
      size_t count = 0;
      for (const std::string& each : operands_of(rest)) {
        if (count == std::size(in.o)) unsupported(in.text);
        in.o[count++] = operand(each);
      }
    }
    if (in.op == Opcode::Barrier || in.op == Opcode::BarrierReduce) {
      const int id = in.op == Opcode::Barrier ? 0 : 1;
      const bool whole = in.o[id].kind == Operand::Immediate && in.o[id].value == 0;
      if (!whole || (id == 0 && in.o[1].kind != Operand::None))
        unsupported(in.text + " (only barrier 0 of all threads)");
    }
    in.kind = class_of(in);
    kernel_.code.push_back(in);
  }

  static std::vector<std::string> operands_of(const std::string& text) {
    std::vector<std::string> found;
    std::string current;
    int depth = 0;
    for (char c : text) {
      depth += (c == '{' || c == '[') - (c == '}' || c == ']');
      if (c == ',' && depth == 0) {
        found.push_back(trim(current));
        current.clear();
      } else {
        current += c;
      }
    }
    if (!trim(current).empty()) found.push_back(trim(current));
    return found;
  }

  Module& module_;
  Kernel& kernel_;
  std::vector<Statement> statements_;
  std::map<std::string, std::pair<Space, uint64_t>> symbols_;
  std::unordered_map<std::string, int> registers_, labels_;
  std::set<std::string> prefixes_, names_;
  std::vector<std::map<std::string, std::string>> scopes_;
  std::vector<std::pair<size_t, std::string>> branches_;
  int unique_ = 0, source_ = 0, source_line_ = 0;
};

}  // namespace

void decode(Module& module, Kernel& kernel) { Decoder(module, kernel).run(); }

}  // namespace ptx
