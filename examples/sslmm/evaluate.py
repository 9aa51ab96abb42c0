"""The grid: methods × missing rates × labelled shares × seeds, each cell computed once and kept on disk."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.msa.baselines import fill, fit_mlp
from examples.msa.corpus import Corpus
from examples.msa.files import write_atomic
from examples.msa.metrics import area_under_curve, evaluate, paired_difference
from examples.msa.missing import label_mask, missing_mask
from examples.msa.report import to_json

from .config import ABLATIONS, Config, ablated
from .train import Trainer

BASELINES = {"mean-filled MLP": "mean", "zero-filled MLP": "zero"}
METHODS = (*ABLATIONS, *BASELINES)


@dataclass(frozen=True)
class Cell:
    """One run: everything that tells it from the others."""

    method: str
    rate: float
    share: float
    seed: int
    pattern: str = "exact"
    label_unit: str = "utterance"

    @property
    def id(self) -> str:
        """A file name."""
        method = self.method.replace(" ", "-")
        return f"{method}_missing{self.rate:g}_labels{self.share:g}_{self.pattern}_{self.label_unit}_seed{self.seed}"


def run_cell(
    corpus: Corpus,
    cell: Cell,
    config: Config,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train and test one method under one missing pattern and one label mask; all methods of a seed share both.

    Args:
        corpus: Pooled features, not standardised.
        cell: What to run.
        config: The whole system's configuration; the method leaves parts of it out.
        device: Where to train.
        checkpoint: Where the run keeps its state.
        resume: Go on from that state.

    Returns:
        The cell, metrics of the test and validation parts, the missing pattern, the label facts, and facts of the fit.
    """
    observed, pattern = missing_mask(corpus, cell.pattern, cell.rate, cell.seed)
    labelled, labels = label_mask(corpus, cell.share, cell.seed, cell.label_unit)
    if cell.method in BASELINES:
        fitted = fit_mlp(fill(corpus, observed, BASELINES[cell.method]), corpus, labelled, seed=cell.seed)
        prediction, facts = fitted.prediction, fitted.facts
    else:
        own = ablated(config, cell.method)
        trainer = Trainer(corpus.standardise(observed), observed, labelled, own, cell.seed, device)
        fit = trainer.fit(checkpoint, resume=resume)
        prediction, facts = fit.prediction, {"best_epoch": fit.best_epoch, "history": fit.history}
    result: dict[str, Any] = {"cell": asdict(cell), "missing": pattern.as_dict(), "labels": labels, "fit": facts}
    for split in ("valid", "test"):
        rows = corpus.rows(split, labelled=True)
        if len(rows):
            result[split] = evaluate(prediction[rows], corpus.labels[rows].astype(np.float64), corpus.family)
    return result


class Grid:
    """Cells of one corpus and configuration in a folder; a cell that is there is not run again.

    Args:
        corpus: The data.
        config: Configuration of the whole system.
        folder: Where results and states are kept.
        resume: Use what the folder holds; otherwise it must hold no cells.
        device: Where to train.
        jobs: Processes that share the cells. Each cell trains on one thread, so its bits do not depend on them.

    Raises:
        ValueError: The folder holds the cells of other data or another configuration, or is not empty without resume.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: Config,
        folder: Path,
        resume: bool = False,
        device: torch.device | str = "cpu",
        jobs: int = 1,
    ) -> None:
        self.corpus, self.config, self.folder, self.device = corpus, config, folder / "cells", device
        self.resume, self.jobs = resume, jobs
        identity = {"corpus": corpus.sha256, "config": asdict(config)}
        identity_file = self.folder / "identity.json"
        if identity_file.exists():
            if not resume:
                raise ValueError(f"{self.folder} holds an earlier run; pass --resume to go on, or another --out")
            stored = json.loads(identity_file.read_text())
            names = {**stored["config"], "corpus": stored["corpus"]}
            now = {**identity["config"], "corpus": identity["corpus"]}  # type: ignore[dict-item]
            changed = [f"{k}: {names.get(k)!r} then, {v!r} now" for k, v in now.items() if names.get(k) != v]
            if changed:
                raise ValueError(f"{self.folder} belongs to another run ({'; '.join(changed)})")
        write_atomic(identity_file, to_json(identity))

    def run(self, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        """Results of the cells in order; each is written as soon as it is known."""
        if self.jobs == 1:
            with _one_thread():
                yield from map(self.cell, cells)
            return
        # A forked child inherits locks of OpenMP threads that it does not have.
        pool = ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn"), _start_worker, (self,))
        try:
            yield from pool.map(_run_in_worker, cells)
        finally:
            pool.shutdown(cancel_futures=True)

    def cell(self, cell: Cell) -> dict[str, Any]:
        """The result of one cell, from the folder or computed and put there."""
        file = self.folder / f"{cell.id}.json"
        if not file.exists():
            checkpoint = self.folder / f"{cell.id}.pt"
            result = run_cell(self.corpus, cell, self.config, self.device, checkpoint, self.resume)
            write_atomic(file, to_json(result))
            checkpoint.unlink(missing_ok=True)
        return json.loads(file.read_text())


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_grid: Grid | None = None


def _start_worker(grid: Grid) -> None:
    global _grid
    _grid = grid
    torch.set_num_threads(1)


def _run_in_worker(cell: Cell) -> dict[str, Any]:
    assert _grid is not None
    return _grid.cell(cell)


def column(results: Sequence[dict[str, Any]], metric: str, method: str, rate: float, share: float) -> list[float]:
    """A test metric of one method at one point, in order of seeds; nan where it is undefined."""
    found = [
        r
        for r in results
        if r["cell"]["method"] == method and r["cell"]["rate"] == rate and r["cell"]["share"] == share
    ]
    found.sort(key=lambda r: r["cell"]["seed"])
    return [float("nan") if r["test"][metric] is None else float(r["test"][metric]) for r in found]


def compare(
    results: Sequence[dict[str, Any]], metric: str, rate: float, share: float, against: str = "SSLMM"
) -> dict[str, dict[str, Any]]:
    """Paired difference of the whole system minus each other method at one point."""
    methods = {r["cell"]["method"] for r in results} - {against}
    ours = column(results, metric, against, rate, share)
    pairs = {m: column(results, metric, m, rate, share) for m in METHODS if m in methods}
    return {m: paired_difference(ours, theirs) for m, theirs in pairs.items() if len(theirs) == len(ours) > 1}


def area_over_rates(
    results: Sequence[dict[str, Any]], metric: str, method: str, rates: Sequence[float], share: float
) -> list[float]:
    """Mean of a metric over the missing rates (trapezoid), per seed."""
    columns = [column(results, metric, method, rate, share) for rate in rates]
    return [area_under_curve(rates, values) for values in zip(*columns, strict=True)]
