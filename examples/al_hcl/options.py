"""Options of AL-HCL's commands, and the system that they describe."""

from __future__ import annotations

import argparse

from msacore.selection import STRATEGIES

from .acquire import MEASURES, SelectionConfig
from .active import Arm
from .arms import REFERENCE
from .config import TrainConfig
from .model import ModelConfig
from .path import VIEWS


def add_selection_arguments(parser: argparse.ArgumentParser) -> None:
    """How utterances are chosen for labelling."""
    al = parser.add_argument_group("active learning")
    al.add_argument("--strategy", choices=sorted(STRATEGIES), default=SelectionConfig.strategy, help="(%(default)s)")
    al.add_argument(
        "--uncertainty", choices=sorted(MEASURES), default=SelectionConfig.uncertainty, help="(%(default)s)"
    )
    al.add_argument(
        "--budget", type=int, default=SelectionConfig.budget, metavar="B", help="labels per round (%(default)s)"
    )
    al.add_argument(
        "--explore",
        type=float,
        default=SelectionConfig.explore,
        help="share of a round's labels that is drawn at random (%(default)s)",
    )
    al.add_argument(
        "--informative",
        type=float,
        default=SelectionConfig.informative,
        help="share of the first labels that is chosen for what they tell about the rest, not at random (%(default)s)",
    )
    al.add_argument(
        "--gamma", type=float, default=SelectionConfig.gamma, help="exponent of the uncertainty (%(default)s)"
    )
    al.add_argument(
        "--option", action="append", default=[], metavar="KEY=NUMBER", help="option of the strategy, e.g. delta=2"
    )


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """How labels are bought in a simulated campaign."""
    protocol = parser.add_argument_group("protocol")
    protocol.add_argument(
        "--initial", type=float, default=SelectionConfig.initial, help="share labelled at first (%(default)s)"
    )
    protocol.add_argument("--rounds", type=int, default=SelectionConfig.rounds, help="rounds of buying (%(default)s)")
    protocol.add_argument(
        "--keep-training", action="store_true", help="continue from the last round's weights, not from new ones"
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Model and training."""
    model = parser.add_argument_group("model and training")
    model.add_argument("--members", type=int, default=SelectionConfig.members, help="models trained (%(default)s)")
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
    model.add_argument("--view", choices=VIEWS, help="restrict the closed-form path to this part (a stack of all)")
    model.add_argument(
        "--pretrain-steps", type=int, default=TrainConfig.pretrain_steps, help="steps of contrast alone (%(default)s)"
    )
    model.add_argument(
        "--squared-error", action="store_true", help="no predicted noise; uncertainty from dropout alone"
    )
    model.add_argument(
        "--validation",
        action="store_true",
        help="also train on the labels of the validation part; they count like bought ones",
    )
    model.add_argument(
        "--transductive",
        action="store_true",
        help="closed forms also read the features of neighbours in other splits, never their labels",
    )
    model.add_argument(
        "--steps", type=int, default=TrainConfig.steps, help="optimiser steps per training (%(default)s)"
    )


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
    if args.members < 1:
        raise ValueError(f"--members must be at least 1, got {args.members}")
    for name in ("explore", "informative"):
        if not 0 <= getattr(args, name, 0.0) <= 1:
            raise ValueError(f"--{name} is a share and must lie in [0, 1], got {getattr(args, name)}")
    # Commands that choose nothing, or simulate no campaign, lack some of these options.
    names = (
        "strategy",
        "uncertainty",
        "informative",
        "initial",
        "budget",
        "rounds",
        "keep_training",
        "members",
        "gamma",
        "explore",
    )
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    selection = SelectionConfig(**given, options=_options(getattr(args, "option", [])))
    return Arm(REFERENCE, model, training, selection)


def _options(pairs: list[str]) -> dict[str, float]:
    try:
        return {key: float(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    except ValueError:
        raise ValueError(f"--option expects KEY=NUMBER, got {pairs}") from None
