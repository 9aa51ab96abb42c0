"""Labels under the names and in the forms that files use: scores, classes, or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .values import numbers, texts

SCORES = ("regression_labels", "labels", "label")
# Scores below this mean unlabelled, as NaN does: no score of any set comes near it.
UNLABELLED_BELOW = -90.0
_WORDS = {"negative": -1.0, "neg": -1.0, "neutral": 0.0, "neu": 0.0, "positive": 1.0, "pos": 1.0}
_CLASSES = {
    2: (-1.0, 1.0),
    3: (-1.0, 0.0, 1.0),
    5: (-2.0, -1.0, 0.0, 1.0, 2.0),
    7: (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0),
}


def labels_of(path: Path, splits: Mapping[str, Mapping], notes: list[str]) -> dict[str, np.ndarray | None]:
    """Scores of each split, float32 ``[N]`` with NaN where there is none; None for a split without any.

    ``regression_labels``, else MulT's ``labels``, else ``classification_labels`` or the words of ``annotations`` as
    integer scores. A file without any of these is unlabelled, and so is a valid or test part without the scores that
    other parts have; a train part without them is an error.

    Raises:
        ValueError: They are not scores, or the train part lacks them where others have them.
    """
    key = next((k for k in SCORES if any(k in part for part in splits.values())), None)
    if key is None:
        return _from_classes(path, splits, notes)
    if "train" in splits and key not in splits["train"]:
        has = sorted(map(str, splits["train"]))[:30]
        raise ValueError(f"{path}, split 'train': it lacks the key {key!r}; it has {has}")
    result: dict[str, np.ndarray | None] = {}
    for name, part in splits.items():
        if key not in part:
            notes.append(f"{name}: no {key!r}: unlabelled")
            result[name] = None
            continue
        result[name] = scores(f"{path}, split {name!r}", key, part[key])
    return result


def scores(where: str, key: str, value: Any) -> np.ndarray:
    """Scores of one part, float32 ``[N]``.

    Raises:
        ValueError: There is more than one number for an utterance, or one of them is infinite.
    """
    labels, _ = numbers(where, key, value)
    if labels.ndim == 0 or labels.size != len(labels):
        raise ValueError(f"{where}: {key!r} must hold one score for each utterance, got shape {labels.shape}")
    labels = labels.reshape(-1)
    if np.isinf(labels).any():
        raise ValueError(f"{where}: {key!r} holds values that are not finite")
    return np.where(labels < UNLABELLED_BELOW, np.float32(np.nan), labels)


def _from_classes(path: Path, splits: Mapping[str, Mapping], notes: list[str]) -> dict[str, np.ndarray | None]:
    key = next((k for k in ("classification_labels", "annotations") if all(k in p for p in splits.values())), None)
    if key is None:
        notes.append("no labels: every utterance is unlabelled")
        return dict.fromkeys(splits)
    found = {name: _classes(f"{path}, split {name!r}", key, part[key]) for name, part in splits.items()}
    known = np.concatenate(list(found.values()))
    known = known[~np.isnan(known)]
    if key == "annotations":
        notes.append("no scores: the words of 'annotations' are read as -1, 0 and 1")
        return dict(found)
    whole = (known == np.round(known)).all() and len(known) > 0
    top = int(known.max()) if whole else -1
    if not whole or known.min() < min(0, -top) or top > 6:
        raise ValueError(f"{path}: 'classification_labels' must be whole numbers of 2, 3, 5 or 7 classes from 0")
    if known.min() < 0:
        notes.append("no scores: 'classification_labels' are read as scores")
        return dict(found)
    count = next(c for c in _CLASSES if c > top)
    notes.append(f"no scores: the {count} classes of 'classification_labels' are read as {_CLASSES[count]}")
    table = np.array([*_CLASSES[count], np.nan], np.float32)
    return {name: table[np.where(np.isnan(v), count, v).astype(int)] for name, v in found.items()}


def _classes(where: str, key: str, value: Any) -> np.ndarray:
    if key == "classification_labels":
        return scores(where, key, value)
    size = getattr(value, "shape", None)
    words = texts(where, key, value, size[0] if size else len(value))
    return np.array([_WORDS.get(w.strip().lower(), np.nan) for w in words], np.float32)
