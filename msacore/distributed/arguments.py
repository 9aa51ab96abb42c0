"""The arguments of one rank before rows travel: sizes, checks without values, what must be equal on all ranks."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from msacore.distributed.header import agree
from msacore.distributed.sharding import Sharding
from msacore.ops._check import check_device
from msacore.ops._check import describe as in_words


def on_meta(value: Any) -> Any:
    """The argument on the meta device: shapes and dtypes without values, for checks."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            return value  # the checks refuse it as it is
        return value.detach().to("meta").requires_grad_(value.requires_grad)
    return [on_meta(item) for item in value] if isinstance(value, (list, tuple)) else value


def _is_sequence(value: Any) -> bool:
    return hasattr(value, "__iter__") and not isinstance(value, (Tensor, str, Mapping))


def rows_of(value: Any) -> int:
    """Rows of a tensor, or of the first one of a sequence; 0 for anything else, which the checks refuse later."""
    first = next(iter(value), None) if _is_sequence(value) else value
    return first.shape[0] if isinstance(first, Tensor) and not first.is_nested and first.dim() > 0 else 0


def describe(value: Any) -> Any:
    """The part of an argument that must be equal on all ranks: kind, dtype and widths of tensors, values of numbers."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            return in_words(value)
        where = "" if value.is_cpu else f" on {value.device.type}"
        return f"{str(value.dtype).removeprefix('torch.')}[*{''.join(f', {s}' for s in value.shape[1:])}]{where}"
    if _is_sequence(value):
        return [describe(item) for item in value]
    if isinstance(value, Real) and not isinstance(value, bool):
        return repr(float(value)).removesuffix(".0")
    return repr(value) if value is None or isinstance(value, (bool, str)) else in_words(value)


def describe_numbers(value: Any) -> Any:
    """The same for a sequence of numbers, which may be tensors on the CPU: their values must be equal."""
    try:
        return [describe(float(item)) for item in value]
    except (TypeError, ValueError, RuntimeError):
        return describe(value)


def _tensors(name: str, value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    if not _is_sequence(value):
        return []
    return [(f"{name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, Tensor)]


def check_values(op: str, rows: Mapping[str, Any], temperatures: Mapping[str, Any]) -> None:
    """Check what checks without values cannot see: devices and, on the CPU, temperatures and the sign of weights.

    Raises:
        RuntimeError: A tensor is not on the device of the first one of ``rows``, a temperature is not positive and
            finite, or a weight is negative.
    """
    learned = [found for name, value in temperatures.items() for found in _tensors(name, value)]
    found = [pair for name, value in rows.items() for pair in _tensors(name, value)] + learned
    for name, tensor in found[1:]:
        check_device(op, name, tensor, found[0][1])
    weights = rows.get("weights")
    if weights is not None and weights.is_cpu and bool((weights < 0).any()):
        raise RuntimeError(f"msacore::{op}: expected `weights` to be at least 0, got a negative one")
    for name, tensor in learned:
        if tensor.is_cpu and tensor.numel() == 1:
            number = float(tensor.detach())
            if not 0 < number < float("inf"):
                raise RuntimeError(f"msacore::{op}: expected `{name}` to be positive and finite, got {number:g}")


def needs_gradient(*values: Any) -> bool:
    """Whether there will be a backward pass; where it is collective, every rank must then run it."""
    found = [tensor for value in values for _, tensor in _tensors("", value)]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in found)


def sizes(
    op: str,
    sharding: Sharding,
    counts: Sequence[int],
    described: Callable[[], dict[str, Any]],
    check: Callable[[], None],
) -> list[list[int]]:
    """``counts`` of every rank. With a capacity they are not exchanged: those of this rank stand for all ranks.

    Args:
        op: Name of the operator.
        sharding: The ranks.
        counts: Sizes that may differ between ranks.
        described: Returns what must be equal on all ranks, by argument.
        check: Raises where the arguments of this rank are wrong.
    """
    if sharding.capacity is None and torch.compiler.is_compiling():
        raise RuntimeError(
            f"msacore::{op}: expected `group` to be Sharding(group, capacity=…) under torch.compile, got one without "
            "capacity, whose sizes must be read by the host"
        )
    if sharding.check and torch.compiler.is_compiling():
        raise RuntimeError(
            f"msacore::{op}: expected `check` of Sharding to be False under torch.compile, got True: the checks "
            "compare values on the host"
        )
    if sharding.capacity is None or sharding.check:
        options = {name: describe(getattr(sharding, name)) for name in ("mode", "capacity", "memory", "check")}
        return agree(op, sharding, counts, {**described(), **options}, check)
    if not torch.compiler.is_compiling():
        check()
    return [list(counts)] * sharding.world
