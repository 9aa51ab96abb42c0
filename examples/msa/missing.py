"""Which modalities and which labels a run may see: seeded, exact, hashed, and independent of the order of the rows.

Every random number is a hash of (purpose, seed, utterance id), so an utterance keeps its draw when rows are reordered.
For one seed, a higher rate of ``exact`` or ``closed_form`` hides everything that a lower rate hides, so curves over the
rate compare like with like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from .corpus import Corpus

KINDS = ("exact", "closed_form", "bernoulli", "fixed", "block")


@dataclass(frozen=True)
class MissingPattern:
    """What was hidden, stored with every result.

    Args:
        kind: One of ``KINDS``.
        rate: Share of (utterance, modality) entries asked to be hidden.
        realised: Share that is hidden.
        seed: Seed of the draw.
        keep: Modalities that stay, for ``"fixed"``; empty otherwise.
        sha256: Hash of the mask and its ids in sorted order, so equal for reordered rows.
    """

    kind: str
    rate: float
    realised: float
    seed: int
    keep: tuple[str, ...]
    sha256: str

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self)


def max_rate(modalities: int) -> float:
    """Highest rate that leaves each utterance one modality: ``(M - 1) / M``."""
    return (modalities - 1) / modalities


def keep_probability(rate: float, modalities: int) -> float:
    """Chance that a modality other than the protected one stays, so that the expected missing share is ``rate``.

    Example:
        >>> keep_probability(0.5, 3)
        0.25
    """
    return 1.0 if modalities == 1 else max(0.0, (modalities * (1 - rate) - 1) / (modalities - 1))


def missing_mask(
    corpus: Corpus,
    kind: str = "exact",
    rate: float = 0.5,
    seed: int = 0,
    keep: Sequence[str] = (),
    keep_one: bool = True,
) -> tuple[np.ndarray, MissingPattern]:
    """Draw which modalities of each utterance are observed.

    ============ ===========================================================================================
    exact        one random modality of an utterance is protected; of all other entries, exactly
                 ``round(rate * entries)`` are hidden, so that the overall share is ``rate``
    closed_form  one is protected, each of the others stays with :func:`keep_probability`; rows are independent
    bernoulli    each entry is hidden with chance ``rate``; ``keep_one=False`` lets an utterance lose all
    fixed        all modalities but ``keep`` are hidden everywhere (``rate`` is not used)
    block        per video and modality one run of clips is hidden (it may wrap from the last clip to the first);
                 the runs of the modalities are staggered so that one modality stays at each clip
    ============ ===========================================================================================

    Args:
        corpus: Gives ids, modalities, conversations and the entries that exist at all (``available``).
        kind: The protocol, from the table.
        rate: Share of the existing entries to hide.
        seed: Seed of the draw.
        keep: Names that stay, for ``"fixed"``.
        keep_one: ``"bernoulli"``: give an utterance that lost everything its protected modality back; ``"fixed"``:
            refuse where an utterance would lose everything.

    Returns:
        Observed entries, bool ``[N, M]``, and the pattern to store with the results.

    Raises:
        ValueError: The kind or a name is unknown, the rate is out of range, or ``fixed`` leaves an utterance nothing.
    """
    if kind not in KINDS:
        raise ValueError(f"missing_mask: kind must be one of {list(KINDS)}, got {kind!r}")
    present = corpus.available
    m = present.shape[1]
    if keep and kind != "fixed":
        raise ValueError(f"missing_mask: keep belongs to kind 'fixed', not to {kind!r}")
    if not keep_one and kind not in ("bernoulli", "fixed"):
        raise ValueError(f"missing_mask: keep_one=False belongs to kind 'bernoulli' or 'fixed', not to {kind!r}")
    if kind == "fixed":
        observed = _fixed(corpus, tuple(keep), keep_one)
        rate = float(1 - observed.sum() / max(1, present.sum()))
    else:
        limit = rate_limit(present) if keep_one else 1.0
        if not 0.0 <= rate <= limit + 1e-9:
            raise ValueError(
                f"missing_mask: rate must lie in [0, {limit:.4f}] so that each utterance keeps a modality, got {rate}"
            )
        draw = hash_uniform("missing", seed, corpus.utterance_ids, m + 1)
        observed = {"exact": _exact, "closed_form": _closed_form, "bernoulli": _bernoulli, "block": _block}[kind](
            corpus, rate, draw, seed, keep_one
        )
    realised = float(1 - observed.sum() / max(1, present.sum()))
    return observed, MissingPattern(
        kind, float(rate), realised, seed, tuple(keep), mask_sha256(observed, corpus.utterance_ids)
    )


def harder_mask(observed: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Hide one more random modality of every row that has two or more (a harder view, a reconstruction target)."""
    score = np.where(observed, generator.random(observed.shape), -1.0)
    result = observed.copy()
    rows = np.flatnonzero(observed.sum(1) >= 2)
    result[rows, score[rows].argmax(1)] = False
    return result


def label_mask(
    corpus: Corpus, share: float = 0.5, seed: int = 0, by: str = "utterance"
) -> tuple[np.ndarray, dict[str, object]]:
    """Choose which train utterances keep their label, among those that have one.

    Args:
        corpus: The data; only rows of the train part are ever labelled.
        share: Share of the train utterances with a label to keep, in (0, 1].
        seed: Seed of the draw.
        by: ``"utterance"``: stratified by ``round(y)``, exactly ``round(share * train)`` labels (at least 1);
            ``"video"``: whole videos in random order until the number of labels is nearest to the share (at least one
            video).

    Returns:
        bool ``[N]``, and the plain facts to store: share asked and realised, count, seed, unit, sha256.

    Raises:
        ValueError: The share or ``by`` is out of range, or no train utterance has a label.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"label_mask: share must lie in (0, 1], got {share}")
    if by not in ("utterance", "video"):
        raise ValueError(f"label_mask: by must be 'utterance' or 'video', got {by!r}")
    train = corpus.rows("train", labelled=True)
    if len(train) == 0:
        raise ValueError(f"label_mask: corpus {corpus.name!r} has no train row with a label")
    count = max(1, round(share * len(train)))
    chosen = _stratified(corpus, train, count, seed) if by == "utterance" else _whole_videos(corpus, train, count, seed)
    mask = np.zeros(len(corpus), dtype=bool)
    mask[chosen] = True
    facts = {"share": share, "realised": len(chosen) / len(train), "labels": len(chosen), "seed": seed, "by": by}
    return mask, {**facts, "sha256": mask_sha256(mask, corpus.utterance_ids)}


def hash_uniform(purpose: str, seed: int, ids: Sequence[str], count: int) -> np.ndarray:
    """``count`` uniform numbers in [0, 1) per id, float64 ``[N, count]``; functions of (purpose, seed, id) alone."""
    draws = b"".join(hashlib.shake_128(f"{purpose}\0{seed}\0{i}".encode()).digest(8 * count) for i in ids)
    return (np.frombuffer(draws, dtype="<u8") >> 11).reshape(len(ids), count) / float(1 << 53)


def mask_sha256(mask: np.ndarray, ids: np.ndarray) -> str:
    """Hash of a mask and the ids it belongs to, taken in sorted order of the ids."""
    order = np.argsort(ids)
    h = hashlib.sha256("\n".join(ids[order].tolist()).encode())
    h.update(np.packbits(mask[order]).tobytes())
    return h.hexdigest()


def rate_limit(present: np.ndarray) -> float:
    """Highest share of the existing entries (bool ``[N, M]``) that can be hidden so that each row keeps one."""
    removable = np.maximum(present.sum(1) - 1, 0).sum()
    return float(removable / max(1, present.sum()))


def _protected(present: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """The one modality of each row that is never hidden: uniform among those present; bool ``[N, M]``."""
    count = present.sum(1)
    pick = np.minimum((draw[:, -1] * count).astype(int), np.maximum(count - 1, 0))
    return present & (np.cumsum(present, 1) == pick[:, None] + 1)


def _exact(corpus: Corpus, rate: float, draw: np.ndarray, seed: int, keep_one: bool) -> np.ndarray:
    present = corpus.available
    order = np.where(present & ~_protected(present, draw), draw[:, :-1], np.inf).ravel()
    count = min(round(rate * int(present.sum())), int(np.isfinite(order).sum()))
    observed = present.copy().ravel()
    observed[np.argsort(order, kind="stable")[:count]] = False
    return observed.reshape(present.shape)


def _closed_form(corpus: Corpus, rate: float, draw: np.ndarray, seed: int, keep_one: bool) -> np.ndarray:
    present = corpus.available
    stay = keep_probability(rate, present.shape[1])
    return present & (_protected(present, draw) | (draw[:, :-1] >= 1 - stay))


def _bernoulli(corpus: Corpus, rate: float, draw: np.ndarray, seed: int, keep_one: bool) -> np.ndarray:
    present = corpus.available
    observed = present & (draw[:, :-1] >= rate)
    if keep_one:
        lost = ~observed.any(1)
        observed[lost] = _protected(present, draw)[lost]
    return observed


def _block(corpus: Corpus, rate: float, draw: np.ndarray, seed: int, keep_one: bool) -> np.ndarray:
    present = corpus.available
    m = present.shape[1]
    observed = present.copy()
    for start, stop in zip(corpus.video_ptr[:-1], corpus.video_ptr[1:], strict=True):
        length = int(stop - start)
        u = hash_uniform("block", seed, corpus.utterance_ids[start : start + 1], m + 2)[0]
        # A run of at most T - ceil(T/M) clips, runs T/M apart: at no clip are all modalities inside their run.
        run = min(int(rate * length + u[0]), length - -(-length // m))
        for rank, column in enumerate(np.argsort(u[2:])):
            first = int(u[1] * length) + rank * length // m
            observed[start + (first + np.arange(run)) % length, column] = False
    lost = ~observed.any(1) & present.any(1)
    observed[lost] = _protected(present, draw)[lost]
    return observed


def _fixed(corpus: Corpus, keep: tuple[str, ...], keep_one: bool) -> np.ndarray:
    unknown = [name for name in keep if name not in corpus.modalities]
    if unknown or not keep:
        raise ValueError(f"missing_mask: keep must name some of {list(corpus.modalities)}, got {list(keep)}")
    observed = corpus.available & np.isin(corpus.modalities, keep)
    lost = int((~observed.any(1) & corpus.available.any(1)).sum())
    if lost and keep_one:
        raise ValueError(f"missing_mask: keeping only {list(keep)} leaves {lost} utterances without any modality")
    return observed


def _stratified(corpus: Corpus, train: np.ndarray, count: int, seed: int) -> np.ndarray:
    draw = hash_uniform("label", seed, corpus.utterance_ids[train], 1)[:, 0]
    strata, member = np.unique(np.round(corpus.labels[train]), return_inverse=True)
    sizes = np.bincount(member, minlength=len(strata))
    quota = sizes * count / len(train)
    take = np.floor(quota).astype(int)
    # Largest remainders get what rounding left over; ties go to the smaller label.
    take[np.argsort(-(quota - take), kind="stable")[: count - take.sum()]] += 1
    chosen = [
        np.flatnonzero(member == s)[np.argsort(draw[member == s], kind="stable")[: take[s]]] for s in range(len(strata))
    ]
    return train[np.sort(np.concatenate(chosen))]


def _whole_videos(corpus: Corpus, train: np.ndarray, count: int, seed: int) -> np.ndarray:
    video = corpus.video_index[train]
    numbers = np.unique(video)
    first_ids = corpus.utterance_ids[corpus.video_ptr[numbers]]
    order = numbers[np.argsort(hash_uniform("label-video", seed, first_ids, 1)[:, 0], kind="stable")]
    totals = np.cumsum([(video == v).sum() for v in order])
    stop = int(np.argmin(np.abs(totals - count))) + 1
    return train[np.isin(video, order[:stop])]
