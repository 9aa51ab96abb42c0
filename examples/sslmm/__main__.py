"""``python -m examples.sslmm``: train, evaluate and report SSLMM and what it is compared with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.msa.corpus import Corpus
from examples.msa.data import add_data_arguments, load_from
from examples.msa.missing import KINDS, max_rate
from examples.msa.report import run_card
from examples.msa.timing import StageTimer, add_progress_argument, progress

from .config import add_config_arguments, config_from
from .evaluate import METHODS, Cell, Grid, column
from .page import build

GRID_RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
GRID_SHARES = (0.1, 0.5, 1.0)
GRID_METHODS = ("SSLMM", "mean-filled MLP")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m examples.sslmm", description=__doc__)
    add_data_arguments(result, pairs="persistent")
    run = result.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("runs/sslmm"), help="folder of the report (%(default)s)")
    run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of masks and training (0 1 2)")
    run.add_argument("--rate", type=float, default=0.5, help="missing rate of the main comparison (%(default)s)")
    run.add_argument("--share", type=float, default=0.5, help="labelled share of the main comparison (%(default)s)")
    run.add_argument(
        "--pattern", choices=[k for k in KINDS if k != "fixed"], default="exact", help="what goes missing (%(default)s)"
    )
    run.add_argument("--label-unit", choices=["utterance", "video"], default="utterance", help="(%(default)s)")
    run.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"of the main comparison: {', '.join(METHODS)}",
    )
    run.add_argument("--grid", action="store_true", help="also all missing rates and labelled shares")
    run.add_argument("--rates", type=float, nargs="+", default=list(GRID_RATES), help="missing rates of the grid")
    run.add_argument("--shares", type=float, nargs="+", default=list(GRID_SHARES), help="labelled shares of the grid")
    run.add_argument("--resume", action="store_true", help="go on with the cells that --out holds")
    run.add_argument("--device", default="cpu", help="(%(default)s)")
    run.add_argument(
        "--jobs", type=int, default=0, metavar="N", help="processes that share the cells (one per thread of torch)"
    )
    run.add_argument("--demo", action="store_true", help="a quick run: fewer utterances, one seed, few epochs")
    add_progress_argument(run)
    add_config_arguments(result)
    return result


def cells_of(args: argparse.Namespace, modalities: int) -> list[Cell]:
    """The main comparison, and the grid if asked for; no cell twice."""
    points = [(m, args.rate, args.share) for m in args.methods]
    if args.grid:
        rates = [r for r in args.rates if r <= max_rate(modalities) + 1e-9]
        points += [(m, r, s) for m in GRID_METHODS for r in rates for s in args.shares]
    return [
        Cell(method, rate, share, seed, args.pattern, args.label_unit)
        for method, rate, share in dict.fromkeys(points)
        for seed in args.seeds
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    command = parser()
    args = command.parse_args(argv)
    if args.demo:
        args.size = args.size or (None if args.data else 800)
        args.seeds, args.pretrain_epochs, args.finetune_epochs = args.seeds[:1], 8, 15
    timer = StageTimer()
    try:
        with timer("load data"):
            corpus = load_from(args).pooled()
        results = run(corpus, args, timer)
    except (ValueError, FileNotFoundError) as error:
        command.exit(2, f"{command.prog}: {error}\n")
    rates = sorted({r["cell"]["rate"] for r in results if r["cell"]["method"] == "SSLMM"})
    shares = sorted({r["cell"]["share"] for r in results if r["cell"]["method"] == "SSLMM"})
    card = run_card(corpus, vars(args), args.seeds, timer, missing=results[0]["missing"], labels=results[0]["labels"])
    page, _ = build(corpus, results, rates, shares, (args.rate, args.share), card).write(args.out)
    for method in args.methods:
        accuracy = column(results, "acc2_non0", method, args.rate, args.share)
        error = column(results, "mae", method, args.rate, args.share)
        print(f"{method:22} neg/pos accuracy {sum(accuracy) / len(accuracy):.3f}  MAE {sum(error) / len(error):.3f}")
    print(f"report: {page}")
    return 0


def run(corpus: Corpus, args: argparse.Namespace, timer: StageTimer) -> list[dict]:
    """All cells of the command line."""
    cuda = torch.device(args.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch sees no CUDA device")
    if args.jobs < 0:
        raise ValueError(f"--jobs must be at least 1, or 0 for one per thread of torch, got {args.jobs}")
    cells = cells_of(args, len(corpus.modalities))
    jobs = min(args.jobs or (1 if cuda else torch.get_num_threads()), len(cells))
    grid = Grid(corpus, config_from(args), args.out, args.resume, args.device, jobs)
    with timer("train and evaluate"):
        return list(progress(grid.run(cells), "cells", len(cells), args.no_progress))


if __name__ == "__main__":
    raise SystemExit(main())
