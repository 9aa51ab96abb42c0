"""Selection of the samples worth labelling: exact, deterministic, resumable, for pools larger than memory.

From the shell: ``python -m msacore.selection POOL.npy --budget N --out FILE``.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from msacore.selection import clusters, strategies
from msacore.selection.engine import Native
from msacore.selection.faiss_engine import Faiss
from msacore.selection.gradients import FactoredPool, GradientEmbeddings, gradient_embeddings
from msacore.selection.greedy import Cover
from msacore.selection.job import DEFAULTS, Job, digest
from msacore.selection.pool import Pool, as_array

__all__ = [
    "STRATEGIES",
    "GradientEmbeddings",
    "Selection",
    "SelectionInterrupted",
    "gradient_embeddings",
    "select",
]

STRATEGIES: dict[str, Callable[[Job], Cover | None]] = {
    "random": strategies.random,
    "topk": strategies.topk,
    "kcenter": strategies.farthest,
    "uncertainty_kcenter": strategies.uncertain_and_far,
    "kmeans++": strategies.kmeans_plus_plus,
    "lcmd": strategies.largest_cluster,
    "maxdet": strategies.max_determinant,
    "mmr": strategies.marginal_relevance,
    "prefilter": strategies.prefilter,
    "typiclust": clusters.typical,
    "probcover": clusters.cover_with_balls,
}
_FACTORED = ("kmeans++", "lcmd", "random", "topk")
_NOTE_SECONDS = 0.1
_NEED_UNCERTAINTY = ("topk", "uncertainty_kcenter", "mmr", "prefilter")


@dataclass(frozen=True)
class Selection:
    """Samples chosen from a pool.

    Attributes:
        indices: Rows of the pool in the order they were picked, ``[budget]`` int64, without duplicates.
        scores: What each pick was chosen for, ``[budget]`` float64; inf for a first pick without any centre.
        radius: Largest distance of a sample that is not selected to its nearest centre, labelled or selected; inf
            without centres, 0 with nothing left. For "kcenter" no choice of as many centres has less than half of it
            (Gonzalez, 1985): see `lower_bound`.
        backend: What ran: "native", "faiss-cpu" or "faiss-gpu".
        pool_reads: How many times the pool was read, counted in rows and rounded up, the check for NaN included.
        state: Pass it to :func:`select` with a larger budget to go on. Plain tensors, numbers and text.
    """

    indices: Tensor
    scores: Tensor
    radius: float
    backend: str
    pool_reads: int
    state: dict[str, Any] = field(repr=False)

    @property
    def lower_bound(self) -> float:
        """Half the radius; for "kcenter" with euclidean distance no choice of as many centres reaches less."""
        return self.radius / 2


class SelectionInterrupted(KeyboardInterrupt):
    """Ctrl-C during :func:`select`.

    Attributes:
        state: Everything picked so far; pass it as `state=` to go on.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__(f"select: interrupted after {len(state['indices'])} picks; `.state` goes on from there")
        self.state = state


class _Bar(tqdm):
    """A progress bar that also says what goes on where no pick is made."""

    def __init__(self, budget: int, strategy: str, shown: bool) -> None:
        super().__init__(total=budget, desc=strategy, unit="pick", disable=not shown)
        self._noted = 0.0

    def note(self, text: str) -> None:
        if not self.disable and time.monotonic() - self._noted >= _NOTE_SECONDS:
            self._noted = time.monotonic()
            self.set_postfix_str(text)

    def update(self, n: float | None = 1) -> bool | None:
        self.set_postfix_str("", refresh=False)
        return super().update(n)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: the error bound of the filter counts on it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _checked_uncertainty(value: Any, pool: Pool) -> Tensor:
    given = as_array("uncertainty", value)
    u = torch.as_tensor(np.array(given) if isinstance(given, np.ndarray) else given).to(pool.device, torch.float64)
    if u.shape != (pool.n,):
        raise ValueError(f"select: expected `uncertainty` to have shape [N] = [{pool.n}], got {list(u.shape)}")
    for bad, what in ((~u.isfinite(), "a NaN or infinite"), (u < 0, "a negative")):
        if bool(bad.any()):
            raise ValueError(f"select: `uncertainty` holds {what} value, first in row {int(bad.int().argmax())}")
    return u


def _checked_labeled(value: Any, pool: Pool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Labelled centres ``[n, d]``, samples that may be picked ``[N]`` bool, and what identifies the labelled set."""
    everyone = torch.ones(pool.n, dtype=torch.bool, device=pool.device)
    nothing = torch.empty(0, pool.width, dtype=torch.float64, device=pool.device)
    if value is None:
        return nothing, everyone, None
    given = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    if given.numel() == 0 and given.dim() <= 2:
        return nothing, everyone, None
    if given.dim() != 1:
        centers = pool.outside_centers(given)
        return centers, everyone, centers
    if given.is_floating_point() or given.dtype == torch.bool or given.is_complex():
        raise ValueError(f"select: expected `labeled` to be int indices [n] or centres [n, d], got {given.dtype} [n]")
    rows = given.to(pool.device, torch.int64)
    outside = (rows < 0) | (rows >= pool.n)
    if bool(outside.any()):
        wrong = int(rows[int(outside.int().argmax())])
        raise ValueError(f"select: expected `labeled` indices in [0, N = {pool.n}), got {wrong}")
    rows = rows.unique()
    everyone[rows] = False
    return pool.centers(rows), everyone, rows


def _checked_options(strategy: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    options = dict(DEFAULTS)
    for key, value in (given or {}).items():
        if key not in DEFAULTS:
            raise ValueError(f"select: unknown option `{key}`; there are {', '.join(DEFAULTS)}")
        options[key] = value
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "mmr_weight": (lambda v: 0 <= v <= 1, "in [0, 1]"),
        "noise": (lambda v: 0 < v < float("inf"), "above 0"),
        "neighbours": (lambda v: v >= 1 and v == int(v), "an integer of at least 1"),
        "factor": (lambda v: 1 <= v < float("inf"), "at least 1"),
        "delta": (lambda v: 0 <= v < float("inf"), "at least 0"),
    }
    for key, (holds, words) in rules.items():
        value = options[key]
        if value is None and key == "delta":
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not holds(value):
            raise ValueError(f"select: expected option `{key}` to be {words}, got {value!r}")
        number = float(value)
        options[key] = int(number) if isinstance(DEFAULTS[key], int) and number.is_integer() else number
    clusters.check_options(strategy, options)
    return options


def _choice(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"select: expected `{name}` to be one of {', '.join(known)}, got {value!r}")


def select(
    embeddings: Tensor | np.ndarray | GradientEmbeddings,
    budget: int,
    *,
    strategy: str = "uncertainty_kcenter",
    uncertainty: Tensor | np.ndarray | None = None,
    labeled: Tensor | np.ndarray | None = None,
    gamma: float = 1.0,
    seed: int = 0,
    distance: str = "euclidean",
    backend: str = "auto",
    options: Mapping[str, Any] | None = None,
    progress: bool = False,
    state: dict[str, Any] | None = None,
) -> Selection:
    """Select ``budget`` samples of a pool to be labelled.

    Args:
        embeddings: The pool, ``[N, d]``: torch tensor (CPU or CUDA), NumPy array, or ``np.memmap``, which is read in
            chunks and may be larger than memory. Floating or integer. Or :func:`gradient_embeddings`.
        budget: Total number of picks, at most the number of samples that are not labelled.
        strategy: One of `STRATEGIES`.
        uncertainty: How uncertain the model is about each sample, ``[N]``, at least 0; needed by "topk",
            "uncertainty_kcenter", "mmr" and "prefilter".
        labeled: Samples that have a label already: indices ``[n]`` int, never picked and used as centres, or centres
            from elsewhere ``[n, d]``.
        gamma: Power of the scaled uncertainty in "uncertainty_kcenter", at least 0.
        seed: Seed of "random", "kmeans++" and "typiclust".
        distance: "euclidean" or "cosine" (1 - cos; a zero row has distance 1 to everything).
        backend: "native" (the kernels of this package), "faiss" (distances to the first centres, k-means, neighbours
            and balls by FAISS, checked by the kernels), or "auto": "native", the faster one wherever both were
            measured (docs/selection.md). The picks are the same.
        options: "mmr_weight" (0.5), "noise" of "maxdet" (1e-6), "neighbours" of "typiclust" (20), "factor" of
            "prefilter" (5), "delta" of "probcover" (no default).
        progress: Show a progress bar with the remaining time.
        state: The `.state` of an earlier Selection, to go on to a larger budget.

    Returns:
        The picks with their scores, the radius they leave, and a state to go on from.

    Raises:
        ValueError: An argument has the wrong shape, type or range, a value is not finite (the first row is named), the
            budget exceeds what is left, or the state belongs to another selection.
        ImportError: ``backend="faiss"`` and FAISS does not load.
        SelectionInterrupted: Ctrl-C; carries the state.

    Note:
        Distances are decided as ``sqrt(Σ (x - c)²)`` in float64 from the stored values, ties go to the smallest index:
        "kcenter" and "uncertainty_kcenter" give the picks of the plain greedy algorithm, reading the pool a few times.
        Deterministic. Memory beside the pool is linear in N.

    Example:
        >>> pool = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
        >>> select(pool, 2, strategy="kcenter", labeled=[0]).indices
        tensor([3, 1])
    """
    return run(
        embeddings,
        budget,
        strategy=strategy,
        uncertainty=uncertainty,
        labeled=labeled,
        gamma=gamma,
        seed=seed,
        distance=distance,
        backend=backend,
        options=options,
        progress=progress,
        state=state,
    )


def run(
    embeddings: Any,
    budget: int,
    *,
    strategy: str,
    uncertainty: Any,
    labeled: Any,
    gamma: float,
    seed: int,
    distance: str,
    backend: str,
    options: Mapping[str, Any] | None,
    progress: bool,
    state: dict[str, Any] | None,
    checkpoint: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
) -> Selection:
    """:func:`select`, calling ``checkpoint`` after every round with what gives the state at that moment."""
    _choice("strategy", strategy, STRATEGIES)
    _choice("distance", distance, ("euclidean", "cosine"))
    _choice("backend", backend, ("auto", "native", "faiss"))
    if isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 0:
        raise ValueError(f"select: expected `budget` to be an integer of at least 0, got {budget!r}")
    if isinstance(gamma, bool) or not isinstance(gamma, Real) or not 0 <= gamma < float("inf"):
        raise ValueError(f"select: expected `gamma` to be a number of at least 0, got {gamma!r}")
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"select: expected `seed` to be a 64-bit integer, got {seed!r}")
    chosen = _checked_options(strategy, options)
    with _full_precision(), torch.no_grad(), _Bar(int(budget), strategy, progress) as bar:
        factored = isinstance(embeddings, GradientEmbeddings)
        if factored and (strategy not in _FACTORED or distance != "euclidean" or backend == "faiss"):
            raise ValueError(
                f"select: gradient embeddings are for {', '.join(_FACTORED)}, euclidean, native; "
                f"got {strategy!r}, {distance!r}, {backend!r}"
            )
        if factored:
            pool: Pool = FactoredPool(embeddings.scale, embeddings.features, bar.note)
        else:
            pool = Pool(embeddings, distance, bar.note)
        u = None if uncertainty is None else _checked_uncertainty(uncertainty, pool)
        if u is None and strategy in _NEED_UNCERTAINTY:
            raise ValueError(f"select: the strategy `{strategy}` needs `uncertainty` [N], got None")
        centers, open_rows, labeled_set = _checked_labeled(labeled, pool)
        left = int(open_rows.sum())
        if budget > left:
            raise ValueError(f"select: expected `budget` to be at most the {left} unlabelled samples, got {budget}")
        identity = {
            "embeddings": pool.fingerprint,
            "strategy": strategy,
            "seed": int(seed),
            "distance": distance,
            "gamma": float(gamma),
            "labeled": digest(labeled_set),
            "uncertainty": digest(u if strategy in _NEED_UNCERTAINTY else None),
            "options": chosen,
        }
        engine = Faiss(pool) if backend == "faiss" else Native(pool)
        job = Job(pool, int(budget), identity, u, centers, open_rows, chosen, int(seed), engine)
        if state is not None:
            job.resume(state)
            bar.update(job.made)
        job.report = bar.update if checkpoint is None else lambda n: (bar.update(n), checkpoint(job.state))
        try:
            cover = STRATEGIES[strategy](job)
            if cover is None:
                cover = Cover(engine, job.all_centers(), 0, {})
            radius = cover.radius(job.open_rows.nonzero()[:, 0])
        except KeyboardInterrupt:
            raise SelectionInterrupted(job.state()) from None
    return Selection(job.picked(), job.picked_scores(), radius, job.engine.name, pool.reads, job.state())
