"""Rank-N-Contrast as a module, re-exported by `msacore.nn`."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from msacore.losses import rank_n_contrast


class RankNContrast(nn.Module):
    """:func:`msacore.rank_n_contrast` as a module with a temperature that can be learned.

    Args:
        temperature: Divides the distances; positive and finite. The initial value where it is learned.
        learn_temperature: Make the logarithm of the temperature a parameter, ``log_temperature``.
        group: Process group whose ranks share the batch; see `group` of the loss.
        device: Device of the parameter.
        dtype: Floating dtype of the parameter.

    Example:
        >>> loss = RankNContrast(learn_temperature=True)
        >>> loss(torch.randn(6, 8), torch.randn(6)).backward()
        >>> loss.log_temperature.grad.shape
        torch.Size([])
    """

    log_temperature: nn.Parameter | None

    def __init__(
        self,
        temperature: float = 2.0,
        *,
        learn_temperature: bool = False,
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"RankNContrast: expected `temperature` to be positive and finite, got {temperature}")
        self.temperature, self.group = temperature, group
        logarithm = torch.tensor(math.log(temperature), device=device, dtype=dtype)
        self.register_parameter("log_temperature", nn.Parameter(logarithm) if learn_temperature else None)

    def forward(self, embeddings: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the loss, 0-d.

        Args:
            embeddings: ``[N, d]``.
            targets: ``[N]`` or ``[N, k]``, floating or integer.
            mask: Samples that take part, ``[N]`` bool.
        """
        temperature = self.temperature if self.log_temperature is None else self.log_temperature.exp()
        return rank_n_contrast(embeddings, targets, temperature=temperature, mask=mask, group=self.group)

    def extra_repr(self) -> str:
        """Return the options, as in the constructor."""
        return f"temperature={self.temperature}, learn_temperature={self.log_temperature is not None}"
