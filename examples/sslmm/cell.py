"""One cell of the grid: a method under one missing pattern, one set of labels and one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.msa.baselines import fill, fit_boosting, fit_mlp
from examples.msa.closed_form import Design
from examples.msa.corpus import TEST, VALID, Corpus
from examples.msa.metrics import evaluate
from examples.msa.missing import MissingPattern, label_mask, missing_mask
from examples.msa.patterns import TestPattern, write_mask
from examples.msa.predictions import write_predictions
from examples.msa.saved import calibrate, calibrated

from .closed import BOOSTING, RIDGES, blend, fit_ridge_named, labelled_rows
from .config import ABLATIONS, Config, ablated
from .predict import predict_corpus
from .train import Trainer

BASELINES = {"mean-filled MLP": "mean", "zero-filled MLP": "zero"}
METHODS = (*ABLATIONS, *BASELINES, *RIDGES, BOOSTING)
FROM_FILE = "mask"


@dataclass(frozen=True)
class Cell:
    """One run: everything that distinguishes it from the others.

    Args:
        method: One of ``METHODS``.
        rate: Missing rate in training and test; for the patterns ``fixed`` and ``mask`` the share that is hidden.
        share: Labelled share.
        seed: Seed of masks, labels and training.
        pattern: Kind of missing pattern, or ``mask`` for one read from a file.
        label_unit: What keeps or loses its labels as a whole: ``utterance`` or ``video``.
        keep: Modalities that stay, for ``fixed``.
    """

    method: str
    rate: float
    share: float
    seed: int
    pattern: str = "exact"
    label_unit: str = "utterance"
    keep: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """A file name."""
        method = self.method.replace(",", "").replace(" ", "-")
        return f"{method}_missing{self.rate:g}_labels{self.share:g}_{self.pattern_id}_{self.label_unit}_seed{self.seed}"

    @property
    def pattern_id(self) -> str:
        """The pattern as part of a file name."""
        return "-".join((self.pattern, *self.keep))


@dataclass(frozen=True)
class Tests:
    """What is read and written besides a cell's scores.

    Args:
        patterns: Missing patterns of further tests of the trained model.
        mask: Observed entries ``[N, M]`` and their facts, for cells whose pattern is ``mask``.
        predictions: Folder for the predictions of the test part; none are written when omitted.
        masks: Folder for the masks; none are written when omitted.
    """

    # Not a test, whatever pytest makes of the name.
    __test__ = False

    patterns: Sequence[TestPattern] = ()
    mask: tuple[np.ndarray, MissingPattern] | None = None
    predictions: Path | None = None
    masks: Path | None = None


def mask_of(corpus: Corpus, cell: Cell, tests: Tests) -> tuple[np.ndarray, MissingPattern]:
    """Observed entries and pattern of a cell."""
    if cell.pattern == FROM_FILE:
        if tests.mask is None:
            raise ValueError(f"cell {cell.id}: its pattern is read from a file, but there is none")
        return tests.mask
    return missing_mask(corpus, cell.pattern, cell.rate, cell.seed, cell.keep)


def run_cell(
    corpus: Corpus,
    cell: Cell,
    config: Config,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    resume: bool = False,
    tests: Tests | None = None,
) -> dict[str, Any]:
    """Train and test one method under one missing pattern and one label mask; all methods of a seed share both.

    Args:
        corpus: Pooled features, not standardised.
        cell: What to run.
        config: The whole system's configuration; the method leaves parts of it out.
        device: Where to train.
        checkpoint: Where the run keeps its state.
        resume: Go on from that state.
        tests: Further tests, and what is written besides.

    Returns:
        The cell, metrics of the test and validation parts, the missing pattern, the label facts, and facts of the fit;
        ``patterns``: test metrics under each further pattern; ``test_per_metric``: the value of each metric when the
        validation part chooses a checkpoint for that metric alone.
    """
    tests = tests or Tests()
    observed, pattern = mask_of(corpus, cell, tests)
    labelled, labels = label_mask(corpus, cell.share, cell.seed, cell.label_unit)
    run = _system if cell.method in ABLATIONS else _baseline if cell.method in BASELINES else _closed
    prediction, variance, others, facts, each = run(
        corpus, cell, config, observed, labelled, tests.patterns, device, checkpoint, resume
    )
    labels = {**labels, "validation": len(corpus.rows("valid", labelled=True))}
    result: dict[str, Any] = {"cell": asdict(cell), "missing": pattern.as_dict(), "labels": labels, "fit": facts}
    result["transductive"] = config.transductive
    for split in ("valid", "test"):
        rows = corpus.rows(split, labelled=True)
        if len(rows):
            result[split] = evaluate(prediction[rows], corpus.labels[rows].astype(np.float64), corpus.family)
    rows = corpus.rows("test", labelled=True)
    truth = corpus.labels[rows].astype(np.float64)
    result["patterns"] = {
        p.name: evaluate(other[rows], truth, corpus.family)
        for p, other in zip(tests.patterns, others, strict=True)
        if len(rows)
    }
    result["test_per_metric"] = each
    if tests.predictions is not None:
        known = corpus.rows("valid", labelled=True)
        calibration = calibrate(variance[known], prediction[known] - corpus.labels[known])
        file, uncertainty = tests.predictions / f"{cell.id}.csv", calibrated(variance, calibration)
        write_predictions(file, corpus, prediction, uncertainty, observed, corpus.rows("test"))
    if tests.masks is not None:
        write_mask(
            tests.masks / f"{cell.pattern_id}_missing{cell.rate:g}_seed{cell.seed}.json", corpus, observed, pattern
        )
    return result


# Predictions and their variance [N], predictions under each further pattern, facts of the fit, test values per metric.
Outcome = tuple[np.ndarray, np.ndarray, list[np.ndarray], dict[str, Any], dict[str, Any]]


def _baseline(
    corpus: Corpus,
    cell: Cell,
    config: Config,
    observed: np.ndarray,
    labelled: np.ndarray,
    patterns: Sequence[TestPattern],
    device: torch.device | str,
    checkpoint: Path | None,
    resume: bool,
) -> Outcome:
    """A perceptron trains in seconds, so it keeps no state."""
    how = BASELINES[cell.method]
    others = [fill(corpus, p.observed, how, observed) for p in patterns]
    fitted = fit_mlp(fill(corpus, observed, how), corpus, labelled, seed=cell.seed, others=others)
    return fitted.prediction, np.zeros(len(corpus)), list(fitted.others), fitted.facts, fitted.per_metric


def _closed(
    corpus: Corpus,
    cell: Cell,
    config: Config,
    observed: np.ndarray,
    labelled: np.ndarray,
    patterns: Sequence[TestPattern],
    device: torch.device | str,
    checkpoint: Path | None,
    resume: bool,
) -> Outcome:
    """A closed form, on the labels that the system sees. A validation video is predicted by ridge regressions fitted
    without it, or by trees fitted without the validation part."""
    standard = corpus.standardise(observed)
    design = Design.of(standard, observed, config.transductive)
    others = [Design.of(replace(standard, available=p.observed), None, config.transductive) for p in patterns]
    rows, valid = labelled_rows(corpus, labelled), corpus.split == VALID
    facts: dict[str, Any] = {"labels": len(rows)}
    if cell.method == BOOSTING:
        every = np.vstack([design.values, *(o.values for o in others)])
        found = fit_boosting(every, np.tile(corpus.labels, 1 + len(others)), rows)
        prediction, *more = np.split(found, 1 + len(others))
        held = fit_boosting(design.values, corpus.labels, rows[~valid[rows]])
        return np.where(valid, held, prediction), np.zeros(len(corpus)), more, facts, {}
    fitted = fit_ridge_named(corpus, design, rows, cell.method)
    prediction = fitted(design.values)
    prediction[rows[valid[rows]]] = fitted.left_out[valid[rows]]
    facts["strength"] = fitted.strength
    return prediction, np.zeros(len(corpus)), [fitted(o.values) for o in others], facts, {}


def _system(
    corpus: Corpus,
    cell: Cell,
    config: Config,
    observed: np.ndarray,
    labelled: np.ndarray,
    patterns: Sequence[TestPattern],
    device: torch.device | str,
    checkpoint: Path | None,
    resume: bool,
) -> Outcome:
    standard = corpus.standardise(observed)
    trainer = Trainer(standard, observed, labelled, ablated(config, cell.method), cell.seed, device)
    fit = trainer.fit(checkpoint, resume=resume)
    seen = replace(standard, available=standard.available & observed)
    # The uncertainty of predictions for train rows is not needed.
    _, variance = predict_corpus(trainer.model, seen, device=device, parts=(VALID, TEST))
    design = Design.of(seen, None, config.transductive)
    mixed = blend(seen, design, labelled, fit.prediction)

    def under(available: np.ndarray) -> np.ndarray:
        shown = replace(standard, available=available)
        graph = predict_corpus(trainer.model, shown, 0, device)[0]
        return mixed(Design.of(shown, None, config.transductive).values, graph)

    others = [under(p.observed) for p in patterns]
    rows = corpus.rows("test", labelled=True)

    def tested(weights: dict[str, torch.Tensor]) -> np.ndarray:
        trainer.model.load_state_dict(weights)
        return under(seen.available)[rows]

    truth = corpus.labels.astype(np.float64)
    each = trainer.per_metric.scores(tested, truth[rows]) if len(rows) else {}
    prediction = mixed(design.values, fit.prediction)
    prediction[mixed.rows] = mixed.left_out
    graph = {
        part: evaluate(fit.prediction[r], truth[r], corpus.family)
        for part, r in (("valid", mixed.rows), ("test", rows))
        if len(r)
    }
    facts = {"best_epoch": fit.best_epoch, "history": fit.history, "weights": mixed.weights, "graph": graph}
    return prediction, mixed.network**2 * variance, others, facts, each
