"""Closed-form predictors: ridge regression on modalities and on neighbours, judged by leaving out videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls

from msacore import window_mean

from .corpus import Corpus

STRENGTHS = tuple(float(s) for s in 10.0 ** np.arange(0, 6.5, 0.5))
WINDOW = 2
# A matrix with both sides longer than this is decomposed along the directions that a random sketch finds.
LIMIT = 2000
FOLDS = 5
BATCH = 2**22
# Regressions shrink their predictions; the weights of a sum may add up to this much to undo it.
STRETCH = 1.5
FLOOR = 0.1
NEARBY = " nearby"
RIDGE, ENDING = "ridge, ", " and neighbours"
SUM = f"{RIDGE}sum over modalities"


@dataclass(frozen=True)
class Design:
    """What closed forms read, side by side.

    Args:
        values: float32 ``[N, D]``; what is missing is 0, the mean.
        columns: Columns of each block: every modality by its name, with a last column that is 1 where it is missing;
            then every modality's neighbourhood, named with ``NEARBY``, with a last column that is 1 where there is no
            neighbour.
    """

    values: np.ndarray
    columns: dict[str, slice]

    @classmethod
    def of(cls, corpus: Corpus, observed: np.ndarray | None = None, transductive: bool = False) -> Design:
        """From a pooled corpus whose features are standardised.

        Neighbours are utterances of the same video whose clip numbers differ by at most ``WINDOW``, so that missing
        clips leave a gap; the means run over those neighbours that have the modality.

        Args:
            corpus: The features.
            observed: bool ``[N, M]``; what is False is not read. All that is available when omitted.
            transductive: Neighbours of other splits count too; by default only those of the same split do.
        """
        seen = corpus.available if observed is None else corpus.available & observed
        own, near = {}, {}
        for m, (name, x) in enumerate(corpus.features.items()):
            there = seen[:, m]
            filled = np.where(there[:, None], x, np.float32(0))
            own[name] = np.column_stack([filled, ~there]).astype(np.float32)
            near[name + NEARBY] = _nearby(corpus, filled, there, transductive)
        blocks = {**own, **near}
        return cls(np.hstack(list(blocks.values())), columns(corpus.modalities, corpus.dims))

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.columns)[: len(self.columns) // 2]


def columns(modalities: Sequence[str], dims: Sequence[int]) -> dict[str, slice]:
    """Columns of each block of a design, for modalities of these widths."""
    names = [*modalities, *(m + NEARBY for m in modalities)]
    edges = np.cumsum([0, *(d + 1 for d in (*dims, *dims))]).tolist()
    return {name: slice(a, b) for name, a, b in zip(names, edges, edges[1:], strict=False)}


def _nearby(corpus: Corpus, x: np.ndarray, there: np.ndarray, transductive: bool) -> np.ndarray:
    """Mean of the neighbours' features, and a column that is 1 where there is no neighbour: float32 ``[N, d + 1]``."""
    result = np.zeros((len(x), x.shape[1] + 1), np.float32)
    video, parts = corpus.video_index, np.zeros_like(corpus.split) if transductive else corpus.split
    for code in np.unique(parts):
        rows = np.flatnonzero(parts == code)
        offsets = np.concatenate([[0], np.cumsum(np.unique(video[rows], return_counts=True)[1])])
        # An extra column of ones: its mean is 1 where there is a neighbour.
        states = np.column_stack([x[rows], np.ones(len(rows), np.float32)])
        mean = window_mean(
            torch.from_numpy(states)[:, None],
            torch.from_numpy(offsets),
            senders=torch.from_numpy(np.ascontiguousarray(there[rows]))[:, None],
            positions=torch.from_numpy(np.ascontiguousarray(corpus.positions[rows])),
            window=WINDOW,
            include_self=False,
        )[:, 0].numpy()
        mean[:, -1] = 1 - mean[:, -1]
        result[rows] = mean
    return result


def views(modalities: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The blocks that each ridge regression reads, by its name.

    Example:
        >>> list(views(["text", "audio"]))[:3]
        ['ridge, text', 'ridge, text and neighbours', 'ridge, audio']
    """
    named = {**{m: (m,) for m in modalities}, "all modalities": tuple(modalities)}
    result = {}
    for name, own in named.items():
        result[f"{RIDGE}{name}"] = own
        result[f"{RIDGE}{name}{ENDING}"] = (*own, *(m + NEARBY for m in own))
    return result


@dataclass(frozen=True)
class Linear:
    """A fitted predictor: ``offset + design @ coefficient``.

    Args:
        coefficient: float64 ``[D]``, one for each column of a design.
        offset: Prediction where every column is 0.
        left_out: float64 ``[n]``: for each labelled row, the prediction of the fit without its video.
        strength: Chosen ridge strength; for a sum that of its first part, for a stack that of its heaviest part.
        error: Mean squared error of ``left_out``.
    """

    coefficient: np.ndarray
    offset: float
    left_out: np.ndarray
    strength: float
    error: float

    def __call__(self, design: np.ndarray) -> np.ndarray:
        """Predictions ``[N]`` float64."""
        return self.offset + design @ self.coefficient


class Decomposition:
    """Labelled rows of some columns, decomposed once, so that ridge regressions of any target and strength are cheap.

    The smaller side is decomposed: columns where there are no more columns than rows. Where both sides exceed
    ``LIMIT``, a sketch of that many directions (a random range finder with one power step) stands for the columns.

    Args:
        x: float64 ``[n, d]``.
        groups: Video of each row ``[n]``; the rows of a video are left out together, or one row at a time where all
            rows belong to one video.
    """

    def __init__(self, x: np.ndarray, groups: np.ndarray) -> None:
        n, d = x.shape
        self.mean = x.mean(0)
        x = x - self.mean
        basis = None
        if min(n, d) > LIMIT:
            start = np.random.default_rng(0).standard_normal((d, LIMIT))
            basis = np.linalg.qr(x.T @ (x @ start))[0]
            x = x @ basis
        if x.shape[1] <= n:
            power, v = np.linalg.eigh(x.T @ x)
            keep = power > 1e-10 * max(power[-1], 1e-30)
            self.power, v = power[keep], v[:, keep]
            self.u = x @ v / np.sqrt(self.power)
        else:
            power, u = np.linalg.eigh(x @ x.T)
            keep = power > 1e-10 * max(power[-1], 1e-30)
            self.power, self.u = power[keep], u[:, keep]
            v = x.T @ self.u / np.sqrt(self.power)
        self.v = v if basis is None else basis @ v
        if len(np.unique(groups)) < 2:
            groups = np.arange(n)
        order = np.argsort(groups, kind="stable")
        split = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
        sizes = np.array([len(g) for g in split])
        # Videos of equal length are left out in batches of at most ``BATCH`` numbers, or one video.
        self.groups: list[np.ndarray] = []
        for size in np.unique(sizes):
            same = np.stack([split[i] for i in np.flatnonzero(sizes == size)])
            step = max(1, BATCH // (size * max(1, self.u.shape[1])))
            self.groups += [same[i : i + step] for i in range(0, len(same), step)]
        self.left: dict[float, list[np.ndarray]] = {}

    def _without(self, strength: float) -> list[np.ndarray]:
        """``(I - H_gg)⁻¹`` of every video, in the order of ``groups``; computed once for each strength."""
        if strength not in self.left:
            shrink, inverses = self.power / (self.power + strength), []
            for g in self.groups:
                u = self.u[g]
                rest = np.eye(g.shape[1]) * (1 + 1e-9) - (u * shrink) @ u.transpose(0, 2, 1) - 1 / len(self.u)
                inverses.append(np.linalg.inv(rest))
            self.left[strength] = inverses
        return self.left[strength]

    def fit(self, y: np.ndarray, strengths: Sequence[float] = STRENGTHS) -> tuple[np.ndarray, float, np.ndarray, float]:
        """Ridge regression of ``y`` ``[n]`` with the strength that errs least on left-out videos; the intercept is not
        penalised.

        Returns:
            Coefficients ``[d]``, intercept, left-out predictions ``[n]`` (exact) and the strength.

        Note:
            With ``H`` the hat matrix, intercept included, the residual of the fit without the rows ``g`` on these rows
            is ``(I - H_gg)⁻¹ (y - H y)_g``.
        """
        s = np.asarray(strengths)[:, None]
        level = y.mean()
        along = self.u.T @ (y - level)
        shrink = self.power / (self.power + s)
        residual = (y - level) - (shrink * along) @ self.u.T
        errors = np.empty_like(residual)
        for i, strength in enumerate(strengths):
            for g, inverse in zip(self.groups, self._without(float(strength)), strict=True):
                errors[i, g] = (inverse @ residual[i][g][..., None])[..., 0]
        best = int(np.argmin(np.square(errors).mean(1)))
        coefficient = self.v @ (along * np.sqrt(self.power) / (self.power + s[best]))
        return coefficient, level - self.mean @ coefficient, y - errors[best], float(s[best, 0])


def fit_views(
    design: Design,
    labels: np.ndarray,
    rows: np.ndarray,
    groups: np.ndarray,
    strengths: Sequence[float] = STRENGTHS,
    only: Sequence[str] = (),
) -> dict[str, Linear]:
    """Every ridge regression of :func:`views`, and the sums of those of single modalities.

    A sum adds up a regression per modality, best first. Each is fitted to the left-out residuals of the sum so far, and
    is added only if it lowers the left-out error.

    Args:
        design: What can be read.
        labels: ``[N]``; only those of ``rows`` are read.
        rows: Labelled rows ``[n]``.
        groups: Video of every row ``[N]``.
        strengths: Candidate ridge strengths.
        only: Names of the regressions and sums that are wanted; all when empty.

    Returns:
        The predictors by name; left-out predictions are in the order of ``rows``.
    """
    y, where, modalities = labels[rows].astype(np.float64), groups[rows], design.modalities
    found: dict[str, Linear] = {}
    single: dict[str, Decomposition] = {}
    picked: dict[str, np.ndarray] = {}
    every = np.arange(design.values.shape[1])
    for name, blocks in views(modalities).items():
        alone = blocks[0] == name.removeprefix(RIDGE).removesuffix(ENDING)
        needed = alone and f"{SUM}{ENDING if name.endswith(ENDING) else ''}" in only
        if only and name not in only and not needed:
            continue
        picked[name] = np.concatenate([every[design.columns[b]] for b in blocks])
        parts = Decomposition(design.values[np.ix_(rows, picked[name])].astype(np.float64), where)
        found[name] = _linear(parts, picked[name], len(every), y, strengths)
        if alone:
            single[name] = parts
    for ending in ("", ENDING):
        if only and SUM + ending not in only:
            continue
        names = [f"{RIDGE}{m}{ending}" for m in modalities]
        total = Linear(np.zeros(len(every)), 0.0, np.zeros(len(y)), 0.0, np.inf)
        for name in sorted(names, key=lambda k: found[k].error):
            part = _linear(single[name], picked[name], len(every), y - total.left_out, strengths)
            if part.error < total.error:
                total = Linear(
                    total.coefficient + part.coefficient,
                    total.offset + part.offset,
                    total.left_out + part.left_out,
                    total.strength or part.strength,
                    part.error,
                )
        found[SUM + ending] = total
    return {k: v for k, v in found.items() if not only or k in only}


def _linear(parts: Decomposition, columns: np.ndarray, width: int, y: np.ndarray, strengths: Sequence[float]) -> Linear:
    coefficient, offset, left_out, strength = parts.fit(y, strengths)
    whole = np.zeros(width)
    whole[columns] = coefficient
    return Linear(whole, float(offset), left_out, strength, float(np.square(y - left_out).mean()))


def fold_of(groups: np.ndarray, folds: int = FOLDS) -> np.ndarray:
    """Fold of each row ``[n]``: whole groups dealt out in turn, largest first; single rows where there is one group."""
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < 2:
        return np.arange(len(groups)) % max(2, min(folds, len(groups)))
    fold = np.empty(len(names), np.int64)
    fold[np.argsort(-sizes, kind="stable")] = np.arange(len(names)) % min(folds, len(names))
    return fold[index]


def stack_weights(predictions: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, float]:
    """Non-negative weights of several predictors, from predictions of rows that they were not fitted on.

    A weighted mean, a sum with free weights and the best predictor alone compete: the one with the least squared error
    on videos that its weights were not fitted on is used.

    Args:
        predictions: ``[n, P]``.
        y: Truth ``[n]``.
        groups: Video of each row ``[n]``.

    Returns:
        Weights ``[P]`` and a constant to add: ``predictions @ weights + added``.
    """
    errors = np.square(predictions - y[:, None]).mean(0)
    best = int(np.argmin(errors))
    weights, added, least = np.eye(predictions.shape[1])[best], 0.0, errors[best]
    if len(y) < 2:
        return weights, added
    fold = fold_of(groups)
    for solve in (_convex, _free):
        held = np.empty(len(y))
        for k in np.unique(fold):
            inside = fold == k
            w, b = solve(predictions[~inside], y[~inside])
            held[inside] = predictions[inside] @ w + b
        error = np.square(held - y).mean()
        if error < least:
            least = error
            weights, added = solve(predictions, y)
    return weights, added


def _free(predictions: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights with any sum from ``FLOOR`` to ``STRETCH``, and a constant to add."""
    mean, level = predictions.mean(0), float(y.mean())
    weights = nnls(predictions - mean, y - level)[0]
    if weights.sum() < FLOOR:
        # No predictor helps; but a constant prediction would not rank anything.
        weights = FLOOR * _convex(predictions, y)[0]
    weights *= min(1.0, STRETCH / float(weights.sum()))
    return weights, level - float(mean @ weights)


def _convex(predictions: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights that sum to 1, nothing added: a weighted mean of the predictors."""
    # An extra row that only weights with sum 1 satisfy, heavy enough to force them to it.
    heavy = 1e4 * float(np.sqrt(np.square(predictions).sum()) + 1e-30)
    width = predictions.shape[1]
    weights = nnls(np.vstack([predictions, np.full(width, heavy)]), np.append(y, heavy))[0]
    return weights / weights.sum(), 0.0


def stacked(found: Mapping[str, Linear], y: np.ndarray, groups: np.ndarray) -> tuple[Linear, dict[str, float]]:
    """The predictors combined into one, and the weight of each.

    Args:
        found: Predictors fitted on the same rows.
        y: Their labels ``[n]``.
        groups: Their videos ``[n]``.
    """
    parts = list(found.values())
    weights, added = stack_weights(np.column_stack([p.left_out for p in parts]), y, groups)
    left_out = np.column_stack([p.left_out for p in parts]) @ weights + added
    whole = Linear(
        np.column_stack([p.coefficient for p in parts]) @ weights,
        float(np.dot([p.offset for p in parts], weights)) + added,
        left_out,
        parts[int(np.argmax(weights))].strength,
        float(np.square(y - left_out).mean()),
    )
    return whole, dict(zip(found, weights.tolist(), strict=True))
