"""Values as files hold them (arrays, lists of arrays, tensors, texts), turned into plain arrays and lists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .stand_ins import LongText, StoredArray, plain

# Sequences of very uneven length grow when they are padded to the longest; this limits how far.
FREE_VALUES = 1 << 24
MAX_PADDING = 64
MAX_NAME = 500


def numbers(where: str, key: str, value: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Numbers as one float32 array.

    Args:
        where: File and part, for messages.
        key: Name of the value, for messages.
        value: An array, a tensor, or a list of numbers, of arrays or of tensors. Sequences of unequal length are padded
            with zeros at the end; None is an empty sequence.

    Returns:
        The array, and the lengths ``[N]`` where sequences had to be padded (for single vectors 1, or 0 for an empty
        one), else None.

    Raises:
        ValueError: It holds something other than numbers, or rows of unequal width.
    """
    with _named(where, key, "is not an array of numbers"):
        value = _unstored(value)
        if isinstance(value, list) and any(v is None or np.ndim(v) > 0 for v in value):
            return _stacked([np.zeros(0, np.float32) if v is None else _float32(v) for v in value])
        return _float32(value), None


@contextmanager
def _named(where: str, key: str, what: str) -> Iterator[None]:
    """Turn whatever a damaged value raises when its array is built into one ValueError that names it."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{where}: {key!r} {what} ({str(e)[:300]})") from e


def _unstored(value: Any) -> Any:
    """Stand-ins as arrays, object arrays as lists, at every level."""
    value = plain(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        simple = all(isinstance(v, (int, float)) for v in value)
        return list(value) if simple else [_unstored(v) for v in value]
    return value


def _float32(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"its elements are {array.dtype}")
    # A value beyond float32 becomes infinite, and is then reported as such with its row and column.
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _stacked(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    full = [r for r in rows if r.size]
    if not full:
        raise ValueError("all its rows are empty")
    if len({r.ndim for r in full}) > 1 or len({r.shape[1:] for r in full}) > 1:
        raise ValueError(f"its rows have the shapes {sorted({r.shape for r in full})[:5]}")
    if full[0].ndim == 1 and len({len(r) for r in full}) > 1:
        raise ValueError(f"its rows have the widths {sorted({len(r) for r in full})[:5]}")
    longest = max(len(r) for r in full)
    out_size = len(rows) * longest * math.prod(full[0].shape[1:])
    if out_size > FREE_VALUES + MAX_PADDING * sum(r.size for r in full):
        raise ValueError(f"one of its {len(rows)} sequences has {longest} steps, most have far fewer: shorten it")
    lengths = np.array([len(r) if r.size else 0 for r in rows])
    out = np.zeros((len(rows), longest, *full[0].shape[1:]), np.float32)
    for row, length, values in zip(out, lengths, rows, strict=True):
        if length:
            row[:length] = values
    if full[0].ndim == 1:
        lengths, longest = (lengths > 0).astype(lengths.dtype), 1
    return out, None if (lengths == longest).all() else lengths


def column(where: str, key: str, value: Any, n: int) -> list[Any]:
    """One plain entry for each of ``n`` utterances: text, number, or a tuple of them.

    Raises:
        ValueError: The number of entries is not ``n``, or an entry is something else.
    """
    with _named(where, key, "cannot be read"):
        value = _unstored(value)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list) or len(value) != n:
        raise ValueError(f"{where}: {key!r} must list one entry for each of the {n} labels")
    return [_entry(where, key, v) for v in value]


def _entry(where: str, key: str, value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        # Some releases store each id in a list of its own.
        inner = tuple(_entry(where, key, v) for v in value)
        return inner[0] if len(inner) == 1 else inner if inner else _no_entry(where, key)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bytes, memoryview)):
        value = bytes(value)
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            value = value.decode("latin1")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        _no_entry(where, key)
    if isinstance(value, str) and value.encode("utf-8", "replace").decode() != value:
        raise ValueError(f"{where}: {key!r} holds half a character")
    return value


def _no_entry(where: str, key: str) -> None:
    raise ValueError(f"{where}: {key!r} must hold strings or numbers")


def texts(where: str, key: str, value: Any, n: int) -> list[str]:
    """One text for each of ``n`` utterances; entries that are neither text nor number become empty."""
    with _named(where, key, "cannot be read"):
        value = _unstored(value)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list) or len(value) != n:
        raise ValueError(f"{where}: {key!r} must list one entry for each of the {n} labels")
    result = []
    for v in value:
        if isinstance(v, np.ndarray):
            v = v.tolist()
        if isinstance(v, list) and len(v) == 1:
            v = v[0]
        v = bytes(v).decode("utf-8", "replace") if isinstance(v, (bytes, memoryview)) else v
        v = str(v) if isinstance(v, (str, int, float)) and not isinstance(v, bool) else ""
        result.append(v.encode("utf-8", "replace").decode())
    return result


def is_stored(value: Any) -> bool:
    """True for what may hold an array of numbers."""
    return isinstance(value, (StoredArray, np.ndarray, list, tuple)) and not isinstance(value, (str, LongText))
