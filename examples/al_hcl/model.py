"""The AL-HCL model: encoders, fusion guidance, matrix fusion, sentiment head, hierarchical contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.msa.closed_form import Design
from examples.msa.corpus import Corpus
from msacore.nn import HierarchicalContrastiveLoss, MatrixFusion

from .encoders import Encoder, FusionGuidance, PairPerceptron, masked_mean


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and parts of the model.

    Args:
        width: Common width ``k`` of tokens and of the fused embedding.
        rows: High-level features ``q`` per pair of modalities.
        heads: Attention heads.
        dropout: Share of hidden units dropped, in training and in Monte-Carlo passes.
        input_dropout: Share of raw features dropped.
        projection: Width of the space in which embeddings are contrasted.
        guidance: Whether to use fusion guidance; without it the text's mean is used as it is.
        high_level: What makes the high-level features of a pair: "matrix" (matrix fusion), "mlp" (a perceptron on the
            concatenated means, with no fewer parameters), or "none"; then tier 3 is empty.
        tier_weights: Weights of the three contrastive tiers.
        temperatures: Temperatures of the three contrastive tiers.
        tier1: "cross_modal" contrasts the modalities of a sample; "intra_modal" contrasts the classes of labelled
            samples within a modality.
        heteroscedastic: Predict a noise variance per sample (Gaussian likelihood) instead of squared error.
    """

    width: int = 64
    rows: int = 32
    heads: int = 4
    dropout: float = 0.1
    input_dropout: float = 0.1
    projection: int = 64
    guidance: bool = True
    high_level: str = "matrix"
    tier_weights: tuple[float, float, float] = (0.2, 0.3, 0.5)
    temperatures: tuple[float, float, float] = (0.1, 0.1, 0.5)
    tier1: str = "cross_modal"
    heteroscedastic: bool = True


@dataclass(frozen=True)
class Inputs:
    """Rows of a corpus as a model reads them: tokens ``[N, L_m, d_m]``, their masks, which modalities exist, and what
    closed forms read (``closed_form.Design``), ``[N, D]``."""

    features: list[Tensor]
    masks: list[Tensor]
    available: Tensor
    design: Tensor

    @classmethod
    def of(cls, corpus: Corpus, device: torch.device | str = "cpu", transductive: bool = False) -> Inputs:
        """All rows; pooled features become sequences of one token. Tokens of a missing modality are masked.

        Args:
            corpus: Standardised corpus.
            device: Device of the tensors.
            transductive: Whether closed forms read neighbours of other splits.
        """
        t = corpus.tensors(device)
        features = [x if x.dim() == 3 else x[:, None] for x in t["features"]]
        masks = t["masks"] or [torch.ones(x.shape[:2], dtype=torch.bool, device=device) for x in features]
        masks = [m & t["available"][:, i : i + 1] for i, m in enumerate(masks)]
        design = torch.from_numpy(Design.of(corpus.pooled(), transductive=transductive).values).to(device)
        return cls(features, masks, t["available"], design)

    def __getitem__(self, rows: Tensor) -> Inputs:
        features, masks = [x[rows] for x in self.features], [m[rows] for m in self.masks]
        return Inputs(features, masks, self.available[rows], self.design[rows])

    def __len__(self) -> int:
        return len(self.available)


@dataclass(frozen=True)
class Outputs:
    """Outputs of the network: correction of the closed-form path and log variance ``[B]`` in units of the labels'
    deviation, unimodal predictions ``[M, B]``, and the embeddings that the contrastive tiers compare."""

    correction: Tensor
    log_variance: Tensor
    unimodal_mean: Tensor
    unimodal: list[Tensor]
    fused: Tensor
    high_level: list[Tensor]

    @property
    def embedding(self) -> Tensor:
        """Fused and high-level features side by side, ``[B, k + P q]``."""
        return torch.cat([self.fused, *self.high_level], -1)


class SentimentModel(nn.Module):
    """AL-HCL on two or more modalities.

    Args:
        dims: Width of each modality's features; the first is the base of fusion guidance.
        sequences: Whether there are token sequences rather than one pooled token.
        aligned: Whether token ``l`` belongs to the same word in every modality; then matrix fusion sums over tokens,
            else it fuses the means.
        config: Sizes and parts.
    """

    def __init__(self, dims: tuple[int, ...], sequences: bool, aligned: bool, config: ModelConfig) -> None:
        super().__init__()
        if len(dims) < 2:
            raise ValueError(f"AL-HCL fuses two or more modalities, got {len(dims)}")
        k, m = config.width, len(dims)
        self.config, self.per_token = config, aligned or not sequences
        self.encoders = nn.ModuleList(
            Encoder(d, k, config.heads, config.dropout, config.input_dropout, sequences) for d in dims
        )
        self.guidance = FusionGuidance(k, m, config.heads) if config.guidance else None
        pairs = m * (m - 1) // 2
        self.pair_fusion: nn.Module | None = None
        if config.high_level == "matrix":
            self.pair_fusion = MatrixFusion(k, config.rows, channels=pairs, modalities=m)
        elif config.high_level == "mlp":
            self.pair_fusion = PairPerceptron(k, config.rows)
        # Column means over k + 1 columns are small; normalised, they weigh as much as the other inputs of the join.
        self.high_norm = nn.LayerNorm(config.rows)
        self.join = nn.Linear(m * k + (pairs * config.rows if self.pair_fusion else 0), k)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(k, 1)
        self.noise_head = nn.Linear(k, 1)
        self.unimodal_heads = nn.ModuleList(nn.Linear(k, 1) for _ in dims)
        weights = config.tier_weights if self.pair_fusion else (*config.tier_weights[:2], 0.0)
        self.contrast = HierarchicalContrastiveLoss(
            k, config.rows, config.projection, m, weights, config.temperatures, config.tier1
        )
        # At the start, the network does not correct the closed-form path.
        for layer in (self.head, self.noise_head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Inputs) -> Outputs:
        """Predictions and embeddings of a batch."""
        tokens = [e(f, m) for e, f, m in zip(self.encoders, x.features, x.masks, strict=True)]
        unimodal = [masked_mean(t, m) for t, m in zip(tokens, x.masks, strict=True)]
        base = unimodal[0]
        if self.guidance is not None:
            base = masked_mean(self.guidance(tokens, x.masks), _some_token(x.masks[0]))
        parts, high_level = [base, *unimodal[1:]], []
        if self.pair_fusion is not None:
            high, pairs = self._fuse(tokens, unimodal, x)
            parts.append(self.high_norm(high).flatten(1))
            high_level = list(self.high_norm(pairs).unbind(1))
        fused = self.join(torch.cat(parts, -1))
        hidden = self.dropout(nn.functional.gelu(fused) + fused)
        return Outputs(
            correction=self.head(hidden)[:, 0],
            log_variance=self.noise_head(hidden)[:, 0].clamp(-6, 4),
            unimodal_mean=torch.stack(
                [h(e.detach())[:, 0] for h, e in zip(self.unimodal_heads, unimodal, strict=True)]
            ),
            unimodal=unimodal,
            fused=fused,
            high_level=high_level,
        )

    def _fuse(self, tokens: list[Tensor], unimodal: list[Tensor], x: Inputs) -> tuple[Tensor, Tensor]:
        assert self.pair_fusion is not None
        if self.config.high_level == "mlp" or not self.per_token:
            fused, pairs = self.pair_fusion(unimodal, available=x.available)
        else:
            fused, pairs = self.pair_fusion(tokens, mask=torch.stack(x.masks).any(0), available=x.available)
        return fused, pairs

    def contrastive_loss(self, out: Outputs, available: Tensor, classes: Tensor) -> Tensor:
        """Weighted sum of the three tiers, by the fused operator.

        Args:
            out: Outputs for a batch.
            available: Its modalities, ``[B, M]``.
            classes: Class of each sample, ``[B]`` int64; each unlabelled sample has a class of its own. Read only by an
                intra-modal first tier.
        """
        high_level = out.high_level or [out.fused.new_zeros(len(out.fused), self.config.rows)] * len(
            self.contrast.pairs
        )
        loss: Tensor = self.contrast(out.unimodal, out.fused, high_level, available, classes)
        return loss


def _some_token(mask: Tensor) -> Tensor:
    """The mask, with the first token valid in rows without a valid token: there the answers alone guide."""
    first = torch.zeros_like(mask)
    first[:, 0] = ~mask.any(1)
    return mask | first
