"""Pickles in the layout of MMSA and MulT: splits of ``text``, ``audio``, ``vision``, ``id``, labels …"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import SPLITS, TRAIN, Corpus
from .intake import Intake, Part
from .labels import labels_of
from .safe_pickle import read_pickle
from .torch_file import read_torch
from .values import column, is_stored, numbers, texts

MODALITIES = {
    "text": ("text", "language"),
    "audio": ("audio", "acoustic"),
    "vision": ("vision", "visual", "video"),
}
OTHER_NAMES = {"valid": ("val", "dev")}
VIDEO_KEYS = ("video_id", "vid")
CLIP_KEYS = ("clip_id", "clip")


def load_mmsa(
    path: str | Path,
    family: str | None = None,
    pooled: bool = False,
    *,
    video_key: str | None = None,
    id_pattern: str | None = None,
    repair: bool = False,
) -> Corpus:
    """Load a pickle or torch file in the layout of MMSA or MulT.

    Sequences are called aligned when their lengths agree, the file gives no ``audio_lengths``, and all masks are equal.
    Text is masked by ``text_bert[:, 1]`` where present; all other masks follow the data
    (:func:`examples.msa.streams.masks_of`). ``-inf`` in audio becomes 0, as in MMSA.

    Args:
        path: The file. No code from it is run, and only the keys that are needed are read.
        family: ``"mosi"``, ``"mosei"`` or ``"sims"``; by default inferred from the file
            (:func:`examples.msa.family.family_of`).
        pooled: Masked means over time, split by split, instead of sequences.
        video_key: Key of each split that holds the video of each utterance.
        id_pattern: Regular expression for ids, see :func:`examples.msa.conversations.utterances`.
        repair: Replace values that are not finite by the means of the train part.

    Raises:
        ValueError: The pickle is hostile, corrupt or truncated, or lacks a split, a key or a modality, or shapes
            disagree. The message names the file and the part.
    """
    path = Path(path)
    root = _read(path)
    if not isinstance(root, Mapping):
        raise ValueError(f"{path}: expected a dictionary with the splits {list(SPLITS)}, got {type(root).__name__}")
    intake = Intake(path, pooled, repair, family, id_pattern)
    splits = _splits(path, root)
    modalities = _modalities(path, splits)
    labels = labels_of(path, splits, intake.notes)
    parts = [
        _part(intake, f"{path}, split {name!r}", SPLITS[name], part, modalities, labels[name], video_key)
        for name, part in splits.items()
    ]
    mixed = root.get("train_mix")
    if isinstance(mixed, Mapping) and "train" in root:
        parts.append(_unlabelled(intake, f"{path}, split 'train_mix'", mixed, modalities, parts[0], video_key))
    _distinct(parts)
    return intake.corpus([p for p in parts if p.ids])


def _read(path: Path) -> Any:
    if path.is_file():
        with path.open("rb") as f:
            if f.read(4) == b"PK\x03\x04":
                return read_torch(path)
    return read_pickle(path)


def _splits(path: Path, root: Mapping) -> dict[str, Mapping]:
    found = {}
    for name in SPLITS:
        key = next((k for k in (name, *OTHER_NAMES.get(name, ())) if isinstance(root.get(k), Mapping)), None)
        if name == "train" and key is None and isinstance(root.get("train_mix"), Mapping):
            key = "train_mix"
        if key is not None:
            found[name] = root[key]
    # New data to predict often come as one part; in a file with two, the third has more likely been lost.
    if len(found) in (0, 2):
        lost = next(name for name in SPLITS if name not in found)
        raise ValueError(f"{path}: it lacks the split {lost!r}; it has {sorted(map(str, root))[:20]}")
    return found


def _modalities(path: Path, splits: Mapping[str, Mapping]) -> dict[str, str]:
    """Key of each modality that the file has; a modality of one split must be in all splits."""
    found: dict[str, str] = {}
    for name, keys in MODALITIES.items():
        having = {s: next((k for k in keys if is_stored(part.get(k))), None) for s, part in splits.items()}
        key = next((k for k in having.values() if k is not None), None)
        if key is None:
            continue
        found[name] = key
        for split, own in having.items():
            if own != key:
                part = splits[split]
                state = "is not an array of numbers" if key in part else "it lacks the modality"
                raise ValueError(f"{path}, split {split!r}: {state} {key!r}; it has {sorted(map(str, part))[:30]}")
    if not found:
        keys = sorted({str(k) for part in splits.values() for k in part})[:30]
        raise ValueError(f"{path}: it holds none of the modalities {list(MODALITIES)}; it has {keys}")
    return found


def _part(
    intake: Intake,
    where: str,
    split: int,
    part: Mapping,
    modalities: Mapping[str, str],
    labels: np.ndarray | None,
    video_key: str | None,
) -> Part:
    values, lengths, present = {}, {}, {}
    for name, key in modalities.items():
        values[name], ragged = numbers(where, key, part[key])
        if ragged is not None and values[name].ndim == 3:
            lengths[name] = ragged
        elif ragged is not None:
            present[name] = ragged > 0
    n = len(next(iter(values.values()))) if labels is None else len(labels)
    for name, x in values.items():
        if x.ndim not in (2, 3) or len(x) != n or x.shape[-1] == 0:
            raise ValueError(f"{where}: {modalities[name]!r} must be [{n}, L, d] or [{n}, d], got {x.shape}")
        if name == "audio" and (infinite := int(np.isneginf(x).sum())):
            intake.notes.append(f"{where.rpartition(', ')[2]}: {infinite} values -inf in audio set to 0")
            values[name] = np.where(np.isneginf(x), np.float32(0), x)
        if f"{name}_lengths" in part and x.ndim == 3:
            lengths[name] = _lengths(where, part, name, n, x.shape[1])
    words = _words(where, part, n) if "text_bert" in part else None
    if words is not None and "text" in values and values["text"].shape[:2] != words.shape and values["text"].ndim == 3:
        raise ValueError(
            f"{where}: 'text_bert' must be [{n}, 3, {values['text'].shape[1]}], got {words.shape[1]} steps"
        )
    train = np.full(n, split == TRAIN)
    features, masks, available, aligned = intake.features(where, values, train, lengths, words, None, present)
    intake.unimodal = intake.unimodal or "regression_labels_T" in part
    if "id" not in part:
        raise ValueError(f"{where}: it lacks the key 'id'; it has {sorted(map(str, part))[:30]}")
    if video_key is not None and video_key not in part:
        raise ValueError(
            f"{where}: it lacks the key {video_key!r} of --video-key; it has {sorted(map(str, part))[:30]}"
        )
    video = video_key or next((k for k in VIDEO_KEYS if k in part), None)
    clip = next((k for k in CLIP_KEYS if k in part), None)
    said = next((k for k in ("raw_text", "transcript") if k in part), None)
    return Part(
        ids=column(where, "id", part["id"], n),
        labels=np.full(n, np.nan, np.float32) if labels is None else labels,
        split=np.full(n, split, np.int8),
        features=features,
        masks=masks,
        available=available,
        aligned=aligned,
        videos=None if video is None else column(where, video, part[video], n),
        clips=None if clip is None or video is None else column(where, clip, part[clip], n),
        transcripts=None if said is None else texts(where, said, part[said], n),
        media=texts(where, "media", part["media"], n) if "media" in part else None,
    )


def _unlabelled(
    intake: Intake, where: str, part: Mapping, modalities: Mapping[str, str], train: Part, video_key: str | None
) -> Part:
    """Rows of ``train_mix`` (all clips of SIMS v2, labelled or not) that ``train`` does not have."""
    lost = [key for key in modalities.values() if key not in part]
    if lost:
        raise ValueError(f"{where}: it lacks the modality {lost[0]!r}; it has {sorted(map(str, part))[:30]}")
    counts = intake.counts.copy()
    whole = _part(intake, where, TRAIN, part, modalities, None, video_key)
    known = set(map(str, train.ids))
    rows = np.array([i for i, name in enumerate(whole.ids) if str(name) not in known], dtype=np.int64)
    intake.counts = counts if len(rows) == 0 else intake.counts
    intake.notes.append(f"train_mix: {len(rows)} utterances beyond those of train, taken into it without a label")

    def take(values: list | None) -> list | None:
        return None if values is None else [values[i] for i in rows]

    return replace(
        whole,
        ids=take(whole.ids),
        labels=whole.labels[rows],
        split=whole.split[rows],
        features={m: x[rows] for m, x in whole.features.items()},
        masks={m: x[rows] for m, x in whole.masks.items()},
        available={m: x[rows] for m, x in whole.available.items()},
        videos=take(whole.videos),
        clips=take(whole.clips),
        transcripts=take(whole.transcripts),
        media=take(whole.media),
    )


def _distinct(parts: list[Part]) -> None:
    """Prefix ids that are numbers starting anew in every split with the name of the split."""
    names = Counter(i for p in parts for i in p.ids)
    if all(isinstance(i, int) for i in names) and max(names.values()) > 1:
        for p in parts:
            p.ids[:] = [f"{list(SPLITS)[p.split[0]]}/{i}" for i in p.ids]


def _lengths(where: str, part: Mapping, name: str, n: int, size: int) -> np.ndarray:
    lengths = numbers(where, f"{name}_lengths", part[f"{name}_lengths"])[0].reshape(-1)
    if lengths.shape != (n,) or not ((lengths >= 0) & (lengths <= size)).all():
        raise ValueError(f"{where}: '{name}_lengths' must hold {n} numbers in [0, {size}]")
    return lengths.astype(np.int64)


def _words(where: str, part: Mapping, n: int) -> np.ndarray:
    bert = numbers(where, "text_bert", part["text_bert"])[0]
    if bert.ndim != 3 or bert.shape[:2] != (n, 3):
        size = bert.shape[-1] if bert.ndim else 0
        raise ValueError(f"{where}: 'text_bert' must be [{n}, 3, {size}], got {bert.shape}")
    return bert[:, 1] > 0
