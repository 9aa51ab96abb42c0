"""Builds `libmsacore` and `msacore._C`; metadata lives in pyproject.toml. Nothing is downloaded here."""

import glob
import os
import re
import sys
from importlib.util import find_spec

# torch is named first: when it is missing, pip has hidden it (build isolation), and the others alone would not help.
missing = [name for name in ("torch", "setuptools", "pybind11") if find_spec(name) is None]
if missing:
    sys.exit(
        f"msacore builds against the torch that you use, and finds no {', '.join(missing)} here; without "
        "--no-build-isolation pip hides what is installed. Run: pip install setuptools wheel ninja pybind11 "
        "'torch>=2.11', then: pip install --no-build-isolation . (with extras: pip install --no-build-isolation "
        "'.[faiss]')"
    )

import pybind11  # noqa: E402
import torch  # noqa: E402
from setuptools import setup  # noqa: E402
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

DEFAULT_ARCHITECTURES = "8.0;8.6;9.0+PTX"
LIBRARY = "msacore.libmsacore"


def choose_cuda() -> tuple[bool, str]:
    """Whether to build the CUDA kernels, and why. A GPU need not be visible: container builds see none."""
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


def check_architectures(architectures: str) -> None:
    """Stop where an architecture lacks the tensor-core instructions the kernels use."""
    old = [a for a in re.findall(r"\d+\.\d+", architectures) if float(a) < 8]
    old += re.findall(r"Kepler|Maxwell|Pascal|Volta|Turing", architectures)  # torch takes names, too
    if architectures == "native" and torch.cuda.get_device_capability() < (8, 0):
        old = ["{}.{}".format(*torch.cuda.get_device_capability())]
    if old:
        sys.exit(
            f"msacore: the CUDA kernels need compute capability 8.0 (Ampere) or newer, got {', '.join(old)}; "
            "set TORCH_CUDA_ARCH_LIST without it, or MSACORE_CUDA=0 to build for the CPU alone"
        )


def build_extensions() -> list:
    """`libmsacore`, the operators, which needs no Python; and `_C`, the Python module that loads it."""
    cuda, why = choose_cuda()
    architectures = ""
    if cuda:
        # torch stops with an IndexError when it finds neither a GPU nor this variable.
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "native")
        check_architectures(architectures)
    print(f"msacore: torch {torch.__version__}, CUDA {'on' if cuda else 'off'} ({why}) {architectures}".rstrip())

    # Stable ABI of torch 2.11: one binary runs on every later torch.
    stable = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    # -fno-math-errno: sqrt sets no errno, so loops over it vectorise; its result is the same.
    # -fno-trapping-math: comparisons raise no flags, so a select in a loop need not be a branch; results are the same.
    loops = ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    cxx = ["-O3", "-g0", "-fvisibility=hidden", f"-ffile-prefix-map={os.getcwd()}/=", *loops, *stable]
    if cuda:
        cxx.append("-DUSE_CUDA")
    sources = sorted(glob.glob("csrc/*/*.cpp"))
    if not sources:
        sys.exit("msacore: csrc holds no operator; this source distribution is incomplete")
    if cuda:
        kernels = sorted(glob.glob("csrc/*/*_cuda.cu"))
        without = sorted({os.path.dirname(s) for s in sources} - {os.path.dirname(k) for k in kernels})
        if without:
            sys.exit(
                f"msacore: CUDA is on, but {', '.join(without)} holds no `_cuda.cu` file; "
                "this source distribution is incomplete. MSACORE_CUDA=0 builds for the CPU alone"
            )
        sources += kernels
    extension = CUDAExtension if cuda else CppExtension
    library = extension(
        name=LIBRARY,
        sources=sources,
        include_dirs=[os.path.abspath("csrc")],
        depends=glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True),
        # Compressed machine code takes a quarter of the space.
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-DUSE_CUDA", "-Xfatbin=-compress-all", *stable]},
    )
    library.libraries.remove("torch_python")
    module = CppExtension(
        name="msacore._C",
        sources=["csrc/module.cpp"],
        include_dirs=[os.path.abspath("csrc"), pybind11.get_include()],
        define_macros=[
            ("MSACORE_CUDA_VERSION", f'"{torch.version.cuda if cuda else ""}"'),
            ("MSACORE_CUDA_ARCHITECTURES", f'"{architectures}"'),
            ("MSACORE_TORCH_VERSION", f'"{torch.__version__}"'),
        ],
        extra_compile_args={"cxx": cxx},
        # The library lies beside the module. The module uses no symbol of it, so the linker must be told to keep it.
        extra_link_args=["-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", "-l:libmsacore.so"],
    )
    return [library, module]


class Build(BuildExtension):
    """Builds the library first, under its plain name, and links the module against it."""

    def get_ext_filename(self, name: str) -> str:
        if name.rpartition(".")[2] == "libmsacore":
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, extension) -> None:
        if extension.name == "msacore._C":
            extension.library_dirs.append(os.path.dirname(os.path.abspath(self.get_ext_fullpath(LIBRARY))))
        super().build_extension(extension)


setup(ext_modules=build_extensions(), cmdclass={"build_ext": Build})
