"""Compiles CUDA sources with the host compiler against the shim of this folder, and knows how to load the result."""

import functools
import hashlib
import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda_on_host"
SANITIZE = os.environ.get("CUDA_ON_HOST_SANITIZE") == "1"

_TORCH = Path(torch.__file__).parent
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def content_hash(source: Path, command: list[str]) -> str:
    """Hash of everything a build of ``source`` depends on: itself, every header it may include, the command."""
    digest = hashlib.sha256("\0".join(command).encode() + torch.__version__.encode())
    headers = [p for folder in (ROOT / "csrc", HERE) for p in folder.rglob("*") if p.suffix in (".h", ".cuh")]
    for path in sorted([source, *headers]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(source: Path, *options: str, sanitize: bool = SANITIZE) -> Path:
    """Path of the shared object made from ``source``, from the cache when nothing changed."""
    library, error = _compile(source, *options, sanitize=sanitize)
    if error:
        raise RuntimeError(f"{source.name} does not compile for the host:\n{error[:4000]}")
    return library


@functools.cache  # of failures too: hundreds of tests may ask for the same library
def _compile(source: Path, *options: str, sanitize: bool) -> tuple[Path, str]:
    command = [
        *(compiler(), "-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", f"{_TORCH / 'include'}"),
        *(SANITIZERS if sanitize else []),
        *options,
        str(source),
        *(f"-L{_TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    kind = "".join([source.stem, ".sanitized" if sanitize else "", *options])
    library = CACHE / f"{kind}.{content_hash(source, command)}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        for stale in CACHE.glob(f"{kind}.????????????????.so"):
            stale.unlink()
        unfinished = library.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode != 0:
            return library, done.stderr
        unfinished.rename(library)
    return library, ""


def _runtime(name: str) -> str:
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def sanitizer_environment() -> dict[str, str]:
    """Environment of a Python process that can load sanitized libraries."""
    return {
        **os.environ,
        # Python itself has no C++ runtime: without it loaded first, AddressSanitizer finds no `throw` to wrap.
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "CUDA_ON_HOST_SANITIZE": "1",
    }
