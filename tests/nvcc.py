"""Compiles every `_cuda.cu` for all architectures and reads what ptxas reports about each kernel.

`python -m tests.nvcc` prints it.
"""

import functools
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.cuda_on_host.build import ROOT
from tests.ptx.build import ptx_of

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
SOURCES = sorted((ROOT / "csrc").glob("*/*_cuda.cu"))
CACHE = ROOT / "build" / "nvcc"

_KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    name: str
    architecture: int
    registers: int
    shared: int  # bytes, static
    spilled: int  # bytes stored and loaded


def report(source: Path, architecture: str) -> str:
    """What ptxas reports as it compiles nvcc's PTX, which is the same for all architectures."""
    ptx = ptx_of(source)
    said = CACHE / f"{ptx.stem}.sm_{architecture}.txt"
    if not said.exists():
        command = ["ptxas", "-v", f"-arch=sm_{architecture}", str(ptx), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for sm_{architecture}: {done.stderr[-4000:]}")
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = said.with_suffix(f".{os.getpid()}")
        unfinished.write_text(done.stderr)
        unfinished.rename(said)
    return said.read_text()


@functools.cache
def kernels_of(source: Path) -> list[Kernel]:
    """The kernels of a source on every architecture; raises with the compiler's message if it does not compile."""
    ptx_of(source)  # once, before two threads ask for it
    with ThreadPoolExecutor(2) as pool:
        found = _KERNEL.findall("".join(pool.map(partial(report, source), ARCHITECTURES)))
    names = subprocess.run(
        ["c++filt"], input="\n".join(k[0] for k in found), capture_output=True, text=True, check=True
    )
    kernels = []
    for name, (_, arch, _, stores, loads, registers, rest) in zip(names.stdout.split("\n"), found, strict=False):
        shared = re.search(r"(\d+) bytes smem", rest)
        short = re.sub(r"^void |msacore::|\(anonymous namespace\)::|c10::|\(.*\)$", "", name)
        kernels.append(
            Kernel(short, int(arch), int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads))
        )
    return kernels


if __name__ == "__main__":
    print(f"{'kernel':<90} {'arch':>5} {'registers':>9} {'shared':>7} {'spilled':>7}")
    for path in SOURCES:
        for k in kernels_of(path):
            print(f"{k.name[:90]:<90} sm_{k.architecture} {k.registers:>9} {k.shared:>7} {k.spilled:>7}")
