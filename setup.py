"""Builds the native extension `msacore._C`; metadata lives in pyproject.toml. Nothing is downloaded here."""

import glob
import os
import sys

try:
    import pybind11
    import torch
    from setuptools import setup
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError as missing:
    sys.exit(
        f"msacore builds against the packages you already have, and '{missing.name}' is missing. Run: "
        "pip install setuptools wheel ninja pybind11 'torch>=2.11', then: pip install --no-build-isolation ."
    )

DEFAULT_ARCHITECTURES = "8.0;8.6;9.0+PTX"


def choose_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why. A visible GPU is not asked for: container builds see none."""
    lacking = [
        name
        for name, there in (("nvcc (CUDA_HOME)", CUDA_HOME is not None), ("a CUDA build of torch", torch.version.cuda))
        if not there
    ]
    want = os.environ.get("MSACORE_CUDA", "auto")
    if want not in ("auto", "0", "1"):
        sys.exit(f"MSACORE_CUDA must be auto, 0 or 1, got {want!r}")
    if want == "1" and lacking:
        sys.exit(f"MSACORE_CUDA=1 asks for the CUDA kernels, but {' and '.join(lacking)} is missing")
    if want == "0":
        return False, "MSACORE_CUDA=0"
    return (False, f"missing: {', '.join(lacking)}") if lacking else (True, "nvcc and a CUDA torch are present")


def build_extension():
    cuda, why = choose_cuda()
    architectures = ""
    if cuda:
        # torch stops with an IndexError when it finds neither a GPU nor this variable.
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
    print(f"msacore: torch {torch.__version__}, CUDA {'on' if cuda else 'off'} ({why}) {architectures}".rstrip())

    # Stable ABI of torch 2.11: one binary runs on every later torch.
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    macros = [
        ("MSACORE_CUDA_VERSION", f'"{torch.version.cuda if cuda else ""}"'),
        ("MSACORE_CUDA_ARCHITECTURES", f'"{architectures}"'),
    ]
    # -fno-math-errno: sqrt sets no errno, so loops over it vectorise; its result is the same.
    # -fno-trapping-math: comparisons raise no flags, so that a select in a loop is no branch; results are the same.
    loops = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", f"-ffile-prefix-map={os.getcwd()}/=", *loops, *stable]
    if cuda:
        cxx.append("-DUSE_CUDA")
    sources = sorted(glob.glob("csrc/**/*.cpp", recursive=True))
    if cuda:
        sources += sorted(glob.glob("csrc/*/*_cuda.cu"))
    extension = CUDAExtension if cuda else CppExtension
    return extension(
        name="msacore._C",
        sources=sources,
        include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
        define_macros=macros,
        depends=glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True),
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-DUSE_CUDA", *stable]},
    )


setup(ext_modules=[build_extension()], cmdclass={"build_ext": BuildExtension})
