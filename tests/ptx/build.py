"""Builds what a run needs: the interpreter, the PTX of a CUDA source, and the source's launch code for the host."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cuda_on_host.build import INCLUDES, ROOT, build, cached, compiler

HERE = Path(__file__).parent
CACHE = ROOT / "build" / "ptx"


def _made(kind: str, suffix: str, source: Path, command: list[str]) -> Path:
    path, error = cached(CACHE, kind, suffix, source, command)
    if error:
        raise RuntimeError(f"{' '.join(command)} failed:\n{error[-6000:]}")
    return path


def interpreter() -> Path:
    """The interpreter, a shared library."""
    flags = ["-std=c++20", "-O3", "-g1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-ffp-contract=off"]
    flags += ["-fno-semantic-interposition", "-Wl,-Bsymbolic-functions"]  # its calls to itself go through no table
    return _made("libptx", "so", HERE / "interpreter.cpp", [compiler(), *flags, str(HERE / "interpreter.cpp"), "-o"])


def ptx_of(source: Path) -> Path:
    """The PTX that nvcc makes of a source for compute_80, which serves all architectures.

    csrc needs nothing newer. For compute_90 nvcc converts bfloat16 with another instruction; nothing else differs.
    Only launch code depends on the sizes of tests (`tests/test_build.py` checks this), so the same PTX serves both.
    """
    command = ["nvcc", "-x", "cu", "-std=c++17", "-O3", "--ptx", "-lineinfo", "-arch=compute_80", "-DUSE_CUDA"]
    command += [*INCLUDES, str(source), "-o"]
    return _made(source.stem, "ptx", source, command)


def host_of(source: Path, small: bool = True) -> Path:
    """The launch code of a source, built for the host: its launches go to the interpreter."""
    return build(source, "-DCUDA_ON_HOST_PTX", "-O0", sanitize=False, small=small)


def preloaded() -> dict[str, str]:
    """Environment of a Python process that loads the interpreter before libc, so that it sees what torch allocates."""
    return {**os.environ, "LD_PRELOAD": str(interpreter())}


@contextmanager
def compilers_alone() -> Iterator[None]:
    """Keep the interpreter out of the processes that this one starts."""
    preload = os.environ.pop("LD_PRELOAD", None)
    yield
    if preload is not None:
        os.environ["LD_PRELOAD"] = preload
