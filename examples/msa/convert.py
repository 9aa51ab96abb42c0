"""Writing a corpus to disk: as an open folder, or as one ``.npz`` with the documented keys."""

from __future__ import annotations

import csv
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np

from .corpus import SPLITS, Corpus
from .files import write_atomic
from .folder import FACTS
from .report import to_json

SPLIT_NAMES = {number: name for name, number in SPLITS.items()}


def convert(corpus: Corpus, out: str | Path) -> Path:
    """Write a corpus so that :func:`examples.msa.data.load` reads the same one back.

    Args:
        corpus: What to write.
        out: A path that ends in ``.npz``, or a folder that does not exist yet or is empty.

    Returns:
        The path.

    Raises:
        ValueError: The folder is not empty, or the path is that of another kind of file.
    """
    out = Path(out)
    if out.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays(corpus))
        return write_atomic(out, buffer.getvalue())
    if out.suffix in (".pkl", ".pt", ".csv", ".npy", ".h5", ".json"):
        raise ValueError(f"{out}: only a folder or a file that ends in .npz is written")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: it already exists; name a new folder, or a file that ends in .npz")
    out.parent.mkdir(parents=True, exist_ok=True)
    # The folder appears whole or not at all.
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        _write_folder(corpus, temporary)
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return out


def arrays(corpus: Corpus) -> dict[str, np.ndarray]:
    """The corpus under the keys that :mod:`examples.msa.npz` documents."""
    result: dict[str, np.ndarray] = dict(corpus.features)
    result |= {f"{m}_mask": mask for m, mask in corpus.masks.items()}
    for column, m in enumerate(corpus.modalities):
        if not corpus.available[:, column].all():
            result[f"{m}_present"] = corpus.available[:, column]
    result |= {"label": corpus.labels, "split": corpus.split, "utt_id": corpus.utterance_ids}
    result["video_index"] = corpus.video_index
    if corpus.videos is not None:
        result["video_id"] = corpus.videos.astype(str)
    if corpus.clips is not None:
        result["clip_id"] = corpus.clips
    if corpus.transcripts is not None:
        result["transcript"] = corpus.transcripts.astype(str)
    if corpus.media is not None:
        result["media"] = corpus.media.astype(str)
    result["family"] = np.array(corpus.family)
    result["aligned"] = np.array(corpus.aligned)
    result["notes"] = np.array(corpus.notes, dtype=str)
    return result


def _write_folder(corpus: Corpus, out: Path) -> None:
    columns: dict[str, list] = {"id": corpus.utterance_ids.tolist()}
    names = [f"video {v}" for v in range(len(corpus.video_ptr) - 1)] if corpus.videos is None else corpus.videos
    columns["video"] = [names[v] for v in corpus.video_index]
    columns["clip"] = corpus.positions.tolist()
    columns["split"] = [SPLIT_NAMES.get(s, "unused") for s in corpus.split.tolist()]
    columns["label"] = ["" if np.isnan(y) else str(y) for y in corpus.labels]
    for name in ("transcript", "media"):
        column = {"transcript": corpus.transcripts, "media": corpus.media}[name]
        if column is not None:
            columns[name] = column.tolist()
    with (out / "clips.csv").open("w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    for column_number, (m, x) in enumerate(corpus.features.items()):
        there = corpus.available[:, column_number]
        if m in corpus.masks or not there.all():
            mask = {"mask": corpus.masks[m]} if m in corpus.masks else {}
            np.savez(out / f"{m}.npz", features=x, present=there, **mask)
        else:
            np.save(out / f"{m}.npy", x)
    (out / FACTS).write_text(
        to_json({"family": corpus.family, "aligned": corpus.aligned, "notes": corpus.notes}), encoding="utf-8"
    )
