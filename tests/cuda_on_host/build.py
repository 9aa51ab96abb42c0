"""Compiles CUDA sources with the host compiler against the shim of this folder, and knows how to load the result."""

import functools
import hashlib
import os
import re
import subprocess
import threading
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / "build" / "cuda_on_host"
SANITIZE = os.environ.get("CUDA_ON_HOST_SANITIZE") == "1"

_TORCH = Path(torch.__file__).parent
# Compared with -O1 the compiler takes two thirds of the time, and the tests take as long.
SANITIZERS = ["-Og", "-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
# What any compiler needs for a CUDA source.
INCLUDES = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{ROOT / 'csrc'}",
    *("-isystem", f"{_TORCH / 'include'}"),
]
SMALL_SIZES = "-DMSACORE_SMALL_SIZES"  # see csrc/cuda/device.cuh


def compiler() -> str:
    return os.environ.get("CXX", "g++")


@functools.cache
def _included(path: Path) -> frozenset[Path]:
    """The files of this project that a file names in its `#include` lines, whatever conditions surround these lines."""
    names = re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE)
    places = [folder / name for name in names for folder in (path.parent, ROOT / "csrc", HERE)]
    return frozenset(place.resolve() for place in places if place.is_file())


def files_of(source: Path) -> list[Path]:
    """A source and every header of this project that it may include."""
    files, new = {source}, {source}
    while new:
        new = {path for file in new for path in _included(file)} - files
        files |= new
    return sorted(files)


def content_hash(source: Path, command: list[str]) -> str:
    """Hash of everything a build of ``source`` depends on: its files and the command."""
    digest = hashlib.sha256("\0".join(command).encode() + torch.__version__.encode())
    for path in files_of(source):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cached(folder: Path, kind: str, suffix: str, source: Path, command: list[str]) -> tuple[Path, str]:
    """What a command that ends with `-o` writes: its path, and the compiler's message if the command failed.

    Built once for each content of its dependencies; `kind` distinguishes it from other outputs of the same source.
    """
    path = folder / f"{kind}.{content_hash(source, command)}.{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{kind}.????????????????.{suffix}"):
            stale.unlink(missing_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        done = subprocess.run([*command, str(unfinished)], capture_output=True, text=True)
        if done.returncode != 0:
            return path, done.stderr
        unfinished.rename(path)
    return path, ""


def build(source: Path, *options: str, sanitize: bool = SANITIZE, small: bool = True) -> Path:
    """Path of the shared object made from ``source``, from the cache when nothing changed.

    Args:
        source: A CUDA source, or one of the shim's own tests.
        options: Further compiler options; they become part of the file's name.
        sanitize: With AddressSanitizer and UBSan.
        small: With the sizes of tests, not those of a CUDA build.
    """
    library, error = _compile(source, *options, sanitize=sanitize, small=small)
    if error:
        raise RuntimeError(f"{source.name} does not compile for the host:\n{error[:4000]}")
    return library


@functools.cache  # also of failures: hundreds of tests may ask for the same library
def _compile(source: Path, *options: str, sanitize: bool, small: bool) -> tuple[Path, str]:
    command = [
        *(compiler(), "-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"),
        *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
        *(f"-I{HERE}", *INCLUDES),
        *(SANITIZERS if sanitize else []),
        *([SMALL_SIZES] if small else []),
        *options,
        str(source),
        *(f"-L{_TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-o"),
    ]
    kind = "".join([source.stem, ".sanitized" if sanitize else "", "" if small else ".production", *options])
    return cached(CACHE, kind, "so", source, command)


def _runtime(name: str) -> str:
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


def sanitizer_environment() -> dict[str, str]:
    """Environment of a Python process that can load sanitized libraries."""
    return {
        **os.environ,
        # Python itself has no C++ runtime: unless one is loaded first, AddressSanitizer finds no `throw` to intercept.
        "LD_PRELOAD": f"{_runtime('libasan.so')} {_runtime('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "CUDA_ON_HOST_SANITIZE": "1",
    }
