"""The names that a pickle may ask for, and what stands in for each of them."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from typing import Any

from .stand_ins import LongText, StoredArray, StoredDType, StoredStorage, StoredTensor, refuse

_KEYS = (str, int, bytes)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if str(encoding).lower().replace("-", "").replace("_", "") not in ("latin1", "iso88591", "utf8"):
        raise pickle.UnpicklingError(f"the codec {encoding!r} is not used by arrays")
    return codecs.encode(text, encoding)


def _encoded(text: Any, encoding: str = "latin1") -> Any:
    """The bytes of a text that stands for an array's memory; a long one is only wrapped."""
    if isinstance(text, LongText) and encoding == "latin1":
        return text
    return _encode(text, encoding) if isinstance(text, str) else refuse("an encoding of something that is not text")


class _NdarrayName:
    """Stands for the class ``numpy.ndarray``, which files only pass back to ``_reconstruct``."""


def _reconstruct(cls: Any, shape: Any, code: Any) -> StoredArray:
    return StoredArray() if cls is _NdarrayName else refuse("only numpy.ndarray is reconstructed")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
    array = StoredArray()
    array.fill(shape, dtype, order == "F", data)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    if not isinstance(dtype, StoredDType):
        refuse("a NumPy number without a type")
    if dtype.dtype is None or dtype.dtype.kind == "O":
        return None
    array = StoredArray()
    array.fill((1,), dtype, False, data)
    return array.value[0]


def _ordered(*items: Any) -> dict:
    pairs = items[0] if items else []
    if len(items) > 1 or not isinstance(pairs, list):
        refuse("an OrderedDict of something other than pairs")
    return {checked_key(k): v for k, v in pairs}


def make_set(items: Any = ()) -> set:
    return {checked_key(v) for v in items} if isinstance(items, (list, tuple)) else refuse("a set without a list")


def _bytes(data: Any = b"", encoding: Any = "latin1") -> Any:
    return _encoded(data, encoding) if isinstance(data, (str, LongText)) else data


def checked_key(value: Any) -> Any:
    if not isinstance(value, _KEYS) or (isinstance(value, int) and abs(value) >= 1 << 60):
        refuse(f"a key of type {type(value).__name__}; keys are text or numbers")
    return value


def _load_from_bytes(data: Any) -> StoredStorage:
    # Imported here: torch_file runs the machine, which looks names up in this module.
    from .torch_file import load_from_bytes

    return load_from_bytes(data)


ALLOWED: dict[tuple[str, str], Callable] = {
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy", "dtype"): StoredDType,
    ("_codecs", "encode"): _encoded,
    ("collections", "OrderedDict"): _ordered,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("torch._utils", "_rebuild_tensor_v2"): StoredTensor.rebuild,
    ("torch._utils", "_rebuild_tensor"): StoredTensor.rebuild,
    ("torch._utils", "_rebuild_parameter"): StoredTensor.parameter,
}
for _builtins in ("builtins", "__builtin__"):
    ALLOWED |= {
        (_builtins, "bytearray"): _bytes,
        (_builtins, "bytes"): _bytes,
        (_builtins, "set"): make_set,
        (_builtins, "frozenset"): make_set,
    }
for _package in ("numpy.core", "numpy._core"):
    ALLOWED |= {
        (f"{_package}.multiarray", "_reconstruct"): _reconstruct,
        (f"{_package}.multiarray", "scalar"): _scalar,
        (f"{_package}.numeric", "_frombuffer"): _frombuffer,
    }
