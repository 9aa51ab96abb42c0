"""Models that are kept: fit on all labels, saved to a folder, opened again for other data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.msa.checkpoint import seed_everything
from examples.msa.command import check_device
from examples.msa.corpus import Corpus
from examples.msa.predictions import write_predictions
from examples.msa.saved import SavedModel, calibrate, calibrated, describe_inputs, save_model
from examples.msa.tool import Predictor, say_notes, score_parts, training_data

from .closed import ClosedForm
from .ensemble import Ensemble, fit_ensemble
from .model import Inputs, ModelConfig, SentimentModel
from .options import base_arm
from .train import Data, Member, Trained, set_parameters

SYSTEM = "al_hcl"


def fit_command(args: argparse.Namespace) -> int:
    """``fit``: train on every label, and save what predicts."""
    device = check_device(args.device)
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    given = training_data(args)
    statistics = given.corpus.statistics()
    # Tokens that are hidden on purpose are hidden in training; predictions are made from all that is there.
    standard = given.source.standardise_by(statistics)
    data = Data.of(given.corpus.standardise_by(statistics), device, needed=("train", "valid"))
    # Copies of a video are one video: what is left out of the closed-form path's fit must be left out in all of them.
    data = replace(data, video=torch.tensor(given.source.video_index[given.origin], device=device))
    arm = base_arm(args)
    ensemble, trained = fit_ensemble(given.corpus, data, data.buyable, arm, args.seed)
    card = {
        "config": {"model": asdict(arm.model), "training": asdict(arm.training), "members": len(trained)},
        **describe_inputs(given.source, statistics),
        "labels": len(given.source.rows("train", labelled=True)),
        "tokens": given.tokens,
        "seed": args.seed,
    }
    inputs = Inputs.of(standard, device)
    scores = _save(args.out, ensemble, trained, standard, inputs, card)
    if args.each_metric:
        kept = [t.best.state for t in trained]
        for metric in [m for m in kept[0]["best"] if all(m in state["best"] for state in kept)]:
            for t, state in zip(trained, kept, strict=True):
                set_parameters(t.model, state["weights"][state["best"][metric]["when"]])
            _save(args.out / "by_metric" / metric, ensemble, trained, standard, inputs, card)
    say_notes(given.source)
    for part, found in scores.items():
        print(f"{part}: n {found['n']}, MAE {found['mae']:.3f}, neg/pos {found['acc2_non0']:.3f}")
    print(f"model: {args.out}")
    return 0


def _save(
    folder: Path,
    ensemble: Ensemble,
    trained: Sequence[Trained],
    standard: Corpus,
    inputs: Inputs,
    card: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Calibrate, score and save the members as they are; returns the scores of each part but train."""
    value, variance = ensemble.values(inputs)
    rows = standard.rows("valid", labelled=True)
    calibration = calibrate(variance[rows], value[rows] - standard.labels[rows])
    parts = [part for part in ("valid", "test") if len(standard.rows(part, labelled=True))]
    scores = score_parts(value, standard, parts)
    members = [_facts(t, path) for t, path in zip(trained, ensemble.paths, strict=True)]
    card = {**card, "members": members, "calibration": calibration, "scores": scores}
    save_model(folder, SYSTEM, card, _tensors(ensemble))
    write_predictions(folder / "predictions.csv", standard, value, calibrated(variance, calibration))
    return scores


def _facts(trained: Trained, path: ClosedForm) -> dict[str, Any]:
    scale = {"centre": trained.centre, "scale": trained.scale, "noise": trained.noise}
    return {**scale, "closed_form": path.facts(), "training": trained.facts}


def _tensors(ensemble: Ensemble) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for k, (member, path) in enumerate(zip(ensemble.members, ensemble.paths, strict=True)):
        result |= {f"member{k}.network.{name}": value for name, value in member.model.state_dict().items()}
        result |= {f"member{k}.path.{name}": value for name, value in path.tensors().items()}
    return result


def load_ensemble(saved: SavedModel, device: torch.device) -> Ensemble:
    """The ensemble that ``fit`` saved.

    Raises:
        ValueError: Card and weights do not fit together.
    """
    try:
        return _load(saved, device)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{saved.folder}: card and weights do not fit together ({error})") from None


def _load(saved: SavedModel, device: torch.device) -> Ensemble:
    card = saved.card
    config = ModelConfig(**_tuples(card["config"]["model"]))
    dims = tuple(saved.modalities.values())
    members, paths = [], []
    for k, facts in enumerate(card["members"]):
        model, learner = (SentimentModel(dims, card["sequences"], card["aligned"], config) for _ in range(2))
        model.load_state_dict(saved.part(f"member{k}.network"))
        tensors = {name: value.to(device) for name, value in saved.part(f"member{k}.path").items()}
        members.append(Member(model.to(device), facts["centre"], facts["scale"], facts["noise"]))
        paths.append(ClosedForm.load(facts["closed_form"], tensors, len(dims), learner.to(device)))
    return Ensemble(members, paths)


def open_model(saved: SavedModel, device: torch.device) -> Predictor:
    """What predicts with a saved model."""
    ensemble = load_ensemble(saved, device)
    return lambda corpus: ensemble.values(Inputs.of(corpus, device))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
