"""Contrastive training before any label, which learns from the whole train part what the modalities share."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TrainConfig
from .data import Data
from .model import Inputs, SentimentModel


def pretrain(model: SentimentModel, data: Data, config: TrainConfig, seed: int) -> Tensor:
    """Train ``model``, in place, on the contrastive loss of the train rows; no label is read.

    Nothing is trained where the contrastive loss has no weight.

    Args:
        model: New model.
        data: The corpus.
        config: Training configuration: ``pretrain_steps`` steps of ``pretrain_rows`` rows.
        seed: Seed of batches and dropout.

    Returns:
        Embedding of every row of the corpus, ``[N, k]`` float32.
    """
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    if config.contrast_weight and config.pretrain_steps:
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.pretrain_steps)
        model.train()
        for _ in range(config.pretrain_steps):
            chosen = torch.randperm(len(data.train), generator=order)[: config.pretrain_rows]
            rows = data.train[chosen.to(data.train.device)]
            batch = data.inputs[rows]
            # No row has a label: each is a class of its own.
            loss = model.contrastive_loss(model(batch), batch.available, -1 - rows)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return embed(model, data.inputs)


@torch.no_grad()
def embed(model: SentimentModel, inputs: Inputs) -> Tensor:
    """Embedding of every row, ``[N, k]`` float32, without dropout."""
    model.eval()
    return torch.cat([model(inputs[rows]).embedding for rows in torch.arange(len(inputs)).split(4096)])
