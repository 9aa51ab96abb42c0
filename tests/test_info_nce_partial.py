"""Parts of a batch, merged as several processes would merge them, give the loss of the whole batch."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from msacore import info_nce
from msacore.ops.info_nce_partial import info_nce_partial, info_nce_partial_backward, info_nce_partial_positives

DOUBLE = torch.float64
DENOMINATORS = {"all": 0, "negatives": 1, "decoupled": 2}


def _log_sum(parts: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """Highest similarity and logarithm relative to it, from (highest, Σ exp) of several parts."""
    highest = torch.stack([p[0] for p in parts]).amax(0)
    base = torch.where(highest.isfinite(), highest, 0)
    total = torch.stack([p[1] * ((p[0] - base) / temperature).exp() for p in parts]).sum(0)
    return base, total.log()


def _merged(whole: dict[str, Any], sizes: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients (for an upstream gradient of 1) of a batch whose anchors are split in these sizes."""
    options = {k: whole[k] for k in ("symmetric", "exclude_self", "normalize", "temperature")}
    denominator, symmetric, tau = DENOMINATORS[whole["denominator"]], whole["symmetric"], whole["temperature"]
    x, y, weights, labels = (whole.get(k) for k in ("anchors", "candidates", "weights", "labels"))
    mask, y_mask, queue, queue_mask = (
        whole.get(k) for k in ("anchor_mask", "candidate_mask", "negatives", "negative_mask")
    )
    bounds = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    assert bounds[-1] == len(x)

    def inputs(begin: int, end: int) -> list[Any]:
        def own(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[begin:end]

        both = (None, None) if labels is None else labels
        return [own(x), y, None, own(both[0]), both[1], own(weights), queue, queue_mask, own(mask), y_mask]

    ranges = list(pairwise(bounds))
    parts = [info_nce_partial(*inputs(b, e), **options, denominator=denominator, diagonal=b) for b, e in ranges]
    n, m = len(x), len(y)
    rows, columns = torch.cat([row for row, _ in parts], 1), [column for _, column in parts]
    row_all, column_all = [_log_sum([rows], tau)], [_log_sum(columns, tau)] if symmetric else []
    row_sums, column_sums = rows[2:], torch.stack([c[2:] for c in columns]).sum(0)

    found = []
    for (highest, log), sums in zip([*row_all, *column_all], [row_sums, column_sums], strict=False):
        total = sums[0]
        if denominator == DENOMINATORS["decoupled"]:
            total = torch.where(log.isinf(), 0, total)
        found.append((highest, log, sums[1], total))
    rests: list[Tensor | None] = [None, None]
    if denominator == DENOMINATORS["negatives"]:
        of_columns = torch.stack(found[1][:2]) if symmetric else x.new_empty(2, 0)
        more = [
            info_nce_partial_positives(
                *inputs(b, e), torch.stack([t[b:e] for t in found[0][:2]]), of_columns, **options, diagonal=b
            )
            for b, e in ranges
        ]
        sums = [torch.cat([row for row, _ in more], 1), torch.stack([column for _, column in more]).sum(0)]
        found = [(h, log, s[0], total) for (h, log, _, total), s in zip(found, sums, strict=False)]
        rests = [s[1] for s in sums]

    losses, stats, counts = [], [], []
    for (highest, log, value, total), rest in zip(found, rests, strict=False):
        kept = total != 0
        mean = torch.where(kept, value / total, 0)
        loss = mean if rest is not None else (highest - mean) / tau + log
        losses.append(torch.where(kept, loss, 0))
        extra = [] if rest is None else [torch.where(kept, rest / total, 0)]
        stats.append(torch.stack([highest, log, mean, total, *extra]))
        counts.append(kept.sum().clamp(min=1))
    loss = torch.stack([each.sum() / count for each, count in zip(losses, counts, strict=True)]).mean()

    def used(mask: Tensor | None, of: Tensor | None, size: int) -> Tensor:
        part = torch.ones(size, dtype=torch.bool) if mask is None else mask
        return (part if of is None else part & (of >= 0)).sum()

    anchors_used = used(mask, labels[0] if labels else None, n)
    candidates_used = used(y_mask, labels[1] if labels else None, m)
    if queue is not None:
        candidates_used = candidates_used + used(queue_mask, None, len(queue))
    scales = [1 / (len(counts) * count.double()) for count in counts]
    column_stats = stats[1] if symmetric else x.new_empty(len(stats[0]), 0)
    grads = [
        info_nce_partial_backward(
            scales[0], scales[-1], *inputs(b, e), stats[0][:, b:e], column_stats, anchors_used, candidates_used,
            **options, denominator=denominator, diagonal=b,
        )
        for b, e in ranges
    ]  # fmt: skip
    one, two, slope, w, q = zip(*grads, strict=True)
    return loss, {
        "anchors": torch.cat(one),
        "candidates": torch.stack(two).sum(0),
        "temperature": torch.stack(slope).sum(),
        **({} if weights is None else {"weights": torch.cat(w)}),
        **({} if queue is None else {"negatives": torch.stack(q).sum(0)}),
    }


def _batch(positives: str, n: int = 9, m: int = 9, d: int = 5, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    x, y, queue = (torch.randn(k, d, generator=generator, dtype=DOUBLE) for k in (n, m, 6))
    whole: dict[str, Any] = dict(
        anchors=x, candidates=y, temperature=0.3, symmetric=False, exclude_self=False, normalize=True, denominator="all"
    )
    if positives == "labels":
        whole["labels"] = tuple(torch.randint(-1, 4, (k,), generator=generator) for k in (n, m))
    if positives == "weights":
        drawn = torch.rand(n, m, generator=generator, dtype=DOUBLE)
        whole["weights"] = torch.where(drawn < 0.3, drawn + 0.1, 0)
    if options.pop("queue", False):
        whole |= dict(negatives=queue, negative_mask=torch.arange(6) != 2)
    if options.pop("masks", False):
        whole |= dict(anchor_mask=torch.arange(n) % 4 != 1, candidate_mask=torch.arange(m) % 5 != 2)
    return {**whole, **options}


_SPLITS = [[9], [4, 5], [0, 9], [1, 0, 8], [3, 1, 5], [2, 2, 2, 3]]
_FORMS = [
    dict(),
    dict(symmetric=True, masks=True),
    dict(symmetric=True, queue=True, denominator="negatives"),
    dict(symmetric=True, masks=True, denominator="decoupled", queue=True),
    dict(denominator="negatives", temperature=0.01),
    dict(symmetric=True, exclude_self=True, temperature=0.02),
    dict(symmetric=True, normalize=False, queue=True),
]


@pytest.mark.parametrize("sizes", _SPLITS, ids=str)
@pytest.mark.parametrize("positives", ["diagonal", "labels", "weights"])
def test_merged_parts_are_the_whole(positives: str, sizes: list[int]) -> None:
    for form in _FORMS:
        if form.get("exclude_self") and positives == "diagonal":
            continue  # no positive is left
        whole = _batch(positives, **form)
        names = [k for k in ("anchors", "candidates", "temperature", "weights", "negatives") if k in whole]
        tensors = {k: torch.as_tensor(whole[k], dtype=DOUBLE).clone().requires_grad_() for k in names}
        expected = info_nce(**{**whole, **tensors})
        gradients = dict(zip(names, torch.autograd.grad(expected, list(tensors.values())), strict=True))
        loss, merged = _merged(whole, sizes)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        assert merged.keys() == gradients.keys()
        for name, ref in gradients.items():
            error = (merged[name] - ref).abs().max() / ref.abs().max().clamp(min=1)
            assert error <= 1e-12, f"{form}: gradient of {name} off by {error}"


def test_candidates_without_a_local_positive_still_have_their_sums() -> None:
    whole = _batch("diagonal", symmetric=True)
    options = {k: whole[k] for k in ("symmetric", "exclude_self", "normalize", "temperature")}
    nothing = [None] * 8
    _, column = info_nce_partial(
        whole["anchors"][:3], whole["candidates"], *nothing, **options, denominator=0, diagonal=4
    )
    assert (column[1] > 0).all()
    assert column[2].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]


def test_candidates_may_be_a_part_too() -> None:
    """Tiles of rows and columns, wherever the diagonal lies in them, merge into the part against all candidates."""
    for form in (dict(), dict(exclude_self=True), dict(denominator="decoupled")):
        for positives in ("diagonal", "labels"):
            whole = _batch(positives, symmetric=True, **form)
            x, y, labels = whole["anchors"][2:6], whole["candidates"], whole.get("labels", (None, None))
            options = {k: whole[k] for k in ("symmetric", "exclude_self", "normalize", "temperature")}
            options["denominator"] = DENOMINATORS[whole["denominator"]]

            own = None if labels[0] is None else labels[0][2:6]
            found = []
            for begin, end in ((0, 9), (0, 1), (1, 4), (4, 4), (4, 9)):
                other = None if labels[1] is None else labels[1][begin:end]
                rest: list[Any] = [None, own, other, *[None] * 5]
                found.append(info_nce_partial(x, y[begin:end], *rest, **options, diagonal=2 - begin))
            (row, column), *parts = found
            torch.testing.assert_close(torch.cat([c for _, c in parts], 1), column, rtol=1e-12, atol=1e-12)
            base, log = _log_sum([r for r, _ in parts], whole["temperature"])
            expected = _log_sum([row], whole["temperature"])
            torch.testing.assert_close(
                base / whole["temperature"] + log, expected[0] / whole["temperature"] + expected[1]
            )
            sums = torch.stack([r[2:] for r, _ in parts]).sum(0)
            torch.testing.assert_close(sums, row[2:], rtol=1e-12, atol=1e-12)


def test_a_diagonal_has_limits() -> None:
    x, y = torch.randn(3, 2), torch.randn(5, 2)
    options: dict[str, Any] = dict(temperature=0.1, symmetric=True, exclude_self=False, normalize=True, denominator=0)
    for diagonal in (-(1 << 62), 1 << 62):
        for device in ("cpu", "meta"):
            with pytest.raises(RuntimeError, match=r"info_nce_partial: expected `diagonal` from -2\^60 to 2\^60"):
                info_nce_partial(x.to(device), y.to(device), *[None] * 8, **options, diagonal=diagonal)


def test_parts_are_operators_that_torch_can_check_and_not_differentiable_alone() -> None:
    whole = _batch("labels", symmetric=True, denominator="negatives")
    options = {k: whole[k] for k in ("symmetric", "exclude_self", "normalize", "temperature")}
    labels = whole["labels"]
    rest: list[Any] = [None, labels[0][:4], labels[1], *[None] * 5]
    arguments = (whole["anchors"][:4], whole["candidates"], *rest)
    row, column = info_nce_partial(*arguments, **options, denominator=1, diagonal=2)
    torch.library.opcheck(info_nce_partial, arguments, {**options, "denominator": 1, "diagonal": 2})
    sums = row[:2].contiguous(), column[:2].contiguous()
    torch.library.opcheck(info_nce_partial_positives, (*arguments, *sums), {**options, "diagonal": 2})
    used = torch.tensor(9), torch.tensor(9)
    scales = torch.ones(4, dtype=DOUBLE), torch.ones((), dtype=DOUBLE)
    stats = row.new_ones(5, 4), row.new_ones(5, 9)
    torch.library.opcheck(
        info_nce_partial_backward, (*scales, *arguments, *stats, *used), {**options, "denominator": 1, "diagonal": 2}
    )
    x = whole["anchors"][:4].clone().requires_grad_()
    row, _ = info_nce_partial(x, *arguments[1:], **options, denominator=1, diagonal=2)
    with pytest.raises(RuntimeError, match="msacore::info_nce_partial: not differentiable by itself"):
        row.sum().backward()
