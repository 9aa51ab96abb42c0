"""One cell of the grid: a method under one missing pattern, one set of labels and one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.msa.baselines import fill, fit_mlp
from examples.msa.corpus import TEST, VALID, Corpus
from examples.msa.metrics import evaluate
from examples.msa.missing import MissingPattern, label_mask, missing_mask
from examples.msa.patterns import TestPattern, write_mask
from examples.msa.predictions import write_predictions
from examples.msa.saved import calibrate, calibrated

from .config import ABLATIONS, Config, ablated
from .predict import predict_corpus
from .train import Trainer

BASELINES = {"mean-filled MLP": "mean", "zero-filled MLP": "zero"}
METHODS = (*ABLATIONS, *BASELINES)
FROM_FILE = "mask"


@dataclass(frozen=True)
class Cell:
    """One run: everything that tells it from the others.

    Args:
        method: One of ``METHODS``.
        rate: Missing rate in training and test; for the patterns ``fixed`` and ``mask`` the share that is hidden.
        share: Labelled share.
        seed: Of masks, labels and training.
        pattern: Kind of missing pattern, or ``mask`` for one read from a file.
        label_unit: What is labelled or not.
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
        method = self.method.replace(" ", "-")
        return f"{method}_missing{self.rate:g}_labels{self.share:g}_{self.pattern_id}_{self.label_unit}_seed{self.seed}"

    @property
    def pattern_id(self) -> str:
        """The pattern as part of a file name."""
        return "-".join((self.pattern, *self.keep))


@dataclass(frozen=True)
class Tests:
    """What is read and written besides a cell's scores.

    Args:
        patterns: What the trained model may see in further tests.
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
        ``patterns``: test metrics under each further pattern; ``test_per_metric``: what each metric is when the
        validation part chooses its checkpoint for it alone.
    """
    tests = tests or Tests()
    observed, pattern = mask_of(corpus, cell, tests)
    labelled, labels = label_mask(corpus, cell.share, cell.seed, cell.label_unit)
    run = _baseline if cell.method in BASELINES else _system
    prediction, variance, others, facts, each = run(
        corpus, cell, config, observed, labelled, tests.patterns, device, checkpoint, resume
    )
    result: dict[str, Any] = {"cell": asdict(cell), "missing": pattern.as_dict(), "labels": labels, "fit": facts}
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
    """A perceptron trains in seconds: it keeps no state."""
    how = BASELINES[cell.method]
    others = [fill(corpus, p.observed, how, observed) for p in patterns]
    fitted = fit_mlp(fill(corpus, observed, how), corpus, labelled, seed=cell.seed, others=others)
    return fitted.prediction, np.zeros(len(corpus)), list(fitted.others), fitted.facts, fitted.per_metric


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
    # No one asks how sure the model is of what it was trained on.
    _, variance = predict_corpus(trainer.model, seen, device=device, parts=(VALID, TEST))
    others = [predict_corpus(trainer.model, replace(standard, available=p.observed), 0, device)[0] for p in patterns]
    rows = corpus.rows("test", labelled=True)

    def tested(weights: dict[str, torch.Tensor]) -> np.ndarray:
        trainer.model.load_state_dict(weights)
        return predict_corpus(trainer.model, seen, 0, device)[0][rows]

    each = trainer.per_metric.scores(tested, corpus.labels[rows].astype(np.float64)) if len(rows) else {}
    return fit.prediction, variance, others, {"best_epoch": fit.best_epoch, "history": fit.history}, each
