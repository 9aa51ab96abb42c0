"""Array files: any ``.npz`` with the documented keys, and two with keys of their own, for CMU-MOSI and ICT-MMMO.

Documented keys, ``N`` utterances: features (any other name) ``[N, d]`` or ``[N, L, d]``; ``label`` ``[N]``; ``split``
``[N]`` (0, 1, 2, or -1 for rows to leave out); ``utt_id`` ``[N]``; ``video_index`` ``[N]`` or ``video_id`` ``[N]`` or
``[V]``; ``clip_id`` ``[N]``; ``transcript`` and ``media`` ``[N]``; and for a feature ``x`` its ``x_mask`` ``[N, L]``,
``x_lengths`` ``[N]`` and ``x_present`` ``[N]``. ``family``, ``aligned`` and ``notes`` are what ``convert`` adds.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .conversations import SINGLE
from .corpus import LABEL_RANGE, TRAIN, UNUSED, VALID, Corpus
from .intake import Intake, Part
from .npy import Archive, HoldsObjects
from .values import column, texts

MOSI_SPLITS = {"official": "split", "bclstm": "split_bclstm", "clean752": "split_clean752"}
# Activations of networks trained on labels of official test rows: allowed only where those rows are not test rows.
LEAKING = ("text_cnn_bclstm", "video")
MOSI_BLOCKS = ("text_minilm", "text_cnn_bclstm", "audio", "video")
DEFAULT_BLOCKS = {
    "official": ("text_minilm", "audio"),
    "bclstm": ("text_cnn_bclstm", "audio", "video"),
    "clean752": ("text_minilm", "audio", "video"),
}
LABELS = ("label", "labels", "regression_labels")
NO_FEATURES = ("_names", "_mask", "_lengths", "_present")


def load_npz(
    path: str | Path,
    split: str = "official",
    blocks: tuple[str, ...] | None = None,
    pooled: bool = True,
    *,
    family: str | None = None,
    video_key: str | None = None,
    id_pattern: str | None = None,
    repair: bool = False,
) -> Corpus:
    """Load an ``.npz``; ``mosi.npz`` and ``mmmo_seq.npz`` are recognised by their keys.

    Args:
        path: The file. Only the arrays that are needed are read.
        split: MOSI only: ``"official"``, ``"bclstm"`` or ``"clean752"``; rows the split does not use are dropped.
            ``bclstm`` has no validation part, so every seventh of its train videos becomes one.
        blocks: Feature arrays to take. From MOSI at most one text array; by default text and audio for the official
            split, and all three modalities for the others. From other files all features by default.
        pooled: Masked means over time instead of sequences.
        family: ``"mosi"``, ``"mosei"`` or ``"sims"``; by default inferred from the file.
        video_key: Array ``[N]`` that holds the video of each utterance.
        id_pattern: Regular expression for ids, see :func:`examples.msa.conversations.utterances`.
        repair: Replace values that are not finite by the means of the train part.

    Returns:
        The corpus; modalities of MOSI and ICT-MMMO are called ``text``, ``audio`` and ``vision``, those of other files
        have the names of their arrays.

    Raises:
        ValueError: The file is corrupt, lacks a key, or the blocks leak labels into the split.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    archive = Archive(path)
    intake = Intake(path, pooled, repair, family, id_pattern)
    mosi = any(k in archive for k in ("split_bclstm", "split_clean752"))
    if not mosi and split != "official":
        raise ValueError(f"{path}: this file has one split; leave --split out")
    if mosi:
        return _mosi(intake, archive, split, blocks, video_key)
    if "text_present" in archive and "utt_id" not in archive:
        if blocks is not None:
            raise ValueError(f"{path}: this file has no choice of blocks; leave --blocks out")
        return _mmmo(intake, archive)
    return _any(intake, archive, blocks, video_key)


def _get(archive: Archive, key: str, rows: int | None = None) -> np.ndarray:
    if key not in archive:
        raise ValueError(f"{archive.path}: it lacks the key {key!r}; it has {sorted(archive)[:50]}")
    shape = archive.header(key).shape
    if rows is not None and (not shape or shape[0] != rows):
        raise ValueError(f"{archive.path}: {key!r} has {shape[0] if shape else 'no'} rows, expected {rows}")
    return archive.read(key)


def _number(archive: Archive, key: str, rows: int | None = None, dtype: Any = np.float32) -> np.ndarray:
    array = _get(archive, key, rows)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{archive.path}: {key!r} holds {array.dtype}, expected numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)


def _line(archive: Archive, key: str, rows: int | None = None, dtype: Any = np.float32) -> np.ndarray:
    array = _number(archive, key, rows, dtype)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{archive.path}: {key!r} must hold one number for each utterance, got shape {array.shape}")
    return array


def _mosi(
    intake: Intake, archive: Archive, split_name: str, blocks: tuple[str, ...] | None, video_key: str | None
) -> Corpus:
    path = archive.path
    if split_name not in MOSI_SPLITS:
        raise ValueError(f"{path}: split must be one of {list(MOSI_SPLITS)}, got {split_name!r}")
    blocks = tuple(blocks) if blocks else DEFAULT_BLOCKS[split_name]
    unknown = [b for b in blocks if b not in MOSI_BLOCKS]
    if unknown:
        raise ValueError(f"{path}: unknown blocks {unknown}; choose from {list(MOSI_BLOCKS)}")
    leaking = [b for b in blocks if b in LEAKING]
    if split_name == "official" and leaking:
        raise ValueError(
            f"{path}: {leaking} come from networks trained on labels of official test utterances, so scores on the "
            "official split would be inflated; use split 'clean752', or the blocks text_minilm and audio"
        )
    names = {b: "text" if b.startswith("text") else {"audio": "audio", "video": "vision"}[b] for b in blocks}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path}: choose each modality once, got {list(blocks)}")
    labels = _line(archive, "label")
    n = len(labels)
    split = _line(archive, MOSI_SPLITS[split_name], n, np.int64)
    video = _videos(archive, video_key or "video_index", n)
    intake.notes.append(f"split {split_name}, blocks {', '.join(blocks)}")
    if split_name == "bclstm":
        train_videos = np.unique(np.array(video)[split == TRAIN])
        split = np.where(np.isin(video, train_videos[::7]), VALID, split)
        intake.notes.append("every seventh train video serves as validation")
    values = {names[b]: (b, _number(archive, b, n)) for b in blocks}
    return _corpus(intake, archive, labels, split, values, video, f"CMU-MOSI ({split_name})")


def _any(intake: Intake, archive: Archive, blocks: tuple[str, ...] | None, video_key: str | None) -> Corpus:
    path = archive.path
    key = next((k for k in LABELS if k in archive), None)
    marks = {"split", "utt_id", "id", "video_index", "video_id"} & set(archive)
    if key is None and not marks:
        raise ValueError(f"{path}: it lacks the keys 'label' and 'utt_id'; it has {sorted(archive)[:50]}")
    first = key or ("utt_id" if "utt_id" in marks else min(marks))
    shape = archive.header(first).shape
    n = shape[0] if shape else 0
    found = [k for k in blocks or archive if k in archive and _is_feature(intake, archive, k)]
    unknown = [b for b in blocks or () if b not in found]
    if unknown:
        raise ValueError(f"{path}: unknown blocks {unknown}; it has {sorted(archive)[:50]}")
    if not found:
        raise ValueError(f"{path}: it holds no features, arrays [{n}, d] or [{n}, L, d]; it has {sorted(archive)[:50]}")
    values = {b: (b, _number(archive, b, n)) for b in blocks or found}
    if key is None:
        intake.notes.append("no 'label': every utterance is unlabelled")
    labels = np.full(n, np.nan, np.float32) if key is None else _line(archive, key)
    if "split" in archive:
        split = _line(archive, "split", n, np.int64)
    else:
        split = np.zeros(n, np.int64)
        intake.notes.append("no 'split': all utterances are taken as train")
    video_key = video_key or next((k for k in ("video_index", "video_id") if k in archive), None)
    videos = None if video_key is None else _videos(archive, video_key, n)
    _facts(intake, archive)
    return _corpus(intake, archive, labels, split, values, videos, None)


def _is_feature(intake: Intake, archive: Archive, key: str) -> bool:
    if key in LABELS or key.endswith(NO_FEATURES):
        return False
    try:
        header = archive.header(key)
    except HoldsObjects:
        intake.notes.append(f"the array {key!r} holds objects and is not read")
        return False
    return header.dtype.kind in "fiu" and len(header.shape) in (2, 3)


def _facts(intake: Intake, archive: Archive) -> None:
    """Family and notes that ``convert`` wrote."""
    if "family" in archive:
        family = str(_get(archive, "family"))
        if family not in LABEL_RANGE:
            raise ValueError(f"{archive.path}: 'family' must be one of {sorted(LABEL_RANGE)}, got {family[:40]!r}")
        intake.stored_family = family
    if "aligned" in archive:
        intake.stored_aligned = bool(np.all(_number(archive, "aligned")))
    if "notes" in archive:
        notes = _get(archive, "notes")
        intake.notes += texts(str(archive.path), "notes", notes, notes.size)


def _videos(archive: Archive, key: str, n: int) -> list[Any] | None:
    """Number of each utterance's video, in the order of the file."""
    shape = archive.header(key).shape if key in archive else (n,)
    if key == "video_id" and shape != (n,):
        return None
    names = column(str(archive.path), key, _get(archive, key, n), n)
    order: dict[Any, int] = {}
    numbers = [order.setdefault(v, len(order)) for v in names]
    return names if all(isinstance(v, int) for v in names) else numbers


def _corpus(
    intake: Intake,
    archive: Archive,
    labels: np.ndarray,
    split: np.ndarray,
    values: dict[str, tuple[str, np.ndarray]],
    videos: list[Any] | None,
    name: str | None,
) -> Corpus:
    """The rows that the split uses."""
    where, n = str(archive.path), len(labels)
    rows = np.flatnonzero(split != UNUSED)
    if len(rows) == 0 or not np.isin(split, (TRAIN, VALID, 2, UNUSED)).all():
        raise ValueError(f"{where}: the split must hold 0, 1, 2 or -1, and use some rows")
    masks, lengths, present = {}, {}, {}
    for m, (key, x) in values.items():
        if x.ndim not in (2, 3) or 0 in x.shape:
            raise ValueError(f"{where}: {key!r} must be [{n}, d] or [{n}, L, d], got {x.shape}")
        if f"{key}_present" in archive:
            present[m] = _line(archive, f"{key}_present", n, bool)[rows]
        if x.ndim == 3 and f"{key}_mask" in archive:
            mask = _number(archive, f"{key}_mask", n, bool)
            if mask.shape != x.shape[:2]:
                raise ValueError(f"{where}: '{key}_mask' must be {list(x.shape[:2])}, got {list(mask.shape)}")
            masks[m] = mask[rows]
        elif x.ndim == 3 and f"{key}_lengths" in archive:
            lengths[m] = _line(archive, f"{key}_lengths", n, np.int64)[rows]
            if not ((lengths[m] >= 0) & (lengths[m] <= x.shape[1])).all():
                raise ValueError(f"{where}: '{key}_lengths' must hold {n} numbers in [0, {x.shape[1]}]")
    features, masks, available, aligned = intake.features(
        where, {m: x[rows] for m, (_, x) in values.items()}, (split == TRAIN)[rows], lengths, None, masks, present,
        rows,
    )  # fmt: skip

    def entries(key: str, read: Any) -> list[Any] | None:
        if key not in archive:
            return None
        every = read(where, key, _get(archive, key, n), n)
        return [every[i] for i in rows]

    names = None
    if videos is not None and "video_id" in archive:
        stored = texts(where, "video_id", _get(archive, "video_id"), archive.header("video_id").shape[0])
        by_number = len(stored) != n and all(isinstance(v, int) and 0 <= v < len(stored) for v in videos)
        if by_number or len(stored) == n:
            names = [stored[videos[i] if by_number else i] for i in rows]
    ids = entries("utt_id", column) or entries("id", column)
    if ids is None:
        ids = [f"row {i}" for i in rows]
        intake.notes.append("no 'utt_id': utterances are called by their row")
    part = Part(
        ids=ids,
        labels=labels[rows],
        split=split[rows],
        features=features,
        masks=masks,
        available=available,
        aligned=aligned,
        videos=None if videos is None else [videos[i] for i in rows],
        video_names=names,
        clips=entries("clip_id", column),
        transcripts=entries("transcript", texts),
        media=entries("media", texts),
    )
    return intake.corpus([part], name)


def _mmmo(intake: Intake, archive: Archive) -> Corpus:
    labels = _line(archive, "label")
    n = len(labels)
    keys = {"text": "text", "audio": "audio", "vision": "video"}
    values = {m: (key, _number(archive, key, n)) for m, key in keys.items()}
    if any(x.ndim != 3 or x.shape[1] != values["audio"][1].shape[1] for _, x in values.values()):
        raise ValueError(f"{archive.path}: 'text', 'audio' and 'video' must be sequences of one length")
    # All-zero audio steps are padding; vision has zero steps inside sequences too, so audio decides for all.
    mask = (values["audio"][1] != 0).any(-1)
    there = {"text": _line(archive, "text_present", n, bool)}
    split = _line(archive, "split", n, np.int64)
    features, masks, available, aligned = intake.features(
        str(archive.path), {m: x for m, (_, x) in values.items()}, split == TRAIN, {}, None,
        dict.fromkeys(values, mask), there,
    )  # fmt: skip
    intake.notes += ["labels 1 to 5 are shifted by -3", "each row is a whole video: there are no neighbours"]
    intake.family = intake.family or "mosi"
    ids = [f"mmmo_{i:03d}" for i in range(n)]
    part = Part(ids, labels - 3, split, features, masks, available, aligned, videos=list(range(n)))
    corpus = intake.corpus([part], "ICT-MMMO")
    return replace(corpus, notes=tuple(n for n in corpus.notes if n != SINGLE))
