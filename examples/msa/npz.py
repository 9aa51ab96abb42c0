"""The project's two array files: CMU-MOSI at utterance level and ICT-MMMO as word sequences."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from .corpus import TRAIN, UNUSED, VALID, Corpus

MOSI_SPLITS = {"official": "split", "bclstm": "split_bclstm", "clean752": "split_clean752"}
# Activations of networks trained on labels of official test rows: allowed only where those rows are no test rows.
LEAKING = ("text_cnn_bclstm", "video")
MOSI_BLOCKS = ("text_minilm", "text_cnn_bclstm", "audio", "video")
DEFAULT_BLOCKS = {
    "official": ("text_minilm", "audio"),
    "bclstm": ("text_cnn_bclstm", "audio", "video"),
    "clean752": ("text_minilm", "audio", "video"),
}


def load_npz(
    path: str | Path, split: str = "official", blocks: tuple[str, ...] | None = None, pooled: bool = True
) -> Corpus:
    """Load ``mosi.npz`` or ``mmmo_seq.npz``, told apart by their keys.

    Args:
        path: The file.
        split: MOSI only: ``"official"``, ``"bclstm"`` or ``"clean752"``; rows the split does not use are dropped.
            ``bclstm`` has no validation part, so every seventh of its train videos becomes one.
        blocks: MOSI only: feature blocks, at most one of them text; by default text and audio for the official split,
            and all three modalities for the others.
        pooled: ICT-MMMO only: masked means over time instead of sequences.

    Returns:
        The corpus; modalities are called ``text``, ``audio`` and ``vision``.

    Raises:
        ValueError: The file is corrupt, lacks a key, or the blocks leak labels into the split.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    arrays = _read(path)
    if "text_present" in arrays:
        if split != "official" or blocks is not None:
            raise ValueError(f"{path}: this file has one split and no choice of blocks; leave split and blocks out")
        return _mmmo(path, arrays, pooled)
    return _mosi(path, arrays, split, blocks)


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as e:
        raise ValueError(f"{path}: not a readable .npz of plain arrays ({e})") from e


def _get(path: Path, arrays: dict[str, np.ndarray], key: str, rows: int | None = None) -> np.ndarray:
    if key not in arrays:
        raise ValueError(f"{path}: it lacks the key {key!r}; it has {sorted(arrays)}")
    array = arrays[key]
    if rows is not None and len(array) != rows:
        raise ValueError(f"{path}: {key!r} has {len(array)} rows, expected {rows}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{path}: {key!r} holds {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def _mosi(path: Path, arrays: dict[str, np.ndarray], split_name: str, blocks: tuple[str, ...] | None) -> Corpus:
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
    label = _get(path, arrays, "label")
    n = len(label)
    split = _get(path, arrays, MOSI_SPLITS[split_name], n).astype(np.int8)
    video = _get(path, arrays, "video_index", n)
    notes = [f"split {split_name}, blocks {', '.join(blocks)}"]
    if split_name == "bclstm":
        train_videos = np.unique(video[split == TRAIN])
        split = np.where(np.isin(video, train_videos[::7]), np.int8(VALID), split)
        notes.append("every seventh train video serves as validation")
    rows = np.flatnonzero(split != UNUSED)
    order = rows[np.lexsort((_get(path, arrays, "clip_id", n)[rows], video[rows]))]
    return Corpus(
        name=f"CMU-MOSI ({split_name})",
        family="mosi",
        features={names[b]: _get(path, arrays, b, n)[order].astype(np.float32) for b in blocks},
        labels=label[order].astype(np.float32),
        split=split[order],
        video_ptr=group_offsets(video[order]),
        utterance_ids=_get(path, arrays, "utt_id", n)[order],
        notes=tuple(notes),
    )


def _mmmo(path: Path, arrays: dict[str, np.ndarray], pooled: bool) -> Corpus:
    label = _get(path, arrays, "label")
    n = len(label)
    x = {
        name: _get(path, arrays, key, n).astype(np.float32)
        for name, key in (("text", "text"), ("audio", "audio"), ("vision", "video"))
    }
    # All-zero audio steps are padding; vision has zero steps inside sequences too, so audio decides for all.
    mask = (x["audio"] != 0).any(-1)
    present = np.ones((n, 3), dtype=bool)
    present[:, 0] = _get(path, arrays, "text_present", n)
    corpus = Corpus(
        name="ICT-MMMO",
        family="mosi",
        features=x,
        labels=(label - 3).astype(np.float32),
        split=_get(path, arrays, "split", n).astype(np.int8),
        video_ptr=np.arange(n + 1),
        utterance_ids=np.array([f"mmmo_{i:03d}" for i in range(n)]),
        masks={name: mask for name in x},
        available=present,
        aligned=True,
        notes=("labels 1 to 5 are shifted by -3", "each row is a whole video: there are no neighbours"),
    )
    return corpus.pooled() if pooled else corpus


def group_offsets(group: np.ndarray) -> np.ndarray:
    """Offsets ``[V + 1]`` of runs of equal values, int64."""
    changes = np.flatnonzero(group[1:] != group[:-1]) + 1
    return np.concatenate([[0], changes, [len(group)]]).astype(np.int64)
