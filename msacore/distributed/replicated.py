"""Replicated losses: every rank gathers all rows and evaluates the operator of one process on them.

The result equals that of one process bit for bit. There is one collective in the forward pass and none in the backward
pass, so a rank that skips its backward pass cannot hang the others. For batches of a few thousand rows; see `Sharding`
for larger ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msacore.distributed import rows
from msacore.distributed.arguments import (
    check_values,
    describe,
    describe_numbers,
    needs_gradient,
    on_meta,
    rows_of,
    sizes,
)
from msacore.distributed.overlap import Started
from msacore.distributed.rows import Layout
from msacore.distributed.sharding import Sharding
from msacore.ops._check import as_optional_indices


def _layout(sharding: Sharding, counts: Sequence[int], rows: int, padded: bool = True) -> Layout:
    if sharding.capacity is not None and padded:
        counts = [sharding.capacity] * sharding.world
    return Layout(tuple(counts), sharding.rank, rows)


def _check_capacity(op: str, sharding: Sharding, count: int) -> None:
    if sharding.capacity is not None and count > sharding.capacity:
        raise ValueError(f"msacore::{op}: expected at most `capacity` = {sharding.capacity} rows, got {count}")


def _valid(mask: Tensor | None, sharding: Sharding, layout: Layout, like: Tensor) -> Tensor | None:
    """The mask of this rank's rows; with a capacity even a full rank needs one, because others pad."""
    if mask is None and sharding.capacity is not None:
        return torch.ones(layout.rows, dtype=torch.bool, device=like.device)
    return mask


def hidden(mask: Tensor | None, labels: Tensor | None = None) -> Tensor | None:
    """Which rows are never read."""
    hidden = None if mask is None else ~mask
    if labels is None:
        return hidden
    return labels < 0 if hidden is None else hidden | (labels < 0)


@dataclass
class Contrast:
    """The arguments of `info_nce` on this rank, checked, and the layouts of their rows."""

    anchors: Tensor
    candidates: Tensor | None  # None: the anchors themselves
    started: Started | None
    anchor_labels: Tensor | None
    candidate_labels: Tensor | None
    weights: Tensor | None
    negatives: Tensor | None
    negative_mask: Tensor | None
    anchor_mask: Tensor | None
    candidate_mask: Tensor | None
    of_anchors: Layout
    of_candidates: Layout
    of_negatives: Layout
    one_role: bool  # every anchor is a candidate with the same label, and there are no other candidates
    gradients: tuple[bool, ...]  # whether each rank needs gradients

    @property
    def own(self) -> bool:
        return self.candidates is None

    def gather(
        self, sharding: Sharding, layout: Layout, tensors: list[Tensor | None], gone: Tensor | None, factor: float
    ) -> list[Tensor | None]:
        unread = [gone if x is not None and x.is_floating_point() else None for x in tensors]
        return rows.gather_rows("info_nce", sharding, layout, tensors, unread, factor)


def contrast(
    local: Callable[..., Tensor],
    sharding: Sharding,
    anchors: Tensor,
    candidates: Tensor | Started | None,
    *,
    temperature: float | Tensor,
    labels: Any,
    weights: Tensor | None,
    negatives: Tensor | None,
    negative_mask: Tensor | None,
    anchor_mask: Tensor | None,
    candidate_mask: Tensor | None,
    **options: Any,
) -> Contrast:
    """Check the arguments of `info_nce` on all ranks."""
    op = "info_nce"
    started = candidates if isinstance(candidates, Started) else None
    given_candidates = started.candidates if started is not None else candidates
    own = given_candidates is None or (given_candidates is anchors and started is None)
    n, m, q = rows_of(anchors), rows_of(anchors if own else given_candidates), rows_of(negatives)
    columns = weights.shape[1] if isinstance(weights, Tensor) and weights.dim() == 2 else 0
    one_mask = anchor_mask is not None and candidate_mask is anchor_mask
    one_role = own and (one_mask or (anchor_mask is None and candidate_mask is None))
    one_role = one_role and weights is None and negatives is None and not isinstance(labels, (tuple, list))
    given = dict(
        anchors=anchors,
        candidates=None if own else given_candidates,
        labels=labels,
        weights=weights,
        negatives=negatives,
        negative_mask=negative_mask,
        anchor_mask=anchor_mask,
        candidate_mask=candidate_mask,
    )

    def check() -> None:
        _check_capacity(op, sharding, max(n, m))
        on_slab = dict(given)
        if columns and weights is not None:  # the rank's own columns stand in for those of all ranks, counted later
            on_slab["weights"] = weights.detach().new_empty((len(weights), m), device="meta")
        first, second, *rest = on_slab.items()
        of_rows = {name: on_meta(value) for name, value in rest}
        local(on_meta(first[1]), on_meta(second[1]), temperature=on_meta(temperature), **of_rows, **options)
        check_values(op, given, dict(temperature=temperature))
        if started is not None and (started.sharding.group, started.sharding.capacity) != (
            sharding.group,
            sharding.capacity,
        ):
            raise ValueError(f"msacore::{op}: expected `candidates` to be started with the `group` of the loss")

    def described() -> dict[str, Any]:
        found = {name: describe(value) for name, value in {**given, **options}.items()}
        found["temperature"] = "a tensor" if isinstance(temperature, Tensor) else describe(temperature)
        found["weights"] = None if weights is None else "given"
        found["candidate_mask"] = "anchor_mask" if one_mask else found["candidate_mask"]
        found["candidates"] = f"{found['candidates']}, started" if started else found["candidates"]
        return found

    gradient = needs_gradient(anchors, given_candidates, weights, negatives, temperature)
    everywhere = sizes(op, sharding, [n, m, q, columns, gradient], described, check)
    of_anchors = _layout(sharding, [s[0] for s in everywhere], n)
    of_candidates = of_anchors if own else _layout(sharding, [s[1] for s in everywhere], m)
    if weights is not None:
        wrong = [(r, s) for r, s in enumerate(everywhere) if s[3] != of_candidates.total and s[0]]
        if wrong:
            rank, size = wrong[0]
            raise RuntimeError(
                f"msacore::{op}: on rank {rank}: expected `weights` to have shape [n, N'] = "
                f"[{size[0]}, {of_candidates.total}], one column per candidate of all ranks, got [{size[0]}, {size[3]}]"
            )
        weights = weights.reshape(n, of_candidates.total)
    given_labels = labels if isinstance(labels, (tuple, list)) else (labels, None)
    anchor_labels, candidate_labels = (as_optional_indices(op, "labels", x) for x in given_labels)
    if not own or candidate_mask is not None or sharding.capacity is not None:
        candidate_mask = _valid(candidate_mask, sharding, of_candidates, anchors)
    return Contrast(
        anchors,
        None if own else given_candidates,  # type: ignore[arg-type]
        started,
        anchor_labels,
        candidate_labels,
        weights,
        negatives,
        negative_mask,
        _valid(anchor_mask, sharding, of_anchors, anchors),
        candidate_mask,
        of_anchors,
        of_candidates,
        _layout(sharding, [s[2] for s in everywhere], q, padded=False),
        one_role,
        tuple(bool(s[4]) for s in everywhere),
    )


def info_nce(
    local: Callable[..., Tensor],
    sharding: Sharding,
    c: Contrast,
    *,
    temperature: float | Tensor,
    reduction: str,
    **arguments: Any,
) -> Tensor:
    """`msacore.info_nce` of the rows of all ranks; ``local`` is the operator of one process."""
    op = "info_nce"
    anchors: Tensor
    candidates: Tensor | None
    per_anchor = reduction == "none"
    factor = 1 if per_anchor else sharding.world
    gone = hidden(c.anchor_mask, c.anchor_labels)
    if c.own:
        # A row is unread where it is neither anchor nor candidate.
        other = hidden(c.candidate_mask, c.anchor_labels if c.candidate_labels is None else c.candidate_labels)
        both = None if gone is None or other is None else gone & other
        of_own = [c.anchors, c.anchor_labels, c.candidate_labels, c.anchor_mask, c.candidate_mask, c.weights]
        whole = c.gather(sharding, c.of_anchors, of_own, both, factor)
        anchors, anchor_labels, candidate_labels, anchor_mask, candidate_mask, weights = whole  # type: ignore[assignment]
        candidates = None
    else:
        of_rows = [c.anchors, c.anchor_labels, c.anchor_mask, c.weights]
        anchors, anchor_labels, anchor_mask, weights = c.gather(  # type: ignore[assignment]
            sharding, c.of_anchors, of_rows, gone, factor
        )
        gone = hidden(c.candidate_mask, c.candidate_labels)
        of_rows = [None if c.started else c.candidates, c.candidate_labels, c.candidate_mask]
        candidates, candidate_labels, candidate_mask = c.gather(sharding, c.of_candidates, of_rows, gone, factor)
        if c.started is not None:
            candidates = c.started.whole(factor)
    negatives, negative_mask = c.negatives, c.negative_mask
    if negatives is not None:
        of_queue = [negatives, negative_mask]
        negatives, negative_mask = c.gather(sharding, c.of_negatives, of_queue, hidden(negative_mask), factor)
    if per_anchor and isinstance(temperature, Tensor):
        temperature = rows.scale_gradient(temperature, 1 / sharding.world)
    options = {k: arguments[k] for k in ("denominator", "normalize", "symmetric", "exclude_self")}
    loss = local(
        anchors,
        candidates,
        temperature=temperature,
        labels=anchor_labels if candidate_labels is None else (anchor_labels, candidate_labels),
        weights=weights,
        negatives=negatives,
        negative_mask=negative_mask,
        anchor_mask=anchor_mask,
        candidate_mask=candidate_mask,
        reduction=reduction,
        **options,
    )
    if per_anchor:
        return rows.own_rows(loss, op, sharding, c.of_anchors)
    return rows.compare_gradient(loss, op, sharding) if sharding.check else loss


def hidden_embeddings(available: Tensor | None, modalities: int, pairs: int) -> list[Tensor | None]:
    """For every embedding, modalities first, then the fused one, then pairs: the rows that no term reads."""
    if available is None:
        return [None] * (modalities + 1 + pairs)
    missing = [~column for column in available.unbind(1)]
    of_pairs = [missing[i] | missing[j] for i in range(modalities) for j in range(i + 1, modalities)]
    return [*missing, ~available.any(1), *of_pairs]


def hierarchy_layout(
    local: Callable[..., Any],
    sharding: Sharding,
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    available: Tensor | None,
    labels: Tensor | None,
    options: dict[str, Any],
) -> tuple[Layout, Tensor | None, tuple[bool, ...]]:
    """Layout of the hierarchical loss's rows, what is available on this rank, and which ranks need gradients."""
    op = "hierarchical_contrastive_loss"
    n = rows_of(fused)
    given = dict(unimodal=unimodal, fused=fused, high_level=high_level, available=available, labels=labels)
    temperatures = options["temperatures"]

    def check() -> None:
        _check_capacity(op, sharding, n)
        of_rows = {name: on_meta(value) for name, value in given.items()}
        local(**of_rows, **{**options, "temperatures": on_meta(temperatures)})
        check_values(op, given, dict(temperatures=temperatures))

    def described() -> dict[str, Any]:
        found = {name: describe(value) for name, value in {**given, **options}.items()}
        return {**found, "tier_weights": describe_numbers(options["tier_weights"])}

    gradient = needs_gradient(unimodal, fused, high_level, temperatures)
    everywhere = sizes(op, sharding, [n, gradient], described, check)
    layout = _layout(sharding, [s[0] for s in everywhere], n)
    if available is None and sharding.capacity is not None:
        available = torch.ones(n, len(unimodal), dtype=torch.bool, device=fused.device)
    return layout, available, tuple(bool(s[1]) for s in everywhere)


def hierarchical_contrastive_loss(
    local: Callable[..., Any],
    sharding: Sharding,
    layout: Layout,
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None,
    labels: Tensor | None,
    **options: Any,
) -> Any:
    """`msacore.hierarchical_contrastive_loss` of the rows of all ranks."""
    op = "hierarchical_contrastive_loss"
    m = len(unimodal)
    unread = hidden_embeddings(available, m, len(high_level))
    sent = [*unimodal, fused, *high_level, available, labels]
    gathered = rows.gather_rows(op, sharding, layout, sent, [*unread, None, None], sharding.world)
    *embeddings, available, labels = gathered
    result = local(embeddings[:m], embeddings[m], embeddings[m + 1 :], available=available, labels=labels, **options)
    if not sharding.check:
        return result
    if isinstance(result, tuple):
        return tuple(rows.compare_gradient(part, op, sharding) for part in result)
    return rows.compare_gradient(result, op, sharding)


def rank_layout(
    local: Callable[..., Tensor],
    sharding: Sharding,
    embeddings: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> tuple[Layout, Tensor | None, tuple[bool, ...]]:
    """Layout of the rows of `rank_n_contrast`, the mask of this rank's rows, and which ranks need gradients."""
    op = "rank_n_contrast"
    n = rows_of(embeddings)
    given = dict(embeddings=embeddings, targets=targets, mask=mask)

    def check() -> None:
        _check_capacity(op, sharding, n)
        of_rows = {name: on_meta(value) for name, value in given.items()}
        local(**of_rows, temperature=on_meta(temperature))
        check_values(op, given, dict(temperature=temperature))

    def described() -> dict[str, Any]:
        found = {name: describe(value) for name, value in given.items()}
        return {**found, "temperature": "a tensor" if isinstance(temperature, Tensor) else describe(temperature)}

    everywhere = sizes(op, sharding, [n, needs_gradient(embeddings, temperature)], described, check)
    layout = _layout(sharding, [s[0] for s in everywhere], n)
    return layout, _valid(mask, sharding, layout, embeddings), tuple(bool(s[1]) for s in everywhere)


def rank_n_contrast(
    local: Callable[..., Tensor],
    sharding: Sharding,
    layout: Layout,
    embeddings: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
) -> Tensor:
    """`msacore.rank_n_contrast` of the rows of all ranks."""
    op = "rank_n_contrast"
    unread = hidden(mask)
    embeddings, targets, mask = rows.gather_rows(  # type: ignore[assignment]
        op, sharding, layout, [embeddings, targets, mask], [unread, unread, None], sharding.world
    )
    loss = local(embeddings, targets, temperature=temperature, mask=mask)
    return rows.compare_gradient(loss, op, sharding) if sharding.check else loss
