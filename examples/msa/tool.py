"""``predict`` and ``evaluate``, the same for both systems, and what their ``fit`` commands share."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import device as Device

from .command import add_device_argument, check_device
from .corpus import SPLITS, TRAIN, VALID, Corpus
from .data import add_data_arguments, load_from
from .files import write_atomic
from .metrics import REPORTED, evaluate
from .missing import KINDS, hash_uniform
from .patterns import RATES, add_test_arguments, test_patterns
from .predictions import add_labels_argument, read_labels, with_labels, write_predictions
from .report import to_json
from .saved import SavedModel, calibrated, fit_inputs, load_model, rescaled
from .tokens import hide_tokens, hide_tokens_in_training, is_token_mask, read_token_mask

# Predictions [N] and the variance of stochastic passes [N], float64, for a corpus that `fit_inputs` made.
Predictor = Callable[[Corpus], tuple[np.ndarray, np.ndarray]]
Opener = Callable[[SavedModel, Device], Predictor]
VALIDATION = 0.15


def with_validation(corpus: Corpus) -> Corpus:
    """The corpus with a validation part that has labels: where there is none, some labelled train videos become one.

    Whole videos are taken, in an order that depends on their first id alone, so that their labels come nearest to 15 %
    of all (at least one video); with a single labelled video, some of its utterances are taken. A note says so.

    Raises:
        ValueError: The train part has fewer than two labels to share between training and validation.
    """
    if len(corpus.rows("valid", labelled=True)):
        return corpus
    train = corpus.rows("train", labelled=True)
    if len(train) < 2:
        raise ValueError(
            f"{corpus.name} has {len(train)} labelled train utterance(s); training needs at least two, "
            "one of them for validation"
        )
    video = corpus.video_index
    groups = np.unique(video[train])
    unit, keys = video, corpus.utterance_ids[corpus.video_ptr[groups]]
    if len(groups) == 1:
        unit, groups, keys = np.arange(len(corpus)), train, corpus.utterance_ids[train]
    order = groups[np.argsort(hash_uniform("validation", 0, keys, 1)[:, 0], kind="stable")]
    sizes = np.cumsum([(unit[train] == g).sum() for g in order])
    count = min(int(np.argmin(np.abs(sizes - VALIDATION * len(train)))) + 1, len(order) - 1)
    chosen = np.isin(unit, order[:count]) & (corpus.split == TRAIN)
    what = "videos" if unit is video else "utterances"
    note = f"no labelled validation part: {count} of {len(order)} labelled train {what} serve as one"
    return replace(
        corpus, split=np.where(chosen, np.int8(VALID), corpus.split).astype(np.int8), notes=(*corpus.notes, note)
    )


def load_labelled(args: argparse.Namespace) -> Corpus:
    """The corpus that the options ask for, with the labels of ``--labels``."""
    corpus = load_from(args)
    return corpus if args.labels is None else with_labels(corpus, read_labels(args.labels, corpus))


@dataclass(frozen=True)
class TrainingData:
    """What ``fit`` learns from.

    Args:
        corpus: The data with tokens hidden as the options ask, possibly in several copies.
        source: The data as they are.
        origin: For each row of ``corpus`` the row of ``source`` it comes from.
        tokens: What was hidden; None where the options ask for nothing.
    """

    corpus: Corpus
    source: Corpus
    origin: np.ndarray
    tokens: dict[str, Any] | None = None


def training_data(args: argparse.Namespace, validation: bool = True) -> TrainingData:
    """The data that ``fit`` reads, with the labels of ``--labels`` and with tokens hidden as the options ask.

    Args:
        args: Parsed options of ``fit``.
        validation: Whether there must be a validation part with labels; one is made where there is none.

    Raises:
        ValueError: The options contradict each other, or the data have no sequences in which to hide tokens.
    """
    draws, mask = args.train_token_draws, args.token_mask
    prepared = with_validation if validation else lambda corpus: corpus
    source = prepared(load_labelled(args))
    if draws is None and mask is None:
        if args.keep_ends:
            raise ValueError("--keep-ends belongs to --train-token-draws")
        return TrainingData(source, source, np.arange(len(source)))
    if mask is not None and (draws is not None or args.keep_ends):
        raise ValueError("--token-mask says which tokens are hidden; leave out --train-token-draws and --keep-ends")
    pooled, args.sequences = not args.sequences, True
    whole = prepared(load_labelled(args))
    args.sequences = not pooled
    if mask is not None:
        hidden, pattern = read_token_mask(mask, whole)
        # The test part stays whole: evaluate --test-mask hides tokens there.
        used = np.isin(whole.split, (TRAIN, VALID))
        masks = {k: np.where(used[:, None], m, whole.masks[k]) for k, m in hidden.masks.items()}
        corpus = replace(hidden, masks=masks, available=np.where(used[:, None], hidden.available, whole.available))
        origin, facts = np.arange(len(whole)), pattern.as_dict()
    else:
        corpus, origin, facts = hide_tokens_in_training(whole, draws, args.seed, args.keep_ends)
    return TrainingData(corpus.pooled() if pooled else corpus, source, origin, facts)


def add_each_metric_argument(parser: argparse.ArgumentParser) -> None:
    """Option of ``fit``: a model for each metric in addition to the one chosen by absolute error."""
    parser.add_argument(
        "--each-metric",
        action="store_true",
        help="also save the weights that were best in each metric on held-out labels, as OUT/by_metric/NAME",
    )


def say_notes(corpus: Corpus) -> None:
    """Print the notes of a corpus on stderr: what a person must know about how the data were read."""
    for note in corpus.notes:
        print(f"note: {note}", file=sys.stderr)


def add_model_arguments(parser: argparse.ArgumentParser, pairs: str) -> None:
    """Options of a saved model and the data it is to read."""
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="folder that fit wrote")
    add_device_argument(parser)
    add_data_arguments(parser, pairs)


def open_saved(args: argparse.Namespace, system: str, opener: Opener) -> tuple[SavedModel, Predictor, Corpus]:
    """The model, the function that predicts with it, and the data as the model reads them."""
    device = check_device(args.device)
    model = load_model(args.model, system)
    args.sequences = model.card["sequences"]
    corpus = load_from(args)
    if getattr(args, "labels", None) is not None:
        given = read_labels(args.labels, corpus)
        corpus = replace(corpus, labels=np.where(np.isfinite(given), given, corpus.labels).astype(np.float32))
    predictor = opener(model, device)
    if corpus.sequences and not model.card["sequences"]:
        corpus = corpus.pooled()
    return model, predictor, fit_inputs(corpus, model)


def predict_arguments(pairs: str) -> Callable[[argparse.ArgumentParser], None]:
    """Adds the options of ``predict``."""

    def add(parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser, pairs)
        parser.add_argument(
            "--out", type=Path, default=Path("predictions.csv"), metavar="FILE.csv", help="(%(default)s)"
        )

    return add


def predict_command(system: str, opener: Opener) -> Callable[[argparse.Namespace], int]:
    """``predict``: a row for every utterance of every split, also for those that lack modalities."""

    def run(args: argparse.Namespace) -> int:
        if args.out.is_dir():
            raise ValueError(f"--out {args.out} is a folder; name a file, such as {args.out / 'predictions.csv'}")
        model, predictor, corpus = open_saved(args, system, opener)
        value, variance = predictor(corpus)
        path = write_predictions(args.out, corpus, value, calibrated(variance, model.card["calibration"]))
        say_notes(corpus)
        print(f"predictions: {path} ({len(corpus)} utterances)")
        return 0

    return run


def evaluate_arguments(pairs: str) -> Callable[[argparse.ArgumentParser], None]:
    """Adds the options of ``evaluate``."""

    def add(parser: argparse.ArgumentParser) -> None:
        add_model_arguments(parser, pairs)
        add_labels_argument(parser)
        add_test_arguments(parser)
        parser.add_argument(
            "--pattern",
            choices=[k for k in KINDS if k != "fixed"],
            default="exact",
            help="kind of pattern for --test-rates (%(default)s)",
        )
        parser.add_argument(
            "--test-token-rates",
            type=float,
            nargs="*",
            metavar="R",
            help="also test with this share of the tokens of every modality hidden, where the data have sequences "
            "(0 0.1 … 0.9)",
        )
        parser.add_argument(
            "--keep-ends",
            nargs="+",
            default=[],
            metavar="MODALITY",
            help="with --test-token-rates: modalities whose first and last token stay",
        )
        parser.add_argument("--seed", type=int, default=0, help="for --test-rates, --test-token-rates (%(default)s)")
        parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write every number here")

    return add


def evaluate_command(system: str, opener: Opener) -> Callable[[argparse.Namespace], int]:
    """``evaluate``: scores of a saved model on the labelled utterances of each part, under every requested pattern."""

    def run(args: argparse.Namespace) -> int:
        model, predictor, corpus = open_saved(args, system, opener)
        parts = [part for part in SPLITS if len(corpus.rows(part, labelled=True))]
        if not parts:
            raise ValueError(f"{corpus.name} has no labelled utterance to score")
        if corpus.family != model.card["family"]:
            note = f"fitted on {model.card['family']}, scored as {corpus.family}: rescaled to its label range"
            corpus = replace(corpus, notes=(*corpus.notes, note))
        say_notes(corpus)
        results = []
        token_masks = [file for file in args.test_mask if is_token_mask(file)]
        args.test_mask = [file for file in args.test_mask if file not in token_masks]
        hidden = [
            (pattern.as_dict(), replace(corpus, available=pattern.observed))
            for pattern in test_patterns(corpus, args, args.pattern, args.seed)
        ]
        for facts, seen in itertools.chain(hidden, _token_tests(args, model, token_masks)):
            value, _ = predictor(seen)
            scores = score_parts(rescaled(value, model.card["family"], corpus.family), corpus, parts)
            results.append({**facts, "scores": scores})
            for part in parts:
                print(f"{facts['name']:20} {part:6} {_line(scores[part], corpus.family)}")
        if args.out:
            content = {"model": str(args.model), "fitted_on": model.card["data"], "data": corpus.describe()}
            write_atomic(args.out, to_json({**content, "patterns": results}))
            print(f"numbers: {args.out}")
        return 0

    return run


def _token_tests(
    args: argparse.Namespace, model: SavedModel, masks: list[Path]
) -> Iterator[tuple[dict[str, Any], Corpus]]:
    """The data with tokens hidden, at each rate and by each file; pooled afterwards where the model reads means."""
    if args.test_token_rates is None and not masks:
        return
    args.sequences = True
    source = load_from(args)

    def seen(hidden: Corpus) -> Corpus:
        return fit_inputs(hidden if model.card["sequences"] else hidden.pooled(), model)

    for rate in [] if args.test_token_rates is None else args.test_token_rates or RATES:
        hidden, pattern = hide_tokens(source, rate, args.seed, args.keep_ends)
        yield {"name": f"tokens {rate:g}", "missing": pattern.as_dict()}, seen(hidden)
    for file in masks:
        hidden, pattern = read_token_mask(file, source)
        yield {"name": f"mask {file.stem}", "missing": pattern.as_dict()}, seen(hidden)


def score_parts(value: np.ndarray, corpus: Corpus, parts: list[str]) -> dict[str, dict[str, Any]]:
    """All metrics of the labelled utterances of each part."""
    result = {}
    for part in parts:
        rows = corpus.rows(part, labelled=True)
        result[part] = evaluate(value[rows].astype(np.float64), corpus.labels[rows].astype(np.float64), corpus.family)
    return result


def _line(scores: dict[str, Any], family: str) -> str:
    return f"n {scores['n']:5d}  " + "  ".join(f"{m} {scores[m]:.3f}" for m in REPORTED[family])
