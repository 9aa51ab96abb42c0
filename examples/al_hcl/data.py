"""A standardised corpus as tensors, and which of its rows have a label that may be read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.msa.closed_form import Design, Linear, columns, fit_views
from examples.msa.corpus import Corpus
from examples.msa.metrics import SIMS_BINS

from .model import Inputs


@dataclass(frozen=True)
class Data:
    """A standardised corpus as tensors: inputs, labels and label classes of all rows, the row numbers of each part, the
    video number of each row, and the metric family.

    ``train`` holds all rows of the train part, ``buyable`` those that have a label. ``given`` holds the labelled rows
    of the validation part where its labels may be used: they are trained on from the start and count like bought ones.
    ``test`` holds labelled rows only. ``design`` holds the same values as ``inputs.design``, with its columns by name;
    ``transductive`` says whether they include neighbours of other splits.
    """

    inputs: Inputs
    labels: Tensor
    classes: Tensor
    train: Tensor
    buyable: Tensor
    given: Tensor
    test: Tensor
    video: Tensor
    family: str
    design: Design
    transductive: bool = False

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        device: torch.device | str = "cpu",
        needed: tuple[str, ...] = ("train", "test"),
        validation: bool = False,
        transductive: bool = False,
    ) -> Data:
        """From a standardised corpus.

        Args:
            corpus: The corpus.
            device: Device of the tensors.
            needed: Parts that must have labels.
            validation: Whether labels of the validation part are used.
            transductive: Whether closed forms read neighbours of other splits.

        Raises:
            ValueError: A part that is needed holds no labelled utterance.
        """
        rows = {part: corpus.rows(part, labelled=True) for part in ("train", "test")}
        given = corpus.rows("valid", labelled=True)[: None if validation else 0]
        parts = {**rows, "valid": given}
        empty = [part for part in (*needed, *(["valid"] if validation else [])) if len(parts[part]) == 0]
        if empty:
            raise ValueError(f"corpus {corpus.name!r} has no utterance in its {' or '.join(empty)} part with a label")
        rows |= {"buyable": rows["train"], "train": corpus.rows("train"), "given": given}
        tensors = {part: torch.tensor(r, device=device) for part, r in rows.items()}
        labels = torch.tensor(corpus.labels, device=device)
        video = torch.tensor(corpus.video_index, device=device)
        classes = torch.tensor(label_classes(corpus.labels, corpus.family), device=device)
        inputs = Inputs.of(corpus, device, transductive)
        design = Design(inputs.design.cpu().numpy(), columns(corpus.modalities, corpus.dims))
        return cls(
            inputs,
            labels,
            classes,
            **tensors,
            video=video,
            family=corpus.family,
            design=design,
            transductive=transductive,
        )

    def ridges(self, labelled: Tensor) -> dict[str, Linear]:
        """Ridge regressions on labelled rows, which the closed-form path stacks and reports compare."""
        rows, labels = labelled.cpu().numpy(), self.labels.cpu().numpy()
        return fit_views(self.design, labels, rows, self.video.cpu().numpy())


def label_classes(labels: np.ndarray, family: str) -> np.ndarray:
    """Classes of labels for supervised contrast, int64: whole numbers on MOSI's scale, the five classes of SIMS.

    A missing label counts as 0; the class of such a row is never used.
    """
    labels = np.nan_to_num(labels)
    if family == "sims":
        return np.digitize(labels, np.float32(SIMS_BINS["acc5"]), right=True).astype(np.int64)
    return np.round(np.clip(labels, -3, 3)).astype(np.int64) + 3
