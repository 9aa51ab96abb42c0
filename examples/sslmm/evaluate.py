"""The grid: methods × missing rates × labelled shares × seeds, each cell computed once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from examples.msa.corpus import Corpus
from examples.msa.files import remove_temporaries, write_atomic
from examples.msa.jobs import sole_user, spread
from examples.msa.metrics import area_under_curve, paired_difference
from examples.msa.report import to_json

from .cell import BASELINES, METHODS, Cell, Tests, run_cell
from .config import Config

__all__ = ["BASELINES", "METHODS", "Cell", "Grid", "area_over_rates", "column", "compare", "run_cell"]


class Grid:
    """Cells of one corpus and configuration in a folder; a cell whose result is there is not run again.

    Args:
        corpus: The data.
        config: Configuration of the whole system.
        folder: Where results and states are kept.
        resume: Use what the folder holds; otherwise it must hold no cells.
        device: Where to train.
        jobs: Processes that share the cells. Each cell trains on one thread, so its bits do not depend on their number.
        tests: Further tests of every cell, and what is written besides.

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
        tests: Tests | None = None,
    ) -> None:
        self.corpus, self.config, self.folder, self.device = corpus, config, folder / "cells", device
        self.resume, self.jobs, self.tests = resume, jobs, tests or Tests()
        identity = {
            "corpus": corpus.sha256,
            "config": asdict(config),
            "patterns": [p.as_dict() for p in self.tests.patterns],
            "mask": self.tests.mask[1].sha256 if self.tests.mask else None,
        }
        identity_file = self.folder / "identity.json"
        if identity_file.exists():
            if not resume:
                raise ValueError(f"{self.folder} holds an earlier run; pass --resume to go on, or another --out")
            names, now = (
                {**i["config"], **{k: v for k, v in i.items() if k != "config"}}
                for i in (json.loads(identity_file.read_text()), json.loads(to_json(identity)))
            )
            changed = [f"{k}: {names.get(k)!r} then, {v!r} now" for k, v in now.items() if names.get(k) != v]
            if changed:
                raise ValueError(f"{self.folder} belongs to another run ({'; '.join(changed)})")
        write_atomic(identity_file, to_json(identity))

    def run(self, cells: Sequence[Cell]) -> Iterator[dict[str, Any]]:
        """Results of the cells in order; each is written as soon as it is known."""
        with sole_user(self.folder):
            for folder in (self.folder, self.folder.parent, self.tests.predictions, self.tests.masks):
                if folder is not None:
                    remove_temporaries(folder)
            yield from spread(self.cell, cells, self.jobs, self.folder)

    def cell(self, cell: Cell) -> dict[str, Any]:
        """The result of one cell, from the folder or computed and put there."""
        file, checkpoint = self.folder / f"{cell.id}.json", self.folder / f"{cell.id}.pt"
        if not file.exists():
            result = run_cell(self.corpus, cell, self.config, self.device, checkpoint, self.resume, self.tests)
            write_atomic(file, to_json(result))
        # This also removes what a run left that was killed between the two steps.
        checkpoint.unlink(missing_ok=True)
        return json.loads(file.read_text())


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
