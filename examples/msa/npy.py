"""Plain arrays in ``.npy`` and ``.npz`` files: the header is checked against the file before anything is allocated."""

from __future__ import annotations

import math
import re
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from .stand_ins import from_bytes

MAX_HEADER = 10_000
# How far a compressed file may unfold: padding compresses well, features do not.
FREE_BYTES = 64 << 20
MAX_RATIO = 32
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([<>|=]?[biufSU]\d{1,6})',\s*'fortran_order':\s*(True|False),\s*"
    r"'shape':\s*\(((?:\d{1,15}L?,?\s*){0,8})\),?\s*\}\s*"
)


class NotPlain(ValueError):
    """The file is damaged, or holds something other than plain arrays."""


class HoldsObjects(NotPlain):
    """The array looks intact, but holds objects or records."""


@dataclass(frozen=True)
class Header:
    """Type, shape and order of an array, and where its bytes begin."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def build(self, data: bytes) -> np.ndarray:
        """The array of ``size`` bytes, writable.

        Raises:
            ValueError: A text in it has an invalid character.
        """
        flat = from_bytes(bytearray(data), self.dtype)
        return flat.reshape(self.shape, order="F" if self.fortran else "C")


def read_header(f: IO[bytes], size: int) -> Header:
    """Read the header of an array that takes ``size`` bytes in all.

    Raises:
        NotPlain: It is not the header of a plain array, or its shape does not fit the size.
    """
    prefix = f.read(8)
    if len(prefix) < 8 or prefix[:6] != b"\x93NUMPY" or prefix[6] not in (1, 2, 3):
        raise NotPlain("not a NumPy array")
    form = "<H" if prefix[6] == 1 else "<I"
    field = f.read(struct.calcsize(form))
    length = struct.unpack(form, field)[0] if len(field) == struct.calcsize(form) else MAX_HEADER + 1
    if length > MAX_HEADER:
        raise NotPlain("an array with an oversized header")
    match = _HEADER.fullmatch(f.read(length).decode("latin1"))
    if match is None:
        raise HoldsObjects("an array of objects or records: only plain numbers and texts are read")
    shape = tuple(int(s) for s in re.findall(r"\d+", match[3]))
    header = Header(np.dtype(match[1]), shape, match[2] == "True", 8 + struct.calcsize(form) + length)
    if header.dtype.itemsize == 0 or header.size != size - header.start:
        raise NotPlain(f"an array of shape {shape} in {size - header.start} bytes")
    if header.size == 0 and max(shape) > FREE_BYTES:
        raise NotPlain(f"an array of shape {shape} without an element")
    return header


def read_npy(path: Path) -> np.ndarray:
    """The array of a ``.npy`` file.

    Raises:
        ValueError: The file is damaged or holds objects. It names the file.
    """
    with _named(path, ".npy"), path.open("rb") as f:
        header = read_header(f, path.stat().st_size)
        return header.build(f.read(header.size))


class Archive:
    """The arrays of an ``.npz``; each is read when it is asked for.

    Args:
        path: The file.

    Raises:
        ValueError: It is not a zip file.
        FileNotFoundError: There is no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no such file")
        self.path = path
        self.left = FREE_BYTES + MAX_RATIO * path.stat().st_size
        self.headers: dict[str, Header] = {}
        with _named(path, ".npz"):
            # It stays open: its directory may be long, and is read once.
            self.file = zipfile.ZipFile(path)
            self.members = {i.filename[: -len(".npy")]: i for i in self.file.infolist() if i.filename.endswith(".npy")}

    def __contains__(self, key: object) -> bool:
        return key in self.members

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def header(self, key: str) -> Header:
        """Type and shape of an array, without reading it."""
        if key not in self.headers:
            with self._open(key) as f:
                self.headers[key] = read_header(f, self.members[key].file_size)
        return self.headers[key]

    def read(self, key: str) -> np.ndarray:
        """One array.

        Raises:
            ValueError: It is damaged, holds objects, or unfolds further than features do.
        """
        header = self.header(key)
        self.left -= header.size
        with self._open(key) as f:
            if self.left < 0:
                raise NotPlain(f"{key[:80]!r} unfolds to {header.size} bytes: more than a file of features does")
            f.read(header.start)
            data = f.read(header.size)
            if len(data) != header.size:
                raise NotPlain(f"{key[:80]!r} is cut off")
            return header.build(data)

    @contextmanager
    def _open(self, key: str) -> Iterator[IO[bytes]]:
        with _named(self.path, ".npz"):
            info = self.members[key]
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise NotPlain(f"{key[:80]!r} is packed or locked in a way that NumPy does not use")
            with self.file.open(info) as f:
                yield f


@contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into one ValueError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as e:
        what = str(e) if isinstance(e, NotPlain) else f"{type(e).__name__}: {e}"
        failure = HoldsObjects if isinstance(e, HoldsObjects) else ValueError
        raise failure(f"{path}: not a readable {kind} of plain arrays ({what})") from e
