// Reads a file of PTX text into a Module; the body of a kernel stays text until its first launch.
#include <cxxabi.h>

#include <cstdlib>
#include <fstream>

#include "text.h"

namespace ptx {
namespace {

std::unique_ptr<Kernel> kernel_of_header(const std::string& header, const std::string& file) {
  auto kernel = std::make_unique<Kernel>();
  const size_t name = header.find(".entry") + 6, open = header.find('(', name), close = header.find(')', open);
  kernel->name = trim(header.substr(name, open - name));
  kernel->signature = comparable_signature(kernel->name);
  kernel->file = file;
  for (const std::string& text : split(header.substr(open + 1, close - open - 1), ',')) {
    if (text.empty()) continue;
    const Declaration d = declaration(text);
    kernel->parameter_bytes = aligned(kernel->parameter_bytes, d.align);
    kernel->parameter_offset[d.name] = kernel->parameter_bytes;
    kernel->parameters.push_back({d.bytes(), kernel->parameter_bytes});
    kernel->parameter_bytes += d.bytes();
  }
  return kernel;
}

// `.global .align 8 .b8 table[24] = {1, 2, ...}`
void add_global(Module& module, const std::string& text) {
  const size_t equals = text.find('=');
  const Declaration d = declaration(trim(text.substr(0, equals)));
  std::vector<char>& data = module.globals[d.name];
  data.assign(d.bytes(), 0);
  if (equals == std::string::npos) return;
  size_t at = 0;
  std::string number;
  for (char c : text.substr(equals + 1) + ",") {
    if (std::isalnum(c) || c == '-' || c == '_') {
      number += c;
      continue;
    }
    if (number.empty()) continue;
    if (!std::isdigit(number[0]) && number[0] != '-')
      fail("unsupported", "initial value `" + number + "` of " + d.name);
    const uint64_t value = is_float_literal(number) ? std::stoull(number.substr(2), nullptr, 16) : integer(number);
    for (int i = 0; i < size_of(d.type) && at < data.size(); ++i) data[at++] = static_cast<char>(value >> (8 * i));
    number.clear();
  }
}

}  // namespace

// The same text for a kernel whether g++ or nvcc mangled its name: they name anonymous namespaces differently.
std::string comparable_signature(const std::string& mangled) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string text = status == 0 ? demangled : mangled;
  std::free(demangled);
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t p; (p = text.find(anonymous)) != std::string::npos;) text.erase(p, anonymous.size());
  if (starts(text, "void ")) text.erase(0, 5);  // only templates have it
  for (const char* prefix : {"_GLOBAL__N__", "_INTERNAL_"}) {
    for (size_t p; (p = text.find(prefix)) != std::string::npos;) text.erase(p, text.find("::", p) + 2 - p);
  }
  text.erase(std::remove_if(text.begin(), text.end(), [](unsigned char c) { return std::isspace(c); }), text.end());
  return text;
}

std::unique_ptr<Module> load(const std::string& path) {
  std::ifstream in(path);
  if (!in) throw std::runtime_error("ptx: cannot read " + path);
  auto module = std::make_unique<Module>();
  std::unique_ptr<Kernel> kernel;
  std::string header, pending;
  bool in_header = false;
  int depth = 0, number = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    line = trim(line.substr(0, line.find("//")));
    if (line.empty()) continue;
    if (kernel) {
      std::string kept;
      for (char c : line) {
        depth += (c == '{') - (c == '}');
        if (depth == 0) break;
        kept += c;
      }
      kernel->lines.push_back(kept);
      kernel->numbers.push_back(number);
      if (depth == 0) {
        const std::string signature = kernel->signature;
        module->kernels[signature] = std::move(kernel);
      }
    } else if (in_header || line.find(".entry") != std::string::npos) {
      header = in_header ? header + " " + line : line;
      in_header = line.find('{') == std::string::npos;
      if (in_header) continue;
      kernel = kernel_of_header(header, path);
      depth = 1;
    } else {
      if (starts(line, ".file")) {  // .file 3 "path", size, time
        const size_t open = line.find('"'), close = line.find('"', open + 1);
        module->sources[std::stoi(line.substr(5))] = line.substr(open + 1, close - open - 1);
        continue;
      }
      // A variable of the module, perhaps over several lines.
      const bool variable = starts(line, ".global") || starts(line, ".const") || starts(line, ".visible .global") ||
                            starts(line, ".visible .const") || line.find(".shared") != std::string::npos;
      if (pending.empty() && !variable) continue;
      pending += " " + line;
      if (pending.find(';') == std::string::npos) continue;
      const std::string text = trim(pending.substr(0, pending.find(';')));
      pending.clear();
      if (text.find(".shared") == std::string::npos) {
        add_global(*module, text);
      } else {
        const Declaration d = declaration(text);
        module->shared[d.name] = {d.bytes(), std::max(d.align, 1)};
      }
    }
  }
  return module;
}

}  // namespace ptx
