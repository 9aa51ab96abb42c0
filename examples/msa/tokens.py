"""Hidden tokens: "random data missing" of LNLN and its successors, in training and in tests, drawn or from a file.

The protocol as LNLN's released code has it (https://github.com/Haoyu-ha/LNLN, core/dataset.py, train.py and
robust_evaluation.py); P-RMF and SemMSA (arXiv 2609.30238) state the same one:

- training: in every epoch each modality of an utterance stays whole with chance one half, and otherwise loses each of
  its tokens with a chance that is drawn uniformly from [0, 1] for this utterance and modality;
- validation: every token is hidden with chance .5;
- test: with chance 0, .1, … .9, one after the other; text keeps its first and last token; three seeds, 1111 to 1113;
- a checkpoint for each metric. The released code chooses them on the test part; these systems, on the validation part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import SPLITS, TRAIN, VALID, Corpus
from .files import write_atomic
from .missing import hash_uniform

KIND = "tokens"
VALIDATION_RATE = 0.5


@dataclass(frozen=True)
class TokenPattern:
    """What was hidden, stored with every result.

    Args:
        rate: Chance that a token is hidden.
        realised: Share that is hidden.
        seed: Seed of the draw.
        keep_ends: Modalities whose first and last token stay.
        sha256: Hash of the hidden tokens' positions by utterance and modality, equal for reordered rows.
    """

    rate: float
    realised: float
    seed: int
    keep_ends: tuple[str, ...]
    sha256: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": KIND, **vars(self)}


def hide_tokens(
    corpus: Corpus, rate: float, seed: int = 0, keep_ends: Sequence[str] = ()
) -> tuple[Corpus, TokenPattern]:
    """Hide single tokens of every modality, each with chance ``rate``.

    A modality whose tokens are all hidden is missing in that utterance. For one seed, a higher rate hides everything
    that a lower rate hides. Tokens that the source has encoded in context may still carry information about hidden
    ones; LNLN hides words before its text encoder reads them.

    Args:
        corpus: Sequences.
        rate: Chance that a token is hidden, in [0, 1].
        seed: Seed of the draw.
        keep_ends: Modalities whose first and last token stay, as LNLN keeps those that frame a text.

    Returns:
        The corpus with fewer valid tokens, and the facts to store.

    Raises:
        ValueError: The corpus has no sequences, the rate is out of range, or a name is not a modality.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"hide_tokens: rate must lie in [0, 1], got {rate}")
    hidden = _hidden(corpus, [np.full(len(corpus), rate)] * len(corpus.modalities), f"{seed}", keep_ends)
    return _without(corpus, hidden), _pattern(corpus, hidden, rate, seed, keep_ends)


def _require_sequences(corpus: Corpus, keep_ends: Sequence[str]) -> None:
    if not corpus.sequences:
        raise ValueError(f"hide_tokens: {corpus.name} has one vector per utterance, and no tokens to hide")
    unknown = [name for name in keep_ends if name not in corpus.masks]
    if unknown:
        raise ValueError(f"hide_tokens: {corpus.name} has no modality {unknown}; it has {list(corpus.masks)}")


def _hidden(corpus: Corpus, rates: Sequence[np.ndarray], draw: str, keep_ends: Sequence[str]) -> dict[str, np.ndarray]:
    """Valid tokens to hide, bool ``[N, L_m]`` by modality, from rates ``[N]`` for each modality."""
    _require_sequences(corpus, keep_ends)
    hidden = {}
    for rate, (name, mask) in zip(rates, corpus.masks.items(), strict=True):
        chance = hash_uniform(f"tokens {name} {draw}", 0, corpus.utterance_ids, mask.shape[1])
        hidden[name] = mask & (chance < rate[:, None])
        if name in keep_ends:
            rank = np.cumsum(mask, 1)
            hidden[name] &= (rank > 1) & (rank < rank[:, -1:])
    return hidden


def _without(corpus: Corpus, hidden: dict[str, np.ndarray]) -> Corpus:
    masks = {name: mask & ~hidden[name] for name, mask in corpus.masks.items()}
    left = np.stack([mask.any(1) for mask in masks.values()], 1)
    return replace(corpus, masks=masks, available=corpus.available & left)


def _table(corpus: Corpus, hidden: dict[str, np.ndarray]) -> dict[str, list[list[int]]]:
    """For each utterance and modality the numbers of the hidden tokens among the valid ones: padding does not count."""
    table: dict[str, list[list[int]]] = {str(i): [] for i in corpus.utterance_ids.tolist()}
    for name, mask in corpus.masks.items():
        number = np.cumsum(mask, 1) - 1
        for utterance, row, gone in zip(table, number, hidden[name], strict=True):
            table[utterance].append(row[gone].tolist())
    return table


def _sha256(table: dict[str, list[list[int]]], modalities: Sequence[str]) -> str:
    order = np.argsort(modalities)
    rows = [[key, *(table[key][m] for m in order)] for key in sorted(table)]
    return hashlib.sha256(json.dumps([sorted(modalities), rows]).encode()).hexdigest()


def _pattern(
    corpus: Corpus, hidden: dict[str, np.ndarray], rate: float, seed: int, keep_ends: Sequence[str]
) -> TokenPattern:
    valid = sum(int(mask[corpus.available[:, m]].sum()) for m, mask in enumerate(corpus.masks.values()))
    gone = sum(int(hidden[k][corpus.available[:, m]].sum()) for m, k in enumerate(corpus.masks))
    digest = _sha256(_table(corpus, hidden), corpus.modalities)
    return TokenPattern(float(rate), gone / max(1, valid), seed, tuple(keep_ends), digest)


def write_token_mask(
    path: str | Path, corpus: Corpus, rate: float, seed: int, keep_ends: Sequence[str]
) -> TokenPattern:
    """Draw hidden tokens and write them as JSON, a line for each utterance: the hidden tokens' numbers by modality.

    Raises:
        ValueError: As :func:`hide_tokens`.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"--rate must lie in [0, 1], got {rate}")
    hidden = _hidden(corpus, [np.full(len(corpus), rate)] * len(corpus.modalities), f"{seed}", keep_ends)
    pattern = _pattern(corpus, hidden, rate, seed, keep_ends)
    head = {**pattern.as_dict(), "modalities": list(corpus.modalities)}
    rows = _table(corpus, hidden).items()
    lines = ",\n".join(f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(row)}" for name, row in rows)
    write_atomic(path, json.dumps(head, ensure_ascii=False, indent=1)[:-2] + f',\n "hidden": {{\n{lines}\n }}\n}}\n')
    return pattern


def is_token_mask(path: str | Path) -> bool:
    """Whether a file states that it hides tokens."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND


def read_token_mask(path: str | Path, corpus: Corpus) -> tuple[Corpus, TokenPattern]:
    """The corpus without the tokens that a file of :func:`write_token_mask` hides, for utterances in any order.

    Raises:
        ValueError: The file is damaged or was changed by hand, or does not fit the corpus.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names, table = [str(name) for name in content["modalities"]], content["hidden"]
        facts = {key: content[key] for key in ("rate", "realised", "seed", "keep_ends", "sha256")}
        numbers = [i for row in table.values() for part in row for i in part]
        whole = all(len(row) == len(names) for row in table.values()) and all(type(i) is int for i in numbers)
        digest = _sha256(table, names) if whole else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a file of hidden tokens ({type(error).__name__}: {error})") from None
    if digest != facts["sha256"]:
        raise ValueError(f"{path}: its tokens do not have the hash it states; the file was changed")
    _require_sequences(corpus, ())
    if sorted(names) != sorted(corpus.modalities):
        raise ValueError(f"{path}: hides tokens of {names}, but {corpus.name} has {list(corpus.modalities)}")
    unknown = [str(i) for i in corpus.utterance_ids.tolist() if i not in table]
    if unknown:
        raise ValueError(f"{path}: it does not list {len(unknown)} utterances of {corpus.name}, first {unknown[0]!r}")
    hidden = {}
    for name, mask in corpus.masks.items():
        number, column = np.where(mask, np.cumsum(mask, 1) - 1, -1), names.index(name)
        hidden[name] = np.zeros_like(mask)
        for row, utterance in enumerate(corpus.utterance_ids.tolist()):
            wanted = table[utterance][column]
            hidden[name][row] = np.isin(number[row], wanted)
            if int(hidden[name][row].sum()) != len(wanted):
                raise ValueError(f"{path}: {utterance!r} of {corpus.name} has no token of {name} that it hides")
    return _without(corpus, hidden), TokenPattern(**{**facts, "keep_ends": tuple(facts["keep_ends"])})


def hide_tokens_in_training(
    corpus: Corpus, draws: int, seed: int = 0, keep_ends: Sequence[str] = ()
) -> tuple[Corpus, np.ndarray, dict[str, Any]]:
    """Training data under LNLN's protocol: ``draws`` copies of the train part, each with different tokens hidden.

    LNLN draws anew in every epoch. Here an epoch over ``draws`` copies stands for that many of its epochs, which leaves
    the training loops as they are. In the validation part tokens are hidden once, with chance .5; the test part stays
    whole, because :func:`hide_tokens` hides there what a test asks for.

    Args:
        corpus: Sequences.
        draws: Copies of the train part, at least 1; copies have ids of their own.
        seed: Seed of the draws.
        keep_ends: Modalities whose first and last token stay.

    Returns:
        The corpus, for each of its rows the row of the given corpus that it comes from, and the facts to store: kind,
        draws, realised share of each part, seed, keep_ends.

    Raises:
        ValueError: ``draws`` is below 1, the corpus has no sequences, or a name is not a modality.
    """
    if draws < 1:
        raise ValueError(f"--train-token-draws must be at least 1, got {draws}")
    _require_sequences(corpus, keep_ends)
    train = corpus.split == TRAIN
    copies, realised = [], {}
    for draw in range(draws):
        rates = []
        for name in corpus.modalities:
            chance = hash_uniform(f"token rates {name} draw {draw}", seed, corpus.utterance_ids, 2)
            lossy = np.where(chance[:, 0] < 0.5, chance[:, 1], 0.0)
            rates.append(np.where(train, lossy, np.where(corpus.split == VALID, VALIDATION_RATE, 0.0)))
        hidden = _hidden(corpus, rates, f"{seed} draw {draw}", keep_ends)
        if draw == 0:
            realised = {p: _share(corpus, hidden, corpus.split == SPLITS[p]) for p in ("train", "valid")}
        part = _without(corpus, hidden)
        copies.append(part if draw == 0 else _renamed(_only_train(part), f" draw {draw + 1}"))
    taught = np.flatnonzero(np.isin(corpus.video_index, corpus.video_index[train]))
    origin = np.concatenate([np.arange(len(corpus)), *[taught] * (draws - 1)])
    facts = {"kind": "tokens in training", "draws": draws, "realised": realised, "seed": seed}
    return _joined(copies), origin, {**facts, "keep_ends": list(keep_ends)}


def _share(corpus: Corpus, hidden: dict[str, np.ndarray], rows: np.ndarray) -> float:
    valid = sum(int(mask[rows & corpus.available[:, m]].sum()) for m, mask in enumerate(corpus.masks.values()))
    gone = sum(int(hidden[k][rows & corpus.available[:, m]].sum()) for m, k in enumerate(corpus.masks))
    return gone / max(1, valid)


def _only_train(corpus: Corpus) -> Corpus:
    """The videos that have train utterances; their other utterances belong to no part."""
    part = corpus.keep_videos(np.unique(corpus.video_index[corpus.split == TRAIN]))
    return replace(part, split=np.where(part.split == TRAIN, part.split, np.int8(-1)).astype(np.int8))


def _renamed(corpus: Corpus, ending: str) -> Corpus:
    ids = np.array([f"{i}{ending}" for i in corpus.utterance_ids.tolist()])
    videos = None if corpus.videos is None else np.array([f"{v}{ending}" for v in corpus.videos.tolist()])
    return replace(corpus, utterance_ids=ids, videos=videos)


def _joined(parts: Sequence[Corpus]) -> Corpus:
    """One corpus of the videos of all parts."""
    first = parts[0]

    def rows(take: Any) -> Any:
        arrays = [take(part) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays)

    lengths = np.concatenate([np.diff(part.video_ptr) for part in parts])
    return replace(
        first,
        features={name: rows(lambda part, name=name: part.features[name]) for name in first.features},
        masks={name: rows(lambda part, name=name: part.masks[name]) for name in first.masks},
        video_ptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        **{
            key: rows(lambda part, key=key: getattr(part, key))
            for key in ("labels", "split", "utterance_ids", "available", "clips", "transcripts", "media", "videos")
        },
    )


def add_token_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fit``: which tokens are hidden in training and validation."""
    group = parser.add_argument_group("hidden tokens, where the data have sequences")
    group.add_argument(
        "--train-token-draws",
        type=int,
        metavar="K",
        help="hide tokens in training and validation as LNLN does, in K draws that each hide different ones",
    )
    group.add_argument(
        "--token-mask", type=Path, metavar="FILE.json", help="hide what this file of `mask --tokens` lists"
    )
    group.add_argument(
        "--keep-ends", nargs="+", default=[], metavar="MODALITY", help="modalities whose first and last token stay"
    )
