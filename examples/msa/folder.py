"""The open folder format: ``clips.csv`` beside an array per modality, or a folder per modality with a file per clip."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import LABEL_RANGE, SPLITS, TRAIN, UNUSED, Corpus
from .intake import Intake, Part
from .npy import Archive, read_npy
from .values import numbers

TABLES = ("clips.csv", "label.csv")
FACTS = "corpus.json"
MAX_FACTS = 1 << 20
# Names of columns, the documented one first; the others are those of MMSA's label.csv and of common exports.
COLUMNS = {
    "id": ("id", "utt_id", "name"),
    "video": ("video", "video_id"),
    "clip": ("clip", "clip_id"),
    "split": ("split", "mode"),
    "label": ("label",),
    "transcript": ("transcript", "text"),
    "media": ("media",),
}
_SPLIT_WORDS = {**SPLITS, "val": 1, "dev": 1, "0": 0, "1": 1, "2": 2, "-1": UNUSED, "unused": UNUSED}


def load_folder(
    path: str | Path,
    *,
    family: str | None = None,
    pooled: bool = True,
    video_key: str | None = None,
    id_pattern: str | None = None,
    repair: bool = False,
) -> Corpus:
    """Load a folder with ``clips.csv`` and features.

    Args:
        path: The folder. ``clips.csv`` has a column ``id``, and may have ``video``, ``clip``, ``split`` (train, valid,
            test, unused), ``label`` (empty: unlabelled), ``transcript`` and ``media``. A modality is ``NAME.npy`` with
            a row for each line; ``NAME.npz`` with ``features`` and perhaps ``lengths``, ``mask`` and ``present``, or
            with one array per id; or a folder ``NAME`` with one ``.npy`` or ``.npz`` per id. Clips without a file lack
            the modality. Modalities may lie in a folder ``features`` too.
        family: ``"mosi"``, ``"mosei"`` or ``"sims"``; by default inferred from the path and the labels.
        pooled: Means over time instead of sequences.
        video_key: Column with the video of each clip, where it is not called ``video``.
        id_pattern: Regular expression for ids, see :func:`examples.msa.conversations.utterances`.
        repair: Replace values that are not finite by the means of the train part.

    Raises:
        ValueError: The table or a feature file cannot be used; the message names file and line.
    """
    path = Path(path)
    table = next((path / t for t in TABLES if (path / t).is_file()), None)
    if table is None:
        raise ValueError(f"{path}: the folder has no clips.csv")
    intake = Intake(path, pooled, repair, family, id_pattern)
    columns = _read_table(table, video_key)
    ids = columns["id"]
    _facts(path, intake)
    split = _split(table, columns.get("split", [""] * len(ids)), intake)
    labels = _labels(table, columns.get("label", [""] * len(ids)), intake)
    rows = np.flatnonzero(split != UNUSED)
    if len(rows) == 0:
        raise ValueError(f"{table}: it lists no clip that is used")
    values, lengths, masks, present = {}, {}, {}, {}
    for name, source in _sources(path, table).items():
        x, length, mask, there = _modality(source, columns, pooled and not repair)
        values[name] = x[rows]
        if length is not None:
            lengths[name] = length[rows]
        if mask is not None:
            masks[name] = mask[rows]
        present[name] = there[rows]
    features, found, available, aligned = intake.features(
        str(path), values, (split == TRAIN)[rows], lengths, None, masks, present, rows
    )
    names = columns.get("video")
    order: dict[str, int] = {}

    def take(name: str) -> list[str] | None:
        return None if name not in columns else [columns[name][i] for i in rows]

    part = Part(
        ids=[ids[i] for i in rows],
        labels=labels[rows],
        split=split[rows],
        features=features,
        masks=found,
        available=available,
        aligned=aligned,
        videos=None if names is None else [order.setdefault(names[i], len(order)) for i in rows],
        video_names=take("video"),
        clips=take("clip"),
        transcripts=take("transcript"),
        media=take("media"),
    )
    return intake.corpus([part], path.resolve().name)


def _read_table(table: Path, video_key: str | None) -> dict[str, list[str]]:
    try:
        text = table.read_text(encoding="utf-8-sig")
        head = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=head.count)
        lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if line]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{table}: not a readable table in UTF-8 ({e})") from e
    if len(lines) < 2:
        raise ValueError(f"{table}: it lists no clip")
    header = [h.strip().lower() for h in lines[0]]
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise ValueError(f"{table}, entry {number}: {len(line)} cells, but there are {len(header)} columns")
    cells = {h: [line[i].strip() for line in lines[1:]] for i, h in enumerate(header)}
    found = {}
    for name, others in COLUMNS.items():
        key = next((o for o in others if o in cells), None)
        if key is not None:
            found[name] = cells[key]
    if video_key is not None:
        if video_key.lower() not in cells:
            raise ValueError(f"{table}: it lacks the column {video_key!r} of --video-key; it has {header}")
        found["video"] = cells[video_key.lower()]
    if "id" not in found and {"video", "clip"} <= found.keys():
        found["id"] = [f"{v}$_${c}" for v, c in zip(found["video"], found["clip"], strict=True)]
    if "id" not in found:
        raise ValueError(f"{table}: it lacks the column 'id'; it has {header}")
    for name in ("video", "clip"):
        if name in found and not all(found[name]):
            if any(found[name]):
                raise ValueError(f"{table}, entry {found[name].index('') + 2}: {name!r} is empty")
            del found[name]
    return found


def _facts(path: Path, intake: Intake) -> None:
    """Family and notes that ``convert`` wrote beside the table."""
    file = path / FACTS
    if not file.is_file():
        return
    try:
        with file.open("rb") as f:
            facts = json.loads(f.read(MAX_FACTS))
        family, notes = facts["family"], facts["notes"]
        aligned = facts["aligned"]
        if family not in LABEL_RANGE or not all(isinstance(n, str) for n in notes) or not isinstance(aligned, bool):
            raise ValueError("unexpected values")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ValueError(f"{file}: not the facts that convert writes ({e}); remove the file to do without it") from e
    intake.stored_family, intake.stored_aligned = family, aligned
    intake.notes += notes


def _split(table: Path, words: list[str], intake: Intake) -> np.ndarray:
    if not any(words):
        intake.notes.append("no split: all clips are taken as train")
        return np.zeros(len(words), np.int8)
    result = np.zeros(len(words), np.int8)
    for i, word in enumerate(words):
        if word.lower() not in _SPLIT_WORDS:
            raise ValueError(f"{table}, entry {i + 2}: the split must be train, valid, test or unused, got {word!r}")
        result[i] = _SPLIT_WORDS[word.lower()]
    return result


def _labels(table: Path, words: list[str], intake: Intake) -> np.ndarray:
    if not any(words):
        intake.notes.append("no label: every clip is unlabelled")
    result = np.full(len(words), np.nan, np.float32)
    for i, word in enumerate(words):
        try:
            result[i] = float(word) if word else np.nan
        except ValueError:
            raise ValueError(f"{table}, entry {i + 2}: the label must be a number or empty, got {word!r}") from None
    return result


def _sources(path: Path, table: Path) -> dict[str, Path]:
    """File or folder of each modality."""
    found: dict[str, Path] = {}
    for place in (path, path / "features"):
        for entry in sorted(place.iterdir()) if place.is_dir() else []:
            folder = entry.is_dir() and entry != path / "features" and any(_feature_files(entry))
            if entry.name.startswith(".") or not (folder or entry.suffix in (".npy", ".npz")):
                continue
            name = entry.name if folder else entry.stem
            if name in found:
                raise ValueError(f"{path}: the modality {name!r} is there twice: {found[name].name} and {entry.name}")
            found[name] = entry
    if not found:
        raise ValueError(f"{path}: beside {table.name} there is no modality: no .npy, no .npz, no folder of them")
    return found


def _feature_files(folder: Path) -> Any:
    return (e for e in folder.rglob("*") if e.suffix in (".npy", ".npz"))


def _modality(
    source: Path, columns: dict[str, list[str]], pool: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray]:
    """Values, and lengths, mask and rows that have the modality, as far as they are known."""
    ids = columns["id"]
    n = len(ids)
    if source.is_dir():
        return _by_clip(source, [_clip_file(source, columns, i) for i in range(n)], pool)
    if source.suffix == ".npy":
        return _table(source, source.stem, read_npy(source), n), None, None, np.ones(n, bool)
    archive = Archive(source)
    keys = list(archive)
    main = "features" if "features" in archive else keys[0] if len(keys) == 1 and keys[0] not in ids else None
    if main is None:
        return _by_clip(source, [archive.read(i) if i in archive else None for i in ids], pool)
    x = _table(source, main, archive.read(main), n)
    length, mask = None, None
    there = _row(archive, "present", (n,)).astype(bool) if "present" in archive else np.ones(n, bool)
    if x.ndim == 3 and "mask" in archive:
        mask = _row(archive, "mask", x.shape[:2]).astype(bool)
    elif x.ndim == 3 and "lengths" in archive:
        length = _row(archive, "lengths", (n,)).astype(np.int64)
        if not ((length >= 0) & (length <= x.shape[1])).all():
            raise ValueError(f"{source}: 'lengths' must hold {n} numbers in [0, {x.shape[1]}]")
    return x, length, mask, there


def _row(archive: Archive, key: str, shape: tuple[int, ...]) -> np.ndarray:
    array = archive.read(key)
    if array.shape != shape or array.dtype.kind not in "biuf" or not np.isfinite(array).all():
        raise ValueError(f"{archive.path}: {key!r} must hold numbers {list(shape)}, got {array.dtype} {array.shape}")
    return array


def _table(source: Path, key: str, value: np.ndarray, n: int) -> np.ndarray:
    x, _ = numbers(str(source), key, value)
    if x.ndim not in (2, 3) or len(x) != n or 0 in x.shape:
        raise ValueError(f"{source}: expected [{n}, d] or [{n}, L, d], a row for each line of the table, got {x.shape}")
    return x


def _clip_file(folder: Path, columns: dict[str, list[str]], row: int) -> np.ndarray | None:
    """The features of one clip, from a file, or from a folder with a file for each step."""
    name = columns["id"][row]
    names = [name, name.replace("$_$", "_"), name.replace("$_$", "/")]
    if "video" in columns and "clip" in columns:
        video, clip = columns["video"][row], columns["clip"][row]
        names += [f"{video}_{clip}", f"{video}/{clip}", f"{video}[{clip}]"]
    for n in dict.fromkeys(names):
        if not n or n.startswith("/") or "\0" in n or ".." in re.split(r"[/\\]", n):
            continue
        for suffix in (".npy", ".npz"):
            file = folder / f"{n}{suffix}"
            if file.is_file():
                return _single(file)
        if (folder / n).is_dir() and any(steps := sorted((folder / n).glob("*.npy"))):
            return np.stack([read_npy(s).reshape(-1) for s in steps])
    return None


def _single(file: Path) -> np.ndarray:
    if file.suffix == ".npy":
        return read_npy(file)
    archive = Archive(file)
    keys = list(archive)
    if len(keys) != 1 and "features" not in archive:
        raise ValueError(f"{file}: it must hold one array, or one called 'features'; it has {keys[:10]}")
    return archive.read("features" if "features" in archive else keys[0])


def _by_clip(
    source: Path, arrays: list[np.ndarray | None], pool: bool
) -> tuple[np.ndarray, np.ndarray | None, None, np.ndarray]:
    there = np.array([a is not None and a.size > 0 for a in arrays])
    if not there.any():
        raise ValueError(f"{source}: none of its files is called like an id of the table")
    rows: list[Any] = [a if ok else None for a, ok in zip(arrays, there, strict=True)]
    for i, a in enumerate(rows):
        if a is None:
            continue
        if a.dtype.kind not in "biuf" or a.ndim not in (1, 2):
            raise ValueError(f"{source}: the features of a clip must be [d] or [L, d], got {a.dtype} {a.shape}")
        # A video clip has many frames: their mean is taken before the clips are padded to one length.
        if pool and a.ndim == 2:
            rows[i] = a.mean(0, dtype=np.float64).astype(np.float32)
    if len({a.ndim for a in rows if a is not None}) > 1:
        rows = [a[None] if a is not None and a.ndim == 1 else a for a in rows]
    x, lengths = numbers(str(source), source.stem, rows)
    if x.ndim == 3 and lengths is None:
        lengths = np.where(there, x.shape[1], 0)
    return x, lengths, None, there
