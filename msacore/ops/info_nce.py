"""InfoNCE: masked, weighted, with several positives, without the similarity matrix."""

import math
from typing import Any

import torch
from torch import Tensor

from msacore.ops._autocast import compute_in_float32
from msacore.ops._autograd import differentiable, refuse_second_derivative, will_differentiate
from msacore.ops._check import (
    as_choice,
    as_flag,
    as_indices,
    as_number_or_tensor,
    as_optional_tensor,
    as_tensor,
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    describe,
    fail,
)

_info_nce = torch.ops.msacore.info_nce.default
_info_nce_backward = torch.ops.msacore.info_nce_backward.default
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_DENOMINATORS = {"all": 0, "negatives": 1, "decoupled": 2}
_MOST_KEPT, _WIDE = 2**21, 64  # csrc/info_nce/info_nce.h


def check_temperature(op: str, name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        fail(op, f"expected `{name}` to be positive and finite, got {value:g}")


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_info_nce(
    op: str,
    anchors: Tensor,
    candidates: Tensor | None,
    learned_temperature: Tensor | None,
    anchor_labels: Tensor | None,
    candidate_labels: Tensor | None,
    weights: Tensor | None,
    negatives: Tensor | None,
    negative_mask: Tensor | None,
    anchor_mask: Tensor | None,
    candidate_mask: Tensor | None,
    *,
    temperature: float,
    symmetric: bool,
    exclude_self: bool,
    normalize: bool,
    denominator: int,
    reduction: int,
    is_part: bool = False,
) -> tuple[Any, Any]:
    """The checks of csrc/info_nce/info_nce.h; returns N and N'.

    ``is_part``: the anchors are a part of a batch, and the caller checks their place among the candidates.
    """
    check_floating(op, "anchors", anchors)
    check_shape(op, "anchors", anchors, (-1, -1), "[N, d]")
    n, d = anchors.shape
    m = n
    if weights is not None and anchor_labels is not None:
        fail(op, "expected `labels` or `weights`, got both")
    if (anchor_labels is None) != (candidate_labels is None):
        fail(op, "expected `labels` for anchors and candidates, got one of the two")
    if candidates is not None:
        check_dtype(op, "candidates", candidates, anchors.dtype)
        check_shape(op, "candidates", candidates, (-1, d), "[N', d]")
        check_device(op, "candidates", candidates, anchors)
        m = candidates.shape[0]
    if learned_temperature is not None:
        check_floating(op, "temperature", learned_temperature)
        check_shape(op, "temperature", learned_temperature, (), "[] (0-d)")
        check_device(op, "temperature", learned_temperature, anchors)
    else:
        check_temperature(op, "temperature", temperature)
    q = 0
    if negatives is not None:
        check_dtype(op, "negatives", negatives, anchors.dtype)
        check_shape(op, "negatives", negatives, (-1, d), "[Q, d]")
        check_device(op, "negatives", negatives, anchors)
        q = negatives.shape[0]
    elif negative_mask is not None:
        fail(op, "expected `negative_mask` only together with `negatives`")
    for name, tensor, dtype, rows, meaning in (
        ("labels[0]", anchor_labels, torch.int64, n, "[N]"),
        ("labels[1]", candidate_labels, torch.int64, m, "[N']"),
        ("anchor_mask", anchor_mask, torch.bool, n, "[N]"),
        ("candidate_mask", candidate_mask, torch.bool, m, "[N']"),
        ("negative_mask", negative_mask, torch.bool, q, "[Q]"),
    ):
        if tensor is not None:
            check_dtype(op, name, tensor, dtype)
            check_shape(op, name, tensor, (rows,), meaning)
            check_device(op, name, tensor, anchors)
    if weights is not None:
        check_dtype(op, "weights", weights, anchors.dtype)
        check_shape(op, "weights", weights, (n, m), "[N, N']")
        check_device(op, "weights", weights, anchors)
    as_many = f"expected `candidates` to have as many rows as `anchors` ({n})"
    if weights is None and anchor_labels is None and n != m and not is_part:
        fail(op, f"{as_many} when neither `labels` nor `weights` say which are positive, got {m}")
    if not 0 <= denominator <= 2:
        names = '"all", "negatives" or "decoupled"'
        fail(op, f"expected `denominator` to be {names}, got code {denominator}")
    if not 0 <= reduction <= 2:
        fail(op, f'expected `reduction` to be "none", "mean" or "sum", got code {reduction}')
    if symmetric and reduction == _REDUCTIONS["none"] and n != m:
        fail(op, f'{as_many} with `symmetric` and `reduction` "none", got {m}')
    return n, m


def stat_rows(denominator: int) -> int:
    """How many numbers the forward pass keeps per row; csrc/info_nce/info_nce.h says which."""
    return 5 if denominator == _DENOMINATORS["negatives"] else 4


def _kept_shape(anchors: Tensor, columns: Any, keep: bool) -> tuple[Any, ...]:
    rows, columns = (anchors.shape[0] + 15) // 16 * 16, (columns + 15) // 16 * 16
    few = keep and anchors.shape[1] >= _WIDE and rows * columns <= _MOST_KEPT
    return (rows, columns) if few else (0,)


def _all_candidates(candidates: Any, negatives: Tensor | None) -> Any:
    return candidates if negatives is None else candidates + negatives.shape[0]


@torch.library.register_fake("msacore::info_nce")
def _(*inputs: Any, keep: bool, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, m = check_info_nce("info_nce", *inputs, **options)
    anchors, dtype, rows = inputs[0], loss_dtype(inputs[0].dtype), stat_rows(options["denominator"])
    return (
        anchors.new_empty((n,) if options["reduction"] == _REDUCTIONS["none"] else (), dtype=dtype),
        anchors.new_empty((rows, n), dtype=dtype),
        anchors.new_empty((rows, m if options["symmetric"] else 0), dtype=dtype),
        anchors.new_empty(_kept_shape(anchors, _all_candidates(m, inputs[6]), keep), dtype=dtype),
    )


@torch.library.register_fake("msacore::info_nce_backward")
def _(grad_out: Tensor, *saved: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *inputs, anchor_stats, candidate_stats, kept = saved
    op = "info_nce_backward"
    n, m = check_info_nce(op, *inputs, **options)
    anchors, candidates, learned_temperature, _, _, weights, negatives, *_ = inputs
    dtype = loss_dtype(anchors.dtype)
    per_anchor, rows = options["reduction"] == _REDUCTIONS["none"], stat_rows(options["denominator"])
    columns = m if options["symmetric"] else 0
    full = _kept_shape(anchors, _all_candidates(m, negatives), True)
    for name, tensor, shape, meaning in (
        ("grad_out", grad_out, (n,) if per_anchor else (), "[N]" if per_anchor else "[]"),
        ("anchor_stats", anchor_stats, (rows, n), "[S, N]"),
        ("candidate_stats", candidate_stats, (rows, columns), "[S, N'] or [S, 0]"),
        ("kept", kept, (0,) if kept.dim() == 1 else full, "[0]" if kept.dim() == 1 else "[R, R']"),
    ):
        check_dtype(op, name, tensor, dtype)
        check_shape(op, name, tensor, shape, meaning)
        check_device(op, name, tensor, anchors)
    d = anchors.shape[1]
    return (
        anchors.new_empty((n, d)),
        anchors.new_empty((0 if candidates is None else m, d)),
        anchors.new_empty((0,)) if learned_temperature is None else learned_temperature.new_empty(()),
        anchors.new_empty((0, 0) if weights is None else (n, m)),
        anchors.new_empty((0 if negatives is None else negatives.shape[0], d)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *saved)
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name != "keep"}


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    anchors, candidates, temperature, weights, negatives = _info_nce_backward(grad_out, *saved, **ctx.options)
    return (
        anchors,
        None if saved[1] is None else candidates,
        None if saved[2] is None else temperature,
        None,
        None,
        None if saved[5] is None else weights,
        None if saved[6] is None else negatives,
        None,
        None,
        None,
    )


refuse_second_derivative("info_nce_backward")
compute_in_float32("info_nce")
_eager = differentiable(_info_nce, _setup_context, _backward)


def _labels_of(labels: Any, one_embedding: bool) -> tuple[Tensor | None, Tensor | None]:
    """Labels of anchors and candidates; one tensor serves both where they are the same rows."""
    if labels is None:
        return None, None
    if isinstance(labels, Tensor) and one_embedding:
        both = as_indices("info_nce", "labels", labels)
        return both, both
    if not (isinstance(labels, (tuple, list)) and len(labels) == 2):
        raise ValueError(
            "msacore::info_nce: expected `labels` to be a pair (anchor_labels, candidate_labels), or one tensor "
            f"without `candidates`, got {describe(labels)}"
        )
    return as_indices("info_nce", "labels[0]", labels[0]), as_indices("info_nce", "labels[1]", labels[1])


def info_nce(
    anchors: Tensor,
    candidates: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    weights: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_mask: Tensor | None = None,
    denominator: str = "all",
    normalize: bool = True,
    anchor_mask: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    symmetric: bool = False,
    exclude_self: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """:func:`msacore.info_nce` of one process."""
    op = "info_nce"
    anchors, candidates = as_tensor(op, "anchors", anchors), as_optional_tensor(op, "candidates", candidates)
    number, learned = as_number_or_tensor(op, "temperature", temperature)
    anchor_labels, candidate_labels = _labels_of(labels, candidates is None or candidates is anchors)
    code = as_choice(op, "denominator", denominator, _DENOMINATORS)
    if code == _DENOMINATORS["negatives"] and labels is None and weights is None:
        code = _DENOMINATORS["all"]  # with one positive per row the two are the same, and this takes one sweep
    tensors = {"weights": weights, "negatives": negatives}
    weights, negatives = (as_optional_tensor(op, name, tensor) for name, tensor in tensors.items())
    wanted = (anchors, candidates, learned, weights, negatives)
    loss, *_ = _eager(
        anchors,
        None if candidates is anchors else candidates,
        learned,
        anchor_labels,
        candidate_labels,
        weights,
        negatives,
        as_optional_tensor(op, "negative_mask", negative_mask),
        as_optional_tensor(op, "anchor_mask", anchor_mask),
        as_optional_tensor(op, "candidate_mask", candidate_mask),
        temperature=number,
        symmetric=as_flag(op, "symmetric", symmetric),
        exclude_self=as_flag(op, "exclude_self", exclude_self),
        normalize=as_flag(op, "normalize", normalize),
        denominator=code,
        reduction=as_choice(op, "reduction", reduction, _REDUCTIONS),
        keep=will_differentiate(*(t for t in wanted if t is not None)),
    )
    return loss
