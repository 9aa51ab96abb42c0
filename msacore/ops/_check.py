"""Argument checks of the fake kernels, in the words of the C++ ones (csrc/core/check.h)."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


def cast_under_autocast(features: list[Tensor], parameters: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inside autocast, mixed floating dtypes become the features' dtype (the widest of theirs); outside, no change."""
    tensors = [*features, *parameters]
    if len({t.dtype for t in tensors}) <= 1 or not all(t.dtype in FLOATING for t in tensors):
        return features, parameters
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return features, parameters
    dtype = features[0].dtype
    for feature in features[1:]:
        dtype = torch.promote_types(dtype, feature.dtype)
    return [t.to(dtype) for t in features], [t.to(dtype) for t in parameters]
