"""The one in-memory form of a data set: per-modality features, labels, split and conversations."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

TRAIN, VALID, TEST, UNUSED = 0, 1, 2, -1
SPLITS = {"train": TRAIN, "valid": VALID, "test": TEST}
LABEL_RANGE = {"mosi": (-3.0, 3.0), "mosei": (-3.0, 3.0), "sims": (-1.0, 1.0)}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Utterances of one data set, sorted by video and clip.

    Args:
        name: What reports call the corpus.
        family: Metric family and label range: ``"mosi"``, ``"mosei"`` or ``"sims"``.
        features: One float32 array per modality, by name and in order: pooled ``[N, d_m]``, or sequences ``[N, L_m,
            d_m]``.
        labels: Regression labels, float32 ``[N]``; NaN where an utterance has none.
        split: int8 ``[N]``: 0 train, 1 valid, 2 test, -1 not used.
        video_ptr: int64 ``[V + 1]``; video ``v`` holds rows ``video_ptr[v]:video_ptr[v + 1]`` in clip order.
        utterance_ids: Unique names, str ``[N]``.
        masks: Valid tokens of each sequence modality, bool ``[N, L_m]``, by name; empty for pooled features.
        available: bool ``[N, M]``, False where the source lacks the modality; all True when omitted.
        aligned: Sequences only: token ``l`` of every modality belongs to the same word, so all masks are equal.
        notes: Facts a report should repeat (values repaired, rows dropped, what was planted).
        clips: Number of each clip in its video, int64 ``[N]``, rising within a video; clips that are not in the data
            leave a gap. None where the source has no numbers; :attr:`positions` always has values.
        transcripts: What is said, str objects ``[N]``, empty where unknown; None where the source has none.
        media: Path or address of each clip's recording, str objects ``[N]``, empty where unknown; or None.
        family_from: What the family was inferred from.
        videos: Name of each video, str ``[V]``; None where the source has none.

    Raises:
        ValueError: Shapes, lengths or values do not fit together.
    """

    name: str
    family: str
    features: dict[str, np.ndarray]
    labels: np.ndarray
    split: np.ndarray
    video_ptr: np.ndarray
    utterance_ids: np.ndarray
    masks: dict[str, np.ndarray] = field(default_factory=dict)
    available: np.ndarray | None = None
    aligned: bool = False
    notes: tuple[str, ...] = ()
    clips: np.ndarray | None = None
    transcripts: np.ndarray | None = None
    media: np.ndarray | None = None
    family_from: str = "given"
    videos: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.available is None:
            object.__setattr__(self, "available", np.ones((len(self.labels), len(self.features)), dtype=bool))
        self._check()

    def _check(self) -> None:
        n = len(self.labels)

        def require(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"corpus {self.name!r}: {message}")

        require(self.family in LABEL_RANGE, f"family must be one of {sorted(LABEL_RANGE)}, got {self.family!r}")
        require(len(self.features) > 0, "it has no modality")
        require(n > 0, "it has no utterance")
        for name, x in self.features.items():
            require(
                x.dtype == np.float32 and x.ndim in (2, 3),
                f"{name}: expected float32 [N, d] or [N, L, d], got {x.dtype} {x.shape}",
            )
            require(len(x) == n, f"{name} has {len(x)} rows but there are {n} labels")
            require((x.ndim == 3) == (name in self.masks), f"{name}: sequences need a token mask, other features none")
        for name, mask in self.masks.items():
            require(
                mask.dtype == bool and mask.shape == self.features[name].shape[:2],
                f"token mask of {name} has shape {mask.shape}",
            )
        require(not np.isinf(self.labels).any(), "a label is infinite")
        require(len(self.split) == n, f"split has {len(self.split)} entries, expected {n}")
        require(np.isin(self.split, (TRAIN, VALID, TEST, UNUSED)).all(), "split must hold 0, 1, 2 or -1 only")
        ptr = self.video_ptr
        require(ptr[0] == 0 and ptr[-1] == n and (np.diff(ptr) > 0).all(), f"video_ptr must rise from 0 to {n}")
        require(len(set(self.utterance_ids.tolist())) == n, "utterance ids are not unique")
        require(self.available.shape == (n, len(self.features)), f"available must be [{n}, {len(self.features)}]")
        for name, array in self._extras().items():
            require(array is None or array.shape == (n,), f"{name} must be [{n}]")
        require(self.videos is None or self.videos.shape == (len(ptr) - 1,), f"videos must be [{len(ptr) - 1}]")
        if self.clips is not None:
            within = np.diff(self.video_index) == 0
            require(self.clips.dtype == np.int64, f"clips must be int64, got {self.clips.dtype}")
            require((self.clips[1:] > self.clips[:-1])[within].all(), "clips must rise within each video")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def dims(self) -> tuple[int, ...]:
        """Feature width of each modality."""
        return tuple(x.shape[-1] for x in self.features.values())

    @property
    def sequences(self) -> bool:
        """True when the features are ``[N, L, d]``."""
        return bool(self.masks)

    @property
    def label_range(self) -> tuple[float, float]:
        return LABEL_RANGE[self.family]

    @property
    def video_index(self) -> np.ndarray:
        """Video number of each row, int64 ``[N]``."""
        return np.repeat(np.arange(len(self.video_ptr) - 1), np.diff(self.video_ptr))

    @property
    def positions(self) -> np.ndarray:
        """Place of each row in its video, int64 ``[N]``: the clip's number, or the row's where clips have none."""
        if self.clips is not None:
            return self.clips
        return np.arange(len(self)) - self.video_ptr[self.video_index]

    @property
    def labelled(self) -> np.ndarray:
        """True where an utterance has a label, bool ``[N]``."""
        return np.isfinite(self.labels)

    def lengths(self, modality: str) -> np.ndarray:
        """Valid tokens of each row of a sequence modality, int64 ``[N]``."""
        return self.masks[modality].sum(1)

    def rows(self, split: str, labelled: bool = False) -> np.ndarray:
        """Row numbers of ``"train"``, ``"valid"`` or ``"test"``, all or only those with a label, int64 and rising."""
        inside = self.split == SPLITS[split]
        return np.flatnonzero(inside & self.labelled if labelled else inside)

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that can change a result: features, masks, labels, split, conversations, ids."""
        h = hashlib.sha256()
        parts = {**self.features, **{f"mask:{k}": v for k, v in self.masks.items()}}
        parts |= {
            "labels": self.labels,
            "split": self.split,
            "ptr": self.video_ptr,
            "available": self.available,
            "positions": self.positions,
            "ids": self.utterance_ids,
        }
        for name, array in parts.items():
            h.update(f"{name} {array.dtype.str} {array.shape};".encode())
            h.update(
                np.ascontiguousarray(array).data if array.dtype.kind != "U" else "\n".join(array.tolist()).encode()
            )
        return h.hexdigest()

    def keep_modalities(self, names: tuple[str, ...] | list[str]) -> Corpus:
        """The same utterances with only the named modalities, in the given order.

        Raises:
            ValueError: A name is unknown, or some used utterance would keep no modality.
        """
        unknown = [n for n in names if n not in self.features]
        if unknown or not names:
            raise ValueError(f"corpus {self.name!r} has no modality {unknown}; it has {list(self.modalities)}")
        columns = [self.modalities.index(n) for n in names]
        return replace(
            self,
            features={n: self.features[n] for n in names},
            masks={n: self.masks[n] for n in names if n in self.masks},
            available=self.available[:, columns],
        )

    def keep_videos(self, videos: np.ndarray, name: str | None = None) -> Corpus:
        """The named video numbers only, in rising order (for quick runs)."""
        chosen = np.unique(np.asarray(videos))
        rows = np.flatnonzero(np.isin(self.video_index, chosen))
        return replace(
            self,
            name=name or self.name,
            features={k: v[rows] for k, v in self.features.items()},
            masks={k: v[rows] for k, v in self.masks.items()},
            labels=self.labels[rows],
            split=self.split[rows],
            video_ptr=np.concatenate([[0], np.cumsum(np.diff(self.video_ptr)[chosen])]).astype(np.int64),
            utterance_ids=self.utterance_ids[rows],
            available=self.available[rows],
            videos=None if self.videos is None else self.videos[chosen],
            **{k: None if v is None else v[rows] for k, v in self._extras().items()},
        )

    def _extras(self) -> dict[str, np.ndarray | None]:
        return {"clips": self.clips, "transcripts": self.transcripts, "media": self.media}

    def standardise(self, observed: np.ndarray | None = None, skip: tuple[str, ...] = ()) -> Corpus:
        """Shift and scale every column by its mean and deviation over observed train rows (valid tokens only).

        Args and Raises: see :meth:`statistics`.

        Returns:
            A new corpus; padding and unavailable entries are exactly 0, columns without spread are 0.
        """
        return self.standardise_by(self.statistics(observed, skip))

    def statistics(
        self, observed: np.ndarray | None = None, skip: tuple[str, ...] = ()
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean, and one over the deviation, of every column over observed train rows (valid tokens only).

        Args:
            observed: bool ``[N, M]``; entries that a missing-modality simulation hides are False and stay unread
                by the statistics. Intersected with ``available``.
            skip: Modalities left as they are.

        Returns:
            Per modality two float32 arrays ``[d]``; the second is 0 for columns without spread. Both are 0 for a
            modality that is observed nowhere while others are.

        Raises:
            ValueError: A modality that is observed somewhere is observed in no train row, and is not skipped.
        """
        seen = self.available if observed is None else self.available & observed
        found = {}
        for m, (name, x) in enumerate(self.features.items()):
            if name in skip:
                continue
            if not seen[:, m].any() and (seen.any() or not self.available[:, m].any()):
                found[name] = np.zeros(x.shape[-1], np.float32), np.zeros(x.shape[-1], np.float32)
                continue
            rows = np.flatnonzero((self.split == TRAIN) & seen[:, m])
            if len(rows) == 0:
                raise ValueError(
                    f"corpus {self.name!r}: {name} is observed in no train row, so it cannot be standardised"
                )
            valid = self._valid(m)
            sample = x[rows][valid[rows]].astype(np.float64)
            if len(sample) == 0:
                raise ValueError(f"corpus {self.name!r}: {name} has no valid token in the train part")
            mean, std = sample.mean(0), sample.std(0)
            flat = std <= 1e-6 * np.maximum(1.0, np.abs(mean))
            scale = np.where(flat, 0.0, 1.0 / np.where(flat, 1.0, std))
            found[name] = mean.astype(np.float32), scale.astype(np.float32)
        return found

    def standardise_by(self, statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Corpus:
        """Shift and scale by statistics of this or another corpus; modalities they do not name stay as they are.

        Returns:
            A new corpus; padding and unavailable entries are exactly 0, columns with scale 0 are 0.
        """
        features = dict(self.features)
        for m, (name, x) in enumerate(self.features.items()):
            if name in statistics:
                (mean, scale), valid = statistics[name], self._valid(m)
                features[name] = np.zeros_like(x)
                features[name][valid] = (x[valid] - mean) * scale
        return replace(self, features=features)

    def _valid(self, modality: int) -> np.ndarray:
        """Rows, or tokens of rows, that hold values of a modality: bool ``[N]`` or ``[N, L_m]``."""
        name = self.modalities[modality]
        there = self.available[:, modality]
        return self.masks[name] & there[:, None] if name in self.masks else there

    def pooled(self) -> Corpus:
        """Masked mean over time of every sequence modality; a pooled corpus is returned as it is."""
        if not self.sequences:
            return self
        features = {k: masked_mean(v, self.masks[k]) for k, v in self.features.items()}
        return replace(self, features=features, masks={}, aligned=False)

    def tensors(self, device: torch.device | str = "cpu") -> dict[str, object]:
        """Everything a model reads, as tensors.

        Returns:
            ``features``: list of ``[N, (L_m,) d_m]`` float32; ``masks``: list of ``[N, L_m]`` bool (empty if pooled);
            ``available``: ``[N, M]`` bool; ``labels``: ``[N]`` float32, NaN where there is none; ``split``: ``[N]``
            int8; ``video_ptr``: ``[V + 1]`` int64; ``positions``: ``[N]`` int64.
        """

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.tensor(array, device=device)

        return {
            "features": [tensor(x) for x in self.features.values()],
            "masks": [tensor(self.masks[k]) for k in self.modalities if k in self.masks],
            "available": tensor(self.available),
            "labels": tensor(self.labels),
            "split": tensor(self.split),
            "video_ptr": tensor(self.video_ptr),
            "positions": tensor(self.positions),
        }

    def describe(self) -> dict[str, object]:
        """The facts that a run card and ``describe`` list, as plain values.

        Returns:
            ``family`` and ``family_from``; ``modalities``: width of each; ``sequences``: steps of each, where there are
            any; ``utterances`` of each split; ``videos``; ``missing``: utterances that lack each modality;
            ``unlabelled``: utterances without a label; ``name``, ``aligned``, ``sha256`` and ``notes``.
        """
        return {
            "name": self.name,
            "family": self.family,
            "family_from": self.family_from,
            "modalities": dict(zip(self.modalities, self.dims, strict=True)),
            "sequences": {k: v.shape[1] for k, v in self.masks.items()},
            "aligned": self.aligned,
            "utterances": {k: int((self.split == v).sum()) for k, v in SPLITS.items()},
            "videos": len(self.video_ptr) - 1,
            "missing": dict(zip(self.modalities, (~self.available).sum(0).tolist(), strict=True)),
            "unlabelled": int((~self.labelled).sum()),
            "sha256": self.sha256,
            "notes": list(self.notes),
        }


def masked_mean(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean over the valid tokens, float32 ``[N, d]`` from ``[N, L, d]`` and ``[N, L]``; zeros for rows without one."""
    selected = np.where(mask[..., None], x, np.float32(0))
    return (selected.sum(1) / np.maximum(1, mask.sum(1))[:, None]).astype(np.float32)
