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
    """Continuous labels: floating ones as they are, integers of any width as int64 of the same differences."""
    targets = as_tensor(op, "targets", value)
    if targets.requires_grad:
        fail(op, "`targets` get no gradient: expected a tensor that does not require grad; detach it")
    if targets.dtype == torch.uint64:  # less 2^63
        return targets.view(torch.int64) ^ torch.iinfo(torch.int64).min
    if targets.dtype in INTEGERS and targets.dtype != torch.int64:
        return targets.to(torch.int64)
    return targets


def rank_n_contrast(
    embeddings: Tensor, targets: Tensor, *, temperature: float | Tensor = 2.0, mask: Tensor | None = None
) -> Tensor:
    """Compute the Rank-N-Contrast loss: distances between embeddings should rank as the gaps between labels do.

    ``1/(n(n-1)) Σ_i Σ_{j≠i} [log Σ_{k≠i, gap_ik ≥ gap_ij} exp s_ik - s_ij]`` over the n samples that are not masked,
    with ``s_ij = -‖e_i - e_j‖ / temperature`` and ``gap_ij = |y_i - y_j|``.

    Args:
        embeddings: ``[N, d]``; float16, bfloat16, float32 or float64. Not normalised by the loss.
        targets: Continuous labels, ``[N]``, or ``[N, k]`` with the gap ``Σ_c |y_ic - y_jc|``, such as valence and
            arousal; any floating dtype, in which gaps are computed, or any integer dtype, whose gaps are exact. Must
            not require grad.
        temperature: Divides the distances; a positive, finite number, or a floating tensor with one element, then
            differentiable.
        mask: Samples that take part, ``[N]`` bool; all when omitted. The others are never read.

    Returns:
        Scalar, float64 for float64 embeddings, else float32. 0 for fewer than two samples.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (the value of a temperature tensor: on the CPU
            only), or ``targets`` require grad.

    Note:
        Exact. Every denominator is a running sum over the others in the order of their label gaps, where samples of
        equal gap enter together. With ``[N]`` that order is the merge of two sides of the sorted labels, with
        ``[N, k]`` every anchor sorts: ``O(N² (d + k + log N))`` time at most, ``O(N d)`` memory plus one tile.

        Gaps tie where the labels' dtype makes them equal. MOSEI's labels are means of three raters, thirds, which no
        floating dtype holds: ``2/3 - 1/3`` and ``1/3 - 0`` differ in their last bit. Labels times 3, rounded to
        integers, tie as they should: ``(3 * labels).round().long()``.

        16-bit embeddings compute in float32. Distances are taken in float64 where rows lie more than about a thousand
        times further out than the median row, so that such rows cost the others no accuracy, and neither overflow nor
        underflow. Two equal embeddings have zero gradient. Under autocast nothing is cast, least of all ``targets``.
        Deterministic; differentiable once; no host synchronisation on CUDA. A NaN in an unmasked row makes the loss
        NaN.

        Source: Zha et al., Rank-N-Contrast, NeurIPS 2023.

    Example:
        >>> embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
        >>> rank_n_contrast(embeddings, torch.tensor([-1.0, 0.0, 2.0]))
        tensor(0.2102)
        >>> rank_n_contrast(embeddings, torch.tensor([[0, 1], [1, 1], [3, 0]]))
        tensor(0.2102)
    """
    op = "rank_n_contrast"
    number, learned = as_number_or_tensor(op, "temperature", temperature)
    return _eager(
        as_tensor(op, "embeddings", embeddings),
        as_targets(op, targets),
        learned,
        as_optional_tensor(op, "mask", mask),
        temperature=number,
        anchor_begin=0,
        anchor_count=-1,
    )
