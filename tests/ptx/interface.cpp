// The functions that the tests (Python, through ctypes) and launches (launch.h) call, and the hooks that record, to the
// byte, the memory that torch allocates.
#include <algorithm>
#include <cerrno>
#include <cstring>

#include "block.h"

namespace ptx {

State& state() {
  static State instance;
  return instance;
}

// Never destroyed, because memory is freed until the very end of the process.
Allocations& allocations() {
  static auto* instance = new Allocations;
  return *instance;
}

std::string place(const Module& module, const Instruction& in) {
  std::string text = "`" + in.text + "`";
  std::replace(text.begin(), text.end(), '\t', ' ');
  const auto source = module.sources.find(in.source);
  if (source != module.sources.end()) {
    const std::string& path = source->second;
    text += " from " + path.substr(path.rfind('/') + 1) + ":" + std::to_string(in.source_line);
  }
  return text + " (PTX line " + std::to_string(in.line) + ")";
}

namespace {

Kernel& kernel_named(Module& module, const std::string& mangled) {
  const std::string signature = comparable_signature(mangled);
  const auto found = module.kernels.find(signature);
  if (found == module.kernels.end()) fail("unsupported", "no kernel " + signature + " in the PTX");
  if (!found->second->decoded) decode(module, *found->second);
  return *found->second;
}

}  // namespace
}  // namespace ptx

// ---- C interface ----

using ptx::state;

extern "C" {

// For launch.h. It may throw, because the caller is C++ code with the same runtime library.
void ptx_launch(const char* library, const char* mangled, const unsigned* grid, const unsigned* block, size_t dynamic,
                int count, const void* const* arguments, const size_t* sizes) {
  const auto module = state().modules.find(library);
  if (module == state().modules.end()) ptx::fail("unsupported", std::string("no PTX of ") + library);
  ptx::Kernel& kernel = ptx::kernel_named(*module->second, mangled);
  if (int(kernel.parameters.size()) != count) ptx::fail("unsupported", "parameters of " + kernel.signature);
  std::vector<uint64_t> raw(kernel.parameter_bytes / 8 + 16);
  char* parameters = reinterpret_cast<char*>((reinterpret_cast<uint64_t>(raw.data()) + 63) / 64 * 64);
  for (int i = 0; i < count; ++i) {
    if (size_t(kernel.parameters[i].size) != sizes[i]) {
      ptx::fail("wrong",
                "parameter " + std::to_string(i) + " of " + kernel.short_name() + " has another size on the device");
    }
    std::memcpy(parameters + kernel.parameters[i].offset, arguments[i], sizes[i]);
  }
  ptx::Launch launch{*module->second,
                     kernel,
                     {grid[0], grid[1], grid[2]},
                     {block[0], block[1], block[2]},
                     kernel.shared_bytes + dynamic,
                     parameters};
  const uint64_t blocks = uint64_t{grid[0]} * grid[1] * grid[2];
  const auto shape = [](const unsigned* n) {
    return std::to_string(n[0]) + "x" + std::to_string(n[1]) + "x" + std::to_string(n[2]);
  };
  if (state().statistics) state().statistics->begin_launch(kernel, shape(grid), shape(block), blocks);
  ++state().launches;
  ptx::Block machine(launch);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = state().schedule == "reverse" ? blocks - 1 - i : i;
    machine.run(b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]);
  }
  if (state().statistics) state().statistics->end_launch();
}

// For the tests. Functions that can fail return an error text or null; the text lives until the next call.
const char* ptx_load(const char* library, const char* path) {
  static std::string error;
  try {
    state().modules[library] = ptx::load(path);
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

void ptx_configure(int mma, const char* schedule) {
  state().mma = static_cast<ptx::MmaModel>(mma);
  state().schedule = schedule;
}

void ptx_statistics(const char* path) { state().statistics = std::make_unique<ptx::Statistics>(path); }
void ptx_name_case(const char* name) {
  if (state().statistics) state().statistics->name_case(name);
}
uint64_t ptx_launches() { return state().launches; }
uint64_t ptx_instructions() { return state().instructions; }

// What was found since the last call, one line each.
const char* ptx_findings() {
  static std::string text;
  text.clear();
  for (const auto& [key, times] : state().findings) {
    const auto& [kernel, module, what, pc, other] = key;
    text += what + " in " + kernel->short_name() + ", " + std::to_string(times) +
            " bytes: " + ptx::place(*module, kernel->code[pc]);
    if (other >= 0) text += " against " + ptx::place(*module, kernel->code[other]);
    text += '\n';
  }
  state().findings.clear();
  return text.c_str();
}

// The kernels of all loaded modules that were launched, or those that were not, one line each.
const char* ptx_kernels(int launched) {
  static std::string text;
  text.clear();
  for (const auto& [library, module] : state().modules) {
    for (const auto& [signature, kernel] : module->kernels) {
      if (kernel->decoded == (launched != 0)) text += signature + '\n';
    }
  }
  return text.c_str();
}

// Whether the memory that holds an address was seen when it was allocated.
int ptx_knows(const void* address) {
  return ptx::allocations().holding(reinterpret_cast<uint64_t>(address), 1).second != 0;
}

// ---- with LD_PRELOAD these functions come before libc's; torch's CPU allocator uses no others. Fresh memory is filled
// with NaN, which device memory may hold too.
void* __libc_memalign(size_t alignment, size_t bytes);
void __libc_free(void* pointer);

static thread_local bool inside_table = false;  // the table of allocations allocates too
static constexpr size_t kTorchAlignment = 64;

int posix_memalign(void** pointer, size_t alignment, size_t bytes) noexcept {
  void* memory = __libc_memalign(alignment, bytes);
  if (!memory) return ENOMEM;
  *pointer = memory;
  if (alignment >= kTorchAlignment && !inside_table) {
    inside_table = true;
    std::memset(memory, 0xff, bytes);
    ptx::allocations().add(memory, bytes);
    inside_table = false;
  }
  return 0;
}

void free(void* pointer) noexcept {
  if (reinterpret_cast<uint64_t>(pointer) % kTorchAlignment == 0 && pointer && !inside_table) {
    inside_table = true;
    ptx::allocations().remove(pointer);
    inside_table = false;
  }
  __libc_free(pointer);
}

}  // extern "C"
