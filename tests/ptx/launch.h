// For a CUDA source that is built for the host with -DCUDA_ON_HOST_PTX: a launch runs the PTX that nvcc made of the
// kernel instead of its host code. Grids, buffers and constants come from the operator's own launch code.
#pragma once

#include <dlfcn.h>

#include <map>

extern "C" void ptx_launch(const char* library, const char* mangled, const unsigned* grid, const unsigned* block,
                           size_t dynamic, int count, const void* const* arguments, const size_t* sizes);

namespace cuda_on_host {
namespace {

inline Dl_info this_library() {
  static char here;
  Dl_info library{};
  dladdr(&here, &library);
  return library;
}

// Kernels are local symbols, which dladdr does not find: `nm` lists them.
inline const std::string& kernel_symbol(const void* address) {
  static const std::map<uintptr_t, std::string> symbols = [] {
    const Dl_info library = this_library();
    std::map<uintptr_t, std::string> found;
    const std::string command = std::string("nm --defined-only '") + library.dli_fname + "'";
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) throw std::runtime_error("ptx: cannot run nm");
    char line[1 << 15];
    while (std::fgets(line, sizeof line, pipe)) {
      char* end = nullptr;
      const uintptr_t offset = std::strtoull(line, &end, 16);
      if (end == line || !std::strchr("tTwWu", end[1])) continue;
      std::string name = end + 3;
      name.erase(name.find_last_not_of("\n") + 1);
      found[reinterpret_cast<uintptr_t>(library.dli_fbase) + offset] = name;
    }
    pclose(pipe);
    return found;
  }();
  const auto found = symbols.find(reinterpret_cast<uintptr_t>(address));
  if (found == symbols.end()) throw std::runtime_error("ptx: a kernel without a symbol");
  return found->second;
}

}  // namespace

template <typename... P, typename... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  const std::tuple<P...> parameters(static_cast<P>(args)...);
  const unsigned grid_size[] = {grid.x, grid.y, grid.z}, block_size[] = {block.x, block.y, block.z};
  std::apply(
      [&](const P&... each) {
        const void* const pointers[] = {static_cast<const void*>(&each)..., nullptr};
        const size_t sizes[] = {sizeof(P)..., 0};
        ptx_launch(this_library().dli_fname, kernel_symbol(reinterpret_cast<const void*>(kernel)).c_str(), grid_size,
                   block_size, shared_bytes, sizeof...(P), pointers, sizes);
      },
      parameters);
}

}  // namespace cuda_on_host
