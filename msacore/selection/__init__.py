"""Selection of the samples worth labelling: exact, deterministic, resumable, for pools larger than memory.

From the shell: ``python -m msacore.selection POOL.npy --budget N --out FILE``.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from msacore.selection import clusters, strategies
from msacore.selection.arguments import NEED_UNCERTAINTY, Given, Local, join, limits, row_digest
from msacore.selection.determinant import maxdet
from msacore.selection.engine import Native
from msacore.selection.faiss_engine import Faiss
from msacore.selection.gradients import GradientEmbeddings, gradient_embeddings
from msacore.selection.greedy import Cover
from msacore.selection.job import Job
from msacore.selection.ranks import Alone, ranks_of
from msacore.selection.tree import digest

__all__ = [
    "STRATEGIES",
    "GradientEmbeddings",
    "Selection",
    "SelectionInterrupted",
    "gradient_embeddings",
    "select",
]

Strategy = Literal[
    "random",
    "topk",
    "kcenter",
    "uncertainty_kcenter",
    "kmeans++",
    "lcmd",
    "maxdet",
    "mmr",
    "prefilter",
    "typiclust",
    "probcover",
]
STRATEGIES: dict[str, Callable[[Job], Cover | None]] = {
    "random": strategies.random,
    "topk": strategies.topk,
    "kcenter": strategies.kcenter,
    "uncertainty_kcenter": strategies.uncertainty_kcenter,
    "kmeans++": strategies.kmeans_plus_plus,
    "lcmd": strategies.lcmd,
    "maxdet": maxdet,
    "mmr": strategies.mmr,
    "prefilter": strategies.prefilter,
    "typiclust": clusters.typiclust,
    "probcover": clusters.probcover,
}
_NOTE_SECONDS = 0.1


@dataclass(frozen=True)
class Selection:
    """Samples chosen from a pool.

    Attributes:
        indices: Rows of the pool in the order they were picked, ``[budget]`` int64, without duplicates; fewer where a
            `radius` was reached or no row was left to be picked.
        scores: The score for which each pick was chosen, ``[budget]`` float64; inf for a first pick without any centre.
        radius: Largest distance from a sample that is neither labelled nor selected to its nearest centre, including
            samples that may not be picked; inf without centres, 0 with no sample left. For "kcenter", no equally
            large set of centres has a radius below half of it (Gonzalez, 1985): see `lower_bound`.
        backend: What ran: "native", "faiss-cpu" or "faiss-gpu".
        pool_reads: How many times the pool was read, counted in rows and rounded up, the check for NaN included.
        state: Pass it to :func:`select` with a larger budget to continue. Plain tensors, numbers and text.
    """

    indices: Tensor
    scores: Tensor
    radius: float
    backend: str
    pool_reads: int
    state: dict[str, Any] = field(repr=False)

    @property
    def lower_bound(self) -> float:
        """Half the radius; for "kcenter" with euclidean distance, no equally large set of centres has a smaller radius.

        NaN with candidates, groups or cosine distance, where this bound does not hold.
        """
        identity = self.state["identity"]
        holds = identity["distance"] == "euclidean" and not identity["candidates"] and not identity["groups"]
        return self.radius / 2 if holds else math.nan


class SelectionInterrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`select`.

    Attributes:
        state: Everything picked so far; pass it as `state=` to continue.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__(f"select: interrupted after {len(state['indices'])} picks; `.state` goes on from there")
        self.state = state


class _Bar(tqdm):
    """A progress bar that also says what is being done while no pick is made."""

    def __init__(self, strategy: str, shown: bool) -> None:
        super().__init__(total=0, desc=str(strategy), unit="pick", disable=not shown)
        self._noted = 0.0

    def expect(self, budget: int) -> None:
        self.total = budget

    def note(self, text: str) -> None:
        if not self.disable and time.monotonic() - self._noted >= _NOTE_SECONDS:
            self._noted = time.monotonic()
            self.set_postfix_str(text)

    def update(self, n: float | None = 1) -> bool | None:
        self.set_postfix_str("", refresh=False)
        return super().update(n)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Compute float32 products in full float32, which the error bound of the filter relies on."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def select(
    embeddings: Tensor | np.ndarray | GradientEmbeddings | Sequence[Any],
    budget: int | None = None,
    *,
    strategy: Strategy = "uncertainty_kcenter",
    uncertainty: Tensor | np.ndarray | Sequence[float] | None = None,
    labeled: Tensor | np.ndarray | Sequence[Any] | None = None,
    candidates: Tensor | np.ndarray | Sequence[Any] | None = None,
    groups: Tensor | np.ndarray | Sequence[int] | None = None,
    max_per_group: int | None = None,
    radius: float | None = None,
    first: int | None = None,
    gamma: float = 1.0,
    seed: int = 0,
    distance: Literal["euclidean", "cosine"] = "euclidean",
    backend: Literal["auto", "native", "faiss"] = "auto",
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
    state: dict[str, Any] | None = None,
    group: Any = None,
) -> Selection:
    """Select ``budget`` samples of a pool to be labelled.

    Args:
        embeddings: The pool, ``[N, d]``: torch tensor (CPU or CUDA), NumPy array, or ``np.memmap``, which is read in
            chunks and may be larger than memory. Floating or integer. Or :func:`gradient_embeddings`. Or a sequence of
            2-D tensors, arrays or paths of ``.npy`` files of one width and dtype: one pool, numbered consecutively.
        budget: Total number of picks, at most the number of samples that may be picked. None: the number that
            ``radius`` needs.
        strategy: One of `STRATEGIES`.
        uncertainty: How uncertain the model is about each sample, ``[N]``, at least 0; needed by "topk",
            "uncertainty_kcenter", "mmr" and "prefilter".
        labeled: Samples that already have a label: indices ``[n]`` int, which serve as centres and are not
            picked, or centres from outside the pool ``[n, d]``.
        candidates: Only these samples may be picked, ``[N]`` bool or indices ``[n]``; all by default. The others still
            count in the radius, in clusters, in coverage and in the mean.
        groups: Group of each sample (speaker, video, class), ``[N]`` integer.
        max_per_group: Maximum number of picks of a group, samples labelled by index included; at least 1.
        radius: "kcenter" only: stop when no sample that may be picked is farther than this from its nearest centre, at
            ``budget``, or when none is left.
        first: Index of the first pick where there is no centre; not for "random" and "topk".
        gamma: Power of the scaled uncertainty in "uncertainty_kcenter", at least 0.
        seed: Seed of "random", "kmeans++" and "typiclust".
        distance: "euclidean" or "cosine" (1 - cos; a zero row has distance 1 to everything).
        backend: "native" (the kernels of this package), "faiss" (distances to the first centres, k-means, neighbours
            and balls by FAISS, checked by the kernels), or "auto": "native", the faster one wherever both were
            measured (docs/selection.md). The picks are the same.
        options: "mmr_weight" (0.5), "noise" of "maxdet" (1e-6), "neighbours" of "typiclust" (20), "factor" of
            "prefilter" (5), "delta" of "probcover" (no default).
        progress: Show a progress bar with the remaining time.
        state: The `.state` of an earlier Selection, to continue to a larger budget or a smaller radius.
        group: Ranks that share the pool: a ``ProcessGroup``, a ``DeviceMesh`` of one dimension, or a
            ``msacore.distributed.Sharding``. Each rank passes its rows and, with them, its part of ``uncertainty``,
            ``groups`` and a bool ``candidates``; indices refer to the whole pool, and their union over the ranks
            counts; centres from outside the pool are joined in rank order; everything else must be equal on all ranks.
            Every rank gets the picks that one process would make. Not for "typiclust" and "probcover".

    Returns:
        The picks with their scores, the radius they leave, and a state to continue from.

    Raises:
        ValueError: An argument has the wrong shape, type or range, a value is not finite (the first row is named), the
            budget exceeds what is left, or the state is damaged or belongs to another selection. With ``group``, the
            same error on all ranks.
        ImportError: ``backend="faiss"`` and FAISS does not load.
        SelectionInterrupted: Ctrl-C; carries the state. With ``group``, raised on all ranks after the same step.

    Note:
        Distances are ``sqrt(Σ (x - c)²)`` in float64 from the stored values, and ties go to the smallest index:
        "kcenter" and "uncertainty_kcenter" give the picks of the plain greedy algorithm, reading the pool a few times.
        Deterministic, whatever the number of threads, files or ranks. Memory beyond the pool is linear in N.

    Example:
        >>> pool = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
        >>> select(pool, 2, strategy="kcenter", labeled=[0]).indices
        tensor([3, 1])
    """
    given = Given(
        embeddings=embeddings,
        budget=budget,
        strategy=strategy,
        uncertainty=uncertainty,
        labeled=labeled,
        candidates=candidates,
        groups=groups,
        max_per_group=max_per_group,
        radius=radius,
        first=first,
        gamma=gamma,
        seed=seed,
        distance=distance,
        backend=backend,
        options=options,
        state=state,
    )
    return run(given, ranks_of(group), progress)


def run(
    given: Given,
    ranks: Alone,
    progress: bool,
    checkpoint: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
) -> Selection:
    """:func:`select`, calling ``checkpoint`` after every round with a function that returns the current state."""
    with ranks.listening(), _full_precision(), torch.no_grad(), contextlib.ExitStack() as stack:
        bar = stack.enter_context(_Bar(given.strategy, progress and ranks.rank == 0))
        job = _prepared(given, ranks, bar)
        if given.state is not None:
            job.resume(given.state)
            bar.update(job.made)

        def report(made: int, state: Callable[[], dict[str, Any]]) -> None:
            bar.update(made)
            if checkpoint is not None:
                checkpoint(state)

        job.report = report
        try:
            _add_given_first(job)
            cover = STRATEGIES[given.strategy](job)
            if cover is None:
                cover = Cover(job.engine, job.all_centers(), 0)
            messages = ranks.share(lambda: (cover.radius(job.rest.nonzero()[:, 0]), job.pool.reads, job.engine.name))
        except KeyboardInterrupt:
            raise SelectionInterrupted(job.state()) from None
    radius, reads = max(message[0] for message in messages), max(message[1] for message in messages)
    return Selection(job.picked(), job.picked_scores(), radius, messages[0][2], reads, job.state())


def _prepared(given: Given, ranks: Alone, bar: _Bar) -> Job:
    """The job for ``given``, whose arguments are checked here and against those of the other ranks."""
    held: list[Local] = []

    def header() -> dict[str, Any]:
        held.append(Local(given, ranks, STRATEGIES, bar.note))
        return held[0].message()

    messages = ranks.share(header)
    local = held[0]
    joined = join(local, messages, ranks)
    pool, uncertainty = local.pool, local.uncertainty
    left = limits(joined, ranks)
    if given.budget is not None and given.budget > left and given.radius is None:
        raise ValueError(
            f"select: expected `budget` to be at most the {left} samples that may be picked, got {given.budget}"
        )
    pool.learn(ranks.share(lambda: local.scanned or pool.scan(joined.offset, joined.total)))
    if joined.centers is not None and joined.centers.numel():
        pool.widen(float(joined.centers.abs().max()))
    budget = left if given.budget is None else min(int(given.budget), left)
    bar.expect(budget)
    identity = {
        "embeddings": pool.fingerprint,
        "strategy": given.strategy,
        "seed": int(given.seed),
        "distance": given.distance,
        "gamma": float(given.gamma),
        "labeled": digest(joined.centers if joined.labeled is None else joined.labeled),
        "candidates": row_digest(joined.candidates, joined, ranks),
        "groups": row_digest(local.groups, joined, ranks),
        "max_per_group": None if given.max_per_group is None else int(given.max_per_group),
        "first": joined.first,
        "uncertainty": row_digest(uncertainty if given.strategy in NEED_UNCERTAINTY else None, joined, ranks),
        "options": local.options,
    }
    engines: list[Native] = []
    ranks.share(lambda: engines.append(Faiss(pool) if given.backend == "faiss" else Native(pool)))
    centers = pool.mean.new_empty(0, pool.width) if joined.centers is None else joined.centers
    job = Job(
        pool,
        ranks,
        budget,
        identity,
        uncertainty,
        centers,
        joined.open_rows,
        joined.rest,
        local.options,
        int(given.seed),
        engines[0],
        joined.groups,
        None if given.radius is None else float(given.radius),
        joined.first,
    )
    if joined.labeled is not None:
        job.centers = job.fetch(joined.labeled)
    return job


def _add_given_first(job: Job) -> None:
    """Pick the row that `first` names, if nothing is picked yet."""
    if job.first is None or job.made or not job.left:
        return
    rows = torch.tensor([job.first], device=job.pool.device)

    def offer() -> dict[str, Any] | None:
        own = rows[job.held(rows)] - job.pool.offset
        return {"open": bool(job.open_rows[own].all()), "group": job.groups_of(own)} if len(own) else None

    here = next(message for message in job.share(offer) if message is not None)
    if not here["open"]:
        raise ValueError(f"select: expected `first` to be one of `candidates`, got {job.first}")
    job.add(rows, torch.tensor([torch.inf], device=job.pool.device), here["group"])
