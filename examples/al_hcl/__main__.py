"""Command line of AL-HCL: ``python -m examples.al_hcl [run|fit|predict|evaluate|pick] --data PATH …``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.msa.checkpoint import seed_everything
from examples.msa.command import (
    Command,
    add_device_argument,
    add_tensorboard_argument,
    check_device,
    command_line,
    tensorboard_writer,
)
from examples.msa.data import add_data_arguments, load_from
from examples.msa.missing import KINDS
from examples.msa.patterns import add_test_arguments, test_patterns
from examples.msa.predictions import add_labels_argument
from examples.msa.report import Report, run_card
from examples.msa.timing import StageTimer, add_progress_argument, progress
from examples.msa.tokens import add_token_arguments
from examples.msa.tool import (
    add_each_metric_argument,
    evaluate_arguments,
    evaluate_command,
    predict_arguments,
    predict_command,
)

from .active import Arm
from .arms import ablations, comparison, contrast_sweep
from .data import Data
from .experiment import Experiment
from .fit import SYSTEM, fit_command, open_model
from .options import add_model_arguments, add_protocol_arguments, add_selection_arguments, base_arm
from .pick import add_pick_arguments, pick_command
from .report import build_report

DESCRIPTION = "AL-HCL: active learning and hierarchical contrastive learning for multimodal sentiment."
# Small enough for three minutes on two cores, which share the seeds; options on the command line take precedence. The
# embedded corpus gets eight seeds, so that the planted effects show beyond the spread of the first labels.
DEMO = {"seeds": [0, 1, 2, 3, 4], "jobs": 2, "rounds": 2, "budget": 30, "width": 32, "pretrain_steps": 120, "steps": 20}
DEMO_EMBEDDED = {"size": 900, "seeds": list(range(8)), "ablate": ["without contrast"]}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``run``."""
    add_data_arguments(parser)
    add_progress_argument(parser)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--out", type=Path, default=Path("runs/al_hcl"), metavar="DIR", help="report and checkpoints (%(default)s)"
    )
    run.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="S", help="one run per seed (0 1 2 3 4)"
    )
    run.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    add_device_argument(run)
    _add_threads(run)
    run.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the seeds, with one thread each (%(default)s)",
    )
    run.add_argument(
        "--ablate", nargs="*", metavar="ARM", help="also run an arm without each part, or only the arms named"
    )
    run.add_argument(
        "--sweep-lambda", type=float, nargs="*", metavar="λ", help="also run these contrast weights (.01 .05 .1 .3)"
    )
    run.add_argument(
        "--demo", action="store_true", help="a quick comparison; without --data, on a small corpus and with an ablation"
    )
    add_tensorboard_argument(run)
    add_test_arguments(parser)
    parser.add_argument(
        "--test-pattern",
        choices=[k for k in KINDS if k != "fixed"],
        default="exact",
        help="kind of pattern for --test-rates (%(default)s)",
    )
    add_selection_arguments(parser)
    add_protocol_arguments(parser)
    add_model_arguments(parser)


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fit``."""
    add_data_arguments(parser)
    add_labels_argument(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/al_hcl-model"), metavar="DIR", help="folder of the model (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    add_device_argument(parser)
    _add_threads(parser)
    add_each_metric_argument(parser)
    add_token_arguments(parser)
    add_model_arguments(parser)


def _add_threads(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; small models gain nothing from more (%(default)s)"
    )


def demo(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--demo`` changes; the data of ``--data`` keep their size."""
    return {**DEMO} if args.data else {**DEMO, **DEMO_EMBEDDED}


def chosen_ablations(arms: list[Arm], names: list[str]) -> list[Arm]:
    """The arms with these names; all of them when no name is given.

    Raises:
        ValueError: There is no such arm.
    """
    unknown = [name for name in names if name not in {arm.name for arm in arms}]
    if unknown:
        raise ValueError(f"--ablate: there is no arm {unknown[0]!r}; there are {', '.join(arm.name for arm in arms)}")
    return [arm for arm in arms if not names or arm.name in names]


def run(args: argparse.Namespace) -> Report:
    """Run everything; returns the report."""
    if args.rounds < 1 or args.budget < 1:
        raise ValueError(f"--rounds and --budget must be at least 1, got {args.rounds} and {args.budget}")
    if args.uncertainty == "ensemble_variance" and args.members < 2:
        raise ValueError("--uncertainty ensemble_variance compares models: give --members 2 or more")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds must differ, got {args.seeds}")
    device = check_device(args.device)
    writer = tensorboard_writer(args.tensorboard)
    torch.set_num_threads(args.threads)
    seed_everything(args.seeds[0])
    timer = StageTimer()
    with timer("load"):
        corpus = load_from(args).standardise()
        data = Data.of(corpus, device, validation=args.validation, transductive=args.transductive)
    if args.demo and args.data and args.budget == DEMO["budget"]:
        # A demo must run on any data: it buys at most the labels that the train part has left.
        spare = len(data.buyable) - max(1, round(args.initial * len(data.buyable)))
        args.budget = max(1, min(args.budget, spare // args.rounds))
    base = base_arm(args)
    arms = comparison(base)
    if args.ablate is not None:
        arms += chosen_ablations(ablations(base, len(corpus.modalities)), args.ablate)
    if args.sweep_lambda is not None:
        arms += contrast_sweep(base, args.sweep_lambda or [0.01, 0.05, 0.1, 0.3])
    patterns = test_patterns(corpus, args, args.test_pattern, args.seeds[0])
    jobs = min(args.jobs, len(args.seeds))
    experiment = Experiment(arms, args.seeds, corpus, data, args.out, args.resume, patterns, jobs)
    with timer("experiment"):
        for _ in progress(experiment.rounds(), "training", experiment.total, args.no_progress, experiment.describe):
            pass
    if writer is not None:
        experiment.write_curves(writer)
    return build_report(experiment, run_card(corpus, vars(args), args.seeds, timer))


def run_command(args: argparse.Namespace) -> int:
    """``run``: run the experiment, write its report, and print the result in a sentence and where the report is."""
    report = run(args)
    html, numbers = report.write(args.out)
    if report.headline:
        print(report.headline)
    print(f"report: {html}\nnumbers: {numbers}")
    return 0


COMMANDS = {
    "run": Command(
        "simulate rounds of bought labels and compare; writes a report", add_run_arguments, run_command, demo
    ),
    "pick": Command("choose clips to label next, and make a page to label them on", add_pick_arguments, pick_command),
    "fit": Command("train on every label and save the model", add_fit_arguments, fit_command),
    "predict": Command(
        "predictions of a saved model for other data",
        predict_arguments("independent"),
        predict_command(SYSTEM, open_model),
    ),
    "evaluate": Command(
        "scores of a saved model on other data", evaluate_arguments("independent"), evaluate_command(SYSTEM, open_model)
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; user errors become one line on stderr and exit status 2."""
    return command_line("examples.al_hcl", DESCRIPTION, COMMANDS, argv)


if __name__ == "__main__":
    sys.exit(main())
