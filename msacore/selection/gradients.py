"""Gradient embeddings for BADGE: outer products that are never formed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from msacore.selection.pool import Pool

# Squared distances below this share of the squared norms are rounding errors: such samples are equal.
_ROUNDING = 1e-13
_BLOCK = 4096  # rows compared with all centres at once


@dataclass(frozen=True)
class GradientEmbeddings:
    """Samples ``scale[i] ⊗ features[i]``, given by their factors.

    Attributes:
        scale: Gradient of the loss with respect to the logits, ``[N, K]``.
        features: Input of the head, ``[N, d]``.
    """

    scale: Tensor
    features: Tensor


def gradient_embeddings(
    features: Tensor, probabilities: Tensor | None = None, *, uncertainty: Tensor | None = None, bias: bool = False
) -> GradientEmbeddings:
    """Gradients of the loss with respect to the weights of a linear head, for ``select(..., strategy="kmeans++")``.

    Args:
        features: Input of the head, ``[N, d]``; floating.
        probabilities: Predicted class probabilities, ``[N, K]``: classification. Omitted: regression.
        uncertainty: Regression only: variance of the residual, ``[N]``, at least 0; ones when omitted.
        bias: Whether the head has a bias, which adds the feature 1.

    Returns:
        The factors, ``[N, K]`` (regression: ``[N, 1]``) and ``[N, d + bias]``. The K·d products are never formed.

    Raises:
        ValueError: A shape, dtype or range above does not hold, or ``uncertainty`` is given with ``probabilities``.

    Note:
        Classification (Ash et al., 2020): the cross-entropy gradient at the most likely class,
        ``(p_i - onehot(argmax p_i)) ⊗ x_i``. Regression has no label-free residual; its root mean square replaces it:
        ``sqrt(u_i) · x_i``. ``‖g_i - g_j‖² = ‖p_i‖²‖x_i‖² + ‖p_j‖²‖x_j‖² - 2 (p_i · p_j)(x_i · x_j)``.

    Example:
        >>> g = gradient_embeddings(torch.eye(2), torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
        >>> g.scale
        tensor([[-0.5000,  0.5000],
                [ 0.2500, -0.2500]])
    """
    name = "gradient_embeddings"
    features = torch.as_tensor(features)
    probabilities = None if probabilities is None else torch.as_tensor(probabilities)
    uncertainty = None if uncertainty is None else torch.as_tensor(uncertainty)
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"{name}: expected `features` [N, d] floating, got {features.dtype} {list(features.shape)}")
    n = len(features)
    if probabilities is not None:
        if uncertainty is not None:
            raise ValueError(f"{name}: expected `uncertainty` with a regression head only, got it with `probabilities`")
        if probabilities.dim() != 2 or probabilities.shape[0] != n or probabilities.shape[1] < 2:
            raise ValueError(
                f"{name}: expected `probabilities` [N, K] = [{n}, K >= 2], got {list(probabilities.shape)}"
            )
        likely = torch.nn.functional.one_hot(probabilities.argmax(1), probabilities.shape[1])
        scale = probabilities.detach() - likely.to(probabilities)
    else:
        u = torch.ones(n, dtype=features.dtype, device=features.device) if uncertainty is None else uncertainty
        if u.shape != (n,) or bool((u < 0).any()):
            raise ValueError(f"{name}: expected `uncertainty` [N] = [{n}] of at least 0, got {list(u.shape)}")
        scale = u.detach().to(features)[:, None].sqrt()
    features = features.detach()
    if bias:
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    return GradientEmbeddings(scale, features)


class FactoredPool(Pool):
    """A pool of outer products; a centre is the two factors side by side."""

    def __init__(self, scale: Tensor, features: Tensor, note: Callable[[str], Any]) -> None:
        if scale.dim() != 2 or features.dim() != 2 or len(scale) != len(features):
            raise ValueError(
                f"select: expected gradient embeddings [N, K] and [N, d], got {list(scale.shape)}, "
                f"{list(features.shape)}"
            )
        self._classes = scale.shape[1]
        dtype = torch.promote_types(scale.dtype, features.dtype)
        super().__init__(torch.cat([scale.to(dtype), features.to(dtype)], 1), "euclidean", note)

    def _factors(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        rows = rows.double()
        return rows[:, : self._classes].contiguous(), rows[:, self._classes :].contiguous()

    def _squares(self, rows: Tensor, centers: Tensor) -> Tensor:
        """Squared distances ``[A, n]``, from sums in a fixed order, so that each depends on its two rows alone."""
        (p, x), (q, y) = self._factors(rows), self._factors(centers)
        here, there = _squared_norms(p) * _squared_norms(x), _squared_norms(q) * _squared_norms(y)
        total = here[:, None] + there[None, :]
        squares = total - 2 * _products(p, q) * _products(x, y)
        return squares.where(squares > _ROUNDING * total, 0)

    def fold(self, rows: Tensor, start: Tensor, centers: Tensor, delta: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
        if not len(centers) or not len(rows):
            return delta, owner
        number = torch.arange(len(centers), device=self.device)
        parts = []
        for part in torch.arange(len(rows), device=self.device).split(_BLOCK):
            late = number[None, :] < start[part][:, None]
            distance = self._squares(self.gather(rows[part]), centers).sqrt().masked_fill(late, torch.inf)
            parts.append(distance.min(1))
        nearest, found = torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
        closer = nearest < delta
        return nearest.where(closer, delta), found.where(closer, owner)

    def distances_to(self, center: Tensor, metric: int | None = None) -> Tensor:
        parts = [self._squares(values, center)[:, 0].sqrt() for _, values in self.parts()]
        return torch.cat([center.new_empty(0), *parts])

    def norms(self) -> Tensor:
        return self.distances_to(torch.zeros_like(self.mean)[None])


def _products(a: Tensor, b: Tensor) -> Tensor:
    return kcenter.products(a, torch.arange(len(a), device=a.device), b, torch.zeros_like(b[0]))


def _squared_norms(rows: Tensor) -> Tensor:
    here, origin = torch.arange(len(rows), device=rows.device), torch.zeros_like(rows[:1])
    infinite = torch.full(here.shape, torch.inf, dtype=torch.float64, device=rows.device)
    found = kcenter.fold(rows, here, here * 0, origin, origin[0], infinite, here * 0, scale=1.0, metric=0)
    return found[0].square()
