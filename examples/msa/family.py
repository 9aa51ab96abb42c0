"""Which set a file is scored as: MOSI, MOSEI or SIMS, inferred from its path, its keys and the range of its labels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .corpus import LABEL_RANGE

_NAMES = re.compile(r"(mosei|mosi|sims)(?![a-uw-z])", re.I)
_SLACK = 1e-3
# A folder name of more words than this is a sentence, not the name of a set.
MAX_WORDS = 4


@dataclass(frozen=True)
class Family:
    """The family, what it was inferred from, and a note where that is not certain."""

    name: str
    source: str
    note: str | None = None


def family_of(path: Path, labels: np.ndarray, unimodal: bool = False, given: str | None = None) -> Family:
    """Decide on a family.

    The part of the path that is nearest to the file and names one set decides; folders whose names are whole sentences
    are ignored. Where no part of the path does, labels for each modality within [-1, 1] mean SIMS, and labels beyond
    [-1, 1] mean MOSI. Labels within [-1, 1] alone may belong to any set: then the family is ``mosi``, with a note.

    Args:
        path: The file or folder.
        labels: ``[N]``, NaN where there is none.
        unimodal: The file has labels for each modality, as SIMS has.
        given: ``--family``.

    Raises:
        ValueError: The family is unknown, or the labels leave its range.
    """
    if given is not None and given not in LABEL_RANGE:
        raise ValueError(f"{path}: family must be one of {sorted(LABEL_RANGE)}, got {given!r}")
    known = labels[~np.isnan(labels)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    small = low >= -1 - _SLACK and high <= 1 + _SLACK
    if given is not None:
        result = Family(given, "given")
    elif (named := _in_path(path)) is not None:
        result = Family(named[0], f"the path ({named[1]})")
    elif not small:
        result = Family("mosi", f"labels from {low:g} to {high:g}")
    elif unimodal and len(known):
        result = Family("sims", f"labels of each modality, and labels from {low:g} to {high:g}")
    else:
        why = f"labels from {low:g} to {high:g} may belong to any set" if len(known) else "nothing is labelled"
        result = Family("mosi", "in doubt", f"family mosi: {why}; give --family sims if they belong to SIMS")
    bottom, top = LABEL_RANGE[result.name]
    if low < bottom - _SLACK or high > top + _SLACK:
        hint = "" if given else f", which was taken from {result.source}; --family overrides it"
        raise ValueError(
            f"{path}: labels reach from {low:g} to {high:g}, outside [{bottom:g}, {top:g}] of {result.name}{hint}"
        )
    return result


def _in_path(path: Path) -> tuple[str, str] | None:
    *folders, name = path.absolute().parts
    for part in (name, *reversed(folders)):
        if part is not name and len(re.findall(r"[^\W_]+", part)) > MAX_WORDS:
            continue
        found = {m.lower() for m in _NAMES.findall(part)}
        if len(found) == 1:
            return found.pop(), part
    return None
