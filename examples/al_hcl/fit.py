"""Saved models: fitted on all labels, written to a folder, opened again for other data."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.msa.checkpoint import seed_everything
from examples.msa.command import check_device
from examples.msa.corpus import Corpus
from examples.msa.metrics import evaluate
from examples.msa.predictions import write_predictions
from examples.msa.saved import SavedModel, calibrate, calibrated, describe_inputs, save_model
from examples.msa.tool import Predictor, say_notes, score_parts, training_data

from .data import Data
from .ensemble import Ensemble, fit_ensemble, left_out
from .model import Inputs, ModelConfig, SentimentModel
from .options import base_arm
from .path import ClosedForm
from .predict import Member
from .train import Trained, best_in

SYSTEM = "al_hcl"
LEFT_OUT = "labelled videos left out"


def fit_command(args: argparse.Namespace) -> int:
    """``fit``: train on every label, and save the model."""
    device = check_device(args.device)
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    given = training_data(args, validation=False)
    statistics = given.corpus.statistics()
    # Tokens hidden on purpose are hidden in training only; predictions are made from the complete data.
    standard = given.source.standardise_by(statistics)
    data = Data.of(given.corpus.standardise_by(statistics), device, ("train",), args.validation, args.transductive)
    # Copies of a video count as one video: leaving a video out of a fit must leave out all its copies.
    data = replace(data, video=torch.tensor(given.source.video_index[given.origin], device=device))
    arm = base_arm(args)
    labelled = torch.cat([data.buyable, data.given])
    ensemble, trained = fit_ensemble(given.corpus, data, labelled, arm, args.seed)
    rows = given.origin[labelled.cpu().numpy()]
    card = {
        "config": {"model": asdict(arm.model), "training": asdict(arm.training), "members": len(trained)},
        **describe_inputs(given.source, statistics),
        "labels": len(np.unique(rows)),
        "transductive": args.transductive,
        "tokens": given.tokens,
        "seed": args.seed,
    }
    inputs = Inputs.of(standard, device, args.transductive)
    parts = [p for p in ("valid", "test") if len(standard.rows(p, True)) and not (p == "valid" and args.validation)]
    save = partial(_save, standard=standard, inputs=inputs, rows=rows, parts=parts, card=card)
    scores = save(args.out, ensemble, trained)
    if args.each_metric:
        for metric in [m for m in trained[0].best.state["best"] if all(m in t.best.state["best"] for t in trained)]:
            chosen = [best_in(t, metric) for t in trained]
            save(args.out / "by_metric" / metric, Ensemble(chosen, ensemble.paths), chosen)
    say_notes(given.source)
    for part, found in scores.items():
        print(f"{part}: n {found['n']}, MAE {found['mae']:.3f}, neg/pos {found['acc2_non0']:.3f}")
    print(f"model: {args.out}")
    return 0


def _save(
    folder: Path,
    ensemble: Ensemble,
    trained: Sequence[Trained],
    *,
    standard: Corpus,
    inputs: Inputs,
    rows: np.ndarray,
    parts: list[str],
    card: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Calibrate, score and save the members as they are; returns the scores of the labelled videos, each predicted by
    models not fitted on it, and the scores of each part whose labels were not read."""
    value, variance = ensemble.values(inputs)
    judged, truth = left_out(trained), standard.labels[rows].astype(np.float64)
    calibration = calibrate(variance[rows], judged - truth)
    scores = {LEFT_OUT: evaluate(judged, truth, standard.family), **score_parts(value, standard, parts)}
    members = [_facts(t, path) for t, path in zip(trained, ensemble.paths, strict=True)]
    card = {**card, "members": members, "calibration": calibration, "scores": scores}
    save_model(folder, SYSTEM, card, _tensors(ensemble))
    write_predictions(folder / "predictions.csv", standard, value, calibrated(variance, calibration))
    return scores


def _facts(trained: Trained, path: ClosedForm) -> dict[str, Any]:
    scale = {"centre": trained.centre, "scale": trained.scale, "weight": trained.weight, "noise": trained.noise}
    return {**scale, "networks": len(trained.models), "closed_form": path.facts(), "training": trained.facts}


def _tensors(ensemble: Ensemble) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for k, (member, path) in enumerate(zip(ensemble.members, ensemble.paths, strict=True)):
        for j, model in enumerate(member.models):
            result |= {f"member{k}.network{j}.{name}": value for name, value in model.state_dict().items()}
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
        *models, learner = (
            SentimentModel(dims, card["sequences"], card["aligned"], config) for _ in range(facts["networks"] + 1)
        )
        for j, model in enumerate(models):
            model.load_state_dict(saved.part(f"member{k}.network{j}"))
            model.to(device)
        tensors = {name: value.to(device) for name, value in saved.part(f"member{k}.path").items()}
        members.append(Member(models, facts["centre"], facts["scale"], facts["weight"], facts["noise"]))
        paths.append(ClosedForm.load(facts["closed_form"], tensors, learner.to(device)))
    return Ensemble(members, paths)


def open_model(saved: SavedModel, device: torch.device) -> Predictor:
    """The function that predicts with a saved model."""
    ensemble = load_ensemble(saved, device)
    transductive = bool(saved.card["transductive"])
    return lambda corpus: ensemble.values(Inputs.of(corpus, device, transductive))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
