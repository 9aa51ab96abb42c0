"""The contrastive losses as modules, re-exported by `msacore.nn`."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from msacore.losses import Denominator, Reduction, Tier1, hierarchical_contrastive_loss, info_nce


def _register_log_temperature(
    module: nn.Module,
    temperature: Tensor,
    learn: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Give a module the parameter ``log_temperature``, or None in its place."""
    if not (temperature > 0).all() or not temperature.isfinite().all():
        raise ValueError(
            f"{type(module).__name__}: expected temperatures that are positive and finite, got {temperature.tolist()}"
        )
    logarithm = temperature.double().log().to(device=device, dtype=dtype or torch.get_default_dtype())
    module.register_parameter("log_temperature", nn.Parameter(logarithm) if learn else None)


class InfoNCE(nn.Module):
    """:func:`msacore.info_nce` as a module with fixed options and a temperature that can be learned.

    Args:
        temperature: Divides the similarities; positive and finite. The initial value where it is learned.
        denominator: "all", "negatives" or "decoupled".
        normalize: Cosine similarities; False takes dot products.
        symmetric: Mean of the two directions.
        exclude_self: Leave the pairs ``(i, i)`` out.
        reduction: "mean", "sum" or "none".
        learn_temperature: Make the logarithm of the temperature a parameter, ``log_temperature``.
        group: Process group whose ranks share the batch; see `group` of the loss.
        device: Device of the parameter.
        dtype: Floating dtype of the parameter.

    Example:
        >>> loss = InfoNCE(0.07, symmetric=True, learn_temperature=True)
        >>> loss(torch.randn(6, 8), torch.randn(6, 8)).backward()
        >>> loss.log_temperature.grad.shape
        torch.Size([])
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        denominator: Denominator = "all",
        normalize: bool = True,
        symmetric: bool = False,
        exclude_self: bool = False,
        reduction: Reduction = "mean",
        learn_temperature: bool = False,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.denominator, self.normalize = temperature, denominator, normalize
        self.symmetric, self.exclude_self, self.reduction, self.group = symmetric, exclude_self, reduction, group
        _register_log_temperature(self, torch.tensor(temperature), learn_temperature, device, dtype)

    def forward(
        self,
        anchors: Tensor,
        candidates: Tensor | None = None,
        *,
        labels: Tensor | tuple[Tensor, Tensor] | None = None,
        weights: Tensor | None = None,
        negatives: Tensor | None = None,
        negative_mask: Tensor | None = None,
        anchor_mask: Tensor | None = None,
        candidate_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; the arguments are those of :func:`msacore.info_nce`."""
        return info_nce(
            anchors,
            candidates,
            temperature=self.temperature if self.log_temperature is None else self.log_temperature.exp(),
            labels=labels,
            weights=weights,
            negatives=negatives,
            negative_mask=negative_mask,
            denominator=self.denominator,
            normalize=self.normalize,
            anchor_mask=anchor_mask,
            candidate_mask=candidate_mask,
            symmetric=self.symmetric,
            exclude_self=self.exclude_self,
            reduction=self.reduction,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """Return the options, as in the constructor."""
        return (
            f"temperature={self.temperature}, denominator={self.denominator!r}, normalize={self.normalize}, "
            f"symmetric={self.symmetric}, exclude_self={self.exclude_self}, reduction={self.reduction!r}, "
            f"learn_temperature={self.log_temperature is not None}"
        )


class HierarchicalContrastiveLoss(nn.Module):
    """Project every embedding, then apply :func:`msacore.hierarchical_contrastive_loss`.

    Each modality, the fused embedding and each pair has a linear projection of its own.

    Args:
        in_features: Width of the unimodal and fused embeddings.
        high_level_features: Width of the high-level features of a pair.
        projection: Width after projection.
        modalities: Number of modalities M.
        tier_weights: Weights of the three tiers.
        temperatures: Temperatures of the three tiers. The initial values where they are learned.
        tier1: "cross_modal" or "intra_modal".
        normalize: Cosine similarities; False takes dot products.
        learn_temperature: Make the logarithms of the temperatures a parameter, ``log_temperature`` ``[3]``.
        group: Process group whose ranks share the batch; see `group` of the loss.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Example:
        >>> loss = HierarchicalContrastiveLoss(in_features=8, high_level_features=4, projection=16)
        >>> unimodal, fused = [torch.randn(6, 8) for _ in range(3)], torch.randn(6, 8)
        >>> loss(unimodal, fused, [torch.randn(6, 4) for _ in range(3)]).shape
        torch.Size([])
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        high_level_features: int,
        projection: int = 128,
        modalities: int = 3,
        tier_weights: Sequence[float] = (0.2, 0.3, 0.5),
        temperatures: Sequence[float] = (0.1, 0.1, 0.5),
        tier1: Tier1 = "cross_modal",
        normalize: bool = True,
        learn_temperature: bool = False,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if modalities < 1:
            raise ValueError(f"HierarchicalContrastiveLoss: expected `modalities` to be at least 1, got {modalities}")
        self.in_features, self.high_level_features, self.projection = in_features, high_level_features, projection
        self.modalities, self.tier1, self.normalize, self.group = modalities, tier1, normalize, group
        self.tier_weights, self.temperatures = tuple(tier_weights), tuple(temperatures)
        _register_log_temperature(self, torch.tensor(self.temperatures), learn_temperature, device, dtype)
        self.pairs = list(combinations(range(modalities), 2))

        def linear(width: int) -> nn.Linear:
            return nn.Linear(width, projection, device=device, dtype=dtype)

        self.unimodal = nn.ModuleList(linear(in_features) for _ in range(modalities))
        self.fused = linear(in_features)
        self.high_level = nn.ModuleList(linear(high_level_features) for _ in self.pairs)

    def forward(
        self,
        unimodal: Sequence[Tensor],
        fused: Tensor,
        high_level: Sequence[Tensor],
        available: Tensor | None = None,
        labels: Tensor | None = None,
        return_tiers: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the loss, and with ``return_tiers`` the three tiers ``[3]``.

        Args:
            unimodal: M tensors ``[N, in_features]``.
            fused: ``[N, in_features]``.
            high_level: M(M-1)/2 tensors ``[N, high_level_features]`` in the order (0, 1), (0, 2), (1, 2), ….
            available: Modalities present in a sample, ``[N, M]``, bool.
            labels: ``[N]``, of any integer dtype; needed by "intra_modal".
            return_tiers: Also return the tiers.
        """
        if len(unimodal) != self.modalities or len(high_level) != len(self.pairs):
            raise ValueError(
                f"HierarchicalContrastiveLoss: expected {self.modalities} tensors in `unimodal` and {len(self.pairs)} "
                f"in `high_level`, got {len(unimodal)} and {len(high_level)}"
            )
        if available is not None:
            # The gradient of a projection's weight reads its input, so missing rows are cleared first.
            columns = available.unbind(1)
            exist = [columns[m] & columns[n] for m, n in self.pairs]
            unimodal = [torch.where(e[:, None], x, 0) for e, x in zip(columns, unimodal, strict=True)]
            high_level = [torch.where(e[:, None], x, 0) for e, x in zip(exist, high_level, strict=True)]
        temperatures: Sequence[float | Tensor] = self.temperatures
        if self.log_temperature is not None:
            temperatures = self.log_temperature.exp().unbind()
        return hierarchical_contrastive_loss(
            [project(x) for project, x in zip(self.unimodal, unimodal, strict=True)],
            self.fused(fused),
            [project(x) for project, x in zip(self.high_level, high_level, strict=True)],
            available=available,
            labels=labels,
            tier_weights=self.tier_weights,
            temperatures=temperatures,
            tier1=self.tier1,
            normalize=self.normalize,
            return_tiers=return_tiers,
            group=self.group,
        )

    def extra_repr(self) -> str:
        """Return the sizes and options, as in the constructor."""
        return (
            f"in_features={self.in_features}, high_level_features={self.high_level_features}, "
            f"projection={self.projection}, modalities={self.modalities}, tier_weights={self.tier_weights}, "
            f"temperatures={self.temperatures}, tier1={self.tier1!r}, normalize={self.normalize}, "
            f"learn_temperature={self.log_temperature is not None}"
        )
