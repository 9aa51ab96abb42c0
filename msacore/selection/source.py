"""Where the rows of a pool lie: a tensor, or mapped files that are read piece by piece."""

import mmap
import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SCATTERED_ROWS = 64  # each may map a huge page around it
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_array(name: str, value: Any) -> Tensor | np.ndarray:
    """A tensor in a dtype that the operators take (integers become float64), or an array as it is, mapped or not."""
    if isinstance(value, Tensor):
        value = value.detach()
        if value.is_complex() or value.layout != torch.strided:
            raise ValueError(f"select: expected `{name}` to be a dense real tensor, got {value.dtype}, {value.layout}")
        return value if value.dtype in _FLOATING else value.double()
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"select: expected `{name}` to be a tensor or array of numbers ({error})") from error
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise ValueError(f"select: expected `{name}` to hold real numbers, got dtype {array.dtype}")
    return array


def as_tensor(chunk: np.ndarray) -> Tensor:
    """A chunk as a tensor; shares memory where dtype and layout allow it, and is never written."""
    dtype = chunk.dtype.newbyteorder("=") if chunk.dtype.kind == "f" else np.dtype(np.float64)
    native = np.ascontiguousarray(chunk, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(native)


class _Mapped:
    """One array in a file."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array
        self._file: mmap.mmap | None = None
        self._bytes = 0
        base: Any = array
        while isinstance(base, np.ndarray):
            below = base.base
            if isinstance(below, mmap.mmap):
                self._file = below
                offset = getattr(base, "offset", 0)
                self._bytes = offset - offset % mmap.ALLOCATIONGRANULARITY + len(below)
            base = below

    def check(self) -> None:
        """Raise if the file shrank under its mapping: reading it would end the process without a message."""
        if self._file is not None and self._file.size() < self._bytes:
            raise ValueError(
                f"select: the file of `{self.name}` has become shorter than it was ({self._file.size()} bytes, mapped "
                f"{self._bytes}); it must not change while it is read"
            )

    def release(self) -> None:
        """Give back the mapped pages, which count as memory of this process until then."""
        if self._file is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)


class Parts:
    """Arrays in files, stacked along their rows."""

    def __init__(self, arrays: Sequence[tuple[str, np.ndarray]]) -> None:
        self._parts = [_Mapped(name, array) for name, array in arrays]
        self._ends = np.cumsum([len(array) for _, array in arrays])
        self.shape = (int(self._ends[-1]), arrays[0][1].shape[1])
        self.dtype = as_tensor(np.empty((0, 1), arrays[0][1].dtype)).dtype
        self._raw = arrays[0][1].dtype

    def room(self, rows: int) -> np.ndarray:
        """Memory for ``rows`` rows, reused for parts that are read one after another."""
        return np.empty((rows, self.shape[1]), self._raw)

    def read(self, begin: int, end: int, room: np.ndarray | None = None) -> Tensor:
        chunk = self.room(end - begin) if room is None else room[: end - begin]
        first = 0
        for part, last in zip(self._parts, self._ends.tolist(), strict=True):
            low, high = max(begin, first), min(end, last)
            if low < high:
                part.check()
                chunk[low - begin : high - begin] = part.array[low - first : high - first]
                part.release()
            first = last
        return as_tensor(chunk)

    def take(self, rows: np.ndarray, room: np.ndarray | None = None) -> Tensor:
        chunk = self.room(len(rows)) if room is None else room[: len(rows)]
        which = np.searchsorted(self._ends, rows, side="right")
        for number, part in enumerate(self._parts):
            here = np.flatnonzero(which == number) if len(self._parts) > 1 else np.arange(len(rows))
            first = int(self._ends[number]) - len(part.array)
            for begin in range(0, len(here), _SCATTERED_ROWS):
                wanted = here[begin : begin + _SCATTERED_ROWS]
                part.check()
                chunk[wanted] = part.array[rows[wanted] - first]
                part.release()
        return as_tensor(chunk)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def _is_parts(value: Any) -> bool:
    """Whether a sequence holds pools: paths, or arrays and tensors of two dimensions."""
    if isinstance(value, (np.ndarray, Tensor, str, bytes)) or not isinstance(value, Sequence):
        return False
    return any(_is_path(one) or (isinstance(one, (np.ndarray, Tensor)) and one.ndim == 2) for one in value)


def _opened(name: str, value: Any) -> Tensor | np.ndarray:
    if _is_path(value):
        path = os.fspath(value)
        try:
            value = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # what a damaged file raises is not documented
            raise ValueError(f"select: `{name}`, {path}, cannot be read as .npy: {error}") from error
        if not isinstance(value, np.ndarray):
            raise ValueError(f"select: expected `{name}`, {path}, to be an .npy file with one array")
    return as_array(name, value)


def _dtype_name(value: Tensor | np.ndarray) -> str:
    if isinstance(value, Tensor):
        return str(value.dtype).removeprefix("torch.")
    return value.dtype.newbyteorder("=").name


def open_source(name: str, value: Any) -> Tensor | Parts:
    """The rows ``[N, d]`` that ``value`` holds: in memory as they are, mapped files as parts.

    Raises:
        ValueError: ``value`` is not a pool, or its parts differ in width, dtype or device; the part is named.
    """
    if not _is_parts(value):
        whole = _opened(name, value)
        _check_rank(name, whole)
        if isinstance(whole, np.memmap):
            return Parts([(name, whole)])
        return as_tensor(whole) if isinstance(whole, np.ndarray) else whole.contiguous()
    names = [f"{name}[{i}]" for i in range(len(value))]
    # The dtypes as given: an int32 and an int64 file differ, although both become float64.
    dtypes = [_dtype_name(one) if isinstance(one, (np.ndarray, Tensor)) else None for one in value]
    parts = [_opened(part, one) for part, one in zip(names, value, strict=True)]
    dtypes = [known or _dtype_name(one) for known, one in zip(dtypes, parts, strict=True)]
    for part, one, dtype in zip(names, parts, dtypes, strict=True):
        _check_rank(part, one)
        if one.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"select: expected `{part}` to have the width of the first part, {parts[0].shape[1]}, "
                f"got shape {list(one.shape)}"
            )
        if dtype != dtypes[0]:
            raise ValueError(f"select: expected `{part}` to have the dtype of the first part, {dtypes[0]}, got {dtype}")
    if any(isinstance(one, np.memmap) for one in parts):
        return Parts([(part, _on_cpu(part, one)) for part, one in zip(names, parts, strict=True)])
    tensors = [as_tensor(one) if isinstance(one, np.ndarray) else one for one in parts]
    for part, tensor in zip(names, tensors, strict=True):
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"select: expected `{part}` to be on the device of the first part, {tensors[0].device}, "
                f"got {tensor.device}"
            )
    return torch.cat(tensors)


def _check_rank(name: str, value: Tensor | np.ndarray) -> None:
    if value.ndim != 2:
        raise ValueError(f"select: expected `{name}` to have shape [N, d], got {list(value.shape)}")


def _on_cpu(name: str, value: Tensor | np.ndarray) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    if value.device.type != "cpu":
        raise ValueError(f"select: expected `{name}` to be on the CPU beside files, got {value.device}")
    return value.numpy()
