"""Rank-N-Contrast, the contrastive loss of continuous labels."""

import math
from typing import Any

import torch
from torch import Tensor

from msacore.ops._autograd import differentiable, refuse_second_derivative
from msacore.ops._check import (
    FLOATING,
    INTEGERS,
    as_number_or_tensor,
    as_optional_tensor,
    as_tensor,
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    dtype_name,
    fail,
)

_rank_n_contrast = torch.ops.msacore.rank_n_contrast.default
_rank_n_contrast_backward = torch.ops.msacore.rank_n_contrast_backward.default


def _check_inputs(
    op: str,
    embeddings: Tensor,
    targets: Tensor,
    learned_temperature: Tensor | None,
    mask: Tensor | None,
    *,
    temperature: float,
    anchor_begin: int,
    anchor_count: int,
) -> None:
    """The checks of csrc/rank_n_contrast/rank_n_contrast.h."""
    check_floating(op, "embeddings", embeddings)
    check_shape(op, "embeddings", embeddings, (-1, -1), "[N, d]")
    n = embeddings.shape[0]
    if targets.dtype not in (*FLOATING, torch.int64):
        wanted = "float16, bfloat16, float32, float64 or int64"
        fail(op, f"expected `targets` to have dtype {wanted}, got {dtype_name(targets.dtype)}")
    if targets.dim() == 2:
        check_shape(op, "targets", targets, (n, -1), "[N, k]")
    else:
        check_shape(op, "targets", targets, (n,), "[N] or [N, k]")
    check_device(op, "targets", targets, embeddings)
    if learned_temperature is not None:
        check_floating(op, "temperature", learned_temperature)
        check_shape(op, "temperature", learned_temperature, (), "[] (0-d)")
        check_device(op, "temperature", learned_temperature, embeddings)
    elif not (temperature > 0 and math.isfinite(temperature)):
        fail(op, f"expected `temperature` to be positive and finite, got {temperature:g}")
    if mask is not None:
        check_dtype(op, "mask", mask, torch.bool)
        check_shape(op, "mask", mask, (n,), "[N]")
        check_device(op, "mask", mask, embeddings)
    if anchor_begin < 0:
        fail(op, f"expected `anchor_begin` to be at least 0, got {anchor_begin}")
    if anchor_count < -1:
        fail(op, f"expected `anchor_count` to be at least 0, or -1 for all, got {anchor_count}")


def _loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("msacore::rank_n_contrast")
def _(embeddings: Tensor, *inputs: Any, **options: Any) -> Tensor:
    _check_inputs("rank_n_contrast", embeddings, *inputs, **options)
    return embeddings.new_empty((), dtype=_loss_dtype(embeddings.dtype))


@torch.library.register_fake("msacore::rank_n_contrast_backward")
def _(
    grad_out: Tensor,
    embeddings: Tensor,
    targets: Tensor,
    learned_temperature: Tensor | None,
    mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    op = "rank_n_contrast_backward"
    _check_inputs(op, embeddings, targets, learned_temperature, mask, **options)
    check_shape(op, "grad_out", grad_out, (), "[]")
    check_dtype(op, "grad_out", grad_out, _loss_dtype(embeddings.dtype))
    check_device(op, "grad_out", grad_out, embeddings)
    return (
        embeddings.new_empty(embeddings.shape),
        embeddings.new_empty((0,)) if learned_temperature is None else learned_temperature.new_empty(()),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    embeddings, temperature = _rank_n_contrast_backward(grad_out, *saved, **ctx.options)
    return embeddings, None, None if saved[2] is None else temperature, None


refuse_second_derivative("rank_n_contrast_backward")
_eager = differentiable(_rank_n_contrast, _setup_context, _backward)


def as_targets(op: str, value: Any) -> Tensor:
    """Continuous labels: floating ones as they are, integers of any width as int64 with the same differences."""
    targets = as_tensor(op, "targets", value)
    if targets.requires_grad:
        fail(op, "`targets` get no gradient: expected a tensor that does not require grad; detach it")
    if targets.dtype == torch.uint64:  # minus 2^63
        return targets.view(torch.int64) ^ torch.iinfo(torch.int64).min
    if targets.dtype in INTEGERS and targets.dtype != torch.int64:
        return targets.to(torch.int64)
    return targets


def rank_n_contrast(
    embeddings: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 2.0,
    mask: Tensor | None = None,
    anchors: tuple[int, int] = (0, -1),
) -> Tensor:
    """:func:`msacore.rank_n_contrast` of one process.

    ``anchors`` (begin, count) are the anchors whose terms are summed: places in an order that all calls with these
    targets and this mask share; count -1 stands for all. The divisor does not depend on them.
    """
    op = "rank_n_contrast"
    number, learned = as_number_or_tensor(op, "temperature", temperature)
    return _eager(
        as_tensor(op, "embeddings", embeddings),
        as_targets(op, targets),
        learned,
        as_optional_tensor(op, "mask", mask),
        temperature=number,
        anchor_begin=anchors[0],
        anchor_count=anchors[1],
    )
