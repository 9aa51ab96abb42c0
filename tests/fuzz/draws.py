"""Random arguments of every operator: sizes 0 and 1 among them, options, masks, labels, weights, queues, graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.opcase import DTYPES, Arguments

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_TEMPERATURES = (0.02, 0.07, 0.1, 0.5, 1.0, 3.0, 40.0)


@dataclass(frozen=True)
class Drawn:
    """Arguments, which of them have a gradient, and what must stay unread as (path, mask of its shape)."""

    arguments: Arguments
    gradients: tuple[str, ...]
    hidden: list[tuple[tuple[Any, ...], Tensor]] = field(default_factory=list)
    own_result: bool = False  # a hidden entry still reaches its own row of the result


class Source:
    """Random numbers of one case: choices from `random`, tensors from a generator of torch."""

    def __init__(self, seed: int, dtype: torch.dtype | None = None) -> None:
        self.random = Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype or self.random.choice(DTYPES)

    def often(self, share: float) -> bool:
        return self.random.random() < share

    def size(self, most: int = 9, large: Sequence[int] = ()) -> int:
        """Mostly small; 0 and 1 now and then; rarely a size near a block's edge."""
        draw = self.random.random()
        if draw < 0.12:
            return int(draw > 0.05)
        return self.random.choice(large) if large and draw > 0.95 else self.random.randint(2, most)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def flags(self, *shape: int, share: float = 0.7) -> Tensor:
        """Booleans; now and then all are true, or none."""
        share = self.random.choice([0.0, 1.0]) if self.often(0.1) else share
        return torch.rand(shape, generator=self.generator) < share

    def rows(self, n: int, d: int, scale: Callable[[int], float] | None = None) -> Tensor:
        """Rows; some are zero, and some are copies of others."""
        x = self.normal(n, d)
        doubles = {}
        for i in range(n):
            if self.often(0.05):
                x[i] = 0
            elif self.often(0.08):
                doubles[i] = self.random.randrange(n)
                x[i] = x[doubles[i]]
            elif scale is not None:
                x[i] *= scale(i)
        for i, j in doubles.items() if scale is not None else ():
            x[i] = x[j]  # a copy of the scaled row, whichever of the two came first
        return x

    def labels(self, n: int, classes: int) -> Tensor:
        labels = torch.randint(-1, classes, (n,), generator=self.generator)
        return labels.to(self.random.choice(_INTEGERS))

    def temperature(self) -> Any:
        value = self.random.choice(_TEMPERATURES)
        if self.often(0.5):
            return value
        return torch.tensor([value] if self.often(0.3) else value, dtype=self.dtype)


def _rows_hidden(path: tuple[Any, ...], x: Tensor, used: Tensor) -> tuple[tuple[Any, ...], Tensor]:
    return path, ~used[:, None].expand_as(x)


def info_nce(s: Source, scale: Callable[[int], float] | None = None) -> Drawn:
    n, d = s.size(large=(64, 65, 130)), s.size(large=(33, 64, 130))
    itself = s.often(0.35)
    kind = s.random.choice(["diagonal", "labels", "weights"])
    m = n if itself or kind == "diagonal" else s.size(large=(63, 128, 129))
    a: Arguments = dict(anchors=s.rows(n, d, scale))
    if not itself:
        a["candidates"] = s.rows(m, d, scale)
    rows, columns = torch.ones(n, dtype=torch.bool), torch.ones(m, dtype=torch.bool)
    if kind == "labels":
        classes = s.random.choice([1, 2, 4])
        first = s.labels(n, classes)
        second = first if itself else s.labels(m, classes)
        a["labels"] = first if itself and s.often(0.7) else (first, second)
        rows, columns = first >= 0, second >= 0
    if kind == "weights":
        weights = 0.1 + torch.rand(n, m, generator=s.generator)
        a["weights"] = (weights * s.flags(n, m, share=s.random.choice([0.3, 1.0]))).to(s.dtype)
    if s.often(0.35):
        a["anchor_mask"] = s.flags(n)
        rows = rows & a["anchor_mask"]
    if s.often(0.35):
        a["candidate_mask"] = s.flags(m)
        columns = columns & a["candidate_mask"]
    a["exclude_self"] = s.often(0.5 if itself else 0.1)
    a["symmetric"] = s.often(0.5)
    a["denominator"] = s.random.choice(["all", "negatives", "decoupled"])
    a["normalize"] = s.often(0.75) or scale is not None
    a["reduction"] = s.random.choice(["mean", "sum", "none"] if not a["symmetric"] or n == m else ["mean", "sum"])
    a["temperature"] = s.temperature()
    if itself:
        hidden = [_rows_hidden(("anchors",), a["anchors"], rows | columns)]
    else:
        hidden = [
            _rows_hidden(("anchors",), a["anchors"], rows),
            _rows_hidden(("candidates",), a["candidates"], columns),
        ]
    if s.often(0.4):
        a["negatives"] = s.rows(s.size(large=(64, 130)), d, scale)
        if s.often(0.6):
            a["negative_mask"] = s.flags(len(a["negatives"]))
            hidden.append(_rows_hidden(("negatives",), a["negatives"], a["negative_mask"]))
    if kind == "weights":
        pairs = rows[:, None] & columns[None, :]
        if a["exclude_self"]:
            pairs = pairs & ~torch.eye(n, m, dtype=torch.bool)
        hidden.append((("weights",), ~pairs))
    return Drawn(a, ("anchors", "candidates", "temperature", "weights", "negatives"), hidden)


def hierarchical_contrastive_loss(s: Source, scale: Callable[[int], float] | None = None) -> Drawn:
    n, modalities = s.size(7, large=(65,)), s.random.randint(2, 4)
    d, d3 = s.size(large=(33,)), s.size(large=(33,))
    pairs = list(combinations(range(modalities), 2))
    a: Arguments = dict(
        unimodal=[s.rows(n, d, scale) for _ in range(modalities)],
        fused=s.rows(n, d, scale),
        high_level=[s.rows(n, d3, scale) for _ in pairs],
        tier1=s.random.choice(["cross_modal", "intra_modal"]),
        tier_weights=tuple(s.random.choice([0.0, 0.2, 1.0, 1.5]) for _ in range(3)),
        temperatures=tuple(s.temperature() for _ in range(3)),
        normalize=s.often(0.75) or scale is not None,
        return_tiers=s.often(0.5),
    )
    hidden = []
    if a["tier1"] == "intra_modal":
        a["labels"] = s.labels(n, 3)
    if s.often(0.7):
        there = a["available"] = s.flags(n, modalities)
        hidden += [_rows_hidden(("unimodal", m), a["unimodal"][m], there[:, m]) for m in range(modalities)]
        hidden += [
            _rows_hidden(("high_level", p), a["high_level"][p], there[:, m] & there[:, k])
            for p, (m, k) in enumerate(pairs)
        ]
        hidden.append(_rows_hidden(("fused",), a["fused"], there.any(1)))
    return Drawn(a, ("unimodal", "fused", "high_level", "temperatures"), hidden)


def rank_n_contrast(s: Source, scale: Callable[[int], float] | None = None) -> Drawn:
    n, d = s.size(12, large=(33, 64)), s.size(large=(33, 64, 65))
    a: Arguments = dict(embeddings=s.rows(n, d, scale), temperature=s.temperature())
    shape = (n,) if s.often(0.5) else (n, s.random.randint(0, 3))
    kind = s.random.choice(["eighths", "reals", "small integers", "large integers"])
    if kind == "eighths" or (kind == "reals" and len(shape) == 2):
        a["targets"] = torch.randint(-24, 25, shape, generator=s.generator).to(s.random.choice(DTYPES)) / 8
    elif kind == "reals":
        a["targets"] = torch.randn(shape, generator=s.generator).to(s.random.choice(DTYPES[:2]))
    elif kind == "small integers":
        a["targets"] = torch.randint(-3, 4, shape, generator=s.generator).to(s.random.choice(_INTEGERS))
    else:
        most = 2**60 if len(shape) == 2 else 2**63 - 1
        a["targets"] = torch.tensor(
            [
                s.random.choice([-most, -most + 1, -1, 0, 2**53, 2**53 + 1, most - 1, most])
                for _ in range(n * (shape[1] if len(shape) == 2 else 1))
            ],
            dtype=torch.int64,
        ).reshape(shape)
    hidden = []
    if s.often(0.5):
        a["mask"] = s.flags(n)
        hidden = [_rows_hidden(("embeddings",), a["embeddings"], a["mask"])]
        if a["targets"].is_floating_point():
            hidden.append((("targets",), ~a["mask"].reshape(n, *[1] * (len(shape) - 1)).expand(shape)))
    return Drawn(a, ("embeddings", "temperature"), hidden)


def matrix_fusion(s: Source) -> Drawn:
    batch, modalities = s.size(5), s.random.randint(2, 4)
    pooled = s.often(0.3)
    length = 1 if pooled else s.size(7, large=(40,))
    q, channels, augment = max(1, s.size(6)), max(1, s.size(5)), s.often(0.6)
    k = max(1 - augment, s.size(large=(33, 64)))  # a mean over no column is undefined
    wide = k + augment
    shape = (batch, k) if pooled else (batch, length, k)
    a: Arguments = dict(
        features=[s.normal(*shape) for _ in range(modalities)],
        row_weight=s.normal(q, wide),
        row_bias=s.normal(q),
        pair_weight=s.normal(channels, modalities * (modalities - 1) // 2),
        pair_bias=s.normal(channels),
        augment=augment,
        activation=s.random.choice(["relu", "gelu", "identity"]),
    )
    used = [torch.ones(batch, length, dtype=torch.bool) for _ in range(modalities)]
    if s.often(0.6):
        a["mask"] = s.flags(batch, length)
        used = [u & a["mask"] for u in used]
    if s.often(0.6):
        a["available"] = s.flags(batch, modalities)
        used = [u & a["available"][:, m, None] for m, u in enumerate(used)]
    hidden: list[tuple[tuple[Any, ...], Tensor]] = [
        (("features", m), ~u.reshape(*shape[:-1], 1).expand(shape)) for m, u in enumerate(used)
    ]
    return Drawn(a, ("features", "row_weight", "row_bias", "pair_weight", "pair_bias"), hidden)


def low_rank_fusion(s: Source) -> Drawn:
    batch, modalities, rank, out = s.size(7), s.random.randint(1, 4), s.size(5), s.size(9, large=(33,))
    widths = [s.size(large=(33, 65)) for _ in range(modalities)]
    a: Arguments = dict(
        features=[s.normal(batch, d) for d in widths],
        factors=[s.normal(rank, d + 1, out) for d in widths],
        rank_weight=s.normal(rank),
        bias=s.normal(out),
    )
    hidden = []
    if s.often(0.6):
        a["available"] = s.flags(batch, modalities)
        hidden = [_rows_hidden(("features", m), a["features"][m], a["available"][:, m]) for m in range(modalities)]
    return Drawn(a, ("features", "factors", "rank_weight", "bias"), hidden)


def _conversations(s: Source) -> Arguments:
    """Offsets, positions and a window; empty conversations, gaps and the ends of int64 among them."""
    lengths = [s.size(6, large=(20,)) for _ in range(s.random.randint(0, 4))]
    a: Arguments = dict(offsets=torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]))
    if s.often(0.4):
        a["offsets"] = a["offsets"].to(s.random.choice(_INTEGERS))
    if s.often(0.5):
        ends = s.often(0.2)
        positions: list[int] = []
        for length in lengths:
            first = -(2**63) if ends else s.random.randint(-20, 20)
            there = sorted(s.random.sample(range(first, first + 2 * length + 2), length))
            if ends and length > 1:
                there[-1] = 2**63 - 1
            positions += there
        a["positions"] = torch.tensor(positions, dtype=torch.int64)
    window = tuple(s.random.choice([-1, 0, 1, 2, 5, 2**40, 2**63 - 1]) for _ in range(2))
    a["window"] = window[0] if s.often(0.3) else window
    a["include_self"] = s.often(0.6)
    return a


def propagate(s: Source) -> Drawn:
    a = _conversations(s)
    n, modalities, d = int(a["offsets"][-1]), s.random.randint(1, 4), s.size(large=(17, 33))
    a["x"] = s.normal(n, modalities, d)
    a["steps"], a["alpha"] = s.random.randint(0, 4), s.random.choice([0.0, 0.1, 0.5, 1.0])
    a["send"] = s.random.choice(["after_fill", "never"])
    hidden: list[tuple[tuple[Any, ...], Tensor]] = []
    if s.often(0.7):
        a["available"] = s.flags(n, modalities)
        if a["send"] == "never":
            hidden = [(("x",), ~a["available"][..., None].expand(n, modalities, d))]
    return Drawn(a, ("x",), hidden, own_result=True)


def window_mean(s: Source) -> Drawn:
    a = _conversations(s)
    return Drawn({**a, **(other := _states(s, int(a["offsets"][-1]))).arguments}, ("h",), other.hidden)


def _states(s: Source, n: int) -> Drawn:
    shape = (n, s.random.randint(1, 4), s.size(large=(17, 33)))
    a: Arguments = dict(h=s.normal(*shape))
    hidden: list[tuple[tuple[Any, ...], Tensor]] = []
    if s.often(0.7):
        a["senders"] = s.flags(*shape[:2])
        hidden = [(("h",), ~a["senders"][..., None].expand(shape))]
    return Drawn(a, ("h",), hidden)


def modality_mean(s: Source) -> Drawn:
    return _states(s, s.size(12))


def _graph(s: Source, m: int, n: int, weights: str) -> tuple[Tensor, Tensor, Tensor | None]:
    counts = [s.random.choice([0, 1, 3, 9]) if n else 0 for _ in range(m)]
    rowptr = torch.tensor([0, *torch.tensor(counts, dtype=torch.int64).cumsum(0).tolist()])
    edges = int(rowptr[-1])
    col = torch.tensor([s.random.randrange(n) for _ in range(edges)], dtype=torch.int64)
    integers = s.random.choice(_INTEGERS[1:])
    shape = {"edge": (edges,), "none": None}.get(weights, (edges, int(weights) if weights.isdigit() else 0))
    return rowptr.to(integers), col.to(integers), None if shape is None else s.normal(*shape)


def graph_propagate(s: Source) -> Drawn:
    n, d, heads = s.size(12), s.size(large=(17, 33)), s.random.choice([0, 0, 1, 2, 5])
    steps, alpha = (1, 0.0) if s.often(0.4) else (s.random.randint(0, 3), s.random.choice([0.0, 0.1, 1.0]))
    m = s.size(12) if (steps, alpha) == (1, 0.0) and s.often(0.6) else n
    weights = s.random.choice(["edge", "none", str(heads)] if heads else ["edge", "none"])
    rowptr, col, weight = _graph(s, m, n, weights)
    x = s.normal(n, heads, d) if heads else s.normal(n, d)
    a: Arguments = dict(x=x, rowptr=rowptr, col=col, weight=weight, steps=steps, alpha=alpha)
    used = torch.ones(n, dtype=torch.bool)
    if (steps, alpha) == (1, 0.0):
        used = torch.isin(torch.arange(n), col)
    return Drawn(a, ("x", "weight"), [(("x",), ~used.reshape(n, *[1] * (x.dim() - 1)).expand(x.shape))])


def alternating_graph_propagate(s: Source) -> Drawn:
    n = s.size(12)
    a: Arguments = dict(x=s.normal(n, s.size(large=(17, 33))))
    a["steps"], a["alpha"] = s.random.randint(0, 3), s.random.choice([0.0, 0.1, 1.0])
    for name in ("intra", "inter", "first_intra"):
        if name != "first_intra" or s.often(0.5):
            a[name] = _graph(s, n, n, "edge")
    return Drawn(a, ("x", "intra", "inter", "first_intra"))
