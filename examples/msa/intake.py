"""From what a file holds to a corpus: the checks, repairs and decisions that are the same for every format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .conversations import utterances
from .corpus import Corpus, masked_mean
from .family import Family, family_of
from .streams import masks_of

ORDER = ("text", "audio", "vision")


@dataclass
class Part:
    """Rows of a file, of one split or of all.

    Args:
        ids: As :func:`examples.msa.conversations.utterances` takes them.
        labels: float32 ``[N]``, NaN where there is none.
        split: int8 ``[N]``.
        features: float32 ``[N, d]`` or ``[N, L, d]`` of each modality, checked.
        masks: bool ``[N, L]`` of each sequence.
        available: bool ``[N]`` of each modality.
        videos: The video of each row, where the file gives it: names, or numbers in the order of the videos.
        video_names: The name of each row's video, where ``videos`` are numbers.
        clips: The clip of each row, where the file gives it.
        transcripts: Texts, where there are any.
        media: Paths or addresses of recordings, where there are any.
    """

    ids: list[Any]
    labels: np.ndarray
    split: np.ndarray
    features: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    available: dict[str, np.ndarray]
    aligned: bool = False
    videos: list[Any] | None = None
    clips: list[Any] | None = None
    video_names: list[Any] | None = None
    transcripts: list[str] | None = None
    media: list[str] | None = None


@dataclass
class Intake:
    """One file while it is read, with the options it is read by.

    Args:
        path: The file or folder, for messages and the family.
        pooled: Masked means over time instead of sequences.
        repair: Replace values that are not finite instead of refusing them.
        family: ``--family``.
        id_pattern: ``--id-pattern``.
        notes: What the report should say, in the order it was found.
        unimodal: The file has labels for each modality.
        counts: Utterances or values by (kind, modality), for notes at the end.
        means: Column means of the train part, where values are to be repaired.
        kinds: Number of dimensions of each modality, the same in all parts.
        stored_family: The family, where the file itself names it.
        stored_aligned: False where the file itself says that its sequences are not aligned.
    """

    path: Path
    pooled: bool = True
    repair: bool = False
    family: str | None = None
    id_pattern: str | None = None
    notes: list[str] = field(default_factory=list)
    unimodal: bool = False
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    means: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    stored_family: str | None = None
    stored_aligned: bool | None = None

    def features(
        self,
        where: str,
        values: dict[str, np.ndarray],
        train: np.ndarray,
        lengths: dict[str, np.ndarray],
        words: np.ndarray | None = None,
        masks: dict[str, np.ndarray] | None = None,
        available: dict[str, np.ndarray] | None = None,
        rows: np.ndarray | None = None,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray], bool]:
        """Check, repair, mask and pool the features of a part.

        Args:
            where: File and part, for messages.
            values: float32 ``[N, d]`` or ``[N, L, d]`` of each modality.
            train: Rows whose means repair other rows, bool ``[N]``. The train part must come first.
            lengths: Steps of each utterance, where the file gives it.
            words: Mask of the words, see :func:`examples.msa.streams.masks_of`.
            masks: Masks that the file itself holds; these are taken as they are.
            available: Rows that have the modality, where the file gives it.
            rows: Number of each row in the file, where some are left out.

        Returns:
            Features, masks, and rows that have the modality; and whether the sequences are aligned.

        Raises:
            ValueError: A value is not finite, and is not to be repaired.
        """
        for m, x in values.items():
            if self.kinds.setdefault(m, x.ndim) != x.ndim:
                raise ValueError(f"{where}: {m!r} is {x.shape}, but in another split it has {self.kinds[m]} dimensions")
        given, present = masks or {}, available or {}
        n = len(train)
        there = {m: present.get(m, np.ones(n, bool)) for m in values}
        checked = {m: self._finite(where, m, x, train & there[m], there[m], rows) for m, x in values.items()}
        sequences = {m: x for m, x in checked.items() if x.ndim == 3}
        found = masks_of({m: x for m, x in sequences.items() if m not in given}, lengths, words)
        found.masks |= {m: mask for m, mask in given.items() if m in sequences}
        for kind, counted in (("front", found.front), ("kept", found.kept), ("cut", found.cut)):
            for m, count in counted.items():
                self.counts[kind, m] += count
        if found.apart:
            self.counts["apart", ""] += 1
        aligned = found.aligned or (
            len(given) == len(sequences) > 1 and len({mask.tobytes() for mask in given.values()}) == 1
        )
        for m, x in sequences.items():
            empty = there[m] & ~(x != 0).any((1, 2))
            if empty.any():
                self.counts["empty", m] += int(empty.sum())
                there[m] = there[m] & ~empty
        if self.pooled:
            return (
                {m: masked_mean(x, found.masks[m]) if x.ndim == 3 else x for m, x in checked.items()},
                {},
                there,
                False,
            )
        if sequences:
            for m, x in checked.items():
                if x.ndim == 2:
                    checked[m], found.masks[m], aligned = x[:, None], np.ones((n, 1), bool), False
        return checked, found.masks, there, aligned

    def _finite(
        self, where: str, name: str, x: np.ndarray, train: np.ndarray, there: np.ndarray, rows: np.ndarray | None
    ) -> np.ndarray:
        bad = ~np.isfinite(x)
        if not there.all():
            bad[~there] = False
            x = np.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, np.float32(0))
        if self.repair and name not in self.means:
            self.means[name] = _column_means(x[train] if train.any() else x)
        if not bad.any():
            return x
        count = int(bad.sum())
        if not self.repair:
            row, *others = np.argwhere(bad)[0].tolist()
            step = f"step {others[0]}, " if x.ndim == 3 else ""
            at = f"row {row if rows is None else rows[row]}, {step}column {others[-1]}"
            raise ValueError(
                f"{where}: {name!r} holds {count} values that are not finite, the first in {at} (counted from 0); "
                "--repair replaces them by the means of the train part"
            )
        self.counts["repaired", name] += count
        # A step without a single finite value cannot be filled in: it becomes padding.
        lost = bad.all(-1, keepdims=True)
        return np.where(bad, np.where(lost, np.float32(0), self.means[name]), x)

    def corpus(self, parts: Sequence[Part], name: str | None = None) -> Corpus:
        """The corpus of all parts.

        Raises:
            ValueError: The parts do not fit together, or the labels contradict the family.
        """
        ids = [i for p in parts for i in p.ids]
        labels = np.concatenate([p.labels for p in parts]).astype(np.float32)
        if np.isinf(labels).any():
            raise ValueError(f"{self.path}: {int(np.isinf(labels).sum())} labels are infinite")
        found = utterances(
            str(self.path), ids, videos=_joined(parts, "videos"), clips=_joined(parts, "clips"), pattern=self.id_pattern
        )
        order = found.order()
        videos = [found.videos[i] for i in order]
        starts = [i for i in range(len(videos)) if i == 0 or videos[i] != videos[i - 1]]
        video_ptr = np.array([*starts, len(videos)], dtype=np.int64)
        family = self._family(labels)
        features = {m: self._join(parts, "features", m)[order] for m in _ordered(parts[0].features)}
        masks = {m: self._join(parts, "masks", m)[order] for m in features if m in parts[0].masks}
        available = np.stack([self._join(parts, "available", m)[order] for m in features], axis=1)
        for column, m in enumerate(features):
            seen = available[:, column]
            if seen.any() and _constant(features[m], masks.get(m), seen):
                self.notes.append(f"{m}: the same values in every utterance: read as missing")
                available[:, column] = False
        if not available.any():
            raise ValueError(f"{self.path}: no modality holds data: all features are constant or empty")
        if lost := int((~available.any(1)).sum()):
            self.counts["lost", ""] = lost
        self._say_counts(len(ids))
        names = _joined(parts, "video_names") or (None if _joined(parts, "videos") else found.videos)
        texts = {k: _joined(parts, k) for k in ("transcripts", "media")}
        split = np.concatenate([p.split for p in parts]).astype(np.int8)
        return Corpus(
            name=name or (self.path.name if family.note else f"{family.name.upper()} ({self.path.name})"),
            family=family.name,
            features=features,
            labels=labels[order],
            split=split[order],
            video_ptr=video_ptr,
            utterance_ids=np.array(found.names, dtype=str)[order],
            masks=masks,
            available=available,
            aligned=bool(masks) and all(p.aligned for p in parts) and self.stored_aligned is not False,
            notes=tuple(self.notes + found.notes + ([family.note] if family.note else [])),
            clips=found.numbers(order, video_ptr),
            videos=None if names is None else np.array([names[i] for i in order[video_ptr[:-1]]], dtype=object),
            family_from=family.source,
            **{k: None if v is None or not any(v) else np.array(v, object)[order] for k, v in texts.items()},
        )

    def _family(self, labels: np.ndarray) -> Family:
        if self.stored_family is not None and self.family is None:
            return replace(family_of(self.path, labels, given=self.stored_family), source="the file")
        return family_of(self.path, labels, self.unimodal, self.family)

    def _join(self, parts: Sequence[Part], kind: str, modality: str) -> np.ndarray:
        arrays = [getattr(p, kind)[modality] for p in parts]
        if kind == "features" and len({(a.ndim, a.shape[-1]) for a in arrays}) > 1:
            shapes = sorted({a.shape[1:] for a in arrays})
            raise ValueError(f"{self.path}: {modality!r} has different shapes in the splits: {shapes}")
        if kind == "available" or (kind == "features" and arrays[0].ndim == 2):
            return np.concatenate(arrays)
        # Splits may be padded to different lengths.
        steps = max(a.shape[1] for a in arrays)
        rest = [(0, 0)] * (arrays[0].ndim - 2)
        return np.concatenate([np.pad(a, [(0, 0), (0, steps - a.shape[1]), *rest]) for a in arrays])

    def _say_counts(self, n: int) -> None:
        for (kind, m), count in self.counts.items():
            self.notes.append({
                "front": f"{m}: {count} of {n} utterances are padded at the front; the mask follows the data",
                "kept": f"{m}: the values of {count} of {n} utterances reach beyond the length that the file gives; "
                "they count as data",
                "cut": f"{m}: the values of {count} of {n} utterances reach beyond the length that the file gives; "
                "they are left out",
                "apart": "the modalities are padded at different ends: steps of equal number belong to different words",
                "empty": f"{m}: {count} of {n} utterances are all zeros: read as missing",
                "lost": f"{count} of {n} utterances lack every modality",
                "repaired": f"{m}: {count} values that are not finite replaced by the means of the train part",
            }[kind])  # fmt: skip


def _ordered(features: dict[str, np.ndarray]) -> list[str]:
    return [m for m in ORDER if m in features] + [m for m in features if m not in ORDER]


def _joined(parts: Sequence[Part], name: str) -> list[Any] | None:
    if all(getattr(p, name) is None for p in parts):
        return None
    fill = "" if name in ("transcripts", "media") else None
    return [v for p in parts for v in (getattr(p, name) or [fill] * len(p.ids))]


def _column_means(x: np.ndarray) -> np.ndarray:
    """Mean of each column over finite values of steps that are not padding, float32 ``[d]``."""
    flat = x.reshape(-1, x.shape[-1])
    use = np.isfinite(flat) & (flat != 0).any(-1, keepdims=True)
    total = np.where(use, flat, 0).sum(0, dtype=np.float64)
    return (total / np.maximum(1, use.sum(0))).astype(np.float32)


def _constant(x: np.ndarray, mask: np.ndarray | None, seen: np.ndarray) -> bool:
    """Whether all values (valid steps of rows that have the modality) are equal, column by column."""
    places = np.flatnonzero(seen)
    # Few modalities are constant: a few rows usually show that one is not, and the others need not be copied.
    for chosen in (places[:16], places):
        rows = x[chosen] if mask is None else x[chosen][mask[chosen]]
        low, high = (rows.min(0), rows.max(0)) if len(rows) > 1 else (rows, 2 * rows)
        if not (high - low <= 1e-6 * np.maximum(np.abs(low), np.abs(high))).all():
            return False
    return True
