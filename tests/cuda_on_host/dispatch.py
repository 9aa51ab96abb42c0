"""Runs the operators' CUDA code on CPU tensors: their `_cuda.cu` files, built for the host, take over the calls."""

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import msacore  # noqa: F401  (registers the schemas that are copied here)
from tests.cuda_on_host.build import ROOT, build
from tests.opcase import tensors_of

SOURCES = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))


@functools.cache
def _library() -> torch.library.Library:
    """The library `msacore_host`: every schema of `msacore`, implemented by the CUDA code built for the host."""
    binaries = [CudaOnHost.binary_of(source) for source in CudaOnHost.sources]
    library = torch.library.Library("msacore_host", "FRAGMENT")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith("msacore::"):
            library.define(str(schema).removeprefix("msacore::"))
    for binary in binaries:
        torch.ops.load_library(binary)
    return library


def launches() -> int:
    """The number of kernels that all operators together have launched on the host."""
    _library()
    return sum(ctypes.CDLL(str(build(source))).cuda_on_host_launches() for source in SOURCES)


def operators_of(source: Path) -> list[str]:
    """Names of the operators that a source registers, read from its text so that collecting tests compiles nothing."""
    return re.findall(r'm\.impl\("(\w+)"', source.read_text())


@functools.cache
def operators_with_cuda_code() -> frozenset[str]:
    return frozenset(name for source in SOURCES for name in operators_of(source))


class CudaOnHost(TorchDispatchMode):
    """While active, calls of `torch.ops.msacore`, forward and backward, run the CUDA code on the CPU.

    Before the first use, a process may choose other sources and another way to build them.
    """

    sources: Sequence[Path] = SOURCES
    binary_of: Callable[[Path], Path] = staticmethod(build)

    def __init__(self) -> None:
        super().__init__()
        _library()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "msacore" and not any(t.is_meta for _, t in tensors_of(args)):
            self.calls += 1
            func = getattr(getattr(torch.ops.msacore_host, func._schema.name.split("::")[1]), func._overloadname)
        return func(*args, **(kwargs or {}))
