"""The hierarchical contrastive loss of AL-HCL: three tiers of InfoNCE terms in one operator."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from msacore.ops._autocast import compute_in_float32
from msacore.ops._autograd import differentiable, refuse_second_derivative, will_differentiate
from msacore.ops._check import (
    as_choice,
    as_flag,
    as_number_or_tensor,
    as_numbers,
    as_optional_indices,
    as_optional_tensor,
    as_tensor,
    as_tensors,
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    describe,
    fail,
)
from msacore.ops.info_nce import check_temperature, loss_dtype

_loss = torch.ops.msacore.hierarchical_contrastive_loss.default
_loss_backward = torch.ops.msacore.hierarchical_contrastive_loss_backward.default
_TIERS = 3
_TIER1 = {"cross_modal": 0, "intra_modal": 1}
_MOST_MODALITIES = 64
_MOST_KEPT = 2**22  # csrc/hierarchical_contrastive/hierarchical_contrastive.h


def _check_inputs(
    op: str,
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    available: Tensor | None,
    labels: Tensor | None,
    *learned_temperatures: Tensor | None,
    tier_weights: Sequence[float],
    temperatures: Sequence[float],
    intra_modal: bool,
    normalize: bool,
) -> int:
    """The checks of csrc/hierarchical_contrastive/hierarchical_contrastive.h; returns the number of terms."""
    modalities = len(unimodal)
    pairs = modalities * (modalities - 1) // 2
    if not 1 <= modalities <= _MOST_MODALITIES:
        fail(op, f"expected `unimodal` to hold 1 to {_MOST_MODALITIES} tensors, got {modalities}")
    if len(high_level) != pairs:
        fail(op, f"expected `high_level` to hold M(M-1)/2 = {pairs} tensors, got {len(high_level)}")
    first = unimodal[0]
    check_floating(op, "unimodal[0]", first)
    check_shape(op, "unimodal[0]", first, (-1, -1), "[N, d]")
    n, d = first.shape
    width = high_level[0].shape[1] if pairs and high_level[0].dim() == 2 else -1
    embeddings = [(f"unimodal[{m}]", t, d, "[N, d]") for m, t in enumerate(unimodal)]
    embeddings.append(("fused", fused, d, "[N, d]"))
    embeddings += [(f"high_level[{p}]", t, width, "[N, d3]") for p, t in enumerate(high_level)]
    for name, tensor, size, meaning in embeddings:
        check_dtype(op, name, tensor, first.dtype)
        check_shape(op, name, tensor, (n, size), meaning)
        check_device(op, name, tensor, first)
    if available is not None:
        check_dtype(op, "available", available, torch.bool)
        check_shape(op, "available", available, (n, modalities), "[N, M]")
        check_device(op, "available", available, first)
    if labels is None and intra_modal:
        fail(op, 'expected `labels` with `tier1` "intra_modal", got none')
    if labels is not None:
        check_dtype(op, "labels", labels, torch.int64)
        check_shape(op, "labels", labels, (n,), "[N]")
        check_device(op, "labels", labels, first)
    for name, values in (("tier_weights", tier_weights), ("temperatures", temperatures)):
        if len(values) != _TIERS:
            fail(op, f"expected `{name}` to hold 3 numbers, got {len(values)}")
    for k, (value, learned) in enumerate(zip(temperatures, learned_temperatures, strict=True)):
        if learned is None:
            check_temperature(op, "temperatures", value)
        else:
            check_floating(op, f"temperatures[{k}]", learned)
            check_shape(op, f"temperatures[{k}]", learned, (), "[] (0-d)")
            check_device(op, f"temperatures[{k}]", learned, first)
    return (modalities if intra_modal else pairs) + modalities + pairs * (pairs - 1) // 2


def _kept_shape(samples: Any, terms: int, intra_modal: bool, keep: bool) -> tuple[Any, ...]:
    rows = (samples + 15) // 16 * 16
    if not keep or intra_modal or terms * rows * rows > _MOST_KEPT:
        return (0,)
    return terms, rows, rows


@torch.library.register_fake("msacore::hierarchical_contrastive_loss")
def _(*inputs: Any, keep: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = _check_inputs("hierarchical_contrastive_loss", *inputs, **options)
    fused = inputs[1]
    n, dtype = fused.shape[0], loss_dtype(fused.dtype)
    shapes = ((), (_TIERS,), (terms, 2, 4, n), _kept_shape(n, terms, options["intra_modal"], keep))
    loss, tiers, stats, kept = (fused.new_empty(shape, dtype=dtype) for shape in shapes)
    return loss, tiers, stats, kept


@torch.library.register_fake("msacore::hierarchical_contrastive_loss_backward")
def _(
    grad_loss: Tensor | None, grad_tiers: Tensor | None, *saved: Any, **options: Any
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    *inputs, stats, kept = saved
    op = "hierarchical_contrastive_loss_backward"
    terms = _check_inputs(op, *inputs, **options)
    unimodal, fused, high_level, _, _, *learned = inputs
    n = fused.shape[0]
    full = _kept_shape(n, terms, options["intra_modal"], True)
    for name, tensor, shape, meaning in (
        ("grad_loss", grad_loss, (), "[]"),
        ("grad_tiers", grad_tiers, (_TIERS,), "[3]"),
        ("stats", stats, (terms, 2, 4, n), "[T, 2, 4, N]"),
        ("kept", kept, (0,) if kept.dim() == 1 else full, "[0]" if kept.dim() == 1 else "[T, R, R]"),
    ):
        if tensor is not None:
            check_dtype(op, name, tensor, loss_dtype(fused.dtype))
            check_shape(op, name, tensor, shape, meaning)
            check_device(op, name, tensor, fused)
    one, two, three = (fused.new_empty((0,)) if t is None else t.new_empty(()) for t in learned)
    return [t.new_empty(t.shape) for t in (*unimodal, fused, *high_level)], one, two, three


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    unimodal, fused, high_level, *others = inputs
    _, _, stats, kept = output
    ctx.mark_non_differentiable(stats, kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*unimodal, fused, *high_level, *others, stats, kept)
    ctx.modalities = len(unimodal)
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "keep"}


def _backward(ctx: Any, grad_loss: Tensor | None, grad_tiers: Tensor | None, *_: None) -> tuple[Any, ...]:
    m = ctx.modalities
    *embeddings, available, labels, one, two, three, stats, kept = ctx.saved_tensors
    learned = one, two, three
    grads: Sequence[Tensor | None] = [None] * len(embeddings)
    slopes: Sequence[Tensor | None] = [None] * _TIERS
    if grad_loss is not None or grad_tiers is not None:
        inputs = embeddings[:m], embeddings[m], embeddings[m + 1 :], available, labels, *learned
        grads, *slopes = _loss_backward(grad_loss, grad_tiers, *inputs, stats, kept, **ctx.options)
    slopes = [None if t is None else slope for t, slope in zip(learned, slopes, strict=True)]
    return list(grads[:m]), grads[m], list(grads[m + 1 :]), None, None, *slopes


refuse_second_derivative("hierarchical_contrastive_loss_backward")
compute_in_float32("hierarchical_contrastive_loss")
_eager = differentiable(_loss, _setup_context, _backward)


def _temperatures_of(value: Any) -> tuple[list[float], list[Tensor | None]]:
    """The three temperatures as numbers, and those that are tensors, each at its place."""
    op = "hierarchical_contrastive_loss"
    if isinstance(value, (Tensor, str, Mapping)) or not hasattr(value, "__iter__"):
        fail(op, f"expected `temperatures` to be a sequence of 3 numbers or tensors, got {describe(value)}")
    pairs = [as_number_or_tensor(op, f"temperatures[{k}]", item) for k, item in enumerate(value)]
    if len(pairs) != _TIERS:
        fail(op, f"expected `temperatures` to hold 3 numbers, got {len(pairs)}")
    return [number for number, _ in pairs], [tensor for _, tensor in pairs]


@overload
def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = ...,
    labels: Tensor | None = ...,
    tier_weights: Sequence[float] = ...,
    temperatures: Sequence[float | Tensor] = ...,
    tier1: str = ...,
    normalize: bool = ...,
    return_tiers: Literal[False] = ...,
) -> Tensor: ...
@overload
def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = ...,
    labels: Tensor | None = ...,
    tier_weights: Sequence[float] = ...,
    temperatures: Sequence[float | Tensor] = ...,
    tier1: str = ...,
    normalize: bool = ...,
    return_tiers: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = ...,
    labels: Tensor | None = ...,
    tier_weights: Sequence[float] = ...,
    temperatures: Sequence[float | Tensor] = ...,
    tier1: str = ...,
    normalize: bool = ...,
    return_tiers: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = None,
    labels: Tensor | None = None,
    tier_weights: Sequence[float] = (0.2, 0.3, 0.5),
    temperatures: Sequence[float | Tensor] = (0.1, 0.1, 0.5),
    tier1: str = "cross_modal",
    normalize: bool = True,
    return_tiers: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`msacore.hierarchical_contrastive_loss` of one process."""
    op = "hierarchical_contrastive_loss"
    embeddings = (
        as_tensors(op, "unimodal", unimodal),
        as_tensor(op, "fused", fused),
        as_tensors(op, "high_level", high_level),
    )
    intra_modal = as_choice(op, "tier1", tier1, _TIER1) == _TIER1["intra_modal"]
    numbers, learned = _temperatures_of(temperatures)
    wanted = (*embeddings[0], embeddings[1], *embeddings[2])
    loss, tiers, _, _ = _eager(
        *embeddings,
        as_optional_tensor(op, "available", available),
        as_optional_indices(op, "labels", labels) if intra_modal else None,
        *learned,
        tier_weights=as_numbers(op, "tier_weights", tier_weights),
        temperatures=numbers,
        intra_modal=intra_modal,
        normalize=as_flag(op, "normalize", normalize),
        keep=learned == [None] * _TIERS and will_differentiate(*wanted),
    )
    return (loss, tiers) if as_flag(op, "return_tiers", return_tiers) else loss
