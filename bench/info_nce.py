"""Supervised and two-sided InfoNCE against eager torch, its compiled form and pytorch-metric-learning."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import msacore
from bench.harness import Benchmark, Call, Growth, Inputs, Provider, Shape, Unavailable, Work
from bench.peers import at_most, compiled, package, plain
from msacore import reference

TEMPERATURE = 0.1
_CLASSES = 7  # sentiment from -3 to 3


def _supervised_inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    return {
        "embeddings": torch.randn(sizes["N"], sizes["d"], device=device, requires_grad=True),
        "labels": torch.randint(0, _CLASSES, (sizes["N"],), device=device),
    }


def supervised(embeddings: Tensor, labels: Tensor) -> Tensor:
    return msacore.info_nce(embeddings, embeddings, temperature=TEMPERATURE, labels=(labels, labels), exclude_self=True)


def supervised_reference(embeddings: Tensor, labels: Tensor) -> Tensor:
    function = reference.info_nce.info_nce
    return function(embeddings, embeddings, temperature=TEMPERATURE, labels=(labels, labels), exclude_self=True)


def class_sums(embeddings: Tensor, labels: Tensor) -> Tensor:
    """Σ over positives of a_i · a_j as a_i · (Σ of the class - a_i), so that no N × N mask is read."""
    a = normalize(embeddings, dim=1)
    s = (a @ a.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    sums = torch.zeros(_CLASSES, a.shape[1], dtype=a.dtype, device=a.device).index_add(0, labels, a)
    count = torch.bincount(labels, minlength=_CLASSES)[labels] - 1
    positive = (a * (sums[labels] - a)).sum(1) / TEMPERATURE / count.clamp(min=1)
    return torch.where(count > 0, s.logsumexp(1) - positive, 0).sum() / (count > 0).sum().clamp(min=1)


def positive_mask(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The usual form: all log-probabilities, averaged under a mask of positives."""
    a = normalize(embeddings, dim=1)
    s = a @ a.T / TEMPERATURE
    others = 1 - torch.eye(len(a), dtype=a.dtype, device=a.device)
    s = s - s.max(1, keepdim=True).values.detach()
    log_probability = s - (s.exp() * others).sum(1, keepdim=True).log()
    positive = (labels[:, None] == labels[None, :]).to(a.dtype) * others
    count = positive.sum(1)
    return (-(positive * log_probability).sum(1) / count.clamp(min=1)).sum() / (count > 0).sum().clamp(min=1)


def _metric_learning(inputs: Inputs) -> Call:
    if reason := _scores(8)(inputs):
        raise Unavailable(reason)
    loss = package("pytorch_metric_learning.losses", "pytorch-metric-learning").SupConLoss(temperature=TEMPERATURE)
    return lambda: loss(inputs["embeddings"], inputs["labels"])


def _scores(copies: int) -> Callable[[Inputs], str]:
    """Keeps a form that holds `copies` N × N matrices from running where they do not fit into memory."""
    return at_most(lambda inputs: copies * 4.0 * len(next(iter(inputs.values()))) ** 2)


def _pair_inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    shape = (sizes["N"], sizes["d"])
    return {name: torch.randn(*shape, device=device, requires_grad=True) for name in ("anchors", "candidates")}


def symmetric(anchors: Tensor, candidates: Tensor) -> Tensor:
    return msacore.info_nce(anchors, candidates, temperature=TEMPERATURE, symmetric=True)


def symmetric_reference(anchors: Tensor, candidates: Tensor) -> Tensor:
    return reference.info_nce.info_nce(anchors, candidates, temperature=TEMPERATURE, symmetric=True)


def two_cross_entropies(anchors: Tensor, candidates: Tensor) -> Tensor:
    """The loss of CLIP on one matrix of scores."""
    scores = normalize(anchors, dim=1) @ normalize(candidates, dim=1).T / TEMPERATURE
    target = torch.arange(len(anchors), device=anchors.device)
    return (cross_entropy(scores, target) + cross_entropy(scores.T, target)) / 2


class _FlashLogSumExp(torch.autograd.Function):
    """log Σ_j exp(q_i · k_j / τ) by flash attention on the CPU, whose log-sum-exp torch does not differentiate.

    The derivative by q_i is Σ_j P_ij k_j / τ, the output of the attention with the keys as values. The derivative by
    k_j is Σ_i P_ij g_i q_i / τ, which its backward pass gives for the values when the output's gradient is g_i q_i.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        q4, k4 = q[None, None], k[None, None]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, sums = flash(q4, k4, k4, scale=1 / TEMPERATURE)
        ctx.save_for_backward(q4, k4, out, sums)
        return sums.view(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        q, k, out, sums = ctx.saved_tensors
        weighted = (grads[0][:, None].to(q.dtype) * q[0, 0])[None, None]
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        _, _, to_values = backward(weighted, q, k, k, out, sums, 0.0, False, scale=1 / TEMPERATURE)
        return grads[0][:, None].to(q.dtype) * out[0, 0] / TEMPERATURE, to_values[0, 0] / TEMPERATURE


def flash_cross_entropies(anchors: Tensor, candidates: Tensor, both: bool = True) -> Tensor:
    """Positives on the diagonal, denominators by flash attention: no matrix of scores."""
    a, c = normalize(anchors, dim=1), normalize(candidates, dim=1)
    positive = (a * c).sum(1).float() / TEMPERATURE
    rows = (_FlashLogSumExp.apply(a, c) - positive).mean()
    return (rows + (_FlashLogSumExp.apply(c, a) - positive).mean()) / 2 if both else rows


def _flash(inputs: Inputs) -> str:
    return "" if inputs["anchors"].device.type == "cpu" else "is for CPUs"


def _bf16_inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    shape = (sizes["N"], sizes["d"])
    names = ("anchors", "candidates")
    tensors = {n: torch.randn(*shape, device=device).bfloat16().requires_grad_() for n in names}
    return {**tensors, "both": bool(sizes["both"])}


def _wide_inputs(sizes: dict[str, int], device: torch.device) -> Inputs:
    return {**_pair_inputs(sizes, device), "both": bool(sizes["both"])}


def one_or_both(anchors: Tensor, candidates: Tensor, both: bool) -> Tensor:
    return msacore.info_nce(anchors, candidates, temperature=TEMPERATURE, symmetric=both)


def cross_entropies(anchors: Tensor, candidates: Tensor, both: bool) -> Tensor:
    if both:
        return two_cross_entropies(anchors, candidates)
    scores = normalize(anchors, dim=1) @ normalize(candidates, dim=1).T / TEMPERATURE
    return cross_entropy(scores, torch.arange(len(anchors), device=anchors.device))


def _bf16_work(sizes: dict[str, int]) -> tuple[Work, Work]:
    n, d = sizes["N"], sizes["d"]
    return Work(2 * n * n * d, 2 * 2 * n * d), Work(8 * n * n * d, 6 * 2 * n * d)


def _supervised_work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """Scores are symmetric: N²d forward. As nothing is stored, N²d again backward, and 2N²d for the gradient."""
    n, d = sizes["N"], sizes["d"]
    return Work(n * n * d, 4 * n * d), Work(4 * n * n * d, 3 * 4 * n * d)


def _symmetric_work(sizes: dict[str, int]) -> tuple[Work, Work]:
    n, d = sizes["N"], sizes["d"]
    return Work(2 * n * n * d, 2 * 4 * n * d), Work(8 * n * n * d, 6 * 4 * n * d)


BENCHMARKS = [
    Benchmark(
        name="info_nce",
        shapes=(
            Shape("supervised N=128 d=128 (one batch)", {"N": 128, "d": 128}, quick=True),
            Shape("supervised N=8 d=16 (smallest)", {"N": 8, "d": 16}, quick=True),
            Shape("supervised N=1024 d=128", {"N": 1024, "d": 128}),
            Shape("supervised N=4096 d=128", {"N": 4096, "d": 128}, decisive=True),
            Shape("supervised N=4096 d=768", {"N": 4096, "d": 768}),
            Shape("supervised N=32768 d=128", {"N": 32768, "d": 128}),
        ),
        inputs=_supervised_inputs,
        providers=(
            plain("msacore", supervised),
            plain("reference", supervised_reference, _scores(8)),
            plain("torch, class sums", class_sums, _scores(4)),
            plain("torch, mask of positives", positive_mask, _scores(8)),
            compiled("torch.compile of class sums", class_sums, _scores(4)),
            Provider("pytorch-metric-learning SupConLoss", _metric_learning),
        ),
        work=_supervised_work,
        growth=(
            Growth("N", (512, 1024, 2048, 4096), {"d": 128}, slope=2),
            Growth("d", (128, 256, 512, 1024), {"N": 1024}, slope=1),
        ),
    ),
    Benchmark(
        name="info_nce_symmetric",
        shapes=(
            Shape("two-sided N=128 d=128 (one batch)", {"N": 128, "d": 128}, quick=True),
            Shape("two-sided N=8 d=16 (smallest)", {"N": 8, "d": 16}, quick=True),
            Shape("two-sided N=4096 d=128", {"N": 4096, "d": 128}, decisive=True),
            Shape("two-sided N=65536 d=128", {"N": 65536, "d": 128}, decisive=True, large=True),
            Shape("two-sided N=65536 d=256", {"N": 65536, "d": 256}, decisive=True, large=True),
        ),
        inputs=_pair_inputs,
        providers=(
            plain("msacore", symmetric),
            plain("reference", symmetric_reference, _scores(8)),
            plain("torch, two cross entropies", two_cross_entropies, _scores(4)),
            plain("torch, flash attention as log-sum-exp", flash_cross_entropies, _flash),
            compiled("torch.compile of it", two_cross_entropies, _scores(4)),
        ),
        work=_symmetric_work,
    ),
    Benchmark(
        name="info_nce_wide",
        shapes=tuple(
            Shape(f"{name} N={n} d={d}", {"N": n, "d": d, "both": both}, quick=(n, d) == (256, 768))
            for n in (256, 512, 1024)
            for d in (768, 1024)
            for both, name in enumerate(("one direction", "two-sided"))
        ),
        inputs=_wide_inputs,
        providers=(
            plain("msacore", one_or_both),
            plain("torch, cross entropy", cross_entropies, _scores(4)),
            plain("torch, flash attention as log-sum-exp", flash_cross_entropies, _flash),
        ),
        work=_symmetric_work,
    ),
    Benchmark(
        name="info_nce_bf16",
        shapes=(
            Shape("bfloat16, one direction N=128 d=128", {"N": 128, "d": 128, "both": 0}, quick=True),
            Shape("bfloat16, one direction N=1024 d=128", {"N": 1024, "d": 128, "both": 0}),
            Shape("bfloat16, one direction N=4096 d=128", {"N": 4096, "d": 128, "both": 0}),
            Shape("bfloat16, one direction N=1024 d=768", {"N": 1024, "d": 768, "both": 0}),
            Shape("bfloat16, two-sided N=1024 d=768", {"N": 1024, "d": 768, "both": 1}),
        ),
        inputs=_bf16_inputs,
        providers=(
            plain("msacore", one_or_both),
            replace(plain("torch, cross entropy in bfloat16", cross_entropies, _scores(4)), tolerance=0.1),
            replace(plain("torch, flash attention as log-sum-exp", flash_cross_entropies, _flash), tolerance=0.1),
        ),
        work=_bf16_work,
    ),
]
