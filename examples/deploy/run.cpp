// Runs a model that torch.export and AOTInductor packaged, in a program without Python.
//
//   run LIBMSACORE.so MODEL.pt2 INPUTS.pt OUTPUTS.pt
//
// INPUTS.pt is a list of tensors that torch.save wrote; OUTPUTS.pt becomes a tuple of tensors for torch.load.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

namespace {

std::vector<at::Tensor> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  const c10::IValue value = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> tensors;
  for (const c10::IValue& item : value.toListRef()) tensors.push_back(item.toTensor());
  return tensors;
}

void write(const char* path, const std::vector<at::Tensor>& tensors) {
  // A tuple: torch.load refuses TorchScript's lists of tensors.
  std::vector<c10::IValue> values(tensors.begin(), tensors.end());
  const std::vector<char> bytes = torch::jit::pickle_save(c10::ivalue::Tuple::create(std::move(values)));
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  TORCH_CHECK(file.flush(), "cannot write ", path);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s LIBMSACORE.so MODEL.pt2 INPUTS.pt OUTPUTS.pt\n", argv[0]);
    return 2;
  }
  // Loading the library registers the operators; it must stay loaded as long as models run.
  if (dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  try {
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    write(argv[4], model.run(read(argv[3])));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
