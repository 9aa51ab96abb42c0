"""The public losses: the operators in one process or, with ``group=``, over the ranks of a process group."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch  # noqa: F401  (the examples below use it)
from torch import Tensor

from msacore.ops.hierarchical_contrastive import hierarchical_contrastive_loss as _hierarchical_contrastive_loss
from msacore.ops.info_nce import info_nce as _info_nce
from msacore.ops.rank_n_contrast import rank_n_contrast as _rank_n_contrast

Denominator = Literal["all", "negatives", "decoupled"]
Reduction = Literal["mean", "sum", "none"]
Tier1 = Literal["cross_modal", "intra_modal"]


def _over_ranks(op: str, local: Any, group: Any, *rows: Any, **options: Any) -> Any:
    # Imported on first use, because one process needs no torch.distributed.
    from msacore.distributed.dispatch import run

    return run(op, local, group, *rows, **options)


def info_nce(
    anchors: Tensor,
    candidates: Any = None,
    *,
    temperature: float | Tensor = 0.1,
    labels: Tensor | Sequence[Tensor] | None = None,
    weights: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_mask: Tensor | None = None,
    denominator: Denominator = "all",
    normalize: bool = True,
    anchor_mask: Tensor | None = None,
    candidate_mask: Tensor | None = None,
    symmetric: bool = False,
    exclude_self: bool = False,
    reduction: Reduction = "mean",
    group: Any = None,
) -> Tensor:
    """Masked, weighted InfoNCE, without the similarity matrix.

    With ``s_ij = cos(anchors[i], candidates[j]) / temperature`` and positives weighted by ``w_ij``, an anchor's loss is
    ``log Σ_j exp(s_ij) - Σ_j w_ij s_ij / Σ_j w_ij``; masked rows take part on neither side.

    Args:
        anchors: ``[N, d]``; float16, bfloat16, float32 or float64.
        candidates: ``[N', d]``, dtype of ``anchors``; None or ``anchors`` itself contrasts an embedding with itself,
            at half the cost. Or what :func:`msacore.distributed.start` returned.
        temperature: Positive number, or a floating tensor with one element, which is differentiable.
        labels: ``(anchor_labels [N], candidate_labels [N'])`` of any integer dtype, or one tensor ``[N]`` without
            ``candidates``; equal labels are positives, a negative label means unlabelled: its row is neither anchor nor
            candidate.
        weights: ``[N, N']``, at least 0, dtype of ``anchors``, differentiable. Without labels and weights the positives
            are the pairs ``(i, i)``.
        negatives: ``[Q, d]``, dtype of ``anchors``, differentiable: more candidates for every anchor, positive for
            none, such as a memory queue. With ``symmetric`` they serve the anchors' direction only.
        negative_mask: ``[Q]`` bool, False for entries that are not filled yet; these are never read.
        denominator: "all": the sum over every candidate, as above. "negatives": each positive p is set against itself
            and the candidates of weight 0 alone, ``Σ_p w_p (log(exp s_p + Σ_n exp s_n) - s_p) / Σ_p w_p`` (NT-Xent with
            several positives); the gradient of a weight that is exactly 0 is then 0. "decoupled": ``log Σ_n exp s_n -
            Σ_p w_p s_p / Σ_p w_p``; anchors without a negative drop out.
        normalize: Cosine similarities; False takes plain dot products, which may overflow.
        anchor_mask: ``[N]`` bool, False where a row is not an anchor.
        candidate_mask: ``[N']`` bool, False where a row is not a candidate.
        symmetric: Mean of the two directions, in one sweep (two for "negatives" with labels or weights).
        exclude_self: Leave the pairs ``(i, i)`` out of positives and denominators.
        reduction: "mean" over the anchors that count, "sum" or "none".
        group: A ``ProcessGroup``, 1-D ``DeviceMesh`` or :class:`msacore.distributed.Sharding`: the rows are this rank's
            part of a batch distributed over the ranks, and every rank gets the loss of the whole batch. Labels, masks
            and ``weights`` ``[n, N']`` belong to the rank's rows; ``negatives`` are joined over the ranks.

    Returns:
        The loss, 0-d, or ``[N]`` for "none" with zeros for the anchors that are masked or have no positive; float64 for
        float64 inputs, else float32. Zero, with zero gradients, when no anchor is left.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (values inside tensors are checked on the CPU
            only).
        ValueError: ``reduction`` or ``denominator`` is not one of its three values, or ``labels`` is not a pair.

    Note:
        Several positives are averaged outside of the logarithm, as in "L_out" of Khosla et al., "Supervised Contrastive
        Learning" (2020). Their released ``SupConLoss`` also multiplies by ``temperature / base_temperature``, which is
        1 at its default temperature; multiply likewise to reproduce its numbers. "decoupled" is the loss of Yeh et al.,
        "Decoupled Contrastive Learning" (2022).

        Forward and backward keep four or five numbers per row and, on the CPU where a gradient is needed, up to
        2²¹ similarities of rows at least 64 wide, which are then not computed again; the gradient of ``weights`` is
        ``[N, N']`` by nature. Accumulates in float32 for 16-bit types and computes in float32 under autocast. A zero
        row has cosine 0 and gradient 0. Non-zero rows of any length are normalised without overflow or underflow.
        Deterministic; differentiable once; no host synchronisation on CUDA. With ``group=``, the average that
        DistributedDataParallel takes is the gradient of one process, without a factor in user code.

    Example:
        >>> z = torch.eye(3)
        >>> info_nce(z, z, temperature=1.0)
        tensor(0.5514)
        >>> labels = torch.tensor([0, 0, 1])
        >>> info_nce(z, labels=labels, exclude_self=True, reduction="none")
        tensor([0.6931, 0.6931, 0.0000])
        >>> queue, filled = torch.zeros(8, 3), torch.zeros(8, dtype=torch.bool)
        >>> info_nce(z, z, temperature=1.0, negatives=queue, negative_mask=filled)
        tensor(0.5514)
    """
    options: dict[str, Any] = dict(
        temperature=temperature,
        labels=labels,
        weights=weights,
        negatives=negatives,
        negative_mask=negative_mask,
        denominator=denominator,
        normalize=normalize,
        anchor_mask=anchor_mask,
        candidate_mask=candidate_mask,
        symmetric=symmetric,
        exclude_self=exclude_self,
        reduction=reduction,
    )
    if group is None:
        return _info_nce(anchors, candidates, **options)
    return _over_ranks("info_nce", _info_nce, group, anchors, candidates, **options)


@overload
def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = ...,
    labels: Tensor | None = ...,
    tier_weights: Sequence[float] = ...,
    temperatures: Sequence[float | Tensor] = ...,
    tier1: Tier1 = ...,
    normalize: bool = ...,
    return_tiers: Literal[False] = ...,
    group: Any = ...,
) -> Tensor: ...
@overload
def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = ...,
    labels: Tensor | None = ...,
    tier_weights: Sequence[float] = ...,
    temperatures: Sequence[float | Tensor] = ...,
    tier1: Tier1 = ...,
    normalize: bool = ...,
    return_tiers: Literal[True],
    group: Any = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = ...,
    labels: Tensor | None = ...,
    tier_weights: Sequence[float] = ...,
    temperatures: Sequence[float | Tensor] = ...,
    tier1: Tier1 = ...,
    normalize: bool = ...,
    return_tiers: bool,
    group: Any = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def hierarchical_contrastive_loss(
    unimodal: Sequence[Tensor],
    fused: Tensor,
    high_level: Sequence[Tensor],
    *,
    available: Tensor | None = None,
    labels: Tensor | None = None,
    tier_weights: Sequence[float] = (0.2, 0.3, 0.5),
    temperatures: Sequence[float | Tensor] = (0.1, 0.1, 0.5),
    tier1: Tier1 = "cross_modal",
    normalize: bool = True,
    return_tiers: bool = False,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Three tiers of contrastive terms over the embeddings of M modalities, in one operator.

    Tier 1 contrasts the modalities with each other ("cross_modal") or, with labels, each with itself ("intra_modal");
    tier 2 the fused embedding with every modality; tier 3 the high-level features of modality pairs with each other.
    All terms but the intra-modal ones are symmetric InfoNCE losses whose positives are the same sample; see
    :func:`info_nce`.

    Args:
        unimodal: M tensors ``[N, d]``; float16, bfloat16, float32 or float64, one dtype for all embeddings.
        fused: ``[N, d]``.
        high_level: M(M-1)/2 tensors ``[N, d3]``, for the pairs (0, 1), (0, 2), (1, 2), ….
        available: ``[N, M]`` bool, False where a modality is missing; a pair exists where both members do. A sample
            takes part in a term only where both of its embeddings exist; missing ones are never read.
        labels: ``[N]`` of any integer dtype, needed by "intra_modal" and ignored otherwise; negative means unlabelled.
        tier_weights: Weights of the three tiers in the loss, numbers.
        temperatures: Temperatures of the three tiers, positive: numbers, or floating tensors with one element, which
            are differentiable.
        tier1: "cross_modal" or "intra_modal".
        normalize: Cosine similarities; False takes plain dot products, which may overflow.
        return_tiers: Also return the tiers.
        group: A ``ProcessGroup``, 1-D ``DeviceMesh`` or :class:`msacore.distributed.Sharding`: the rows are this rank's
            part of a batch distributed over the ranks, and every rank gets the loss of the whole batch.

    Returns:
        The loss, 0-d, and with ``return_tiers`` the unweighted sums of the three tiers, ``[3]``, differentiable;
        float64 for float64 inputs, else float32.

    Raises:
        RuntimeError: A shape, dtype, device, count or range above does not hold.
        ValueError: ``tier1`` is not one of its two values.

    Note:
        ``Σ_t tier_weights[t] · tiers[t]``, the loss of "AL-HCL: Active Learning and Hierarchical Contrastive Learning
        for Multimodal Sentiment Analysis with Fusion Guidance" (2026). One operator call forward and one backward; each
        embedding is normalised once, and both directions of a term come from one sweep. Where a gradient is needed, the
        forward pass keeps the exponentials of up to 128 samples for the backward pass and, on the CPU, similarities of
        up to 16 MiB: N² numbers per term; beyond that no similarity matrix is stored. Accumulates in float32 for 16-bit
        types and computes in float32 under autocast. Deterministic; differentiable once; no host synchronisation on
        CUDA. With ``group=``, the average that DistributedDataParallel takes is the gradient of one process,
        without a factor in user code.

    Example:
        >>> text, audio, fused = torch.eye(4), torch.eye(4).roll(1, 0), torch.ones(4, 4)
        >>> loss, tiers = hierarchical_contrastive_loss([text, audio], fused, [torch.eye(4)], return_tiers=True)
        >>> tiers
        tensor([10.0001,  2.7726,  0.0000])
    """
    options: dict[str, Any] = dict(
        available=available,
        labels=labels,
        tier_weights=tier_weights,
        temperatures=temperatures,
        tier1=tier1,
        normalize=normalize,
        return_tiers=return_tiers,
    )
    if group is None:
        return _hierarchical_contrastive_loss(unimodal, fused, high_level, **options)
    name = "hierarchical_contrastive_loss"
    return _over_ranks(name, _hierarchical_contrastive_loss, group, unimodal, fused, high_level, **options)


def rank_n_contrast(
    embeddings: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 2.0,
    mask: Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """Compute the Rank-N-Contrast loss: distances between embeddings should rank as the gaps between labels do.

    ``1/(n(n-1)) Σ_i Σ_{j≠i} [log Σ_{k≠i, gap_ik ≥ gap_ij} exp s_ik - s_ij]`` over the n samples that are not masked,
    with ``s_ij = -‖e_i - e_j‖ / temperature`` and ``gap_ij = |y_i - y_j|``.

    Args:
        embeddings: ``[N, d]``; float16, bfloat16, float32 or float64. Not normalised by the loss.
        targets: Continuous labels, ``[N]``, or ``[N, k]`` with the gap ``Σ_c |y_ic - y_jc|`` (valence and arousal,
            say); any floating dtype, in which gaps are computed, or any integer dtype, whose gaps are exact. Must not
            require grad.
        temperature: Divides the distances; a positive, finite number, or a floating tensor with one element, which
            is differentiable.
        mask: Samples that take part, ``[N]`` bool; all when omitted. The others are never read.
        group: A ``ProcessGroup``, 1-D ``DeviceMesh`` or :class:`msacore.distributed.Sharding`: the rows are this rank's
            part of a batch distributed over the ranks, and every rank gets the loss of the whole batch.

    Returns:
        Scalar, float64 for float64 embeddings, else float32. 0 for fewer than two samples.

    Raises:
        RuntimeError: A shape, dtype, device or range above does not hold (the value of a temperature tensor is checked
            on the CPU only), or ``targets`` require grad.

    Note:
        Exact. Every denominator is a running sum over the others in the order of their label gaps, where samples of
        equal gap enter together. With ``[N]``, that order is a merge of the two sides of the sorted labels; with
        ``[N, k]``, every anchor sorts. At most ``O(N² (d + k + log N))`` time, ``O(N d)`` memory plus one tile.

        Gaps tie where the labels' dtype makes them equal. MOSEI's labels are means of three raters: thirds, which no
        floating dtype holds exactly: ``2/3 - 1/3`` and ``1/3 - 0`` differ in their last bit. Labels times 3, rounded to
        integers, tie as they should: ``(3 * labels).round().long()``.

        16-bit embeddings compute in float32. Distances are computed in float64 where rows lie more than about a
        thousand times further out than the median row, so that such rows do not cost the others accuracy, and neither
        overflow nor underflow. Two equal embeddings have zero gradient. Under autocast nothing is cast, not even
        ``targets``.
        Deterministic; differentiable once; no host synchronisation on CUDA. A NaN that is not masked makes the loss
        NaN.

        Source: Zha et al., Rank-N-Contrast, NeurIPS 2023.

    Example:
        >>> embeddings = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
        >>> rank_n_contrast(embeddings, torch.tensor([-1.0, 0.0, 2.0]))
        tensor(0.2102)
        >>> rank_n_contrast(embeddings, torch.tensor([[0, 1], [1, 1], [3, 0]]))
        tensor(0.2102)
    """
    if group is None:
        return _rank_n_contrast(embeddings, targets, temperature=temperature, mask=mask)
    options = dict(temperature=temperature, mask=mask)
    return _over_ranks("rank_n_contrast", _rank_n_contrast, group, embeddings, targets, **options)
