"""Argument checks of the fake kernels, worded like the C++ ones (csrc/core/check.h), and of the public functions.

The functions called ``as_…`` take what a user passed, of whatever type, and return what an operator takes.
"""

from collections.abc import Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (*_SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1  # of int64


def fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"msacore::{op}: {message}")


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int | torch.SymInt], meaning: str) -> None:
    """``expected`` holds a size per dimension, -1 for any; ``meaning`` spells the shape in words, such as "[N, d]"."""
    if tensor.dim() == len(expected) and all(
        (isinstance(want, int) and want < 0) or have == want for have, want in zip(tensor.shape, expected, strict=True)
    ):
        return
    sizes = ", ".join("*" if isinstance(want, int) and want < 0 else str(want) for want in expected)
    fail(op, f"expected `{name}` to have shape {meaning} = [{sizes}], got {list(tensor.shape)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_dtype(op: str, name: str, tensor: Tensor, expected: torch.dtype) -> None:
    if tensor.dtype != expected:
        fail(op, f"expected `{name}` to have dtype {dtype_name(expected)}, got {dtype_name(tensor.dtype)}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        want = "float16, bfloat16, float32 or float64"
        fail(op, f"expected `{name}` to have dtype {want}, got {dtype_name(tensor.dtype)}")


def check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        fail(op, f"expected `{name}` on {like.device}, got {tensor.device}")


def describe(value: Any) -> str:
    """The value that was given, in the words of a message."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return "a nested tensor"
        kind = "a tensor" if value.layout is torch.strided else f"a {str(value.layout).removeprefix('torch.')} tensor"
        return f"{kind} of dtype {dtype_name(value.dtype)} and shape {list(value.shape)}"
    if type(value).__module__ == "numpy" and type(value).__name__ == "ndarray":
        return f"a NumPy array of dtype {value.dtype} and shape {list(value.shape)}"
    if value is None or isinstance(value, (str, bool, int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"an object of type {type(value).__name__}"


def _is_ordinary(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested


def as_tensor(op: str, name: str, value: Any) -> Tensor:
    """Return ``value`` if it is an ordinary tensor; NumPy arrays, numbers, nested and sparse tensors raise."""
    if _is_ordinary(value):
        return value
    wanted = "a strided tensor" if isinstance(value, Tensor) else "a tensor"
    fail(op, f"expected `{name}` to be {wanted}, got {describe(value)}")


def as_optional_tensor(op: str, name: str, value: Any) -> Tensor | None:
    return None if value is None else as_tensor(op, name, value)


def as_tensors(op: str, name: str, value: Any) -> list[Tensor]:
    """Return a sequence of ordinary tensors (a list, a tuple, a ParameterList) as a list."""
    if type(value) not in (list, tuple) and (
        isinstance(value, (Tensor, str, Mapping, Set)) or not hasattr(value, "__iter__") or hasattr(value, "__array__")
    ):
        advice = "; unbind() makes a sequence of it" if isinstance(value, Tensor) and not value.is_nested else ""
        fail(op, f"expected `{name}` to be a sequence of tensors, got {describe(value)}{advice}")
    return [item if _is_ordinary(item) else as_tensor(op, f"{name}[{i}]", item) for i, item in enumerate(value)]


def as_indices(op: str, name: str, value: Any) -> Tensor:
    """Return labels, offsets, positions or indices of any integer dtype as int64."""
    if (tensor := as_tensor(op, name, value)).dtype == torch.int64:
        return tensor
    if tensor.dtype not in INTEGERS:
        fail(op, f"expected `{name}` to have dtype int64 or another integer one, got {dtype_name(tensor.dtype)}")
    wide = tensor.to(torch.int64)
    if tensor.dtype == torch.uint64 and type(tensor) is Tensor and tensor.is_cpu and not torch.compiler.is_compiling():
        # A value too large for int64 would become negative, which has another meaning. Values are read on the CPU only.
        large = wide[wide < 0]
        if len(large):
            fail(op, f"expected `{name}` of dtype uint64 below 2^63, got {(1 << 64) + int(large[0])}")
    return wide


def as_optional_indices(op: str, name: str, value: Any) -> Tensor | None:
    return None if value is None else as_indices(op, name, value)


def _item(op: str, name: str, tensor: Tensor) -> Any:
    """The value of a tensor that stands for a number; refused where autograd or a CUDA graph would record it."""
    if tensor.requires_grad:
        fail(op, f"`{name}` is not differentiable: expected a number, got a tensor that requires grad; detach it")
    if tensor.is_nested or tensor.numel() != 1:
        fail(op, f"expected `{name}` to be a number, got {describe(tensor)}")
    if not tensor.is_cpu:
        fail(op, f"expected `{name}` to be a number or on the CPU, got a tensor on {tensor.device}; call item() first")
    return tensor.item()


def as_number(op: str, name: str, value: Any) -> Any:
    """Return a number that is not a bool. A tensor is read by value: it must be on the CPU and not require grad."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        value = _item(op, name, value)
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        fail(op, f"expected `{name}` to be a number, got {describe(value)}")
    try:
        return float(value) if isinstance(value, Real) else value  # symbolic numbers stay what they are
    except OverflowError:
        fail(op, f"expected `{name}` to be a number that float64 holds, got a larger one")


def as_numbers(op: str, name: str, value: Any) -> list[float]:
    """Return a sequence of numbers, each as :func:`as_number` takes it."""
    whole = isinstance(value, Tensor) and (value.is_nested or value.dim() != 1)
    if type(value) not in (list, tuple) and (
        whole or isinstance(value, (str, Mapping, Set)) or not hasattr(value, "__iter__")
    ):
        fail(op, f"expected `{name}` to be a sequence of numbers, got {describe(value)}")
    return [item if type(item) is float else as_number(op, f"{name}[{i}]", item) for i, item in enumerate(value)]


def as_number_or_tensor(op: str, name: str, value: Any) -> tuple[float, Tensor | None]:
    """Return a number that is differentiable where it is a tensor: ``(number, None)`` or ``(1.0, 0-d tensor)``."""
    if not isinstance(value, Tensor):
        return as_number(op, name, value), None
    # A 0-d tensor is not asked for its size, which a trace would record.
    if as_tensor(op, name, value).dtype not in FLOATING or (value.dim() > 0 and value.shape.numel() != 1):
        fail(op, f"expected `{name}` to be a number or a floating tensor with one element, got {describe(value)}")
    return 1.0, value if value.dim() == 0 else value.reshape(())


def as_integer(op: str, name: str, value: Any) -> Any:
    """Return an integer of 64 bits that is not a bool; a tensor that holds one is read by value."""
    if type(value) is int and _LEAST <= value <= _MOST:  # asking abstract classes would take most of a microsecond
        return value
    if isinstance(value, Tensor):
        value = _item(op, name, value)
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        fail(op, f"expected `{name}` to be an integer, got {describe(value)}")
    if not isinstance(value, Integral):
        return value  # symbolic numbers stay what they are
    if not _LEAST <= int(value) <= _MOST:
        fail(op, f"expected `{name}` to be an integer of 64 bits, got {int(value).bit_length()} bits")
    return int(value)


def as_flag(op: str, name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    fail(op, f"expected `{name}` to be True or False, got {describe(value)}")


def as_choice(op: str, name: str, value: Any, choices: Mapping[str, int]) -> int:
    """Return the code of an option that is one of a few words."""
    if isinstance(value, str) and value in choices:
        return choices[value]
    *names, last = (f'"{choice}"' for choice in choices)
    raise ValueError(f"msacore::{op}: expected `{name}` to be {', '.join(names)} or {last}, got {describe(value)}")


def as_window(op: str, value: Any) -> tuple[int, int]:
    """Return ``(past, future)``; one integer serves both sides."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        past, future = value
        return as_integer(op, "window[0]", past), as_integer(op, "window[1]", future)
    if isinstance(value, (int, Integral, torch.SymInt, Tensor)):
        side = as_integer(op, "window", value)
        return side, side
    fail(op, f"expected `window` to be (past, future) or one integer for both, got {describe(value)}")


def cast_under_autocast(features: list[Tensor], parameters: list[Any]) -> tuple[list[Tensor], list[Any]]:
    """Inside autocast, mixed floating dtypes become the features' dtype (the widest of theirs); outside, no change.

    A parameter may be None.
    """
    tensors = [*features, *(t for t in parameters if t is not None)]
    if len({t.dtype for t in tensors}) <= 1 or not all(t.dtype in FLOATING for t in tensors):
        return features, parameters
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return features, parameters
    dtype = features[0].dtype
    for feature in features[1:]:
        dtype = torch.promote_types(dtype, feature.dtype)
    return [t.to(dtype) for t in features], [None if t is None else t.to(dtype) for t in parameters]
