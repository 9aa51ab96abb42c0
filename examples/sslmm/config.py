"""Every choice of a run in one place; the command line offers each by name."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Config:
    """Settings of model and training. Where the paper is silent they follow related work, or are our own.

    Args:
        width: Width of a node.
        steps: Alternations of intra-modal and inter-modal propagation.
        alpha: Share of a node's own features kept in each half-step.
        window: Neighbours on either side that an utterance receives messages from.
        transductive: Whether utterances of other splits are neighbours too, without their labels; else they leave gaps.
        variant: Propagation: ``"linear"``, ``"gcnii"`` or ``"gated"``.
        send: When missing nodes send: ``"after_fill"`` or ``"never"``.
        readout: What the head reads: ``"nodes"`` (after propagation) or ``"products"`` (also low-rank products of
            every two modalities before propagation, missing ones rebuilt).
        dropout: Dropout after the encoders and in the head.
        learning_rate: Learning rate of Adam in both stages.
        weight_decay: Weight decay of Adam in both stages.
        conversations: Conversations in a batch, at least.
        utterances: Where conversations are short, a batch holds more of them, up to about this many utterances.
        pretrain_epochs: Epochs of stage A; 0 leaves it out.
        finetune_epochs: Epochs of stage B, at most.
        patience: Stage B stops after this many epochs without a better validation error.
        mask_share: Stage A: share of the observed nodes that are masked and reconstructed.
        sce_power: Exponent of the scaled cosine error.
        node_weight: Stage A: weight of rebuilding masked nodes.
        modality_weight: Stage A: weight of rebuilding a dropped modality.
        contrast_weight: Stage A: weight of contrasting the modalities of an utterance.
        view_weight: Stage A: weight of contrasting two views of an utterance; 0 leaves it out, as it did not help.
        contrast_temperature: Temperature of both contrastive terms.
        task: Supervised loss: ``"l1"`` or ``"mse"``.
        unlabelled: Consistency on all train utterances: ``"mean_teacher"`` (the teacher also makes the final
            predictions), ``"rankup"`` or ``"none"``.
        unlabelled_weight: Weight of consistency after the ramp.
        ramp: Share of stage B over which that weight rises.
        teacher_passes: Dropout passes of the teacher per step.
        teacher_decay: Highest decay of the teacher's moving average.
        noise: Deviation of Gaussian noise on the student's features.
        reconstruction: Targets of stage B: ``"observed"`` (modalities dropped on purpose), ``"oracle"`` (the clean
            features that the simulation hid) or ``"none"``.
        reconstruction_weight: Weight of reconstruction in stage B.
    """

    width: int = 64
    steps: int = 6
    alpha: float = 0.1
    window: int = 2
    transductive: bool = False
    variant: str = "linear"
    send: str = "after_fill"
    readout: str = "products"
    dropout: float = 0.3
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    conversations: int = 16
    utterances: int = 384
    pretrain_epochs: int = 30
    finetune_epochs: int = 60
    patience: int = 10
    mask_share: float = 0.5
    sce_power: float = 2.0
    node_weight: float = 0.2
    modality_weight: float = 3.0
    contrast_weight: float = 0.5
    view_weight: float = 0.0
    contrast_temperature: float = 0.2
    task: str = "l1"
    unlabelled: str = "mean_teacher"
    unlabelled_weight: float = 1.0
    ramp: float = 0.2
    teacher_passes: int = 2
    teacher_decay: float = 0.99
    noise: float = 0.1
    reconstruction: str = "observed"
    reconstruction_weight: float = 3.0


CHOICES = {
    "variant": ("linear", "gcnii", "gated"),
    "send": ("after_fill", "never"),
    "readout": ("nodes", "products"),
    "task": ("l1", "mse"),
    "unlabelled": ("mean_teacher", "rankup", "none"),
    "reconstruction": ("observed", "oracle", "none"),
}

# What each method leaves out of the whole system.
ABLATIONS: dict[str, dict[str, object]] = {
    "SSLMM": {},
    "no pre-training": {"pretrain_epochs": 0},
    "no consistency": {"unlabelled": "none"},
    "no reconstruction": {"node_weight": 0.0, "modality_weight": 0.0, "reconstruction": "none"},
    "no reconstruction in B": {"reconstruction": "none"},
    "supervised graph": {"pretrain_epochs": 0, "unlabelled": "none", "reconstruction": "none"},
}


def ablated(config: Config, method: str) -> Config:
    """The configuration of one of ``ABLATIONS``."""
    return replace(config, **ABLATIONS[method])  # type: ignore[arg-type]


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of :class:`Config`."""
    group = parser.add_argument_group("model and training")
    for field in fields(Config):
        kind = type(field.default)
        if kind is bool:
            group.add_argument(f"--{field.name.replace('_', '-')}", action="store_true", help="(off)")
            continue
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            default=field.default,
            choices=CHOICES.get(field.name),
            metavar=None if field.name in CHOICES else kind.__name__.upper(),
            help="(%(default)s)",
        )


def config_from(args: argparse.Namespace) -> Config:
    """The configuration that parsed options ask for."""
    return Config(**{field.name: getattr(args, field.name) for field in fields(Config)})
