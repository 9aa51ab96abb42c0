"""Tables that people exchange with the systems: predictions out, labels in."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from .corpus import TRAIN, UNUSED, Corpus
from .files import write_atomic

COLUMNS = ("id", "value", "uncertainty", "missing")


def write_predictions(
    path: str | Path,
    corpus: Corpus,
    value: np.ndarray,
    uncertainty: np.ndarray | None = None,
    observed: np.ndarray | None = None,
    rows: np.ndarray | None = None,
) -> Path:
    """Write ``predictions.csv``: a row for every utterance, in the corpus's order.

    Args:
        path: File to write.
        corpus: Ids and modalities.
        value: Predicted scores, ``[N]``.
        uncertainty: Expected error of each, in units of the label, ``[N]``; the column is empty when omitted or nan.
        observed: bool ``[N, M]``: what the model could see; ``corpus.available`` when omitted. The column ``missing``
            names the others, joined by ``+``.
        rows: Write these rows only.
    """
    seen = corpus.available if observed is None else corpus.available & observed
    uncertainty = np.full(len(corpus), math.nan) if uncertainty is None else uncertainty
    lines = [
        (
            str(corpus.utterance_ids[i]),
            f"{value[i]:.6g}",
            f"{uncertainty[i]:.6g}" if math.isfinite(uncertainty[i]) else "",
            "+".join(name for name, there in zip(corpus.modalities, seen[i], strict=True) if not there),
        )
        for i in (range(len(corpus)) if rows is None else rows.tolist())
    ]
    return write_table(path, COLUMNS, lines)


def write_table(path: str | Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Write a CSV file, whole or not at all.

    Raises:
        ValueError: The path is a folder.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; name a file, such as {Path(path) / 'predictions.csv'}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return write_atomic(path, text.getvalue())


def read_labels(path: str | Path, corpus: Corpus) -> np.ndarray:
    """Read ``labels.csv`` (columns ``id`` and ``label``; others are ignored).

    Args:
        path: The file, UTF-8, with or without a byte order mark. A row with an empty label counts as unlabelled.
        corpus: The set the ids belong to.

    Returns:
        float32 ``[N]``, NaN where the file has no label.

    Raises:
        ValueError: A column is missing, an id is unknown or has two labels, a label is not a number or lies
            outside the set's range. The message names the line.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    absent = {"id", "label"} - set(reader.fieldnames or ())
    if absent:
        raise ValueError(f"{path}: it lacks the column(s) {sorted(absent)}; it has {list(reader.fieldnames or ())}")
    number = {name: i for i, name in enumerate(corpus.utterance_ids.tolist())}
    low, high = corpus.label_range
    labels = np.full(len(corpus), np.nan, dtype=np.float32)
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        name, label = row["id"], (row["label"] or "").strip()
        if name not in number:
            raise ValueError(f"{where}: {name!r} is not an utterance of {corpus.name}")
        if not label:
            continue
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not low - 1e-6 <= value <= high + 1e-6:
            raise ValueError(f"{where}: the label of {name!r} is {label!r}, expected a number in [{low:g}, {high:g}]")
        i = number[name]
        if math.isfinite(labels[i]) and labels[i] != np.float32(value):
            raise ValueError(f"{where}: {name!r} has two labels, {labels[i]:g} and {value:g}")
        labels[i] = value
    return labels


def add_labels_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--labels``."""
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.csv",
        help="labels that people gave (columns id, label), as annotate.html saves",
    )


def no_labels(corpus: Corpus) -> np.ndarray:
    """Labels of a corpus that nobody has labelled, float32 ``[N]``: NaN."""
    return np.full(len(corpus), np.nan, np.float32)


def with_labels(corpus: Corpus, given: np.ndarray) -> Corpus:
    """The corpus with labels that people gave (NaN: none), which take precedence over its own.

    Where the data themselves have no label at all, the split means nothing yet: all used rows become one train part.
    """
    notes, split = list(corpus.notes), corpus.split
    differing = int((np.isfinite(given) & corpus.labelled & (given != corpus.labels)).sum())
    if differing:
        notes.append(f"{differing} labels of the data are replaced by different ones from the labels file")
    if not corpus.labelled.any():
        used = split != UNUSED
        split = np.where(used if used.any() else True, TRAIN, UNUSED).astype(np.int8)
    labels = np.where(np.isfinite(given), given, corpus.labels).astype(np.float32)
    return replace(corpus, labels=labels, split=split, notes=tuple(notes))
