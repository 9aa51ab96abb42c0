"""Saved models: a folder with weights, and a JSON file that says what they are and what they expect."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .corpus import LABEL_RANGE, Corpus
from .files import write_atomic
from .report import to_json, versions

FORMAT = 1
CARD, WEIGHTS = "model.json", "weights.safetensors"
KEYS = ("system", "config", "family", "modalities", "sequences", "aligned", "statistics", "data", "calibration")


@dataclass(frozen=True)
class SavedModel:
    """What a model folder holds: the content of ``model.json``, and the weights by name."""

    folder: Path
    card: dict[str, Any]
    weights: dict[str, Tensor]

    @property
    def modalities(self) -> dict[str, int]:
        """Feature widths by name, in the order the model reads them."""
        return self.card["modalities"]

    @property
    def statistics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """What features are standardised by, as ``Corpus.standardise_by`` takes it."""
        return {
            name: (np.float32(value["mean"]), np.float32(value["scale"]))
            for name, value in self.card["statistics"].items()
        }

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights whose names start with ``prefix.``, without it."""
        start = f"{prefix}."
        return {name[len(start) :]: value for name, value in self.weights.items() if name.startswith(start)}


def describe_inputs(corpus: Corpus, statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """The part of ``model.json`` that says what a model reads, from the corpus it was fitted on."""
    return {
        "family": corpus.family,
        "modalities": dict(zip(corpus.modalities, corpus.dims, strict=True)),
        "sequences": corpus.sequences,
        "aligned": corpus.aligned,
        "statistics": {k: {"mean": mean, "scale": scale} for k, (mean, scale) in statistics.items()},
        "data": corpus.describe(),
    }


def save_model(folder: str | Path, system: str, card: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Path:
    """Write a model folder; an existing model is replaced.

    Args:
        folder: Folder to write to; it is created if missing.
        system: Name of the system that the model belongs to.
        card: Everything in ``model.json`` except format, system, versions and the hash of the weights.
        weights: Tensors by name.

    Raises:
        ValueError: The path is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"--out {folder}: it is a file; a model is saved as a folder")
    content = save_tensors({name: value.detach().cpu().contiguous() for name, value in weights.items()})
    write_atomic(folder / WEIGHTS, content)
    head = {
        "format": FORMAT,
        "system": system,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
        "versions": versions(),
    }
    write_atomic(folder / CARD, to_json({**head, **card}))
    return folder


def load_model(folder: str | Path, system: str) -> SavedModel:
    """Read what :func:`save_model` wrote.

    Raises:
        ValueError: A file is damaged or of another format, or the model belongs to another system.
        FileNotFoundError: There is no model in the folder.
    """
    folder = Path(folder)
    for name in (CARD, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"--model {folder}: it holds no saved model ({name} is missing)")
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CARD}: damaged, or not a JSON file ({error})") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError(f"{folder / CARD}: not a model of format {FORMAT} of these systems")
    absent = [key for key in KEYS if key not in card]
    if absent:
        raise ValueError(f"{folder / CARD}: damaged, it lacks {absent}")
    if card["system"] != system:
        other = card["system"]
        raise ValueError(f"--model {folder}: it was fitted by {other}, not {system}; use python -m examples.{other}")
    content = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(content).hexdigest() != card.get("weights_sha256"):
        raise ValueError(f"{folder / WEIGHTS}: damaged, or of another fit than {CARD} (their hashes differ)")
    try:
        weights = load_tensors(content)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not a safetensors file ({error})") from None
    return SavedModel(folder, card, weights)


def fit_inputs(corpus: Corpus, model: SavedModel) -> Corpus:
    """The corpus as the model reads it: its modalities in its order, standardised by its statistics.

    A modality that the corpus lacks is missing in every utterance; one that the model does not know is left out. Notes
    say so.

    Raises:
        ValueError: No modality is shared, a width differs, or one has sequences and the other does not.
    """
    wanted = model.modalities
    if not any(name in corpus.features for name in wanted):
        raise ValueError(
            f"{corpus.name} has none of the modalities {list(wanted)} that the model in {model.folder} reads; it has "
            f"{list(corpus.modalities)}"
        )
    if corpus.sequences != model.card["sequences"]:
        kind = "sequences" if model.card["sequences"] else "one vector per utterance"
        raise ValueError(
            f"{corpus.name}: the model in {model.folder} was fitted on {kind}, which these features are not"
        )
    if model.card["aligned"] and not corpus.aligned:
        raise ValueError(f"{corpus.name}: the model in {model.folder} was fitted on aligned sequences, these are not")
    for name, width in wanted.items():
        found = corpus.features[name].shape[-1] if name in corpus.features else width
        if found != width:
            raise ValueError(
                f"{corpus.name}: {name} has width {found}, but the model in {model.folder} was fitted on width "
                f"{width}: features must come from the same extractor"
            )
    notes = list(corpus.notes)
    lacking = [name for name in wanted if name not in corpus.features]
    ignored = [name for name in corpus.modalities if name not in wanted]
    if lacking:
        notes.append(f"missing in every utterance: {', '.join(lacking)}")
    if ignored:
        notes.append(f"not read by the model: {', '.join(ignored)}")
    n = len(corpus)
    steps = next(x.shape[1] for x in corpus.features.values()) if corpus.sequences else 0
    empty = {name: np.zeros((n, steps, w) if steps else (n, w), np.float32) for name, w in wanted.items()}
    column = {name: corpus.available[:, i] for i, name in enumerate(corpus.modalities)}
    adapted = replace(
        corpus,
        features={name: corpus.features.get(name, empty[name]) for name in wanted},
        masks={k: corpus.masks.get(k, np.zeros((n, steps), bool)) for k in wanted} if steps else {},
        available=np.column_stack([column.get(name, np.zeros(n, bool)) for name in wanted]),
        notes=tuple(notes),
    )
    return adapted.standardise_by(model.statistics)


def calibrated(variance: np.ndarray, calibration: Mapping[str, float]) -> np.ndarray:
    """Expected error of each prediction, in units of the label, from the variance of stochastic passes."""
    return np.sqrt(variance * calibration["factor"] + calibration["floor"])


def calibrate(variance: np.ndarray, error: np.ndarray) -> dict[str, float]:
    """A calibration for which the mean square of :func:`calibrated` equals the mean square of the errors.

    What the variances leave unexplained is added to each of them; where they are too large, all are scaled down.

    Args:
        variance: Variance of the stochastic passes, per row.
        error: Prediction minus label, per row; the model must not have been fitted on these labels.
    """
    claimed, found = float(np.mean(variance)), float(np.mean(np.square(error)))
    if claimed > found:
        return {"factor": found / claimed, "floor": 0.0}
    return {"factor": 1.0, "floor": found - claimed}


def rescaled(value: np.ndarray, source: str, target: str) -> np.ndarray:
    """Scores on the label range of one family, as scores on the range of another."""
    return value * (LABEL_RANGE[target][1] / LABEL_RANGE[source][1])
