"""Saved models: fitted on what the data show, written to a folder, opened again for other data."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from examples.msa.closed_form import Design
from examples.msa.command import add_device_argument, check_device
from examples.msa.corpus import SPLITS, TRAIN, VALID, Corpus
from examples.msa.data import add_data_arguments
from examples.msa.metrics import evaluate
from examples.msa.missing import label_mask
from examples.msa.predictions import add_labels_argument, write_predictions
from examples.msa.saved import SavedModel, calibrate, calibrated, describe_inputs, save_model
from examples.msa.tokens import add_token_arguments
from examples.msa.tool import Predictor, add_each_metric_argument, say_notes, score_parts, training_data

from .closed import Blend, blend, ridges_of
from .config import Config, add_config_arguments, config_from
from .model import SSLMM
from .options import add_pattern_arguments, mask_for
from .predict import predict_corpus
from .train import Trainer

SYSTEM = "sslmm"


def add_fit_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``fit``."""
    add_data_arguments(parser, pairs="persistent")
    add_labels_argument(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/sslmm-model"), metavar="DIR", help="folder of the model (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue from the state that --out holds")
    add_device_argument(parser)
    parser.add_argument("--share", type=float, default=1.0, help="share of the train labels to use (%(default)s)")
    add_each_metric_argument(parser)
    add_pattern_arguments(parser, rate=0.0)
    add_token_arguments(parser)
    add_config_arguments(parser)


def fit_command(args: argparse.Namespace) -> int:
    """``fit``: train on the labels and modalities that are there, or on fewer, and save the model."""
    device = check_device(args.device)
    torch.set_num_threads(1)
    data = training_data(args)
    corpus, source = data.corpus.pooled(), data.source.pooled()
    observed, pattern = mask_for(source, args, args.seed)
    # What is hidden on purpose is hidden in training only; new data are predicted from everything they have.
    used = np.isin(source.split, (TRAIN, VALID))[:, None]
    labelled, labels = label_mask(source, args.share, args.seed)
    seen = np.where(used, observed, source.available)[data.origin] & corpus.available
    statistics = corpus.statistics(observed[data.origin])
    standard = source.standardise_by(statistics)
    trainer = Trainer(
        corpus.standardise_by(statistics), seen, labelled[data.origin], config_from(args), args.seed, device
    )
    checkpoint = args.out / "training.pt"
    fitted = trainer.fit(checkpoint, resume=args.resume)
    card = {
        "config": asdict(trainer.config),
        **describe_inputs(source, statistics),
        "labels": labels,
        "missing": pattern.as_dict(),
        "tokens": data.tokens,
        "seed": args.seed,
    }
    # Closed forms learn from the data as they are, with the modalities hidden that the graph does not see.
    shown = replace(standard, available=np.where(used, observed, source.available))
    learned = Learned(standard, shown, labelled, trainer.config.transductive)
    scores = _save(args.out, trainer.model, learned, card, fitted.best_epoch, device)
    if args.each_metric:
        state = trainer.per_metric.state
        for metric, best in state["best"].items():
            trainer.model.load_state_dict(state["weights"][best["when"]])
            _save(args.out / "by_metric" / metric, trainer.model, learned, card, best["when"], device)
    checkpoint.unlink(missing_ok=True)
    say_notes(source)
    for part, found in scores.items():
        print(f"{part}: n {found['n']}, MAE {found['mae']:.3f}, neg/pos {found['acc2_non0']:.3f}")
    print(f"model: {args.out}")
    return 0


class Learned:
    """The data as they are and as they were seen in training, and ridge regressions on the latter."""

    def __init__(self, whole: Corpus, shown: Corpus, labelled: np.ndarray, transductive: bool) -> None:
        self.whole, self.shown, self.labelled = whole, shown, labelled
        self.designs = [Design.of(c, None, transductive) for c in (whole, shown)]
        self.ridges = ridges_of(shown, self.designs[1], labelled)


def _save(
    folder: Path, model: SSLMM, learned: Learned, card: dict[str, Any], epoch: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Weigh the graph against closed forms, calibrate, score and save; returns the scores of each part but train."""
    whole, shown, (design, shown_design) = learned.whole, learned.shown, learned.designs
    seen = predict_corpus(model, shown, 0, device)[0]
    mixed = blend(shown, shown_design, learned.labelled, seen, learned.ridges)
    graph, variance = predict_corpus(model, whole, device=device)
    value, variance = mixed(design.values, graph), mixed.network**2 * variance
    calibration = calibrate(variance[mixed.rows], mixed.left_out - whole.labels[mixed.rows])
    # The validation part is scored on predictions by models that were not fitted on its videos.
    judged = value.copy()
    judged[mixed.rows] = mixed.left_out
    parts = [part for part in SPLITS if part != "train" and len(whole.rows(part, labelled=True))]
    scores = score_parts(judged, whole, parts)
    card = {
        **card,
        "labels": {**card["labels"], "validation": len(mixed.rows)},
        "graph": evaluate(seen[mixed.rows], whole.labels[mixed.rows].astype(np.float64), whole.family),
        "closed_form": {"offset": mixed.offset, "network": mixed.network, "weights": mixed.weights},
        "best_epoch": epoch,
        "calibration": calibration,
        "scores": scores,
    }
    network = {f"network.{name}": weight for name, weight in model.state_dict().items()}
    save_model(folder, SYSTEM, card, {**network, "coefficient": mixed.coefficient})
    write_predictions(folder / "predictions.csv", whole, value, calibrated(variance, calibration))
    return scores


def open_model(saved: SavedModel, device: torch.device) -> Predictor:
    """The function that predicts with a saved model.

    Raises:
        ValueError: Card and weights do not fit together.
    """
    try:
        model = SSLMM(list(saved.modalities.values()), Config(**saved.card["config"]))
        model.load_state_dict(saved.part("network"))
        facts = saved.card["closed_form"]
        mixed = Blend(
            saved.weights["coefficient"],
            facts["offset"],
            facts["network"],
            facts["weights"],
            np.empty(0),
            np.empty(0, np.int64),
        )
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{saved.folder}: card and weights do not fit together ({error})") from None
    model.to(device)

    def predict(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
        graph, variance = predict_corpus(model, corpus, device=device)
        design = Design.of(corpus, None, model.config.transductive)
        return mixed(design.values, graph), mixed.network**2 * variance

    return predict
