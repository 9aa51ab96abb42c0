"""Compiles every `_cuda.cu` with nvcc and reads what it says of each kernel. `python -m tests.nvcc` prints it."""

import functools
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.cuda_on_host.build import ROOT, content_hash

ARCHITECTURES = ("80", "90")
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


def report(source: Path) -> str:
    command = ["nvcc", "-std=c++17", "-O3", "-c", str(source), "-o", "/dev/null", "-Xptxas", "-v"]
    # Nothing in csrc asks for more than compute_80: one pass of the compiler, machine code for each.
    command.append(f"-gencode=arch=compute_80,code=[{','.join(f'sm_{a}' for a in ARCHITECTURES)}]")
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include")]
    cached = CACHE / f"{source.stem}.{content_hash(source, command)}.txt"
    if not cached.exists():
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            return f"error:\n{done.stderr[-4000:]}"
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_suffix(f".{os.getpid()}")
        unfinished.write_text(done.stderr)
        unfinished.rename(cached)
    return cached.read_text()


@functools.cache
def _reports() -> dict[Path, str]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(report, SOURCES), strict=True))


def kernels_of(source: Path) -> list[Kernel]:
    """The kernels of a source file on every architecture; raises with nvcc's words where it does not compile."""
    report = _reports()[source]
    if report.startswith("error:"):
        raise RuntimeError(f"{source.name} does not compile for the device: {report}")
    found = _KERNEL.findall(report)
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
