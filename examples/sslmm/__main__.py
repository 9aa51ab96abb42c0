"""Command line of SSLMM: ``python -m examples.sslmm [run|fit|predict|evaluate|mask] --data PATH …``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from examples.msa.command import (
    Command,
    add_device_argument,
    add_tensorboard_argument,
    check_device,
    command_line,
    tensorboard_writer,
)
from examples.msa.corpus import Corpus
from examples.msa.data import add_data_arguments, load_from
from examples.msa.metrics import NAMES
from examples.msa.missing import max_rate
from examples.msa.patterns import add_test_arguments, read_mask, test_patterns, write_mask
from examples.msa.report import run_card
from examples.msa.timing import StageTimer, add_progress_argument, progress
from examples.msa.tokens import write_token_mask
from examples.msa.tool import evaluate_arguments, evaluate_command, predict_arguments, predict_command

from .cell import FROM_FILE, METHODS, Cell, Tests
from .closed import RIDGES
from .config import add_config_arguments, config_from
from .evaluate import Grid, column
from .fit import SYSTEM, add_fit_arguments, fit_command, open_model
from .options import add_pattern_arguments, mask_for, pattern_of
from .page import build

DESCRIPTION = (
    "SSLMM: semi-supervised learning with missing modalities, re-implemented from the abstract and related work."
)
GRID_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
GRID_SHARES = (0.1, 0.5, 1.0)
GRID_METHODS = ("SSLMM", "mean-filled MLP")
PAIRS = "persistent"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``run``."""
    add_data_arguments(parser, pairs=PAIRS)
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/sslmm"), help="folder of the report (%(default)s)")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of masks and training (0 1 2)")
    add_pattern_arguments(run, rate=0.5)
    run.add_argument("--share", type=float, default=0.5, help="labelled share of the main comparison (%(default)s)")
    run.add_argument("--label-unit", choices=["utterance", "video"], default="utterance", help="(%(default)s)")
    run.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"methods of the main comparison: {', '.join(METHODS)}",
    )
    run.add_argument("--grid", action="store_true", help="also all missing rates and labelled shares")
    run.add_argument("--rates", type=float, nargs="+", default=list(GRID_RATES), help="missing rates of the grid")
    run.add_argument("--shares", type=float, nargs="+", default=list(GRID_SHARES), help="labelled shares of the grid")
    run.add_argument("--resume", action="store_true", help="continue with the cells that --out holds")
    add_device_argument(run)
    run.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="processes that share the cells (one per thread of torch)"
    )
    run.add_argument("--demo", action="store_true", help="a quick run: fewer methods; with --data, fewer epochs")
    add_progress_argument(run)
    add_tensorboard_argument(run)
    add_test_arguments(parser)
    add_config_arguments(parser)


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--demo`` changes: fewer methods, and with ``--data`` fewer epochs.

    On the embedded corpus training is as by default: one and a half minutes on two cores.
    """
    found = {"seeds": [0, 1, 2], "methods": ["SSLMM", "supervised graph", "mean-filled MLP", *RIDGES]}
    return {**found, "pretrain_epochs": 8, "finetune_epochs": 15} if args.data else found


def cells_of(args: argparse.Namespace, corpus: Corpus) -> list[Cell]:
    """The main comparison, and the grid if asked for; no cell twice."""
    kind, rate, keep = pattern_of(corpus, args)
    points = [(m, rate, args.share) for m in args.methods]
    if args.grid:
        if kind in ("fixed", FROM_FILE):
            raise ValueError("--grid varies the missing rate, for which --pattern fixed and --mask leave no room")
        rates = [r for r in args.rates if r <= max_rate(len(corpus.modalities)) + 1e-9]
        points += [(m, r, s) for m in GRID_METHODS for r in rates for s in args.shares]
    return [
        Cell(method, rate, share, seed, kind, args.label_unit, keep)
        for method, rate, share in dict.fromkeys(points)
        for seed in args.seeds
    ]


def run_command(args: argparse.Namespace) -> int:
    """``run``: all cells, and the report."""
    device = check_device(args.device)
    writer = tensorboard_writer(args.tensorboard)
    timer = StageTimer()
    with timer("load data"):
        corpus = load_from(args).pooled()
    results = run(corpus, args, timer, device)
    if writer is not None:
        write_curves(writer, results)
    rates = sorted({r["cell"]["rate"] for r in results if r["cell"]["method"] == "SSLMM"})
    shares = sorted({r["cell"]["share"] for r in results if r["cell"]["method"] == "SSLMM"})
    rate = pattern_of(corpus, args)[1]
    card = run_card(corpus, vars(args), args.seeds, timer, missing=results[0]["missing"], labels=results[0]["labels"])
    report = build(corpus, results, rates, shares, (rate, args.share), card)
    page, _ = report.write(args.out)
    for method in args.methods:
        accuracy = column(results, "acc2_non0", method, rate, args.share)
        error = column(results, "mae", method, rate, args.share)
        print(f"{method:22} neg/pos accuracy {sum(accuracy) / len(accuracy):.3f}  MAE {sum(error) / len(error):.3f}")
    if report.headline:
        print(report.headline)
    print(f"report: {page}")
    return 0


def run(corpus: Corpus, args: argparse.Namespace, timer: StageTimer, device: torch.device) -> list[dict]:
    """All cells of the command line."""
    if args.jobs < 0:
        raise ValueError(f"--jobs must be at least 1, or 0 for one per thread of torch, got {args.jobs}")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds must differ, got {args.seeds}")
    cells = cells_of(args, corpus)
    jobs = min(args.jobs or (1 if device.type == "cuda" else torch.get_num_threads()), len(cells))
    kind = args.pattern if args.pattern != "fixed" else "exact"
    tests = Tests(
        test_patterns(corpus, args, kind, args.seeds[0]),
        read_mask(args.mask, corpus) if args.mask else None,
        args.out / "predictions",
        args.out / "masks",
    )
    grid = Grid(corpus, config_from(args), args.out, args.resume, device, jobs, tests)
    with timer("train and evaluate"):
        return list(progress(grid.run(cells), "cell", len(cells), args.no_progress, describe))


def describe(result: dict[str, Any]) -> str:
    """A line for a log."""
    cell, test = result["cell"], result["test"]
    return (
        f"{cell['method']}, missing {cell['rate']:g}, labels {cell['share']:g}, seed {cell['seed']}: "
        f"{NAMES['acc2_non0']} {test['acc2_non0'] if test['acc2_non0'] is not None else float('nan'):.3f}, "
        f"{NAMES['mae']} {test['mae']:.3f}"
    )


def write_curves(writer: Callable[[str], Any], results: Sequence[dict[str, Any]]) -> None:
    """Losses over the epochs, for TensorBoard, a run for each cell."""
    for result in results:
        with writer(Cell(**{**result["cell"], "keep": tuple(result["cell"]["keep"])}).id) as curves:
            for stage, epochs in result["fit"].get("history", {}).items():
                for epoch, losses in enumerate(epochs, 1):
                    for name, loss in losses.items():
                        curves.add_scalar(f"{stage}/{name}", loss, epoch)
            for part in ("valid", "test"):
                for metric, value in result.get(part, {}).items():
                    if isinstance(value, float):
                        curves.add_scalar(f"{part}/{metric}", value, result["fit"].get("best_epoch", 0))


def add_mask_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``mask``."""
    add_data_arguments(parser, pairs=PAIRS)
    add_pattern_arguments(parser, rate=0.5)
    parser.add_argument("--tokens", action="store_true", help="hide single tokens, each with chance --rate")
    parser.add_argument(
        "--keep-ends", nargs="+", default=[], metavar="MODALITY", help="for --tokens: whose first and last token stay"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("mask.json"), metavar="FILE.json", help="(%(default)s)")


def mask_command(args: argparse.Namespace) -> int:
    """``mask``: draw a missing pattern and write it to a file."""
    if args.tokens:
        args.sequences = True
        hidden = write_token_mask(args.out, load_from(args), args.rate, args.seed, args.keep_ends)
        print(f"mask: {args.out} ({hidden.realised:.3f} of the tokens hidden, {hidden.sha256})")
        return 0
    if args.keep_ends:
        raise ValueError("--keep-ends belongs to --tokens")
    corpus = load_from(args)
    observed, pattern = mask_for(corpus, args, args.seed)
    print(f"mask: {write_mask(args.out, corpus, observed, pattern)} ({pattern.realised:.3f} hidden, {pattern.sha256})")
    return 0


COMMANDS = {
    "run": Command("train, evaluate and compare; writes a report", add_run_arguments, run_command, demo),
    "fit": Command("train on the labels that are there and save the model", add_fit_arguments, fit_command),
    "predict": Command(
        "predictions of a saved model for other data", predict_arguments(PAIRS), predict_command(SYSTEM, open_model)
    ),
    "evaluate": Command(
        "scores of a saved model on other data", evaluate_arguments(PAIRS), evaluate_command(SYSTEM, open_model)
    ),
    "mask": Command("draw which modalities are missing and write a mask file", add_mask_arguments, mask_command),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Raises:
        SystemExit: There is an error that the user can fix; one sentence on stderr says what it is.
    """
    status = command_line("examples.sslmm", DESCRIPTION, COMMANDS, argv)
    if status:
        raise SystemExit(status)
    return status


if __name__ == "__main__":
    main()
