"""Which clips people should label next: picks, reasons, and a page to label them on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.msa.annotate import write_page
from examples.msa.checkpoint import derive, seed_everything
from examples.msa.command import add_device_argument, check_device
from examples.msa.corpus import TRAIN, Corpus
from examples.msa.data import add_data_arguments, load_from
from examples.msa.predictions import add_labels_argument, no_labels, read_labels, with_labels, write_table
from examples.msa.tool import say_notes
from msacore.selection import select

from .acquire import acquire
from .active import Arm
from .data import Data
from .ensemble import fit_ensemble, new_model
from .first import choose_first
from .options import add_model_arguments, add_selection_arguments, base_arm
from .pretrain import pretrain

COLUMNS = ("id", "video", "clip", "score", "uncertainty", "nearest labelled clip")
# With fewer labels than this, a model's uncertainty tells less about what is worth labelling than the features do.
FEWEST = 8
NEED_UNCERTAINTY = ("topk", "uncertainty_kcenter", "mmr", "prefilter")


@dataclass(frozen=True)
class Choice:
    """Rows in pick order, their scores, their uncertainties (nan where no model was trained), and the row of the
    nearest labelled clip of each (-1 where nothing is labelled)."""

    rows: np.ndarray
    scores: np.ndarray
    uncertainty: np.ndarray
    nearest: np.ndarray


def add_pick_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``pick``."""
    add_data_arguments(parser)
    add_labels_argument(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/picks"), metavar="DIR", help="picks.csv, annotate.html (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    add_device_argument(parser)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    add_selection_arguments(parser)
    add_model_arguments(parser)


def pick_command(args: argparse.Namespace) -> int:
    """``pick``: train on the labelled clips, choose among the others."""
    device = check_device(args.device)
    if args.budget < 1:
        raise ValueError(f"--budget must be at least 1, got {args.budget}")
    if args.out.is_file():
        raise ValueError(f"--out {args.out}: it is a file; picks and page are written to a folder")
    arm = base_arm(args)
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    source = load_from(args)
    given = read_labels(args.labels, source) if args.labels else no_labels(source)
    pool = with_labels(source, given)
    candidates = np.flatnonzero((pool.split == TRAIN) & ~pool.labelled)
    if len(candidates) == 0:
        raise ValueError(f"{pool.name}: every utterance of the train part has a label; nothing is left to pick")
    choice, notes = choose(pool, candidates, arm, args.seed, device, args.validation, args.transductive)
    say_notes(replace(pool, notes=(*pool.notes, *notes)))
    picks = write_table(args.out / "picks.csv", COLUMNS, _lines(pool, choice))
    known = {str(pool.utterance_ids[i]): float(given[i]) for i in np.flatnonzero(np.isfinite(given))}
    base = None if args.data is None else args.data if args.data.is_dir() else args.data.parent
    page = write_page(args.out / "annotate.html", source, choice.rows.tolist(), known, base)
    labelled = int(pool.labelled[pool.split == TRAIN].sum())
    print(f"picks: {picks} ({len(choice.rows)} of {len(candidates)} unlabelled; {labelled} labelled)\npage: {page}")
    return 0


def choose(
    pool: Corpus,
    candidates: np.ndarray,
    arm: Arm,
    seed: int,
    device: torch.device,
    validation: bool = False,
    transductive: bool = False,
) -> tuple[Choice, list[str]]:
    """Pick among the candidates, with a model where there are enough labels for one; also returns notes to print."""
    notes = []
    budget = arm.selection.budget
    if budget > len(candidates):
        notes.append(f"{len(candidates)} utterances are left to pick, fewer than the budget of {budget}")
        budget = len(candidates)
    selection = replace(arm.selection, budget=budget)
    known = pool.rows("train", labelled=True)
    if len(known) < FEWEST:
        return _by_features(pool, candidates, known, replace(arm, selection=selection), seed, device, notes)
    standard = pool.standardise()
    data = Data.of(standard, device, ("train",), validation, transductive)
    ensemble, _ = fit_ensemble(standard, data, torch.cat([data.buyable, data.given]), arm, seed)
    prediction = ensemble.predict(data.inputs, arm.training.passes, seed)
    rows, centres = (torch.from_numpy(r).to(device) for r in (candidates, np.flatnonzero(pool.labelled)))
    picks = acquire(
        prediction[rows],
        data.inputs.available[rows],
        prediction.embedding[centres],
        selection,
        derive(seed, "select", len(known)),
    )
    chosen = candidates[picks.positions.cpu().numpy()]
    choice = Choice(
        chosen,
        picks.scores.cpu().numpy(),
        picks.uncertainty.cpu().numpy(),
        _nearest(prediction.embedding, chosen, centres),
    )
    return choice, notes


def _by_features(
    pool: Corpus, candidates: np.ndarray, known: np.ndarray, arm: Arm, seed: int, device: torch.device, notes: list[str]
) -> tuple[Choice, list[str]]:
    """Pick by the features, without the uncertainty of a model."""
    standard = pool.standardise()
    data = Data.of(standard, device, needed=())
    start = derive(seed, "pretrain", 0)
    torch.manual_seed(start)
    embedding = pretrain(new_model(standard, arm.model, device), data, arm.training, start)
    selection, draw = arm.selection, derive(seed, "select", len(known))
    too_few = f"{len(known)} labels are too few to train on ({FEWEST} are enough): picks go by the features"
    free, centres = torch.from_numpy(candidates).to(device), torch.from_numpy(known).to(device)
    if selection.strategy in NEED_UNCERTAINTY:
        too_few += f", but a share of {1 - selection.informative:g} is drawn at random (--informative)"
        rows, scores = map(np.array, choose_first(data, free, selection.budget, centres, selection, draw, embedding))
    else:
        chosen = select(
            embedding[free],
            selection.budget,
            strategy=selection.strategy,
            labeled=embedding[centres] if len(known) else None,
            gamma=selection.gamma,
            seed=draw,
            options=selection.options or None,
        )
        rows, scores = candidates[chosen.indices.cpu().numpy()], chosen.scores.cpu().numpy()
    notes.append(too_few)
    nothing = np.full(len(rows), np.nan)
    return Choice(rows, scores, nothing, _nearest(embedding, rows, centres)), notes


def _nearest(embedding: Tensor, rows: np.ndarray, labelled: Tensor) -> np.ndarray:
    if len(labelled) == 0:
        return np.full(len(rows), -1)
    distances = torch.cdist(embedding[torch.from_numpy(rows).to(embedding.device)], embedding[labelled])
    return labelled[distances.argmin(1)].cpu().numpy()


def _lines(pool: Corpus, choice: Choice) -> list[tuple[str, ...]]:
    ids, number = pool.utterance_ids, pool.video_index
    names = np.arange(len(pool.video_ptr) - 1) if pool.videos is None else pool.videos
    return [
        (
            str(ids[row]),
            str(names[number[row]]),
            str(int(pool.positions[row])),
            f"{score:.6g}",
            f"{uncertainty:.6g}" if np.isfinite(uncertainty) else "",
            str(ids[nearest]) if nearest >= 0 else "",
        )
        for row, score, uncertainty, nearest in zip(
            choice.rows, choice.scores, choice.uncertainty, choice.nearest, strict=True
        )
    ]
