"""What a model may see at test time: named patterns of missing modalities, and masks as files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import Corpus
from .files import write_atomic
from .missing import KINDS, MissingPattern, mask_sha256, missing_mask, rate_limit

AS_GIVEN = "as given"
RATES = tuple(round(0.1 * i, 1) for i in range(10))


@dataclass(frozen=True)
class TestPattern:
    """A name, the observed entries ``[N, M]``, and the facts to store; no facts for the data as they are."""

    # Not a test, whatever pytest makes of the name.
    __test__ = False

    name: str
    observed: np.ndarray
    facts: MissingPattern | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "missing": self.facts.as_dict() if self.facts else None}


def subsets(modalities: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Every non-empty subset of the modalities, smaller ones first.

    Example:
        >>> ["+".join(s) for s in subsets(["text", "audio"])]
        ['text', 'audio', 'text+audio']
    """
    for size in range(1, len(modalities) + 1):
        yield from combinations(modalities, size)


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`test_patterns` reads."""
    group = parser.add_argument_group("missing modalities at test time")
    group.add_argument("--test-subsets", action="store_true", help="also test on each non-empty subset of modalities")
    group.add_argument(
        "--test-rates",
        type=float,
        nargs="*",
        metavar="R",
        help="also test with this share of entries hidden, modality by modality (0 0.1 … while each clip keeps one)",
    )
    group.add_argument(
        "--test-mask", type=Path, nargs="+", default=[], metavar="FILE.json", help="also test under these masks"
    )


def test_patterns(corpus: Corpus, args: argparse.Namespace, kind: str, seed: int) -> list[TestPattern]:
    """The patterns that the options ask for, the data as they are first.

    Args:
        corpus: The data that is tested on.
        args: Options of :func:`add_test_arguments`.
        kind: Kind of pattern for ``--test-rates``.
        seed: Seed of the patterns of ``--test-rates``.

    Raises:
        ValueError: A rate is not possible, or a mask does not fit the data.
    """
    found = [TestPattern(AS_GIVEN, corpus.available)]
    if args.test_subsets:
        for names in subsets(corpus.modalities):
            observed, facts = missing_mask(corpus, "fixed", keep=names, keep_one=False)
            found.append(TestPattern("only " + "+".join(names), observed, facts))
    if args.test_rates is not None:
        for rate in args.test_rates or possible_rates(corpus):
            observed, facts = missing_mask(corpus, kind, rate, seed)
            found.append(TestPattern(f"{kind} {rate:g}", observed, facts))
    for file in args.test_mask:
        observed, facts = read_mask(file, corpus)
        found.append(TestPattern(f"mask {file.stem}", observed, facts))
    return found


# Test modules import this function, but it is not a test.
test_patterns.__test__ = False  # type: ignore[attr-defined]


def possible_rates(corpus: Corpus) -> list[float]:
    """The rates among 0, .1, … .9 that leave each utterance a modality."""
    limit = rate_limit(corpus.available)
    return [rate for rate in RATES if rate <= limit + 1e-9]


def write_mask(path: str | Path, corpus: Corpus, observed: np.ndarray, pattern: MissingPattern) -> Path:
    """Write a mask as JSON: the pattern's facts, the modalities, and per utterance a 1 for each that is observed.

    The hash in the file is that of the mask and its ids in sorted order, so that copies under other names are
    recognised.
    """
    rows = {
        str(name): row for name, row in zip(corpus.utterance_ids.tolist(), observed.astype(int).tolist(), strict=True)
    }
    head = {**pattern.as_dict(), "modalities": list(corpus.modalities)}
    # A line for each utterance, so that masks can be compared with text tools.
    lines = ",\n".join(f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(row)}" for name, row in rows.items())
    text = json.dumps(head, ensure_ascii=False, indent=1)[:-2] + f',\n "observed": {{\n{lines}\n }}\n}}\n'
    return write_atomic(path, text)


def read_mask(path: str | Path, corpus: Corpus) -> tuple[np.ndarray, MissingPattern]:
    """Read what :func:`write_mask` wrote, for the same utterances in any order.

    Returns:
        Observed entries of the corpus, bool ``[N, M]``, and the pattern, with the realised share of this corpus.

    Raises:
        ValueError: The file is damaged or was changed by hand, or does not fit the corpus: other modalities, an
            utterance it does not list, or an entry it calls observed that the data lack.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("kind") == "tokens":
            raise ValueError("it hides tokens, which fit --token-mask and evaluate --test-mask read")
        names, table = content["modalities"], content["observed"]
        mask = np.array(list(table.values()), dtype=np.int64)
        facts = {key: content[key] for key in ("kind", "rate", "seed", "keep", "sha256")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a mask file of these systems ({type(error).__name__}: {error})") from None
    if mask.ndim != 2 or mask.shape[1] != len(names) or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"{path}: every utterance needs {len(names)} numbers, 0 or 1")
    ids = np.array(list(table), dtype=str)
    if mask_sha256(mask.astype(bool), ids) != facts["sha256"]:
        raise ValueError(f"{path}: its mask does not have the hash it states; the file was changed")
    if sorted(names) != sorted(corpus.modalities):
        raise ValueError(f"{path}: a mask for {names}, but {corpus.name} has {list(corpus.modalities)}")
    unknown = [str(i) for i in corpus.utterance_ids.tolist() if i not in table]
    if unknown:
        raise ValueError(f"{path}: it does not list {len(unknown)} utterances of {corpus.name}, first {unknown[0]!r}")
    columns = [names.index(name) for name in corpus.modalities]
    row = {name: i for i, name in enumerate(ids.tolist())}
    observed = mask[[row[i] for i in corpus.utterance_ids.tolist()]][:, columns].astype(bool)
    wrong = observed & ~corpus.available
    if wrong.any():
        i = int(np.flatnonzero(wrong.any(1))[0])
        raise ValueError(
            f"{path}: it calls {int(wrong.sum())} entries observed that {corpus.name} lacks, first in "
            f"{str(corpus.utterance_ids[i])!r}"
        )
    realised = float(1 - observed.sum() / max(1, corpus.available.sum()))
    keep = tuple(facts.pop("keep"))
    if facts["kind"] not in KINDS:
        raise ValueError(f"{path}: kind must be one of {list(KINDS)}, got {facts['kind']!r}")
    return observed, MissingPattern(**facts, realised=realised, keep=keep)
