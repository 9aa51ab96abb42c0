"""A pickle reader that builds plain containers and plain NumPy arrays, and nothing else.

A pickle is a program. Nothing of NumPy's own reconstruction is exposed to it either: a forged dtype state can make
NumPy take bytes for pointers. Stand-ins collect what the file says, and arrays are built from checked parts.
"""

from __future__ import annotations

import codecs
import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_KINDS = "biufUSO"


class _NdarrayName:
    """Stands for the class ``numpy.ndarray``, which files only pass back to ``_reconstruct``."""


class _DType:
    def __init__(self, spec: str, align: bool = False, copy: bool = False) -> None:
        self.dtype = np.dtype(str(spec))
        if self.dtype.kind not in _KINDS or self.dtype.fields is not None or self.dtype.subdtype is not None:
            raise pickle.UnpicklingError(f"arrays of type {spec!r} are not read")

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])
        if any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError("structured arrays are not read")


class _Array:
    """Filled by the file's state; ``value`` is the finished array."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _build(data, dtype, shape, "F" if fortran else "C")


def _build(data: Any, dtype: _DType, shape: tuple, order: str) -> np.ndarray:
    kind = dtype.dtype.kind
    if kind == "O":
        if not isinstance(data, list):
            raise pickle.UnpicklingError("an object array without a list of objects")
        flat = np.empty(len(data), dtype=object)
        flat[:] = data
    else:
        raw = data.encode("latin1") if isinstance(data, str) else data
        flat = np.frombuffer(raw, dtype=dtype.dtype)
    # A copy: the buffer of a pickle is read-only.
    return flat.reshape(shape, order=order).copy()


def _reconstruct(cls: type, shape: tuple, code: Any) -> _Array:
    if cls is not _NdarrayName:
        raise pickle.UnpicklingError("only numpy.ndarray is reconstructed")
    return _Array()


def _frombuffer(data: Any, dtype: _DType, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.value = _build(data, dtype, shape, order)
    return array


def _scalar(dtype: _DType, data: Any) -> Any:
    return data if dtype.dtype.kind == "O" else _build(data, dtype, (1,), "C")[0]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding.lower().replace("-", "") not in ("latin1", "iso88591", "utf8"):
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not used by arrays")
    return codecs.encode(text, encoding)


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "bytearray"): bytearray,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
for _package in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_package}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_package}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_package}.numeric", "_frombuffer"] = _frombuffer


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither a container nor a NumPy array")
        return _ALLOWED[module, name]


def read_pickle(path: str | Path) -> Any:
    """Read containers, numbers, strings and arrays from a pickle of any Python or NumPy version.

    Returns:
        The object; arrays inside it are reached through :func:`plain`.

    Raises:
        ValueError: The file is corrupt, truncated, or asks for anything but containers and arrays. It names the file.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with path.open("rb") as f:
            # latin1 is how arrays that Python 2 wrote keep their bytes; other files are not touched by it.
            return _Reader(f, encoding="latin1").load()
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path}: refused or corrupt pickle: {e}") from e
    except Exception as e:
        # A damaged stream can fail in any way the machine of the format can: each means "corrupt" to the caller.
        raise ValueError(f"{path}: corrupt or truncated pickle ({type(e).__name__}: {e})") from e


def plain(value: Any) -> Any:
    """The array a reader's stand-in holds; any other value as it is."""
    return getattr(value, "value", None) if isinstance(value, _Array) else value
