"""Pickles in the layout of MMSA: splits of ``text``, ``audio``, ``vision``, ``id``, ``regression_labels`` …"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import LABEL_RANGE, SPLITS, Corpus, masked_mean
from .npz import group_offsets
from .safe_pickle import plain, read_pickle

MODALITIES = ("text", "audio", "vision")


def load_mmsa(path: str | Path, family: str | None = None, pooled: bool = False) -> Corpus:
    """Load an MMSA pickle (``aligned_50.pkl`` or ``unaligned_*.pkl`` of MOSI, MOSEI or SIMS).

    Sequences are called aligned when the three lengths agree and the file gives no ``audio_lengths``; then the text
    mask holds for all. Text is masked by ``text_bert[:, 1]`` where present, else by its non-zero steps. ``-inf`` in
    audio becomes 0, as in MMSA.

    Args:
        path: The file. It is read without running any code from it.
        family: ``"mosi"``, ``"mosei"`` or ``"sims"``; by default from the folder or file name, else from the keys and
            label range (SIMS has ``regression_labels_T``), MOSI and MOSEI being scored alike.
        pooled: Masked means over time, split by split, instead of sequences.

    Raises:
        ValueError: The pickle is hostile, corrupt or truncated, or lacks a split, a key or a modality, or shapes
            disagree. The message names the file and the part.
    """
    path = Path(path)
    root = read_pickle(path)
    if not isinstance(root, Mapping):
        raise ValueError(f"{path}: expected a dictionary with the splits {list(SPLITS)}, got {type(root).__name__}")
    family = family or _guess_family(path, root)
    if family not in LABEL_RANGE:
        raise ValueError(f"{path}: family must be one of {sorted(LABEL_RANGE)}, got {family!r}")
    repaired: list[str] = []
    parts = [_part(path, root, name, pooled, repaired) for name in SPLITS]
    ids = np.concatenate([p["ids"] for p in parts])
    keys = [_video_and_clip(i) for i in ids.tolist()]
    order = np.array(sorted(range(len(ids)), key=lambda i: keys[i]))
    low, high = LABEL_RANGE[family]
    labels = np.concatenate([p["labels"] for p in parts])[order]
    if labels.min() < low - 1e-3 or labels.max() > high + 1e-3:
        raise ValueError(
            f"{path}: labels reach from {labels.min():g} to {labels.max():g}, outside [{low:g}, {high:g}] of {family}"
        )
    masks = {} if pooled else {m: _join(path, parts, "masks", m)[order] for m in MODALITIES}
    return Corpus(
        name=f"{family.upper()} ({path.name})",
        family=family,
        features={m: _join(path, parts, "features", m)[order] for m in MODALITIES},
        labels=labels,
        split=np.repeat(np.array(list(SPLITS.values()), dtype=np.int8), [len(p["labels"]) for p in parts])[order],
        video_ptr=group_offsets(np.array([keys[i][0] for i in order])),
        utterance_ids=ids[order],
        masks=masks,
        aligned=not pooled and all(p["aligned"] for p in parts),
        notes=tuple(repaired),
    )


def _guess_family(path: Path, root: Mapping) -> str:
    hint = f"{path.parent.name}/{path.name}".lower()
    for family in ("mosei", "mosi", "sims"):
        if family in hint:
            return family
    train = root.get("train")
    return "sims" if isinstance(train, Mapping) and "regression_labels_T" in train else "mosi"


def _part(path: Path, root: Mapping, name: str, pooled: bool, repaired: list[str]) -> dict[str, Any]:
    part = root.get(name)
    if not isinstance(part, Mapping):
        raise ValueError(f"{path}: it lacks the split {name!r}; it has {sorted(map(str, root))}")
    where = f"{path}, split {name!r}"
    labels = _numbers(where, part, "regression_labels").reshape(-1)
    n = len(labels)
    if not np.isfinite(labels).all():
        raise ValueError(f"{where}: 'regression_labels' holds values that are not finite")
    features = {m: _features(where, part, m, n, repaired) for m in MODALITIES}
    masks = _masks(where, part, features)
    aligned = "audio_lengths" not in part and len({x.shape[1] for x in features.values()}) == 1
    if pooled:
        features = {m: masked_mean(features[m], masks[m]) for m in MODALITIES}
    ids = [str(i) for i in _column(where, part, "id", n)]
    return {"ids": np.array(ids, dtype=str), "labels": labels, "features": features, "masks": masks, "aligned": aligned}


def _column(where: str, part: Mapping, key: str, n: int) -> list:
    if key not in part:
        raise ValueError(f"{where}: it lacks the key {key!r}; it has {sorted(map(str, part))}")
    value = plain(part[key])
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, (list, tuple)) or len(value) != n:
        raise ValueError(f"{where}: {key!r} must list one entry for each of the {n} labels")
    # Some releases store each id in a list of its own.
    flat = [v[0] if isinstance(v, (list, tuple)) and v else v for v in map(plain, value)]
    if not all(isinstance(v, (str, int)) for v in flat):
        raise ValueError(f"{where}: {key!r} must hold strings")
    return flat


def _numbers(where: str, part: Mapping, key: str) -> np.ndarray:
    if key not in part:
        what = f"the modality {key!r}" if key in MODALITIES else f"the key {key!r}"
        raise ValueError(f"{where}: it lacks {what}; it has {sorted(map(str, part))}")
    value = plain(part[key])
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: {key!r} is no array of numbers ({e})") from e


def _features(where: str, part: Mapping, key: str, n: int, repaired: list[str]) -> np.ndarray:
    x = _numbers(where, part, key)
    if x.ndim != 3 or len(x) != n:
        raise ValueError(f"{where}: {key!r} must be [{n}, L, d], got {x.shape}")
    if key == "audio" and np.isneginf(x).any():
        repaired.append(f"{where.rpartition(', ')[2]}: {int(np.isneginf(x).sum())} values -inf in audio set to 0")
        x = np.where(np.isneginf(x), np.float32(0), x)
    if not np.isfinite(x).all():
        raise ValueError(f"{where}: {key!r} holds {int((~np.isfinite(x)).sum())} values that are not finite")
    return x


def _masks(where: str, part: Mapping, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    n, steps = features["text"].shape[:2]
    if "text_bert" in part:
        bert = _numbers(where, part, "text_bert")
        if bert.shape != (n, 3, steps):
            raise ValueError(f"{where}: 'text_bert' must be [{n}, 3, {steps}], got {bert.shape}")
        text = bert[:, 1] > 0
    else:
        text = (features["text"] != 0).any(-1)
    masks = {"text": text}
    for m in ("audio", "vision"):
        length = features[m].shape[1]
        if f"{m}_lengths" in part:
            lengths = _numbers(where, part, f"{m}_lengths").reshape(-1)
            if lengths.shape != (n,) or (lengths < 0).any() or (lengths > length).any():
                raise ValueError(f"{where}: '{m}_lengths' must hold {n} numbers in [0, {length}]")
            masks[m] = np.arange(length) < lengths[:, None]
        elif length == steps:
            masks[m] = text
        else:
            raise ValueError(f"{where}: {m!r} has {length} steps and text {steps}, but there is no '{m}_lengths'")
    return masks


def _join(path: Path, parts: list[dict[str, Any]], kind: str, modality: str) -> np.ndarray:
    shapes = {p[kind][modality].shape[1:] for p in parts}
    if len(shapes) > 1:
        raise ValueError(f"{path}: {modality!r} has different shapes in the splits: {sorted(shapes)}")
    return np.concatenate([p[kind][modality] for p in parts])


def _video_and_clip(utterance: str) -> tuple[str, int, str]:
    """``video$_$clip`` as a sort key: clips by number where they are numbers."""
    video, _, clip = utterance.rpartition("$_$")
    if not video:
        return utterance, 0, ""
    number = re.fullmatch(r"\d+", clip)
    return video, int(clip) if number else 0, clip
