"""How uncertain a model is about each sample, for :func:`msacore.select`: higher is more uncertain."""

import torch
from torch import Tensor

__all__ = [
    "bald",
    "ensemble_variance",
    "entropy",
    "least_confidence",
    "margin",
    "mc_variance",
    "modality_disagreement",
]

# 16-bit softmax outputs miss a sum of one by about this much; logits miss it by far more.
_SUM_TOLERANCE = 1e-2


def _floating(name: str, argument: str, value: Tensor, meaning: str) -> Tensor:
    """``value`` in the dtype the sums are kept in, after a check of its rank; ``meaning`` is its shape in words."""
    value = torch.as_tensor(value)
    rank = meaning.count(",") + 1
    if value.dim() != rank:
        raise ValueError(f"{name}: expected `{argument}` to have shape {meaning}, got {list(value.shape)}")
    return value if value.dtype == torch.float64 else value.float()


def _probabilities(name: str, value: Tensor, meaning: str) -> Tensor:
    raw = torch.as_tensor(value)
    if raw.dim() < meaning.count(",") + 1 or raw.shape[-1] == 1:
        raise ValueError(
            f"{name}: expected `probabilities` of at least two classes, {meaning} with K >= 2, got {list(raw.shape)}; "
            "the confidence of a single-logit (regression) output is the same for every sample. "
            "Use mc_variance, ensemble_variance or modality_disagreement"
        )
    p = _floating(name, "probabilities", raw, meaning)
    if p.shape[-1] < 2:
        raise ValueError(f"{name}: expected `probabilities` {meaning} with K >= 2, got {list(p.shape)}")
    if bool((p < 0).any()):
        raise ValueError(f"{name}: expected `probabilities` in [0, 1], got {float(p.min()):g}; apply softmax to logits")
    sums = p.sum(-1)
    if bool(((sums - 1).abs() > _SUM_TOLERANCE).any()):
        worst = float(sums.flatten()[(sums - 1).abs().argmax()])
        raise ValueError(f"{name}: expected `probabilities` to sum to 1 over K, got {worst:g}; apply softmax to logits")
    return p


def _variance(name: str, predictions: Tensor) -> Tensor:
    values = _floating(name, "predictions", predictions, "[S, N]")
    if values.shape[0] == 0:
        raise ValueError(f"{name}: expected `predictions` [S, N] with S >= 1, got {list(values.shape)}")
    # Relative to the first pass, so that the variance of equal passes is exactly 0.
    values = values - values[0]
    return (values - values.mean(0)).square().mean(0)


def mc_variance(predictions: Tensor) -> Tensor:
    """Variance of the predictions over stochastic forward passes (Monte-Carlo dropout).

    Args:
        predictions: One prediction per pass and sample, ``[S, N]``; any real dtype.

    Returns:
        ``[N]``, float64 for float64 predictions, else float32.

    Raises:
        ValueError: ``predictions`` is not ``[S, N]`` or has no pass.

    Note:
        ``u_i = (1/S) Σ_s (ŷ_si - mean_s ŷ_si)²``; the sum is divided by S. Gal and Ghahramani, 2016.

    Example:
        >>> mc_variance(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor([1., 0.])
    """
    return _variance("mc_variance", predictions)


def ensemble_variance(predictions: Tensor) -> Tensor:
    """Variance of the predictions over the models of an ensemble.

    Args:
        predictions: One prediction per model and sample, ``[S, N]``; any real dtype.

    Returns:
        ``[N]``, float64 for float64 predictions, else float32.

    Raises:
        ValueError: ``predictions`` is not ``[S, N]`` or has no model.

    Note:
        ``u_i = (1/S) Σ_s (ŷ_si - mean_s ŷ_si)²``; the sum is divided by S. Lakshminarayanan et al., 2017.

    Example:
        >>> ensemble_variance(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        tensor([1., 0.])
    """
    return _variance("ensemble_variance", predictions)


def modality_disagreement(predictions: Tensor, available: Tensor | None = None) -> Tensor:
    """Variance of the unimodal heads over the modalities a sample has.

    Args:
        predictions: One prediction per modality and sample, ``[M, N]``; any real dtype.
        available: Which modalities each sample has, ``[N, M]`` bool; all when omitted. Predictions of a missing
            modality are not read.

    Returns:
        ``[N]``, float64 for float64 predictions, else float32. A sample with fewer than two modalities gets 0.

    Raises:
        ValueError: A shape or dtype above does not hold.

    Note:
        The sum of squares is divided by the number of available modalities.

    Example:
        >>> modality_disagreement(torch.tensor([[1.0, 1.0], [3.0, 5.0]]), torch.tensor([[True, True], [True, False]]))
        tensor([1., 0.])
    """
    name = "modality_disagreement"
    values = _floating(name, "predictions", predictions, "[M, N]")
    if available is None:
        available = torch.ones(values.shape[::-1], dtype=torch.bool, device=values.device)
    available = torch.as_tensor(available)
    if available.dtype != torch.bool:
        raise ValueError(f"{name}: expected `available` to have dtype bool, got {available.dtype}")
    if available.shape != values.shape[::-1]:
        raise ValueError(
            f"{name}: expected `available` to have shape [N, M] = {list(values.shape[::-1])}, "
            f"got {list(available.shape)}"
        )
    there = available.T
    count = there.sum(0).clamp_min(1)
    # Relative to the first head that a sample has, so that the variance of equal heads is exactly 0.
    first = values.gather(0, there.int().argmax(0, keepdim=True)) if len(values) else values.new_zeros(values.shape[1])
    values = (values - first).where(there, 0)
    mean = values.sum(0) / count
    return (values - mean).square().where(there, 0).sum(0) / count


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the predicted class distribution, in nats.

    Args:
        probabilities: Class probabilities, ``[N, K]``, K >= 2; floating.

    Returns:
        ``[N]`` in ``[0, log K]``, float64 for float64 probabilities, else float32.

    Raises:
        ValueError: Not ``[N, K]``, a single class, negative values, or rows that do not sum to 1.

    Note:
        ``u_i = -Σ_k p_ik log p_ik`` with ``0 log 0 = 0``.

    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    return torch.special.entr(_probabilities("entropy", probabilities, "[N, K]")).sum(-1).clamp_min(0)


def least_confidence(probabilities: Tensor) -> Tensor:
    """One minus the probability of the most likely class.

    Args:
        probabilities: Class probabilities, ``[N, K]``, K >= 2; floating.

    Returns:
        ``[N]`` in ``[0, 1 - 1/K]``, float64 for float64 probabilities, else float32.

    Raises:
        ValueError: Not ``[N, K]``, a single class, negative values, or rows that do not sum to 1.

    Note:
        ``u_i = 1 - max_k p_ik``. Lewis and Gale, 1994.

    Example:
        >>> least_confidence(torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
        tensor([0.5000, 0.2500])
    """
    return (1 - _probabilities("least_confidence", probabilities, "[N, K]").amax(-1)).clamp_min(0)


def margin(probabilities: Tensor) -> Tensor:
    """One minus the gap between the two most likely classes.

    Args:
        probabilities: Class probabilities, ``[N, K]``, K >= 2; floating.

    Returns:
        ``[N]`` in ``[0, 1]``, float64 for float64 probabilities, else float32.

    Raises:
        ValueError: Not ``[N, K]``, a single class, negative values, or rows that do not sum to 1.

    Note:
        ``u_i = 1 - (p_(1) - p_(2))``. Scheffer et al., 2001.

    Example:
        >>> margin(torch.tensor([[0.5, 0.5], [0.75, 0.25]]))
        tensor([1.0000, 0.5000])
    """
    top = _probabilities("margin", probabilities, "[N, K]").topk(2, -1).values
    return (1 - (top[:, 0] - top[:, 1])).clamp_min(0)


def bald(probabilities: Tensor) -> Tensor:
    """Mutual information between prediction and model: what the passes disagree about, in nats.

    Args:
        probabilities: Class probabilities per stochastic pass, ``[S, N, K]``, K >= 2; floating.

    Returns:
        ``[N]`` in ``[0, log K]``, float64 for float64 probabilities, else float32.

    Raises:
        ValueError: Not ``[S, N, K]``, no pass, a single class, negative values, or rows that do not sum to 1.

    Note:
        ``u_i = H(mean_s p_si) - mean_s H(p_si)``, computed as the mean of ``Σ_k p log(p / m) - (p - m)`` with
        ``m = mean_s p_s``, whose terms are never negative and exactly 0 for equal passes. Houlsby et al., 2011.

    Example:
        >>> bald(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))
        tensor([0.6931, 0.0000])
    """
    p = _probabilities("bald", probabilities, "[S, N, K]")
    if p.shape[0] == 0:
        raise ValueError(f"bald: expected `probabilities` [S, N, K] with S >= 1, got {list(p.shape)}")
    mean = p[0] + (p - p[0]).mean(0)
    gap = ((p - mean) / mean).where(mean > 0, 0)
    return (mean * (torch.special.xlog1py(1 + gap, gap) - gap).clamp_min(0)).sum(-1).mean(0)
