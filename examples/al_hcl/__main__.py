"""Command line of AL-HCL: ``python -m examples.al_hcl --data PATH --out DIR``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from examples.msa.checkpoint import seed_everything
from examples.msa.data import add_data_arguments, load_from
from examples.msa.report import run_card
from examples.msa.timing import StageTimer, add_progress_argument, progress
from msacore.selection import STRATEGIES

from .acquire import MEASURES, SelectionConfig
from .active import Arm
from .arms import REFERENCE, ablations, comparison, contrast_sweep
from .experiment import Experiment
from .kernel import VIEWS
from .model import ModelConfig
from .report import build_report
from .train import Data, TrainConfig

# Small enough for two minutes on two cores; whatever is given on the command line wins.
DEMO = {"size": 600, "seeds": [0, 1], "ablate": True, "rounds": 2, "budget": 30, "steps": 40, "pretrain_steps": 60}


def parser() -> argparse.ArgumentParser:
    """All options."""
    p = argparse.ArgumentParser(prog="python -m examples.al_hcl", description=__doc__)
    add_data_arguments(p)
    add_progress_argument(p)
    run = p.add_argument_group("run")
    run.add_argument(
        "--out", type=Path, default=Path("runs/al_hcl"), metavar="DIR", help="report and checkpoints (%(default)s)"
    )
    run.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="S", help="one run per seed (0 1 2 3 4)"
    )
    run.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    run.add_argument("--device", default="cpu", help="torch device (%(default)s)")
    run.add_argument(
        "--threads", type=int, default=1, help="CPU threads; small models gain nothing from more (%(default)s)"
    )
    run.add_argument("--ablate", action="store_true", help="also run an arm without each part")
    run.add_argument(
        "--sweep-lambda", type=float, nargs="*", metavar="λ", help="also run these contrast weights (.01 .05 .1 .3)"
    )
    run.add_argument(
        "--demo", action="store_true", help="a quick comparison with ablations on a small synthetic corpus"
    )
    al = p.add_argument_group("active learning")
    al.add_argument("--strategy", choices=sorted(STRATEGIES), default=SelectionConfig.strategy, help="(%(default)s)")
    al.add_argument(
        "--uncertainty", choices=sorted(MEASURES), default=SelectionConfig.uncertainty, help="(%(default)s)"
    )
    al.add_argument(
        "--initial", type=float, default=SelectionConfig.initial, help="share labelled at first (%(default)s)"
    )
    al.add_argument(
        "--budget", type=int, default=SelectionConfig.budget, metavar="B", help="labels per round (%(default)s)"
    )
    al.add_argument("--rounds", type=int, default=SelectionConfig.rounds, help="rounds of buying (%(default)s)")
    al.add_argument(
        "--keep-training", action="store_true", help="go on from the last round's weights, not from new ones"
    )
    al.add_argument("--members", type=int, default=SelectionConfig.members, help="models per round (%(default)s)")
    al.add_argument(
        "--gamma", type=float, default=SelectionConfig.gamma, help="exponent of the uncertainty (%(default)s)"
    )
    al.add_argument(
        "--option", action="append", default=[], metavar="KEY=NUMBER", help="option of the strategy, e.g. delta=2"
    )
    model = p.add_argument_group("model and training")
    model.add_argument(
        "--lambda",
        dest="contrast_weight",
        type=float,
        default=TrainConfig.contrast_weight,
        help="weight of the contrastive loss (%(default)s)",
    )
    model.add_argument(
        "--tier-weights", type=float, nargs=3, default=ModelConfig.tier_weights, metavar="W", help="(.2 .3 .5)"
    )
    model.add_argument(
        "--temperatures", type=float, nargs=3, default=ModelConfig.temperatures, metavar="T", help="(.1 .1 .5)"
    )
    model.add_argument(
        "--tier1", choices=("cross_modal", "intra_modal"), default=ModelConfig.tier1, help="(%(default)s)"
    )
    model.add_argument("--width", type=int, default=ModelConfig.width, help="width of the embeddings (%(default)s)")
    model.add_argument("--dropout", type=float, default=ModelConfig.dropout, help="(%(default)s)")
    model.add_argument("--input-dropout", type=float, default=ModelConfig.input_dropout, help="(%(default)s)")
    model.add_argument("--view", choices=VIEWS, help="features of the closed-form path (the best on held-out labels)")
    model.add_argument(
        "--pretrain-steps", type=int, default=TrainConfig.pretrain_steps, help="steps of contrast alone (%(default)s)"
    )
    model.add_argument(
        "--squared-error", action="store_true", help="no predicted noise; uncertainty from dropout alone"
    )
    model.add_argument(
        "--steps", type=int, default=TrainConfig.steps, help="optimiser steps per training (%(default)s)"
    )
    return p


def base_arm(args: argparse.Namespace) -> Arm:
    """The reference system that the options describe."""
    model = ModelConfig(
        width=args.width,
        dropout=args.dropout,
        input_dropout=args.input_dropout,
        tier_weights=tuple(args.tier_weights),
        temperatures=tuple(args.temperatures),
        tier1=args.tier1,
        heteroscedastic=not args.squared_error,
    )
    training = TrainConfig(
        steps=args.steps, pretrain_steps=args.pretrain_steps, contrast_weight=args.contrast_weight, view=args.view
    )
    selection = SelectionConfig(
        strategy=args.strategy,
        uncertainty=args.uncertainty,
        initial=args.initial,
        budget=args.budget,
        rounds=args.rounds,
        keep_training=args.keep_training,
        members=args.members,
        gamma=args.gamma,
        options=_options(args.option),
    )
    return Arm(REFERENCE, model, training, selection)


def run(args: argparse.Namespace) -> tuple[Path, Path]:
    """Run everything and write the report; returns its two files."""
    if args.rounds < 1 or args.budget < 1:
        raise ValueError(f"--rounds and --budget must be at least 1, got {args.rounds} and {args.budget}")
    if args.uncertainty == "ensemble_variance" and args.members < 2:
        raise ValueError("--uncertainty ensemble_variance compares models: give --members 2 or more")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds must differ, got {args.seeds}")
    torch.set_num_threads(args.threads)
    seed_everything(args.seeds[0])
    timer = StageTimer()
    with timer("load"):
        corpus = load_from(args).standardise()
        data = Data.of(corpus, args.device)
    base = base_arm(args)
    arms = comparison(base)
    if args.ablate:
        arms += ablations(base, len(corpus.modalities))
    if args.sweep_lambda is not None:
        arms += contrast_sweep(base, args.sweep_lambda or [0.01, 0.05, 0.1, 0.3])
    experiment = Experiment(arms, args.seeds, corpus, data, args.out, args.resume)
    with timer("experiment"):
        for _ in progress(experiment.rounds(), "trainings", experiment.total, args.no_progress):
            pass
    return build_report(experiment, run_card(corpus, vars(args), args.seeds, timer)).write(args.out)


def main(argv: list[str] | None = None) -> int:
    """Entry point; user errors become one line on stderr and exit status 2."""
    options = parser()
    if options.parse_args(argv).demo:
        options.set_defaults(**DEMO)
    args = options.parse_args(argv)
    try:
        html, numbers = run(args)
    except (ValueError, FileNotFoundError) as e:
        print(f"al_hcl: {e}", file=sys.stderr)
        return 2
    print(f"report: {html}\nnumbers: {numbers}")
    return 0


def _options(pairs: list[str]) -> dict[str, float]:
    try:
        return {key: float(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    except ValueError:
        raise ValueError(f"--option expects KEY=NUMBER, got {pairs}") from None


if __name__ == "__main__":
    sys.exit(main())
