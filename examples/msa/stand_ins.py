"""What a file says about an array, a dtype or a tensor, kept until it is needed and built from checked parts."""

from __future__ import annotations

import codecs
import math
import pickle
import re
from typing import Any, NoReturn

import numpy as np

_SPEC = re.compile(r"[<>=|]?(\?|[biufUSO]\d{0,6}|bool|u?int\d{1,2}|float\d{2}|object|str)")
# No array of these files has more dimensions than this: text_bert has three.
_MAX_DIMENSIONS = 8


def refuse(what: str) -> NoReturn:
    """Stop reading: the file holds ``what``."""
    raise pickle.UnpicklingError(what)


def checked_shape(shape: Any, limit: int) -> tuple[int, ...]:
    """A valid shape of at most ``limit`` elements; the dimensions of empty arrays are bounded too."""
    if not isinstance(shape, (tuple, list)) or len(shape) > _MAX_DIMENSIONS:
        refuse("an array with an odd shape")
    if not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in shape):
        refuse("an array with an odd shape")
    if math.prod(max(s, 1) for s in shape) > (1 << 20 if 0 in shape else limit):
        refuse(f"an array of shape {tuple(shape)} with data for {limit} elements")
    return tuple(shape)


def from_bytes(data: Any, dtype: np.dtype) -> np.ndarray:
    """A flat array over bytes. NumPy accepts any 32-bit number as a character; Python's own functions fail on some.

    Raises:
        ValueError: An element of a text is not a character.
    """
    flat = np.frombuffer(data, dtype=dtype)
    if dtype.kind == "U" and flat.size:
        codes = np.frombuffer(data, dtype=np.dtype("u4").newbyteorder(dtype.byteorder))
        if codes.max() > 0x10FFFF:
            raise ValueError("a text with a character that does not exist")
    return flat


class LongText:
    """UTF-8 of a long text, decoded when an array needs it."""

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def read(self) -> bytes:
        return codecs.decode(self.view, "utf-8").encode("latin1")


class StoredDType:
    """The element type of arrays: numbers, texts or objects. Other types (times, records) are None: a file may hold
    arrays of them, but these cannot be read."""

    def __init__(self, spec: Any, align: Any = False, copy: Any = False) -> None:
        known = isinstance(spec, str) and _SPEC.fullmatch(spec)
        self.dtype = np.dtype(spec) if known else None

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5:
            refuse("a type with an odd state")
        if any(part is not None for part in state[2:5]):
            self.dtype = None
        if self.dtype is not None and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray:
    """An array whose memory is still in the file."""

    shape: tuple[int, ...] | None = None

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            refuse("an array with an odd state")
        _, shape, dtype, fortran, data = state
        self.fill(shape, dtype, bool(fortran), data)

    def fill(self, shape: Any, dtype: Any, fortran: bool, data: Any) -> None:
        """Set the parts, checked against each other.

        Raises:
            pickle.UnpicklingError: They do not fit together.
        """
        if not isinstance(dtype, StoredDType):
            refuse("an array without a type")
        self.dtype, self.order, self.data = dtype.dtype, "F" if fortran else "C", data
        if self.dtype is None:
            return
        if self.dtype.kind == "O":
            if not isinstance(data, list):
                refuse("an object array without a list of objects")
            limit = len(data)
        else:
            if isinstance(data, str):
                self.data = data.encode("latin1")
            size = self._bytes()
            limit = size // max(self.dtype.itemsize, 1)
            if self.dtype.itemsize == 0:
                refuse("an array of elements without a size")
        self.shape = checked_shape(shape, limit)
        if math.prod(self.shape) != limit and not hasattr(self.data, "read"):
            refuse(f"an array of shape {self.shape} with data for {limit} elements")

    def _bytes(self) -> int:
        if isinstance(self.data, (bytes, bytearray, memoryview)):
            return len(self.data)
        if hasattr(self.data, "read"):
            return len(self.data.view)
        return refuse("an array without data")

    @property
    def value(self) -> np.ndarray:
        """The array, built anew: a copy, as the file's memory is read-only."""
        if self.shape is None:
            refuse("an array without a state, or of a type that is not read")
        if self.dtype.kind == "O":
            flat = np.empty(len(self.data), dtype=object)
            flat[:] = self.data
        else:
            raw = self.data.read() if hasattr(self.data, "read") else self.data
            flat = from_bytes(raw, self.dtype)
        return flat.reshape(self.shape, order=self.order).copy()


_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": "bfloat16",
    "LongStorage": "i8", "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1",
    "BoolStorage": "?",
}  # fmt: skip


class StoredStorage:
    """Memory of torch's tensors: a type, a count, and the bytes or a function that reads them."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.data: Any = None

    @staticmethod
    def named(name: str) -> str | None:
        """The element type of a storage class by its name, None for other names."""
        return _STORAGES.get(name)

    @property
    def itemsize(self) -> int:
        return 2 if self.kind == "bfloat16" else np.dtype(self.kind).itemsize

    def read(self) -> np.ndarray:
        """All elements; bfloat16, which NumPy lacks, as float32."""
        data = self.data() if callable(self.data) else self.data
        if data is None or len(data) != self.count * self.itemsize:
            refuse("a tensor without its data")
        if self.kind == "bfloat16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(data, np.dtype(self.kind).newbyteorder("<"))


class StoredTensor(StoredArray):
    """A view of a storage."""

    @classmethod
    def rebuild(cls, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> StoredTensor:
        """A tensor of torch's ``_rebuild_tensor_v2``.

        Raises:
            pickle.UnpicklingError: The view leaves the storage, or repeats its elements.
        """
        if not isinstance(storage, StoredStorage):
            refuse("a tensor without a storage")
        tensor = cls()
        tensor.shape, tensor.storage = checked_shape(size, storage.count), storage
        if not isinstance(stride, tuple) or len(stride) != len(tensor.shape):
            refuse("a tensor with odd strides")
        if not all(isinstance(s, int) and 0 <= s < 1 << 40 for s in (offset, *stride)):
            refuse("a tensor with odd strides")
        last = offset + sum((s - 1) * d for s, d in zip(tensor.shape, stride, strict=True))
        if 0 not in tensor.shape and last >= storage.count:
            refuse("a tensor that reaches beyond its storage")
        tensor.offset, tensor.stride = offset, stride
        return tensor

    @classmethod
    def parameter(cls, data: Any, *rest: Any) -> StoredTensor:
        """The tensor of a parameter."""
        return data if isinstance(data, StoredTensor) else refuse("a parameter without a tensor")

    def set_state(self, state: Any) -> None:
        refuse("a state for a tensor")

    @property
    def value(self) -> np.ndarray:
        flat = self.storage.read()
        if 0 in self.shape:
            return np.zeros(self.shape, flat.dtype)
        strides = tuple(d * flat.itemsize for d in self.stride)
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False).copy()


def plain(value: Any) -> Any:
    """The array a reader's stand-in holds; any other value as it is."""
    return value.value if isinstance(value, StoredArray) else value
