"""The half-steps of propagation against eager torch, on conversations of equal length."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

import msacore
from bench.harness import Benchmark, Inputs, Shape, Work
from bench.peers import compiled, plain
from msacore import reference

_MODALITIES = 3


def _states(sizes: dict[str, int], device: torch.device) -> Inputs:
    shape = sizes["V"] * sizes["T"], _MODALITIES, sizes["d"]
    return {"h": torch.randn(*shape, device=device, requires_grad=True)}


def _conversations(sizes: dict[str, int], device: torch.device) -> Inputs:
    n, past = sizes["V"] * sizes["T"], sizes["w"]
    offsets = torch.arange(0, n + 1, sizes["T"], device=device)
    return {**_states(sizes, device), "offsets": offsets, "window": (past, past)}


def others(h: Tensor) -> Tensor:
    return (h.sum(1, keepdim=True) - h) / (_MODALITIES - 1)


def pooled(h: Tensor, offsets: Tensor, window: tuple[int, int]) -> Tensor:
    """The mean over a window as a pooling layer: time last, the padding not counted."""
    length = len(h) // (len(offsets) - 1)
    over_time = h.reshape(-1, length, _MODALITIES * h.shape[-1]).transpose(1, 2)
    means = avg_pool1d(over_time, 2 * window[0] + 1, stride=1, padding=window[0], count_include_pad=False)
    return means.transpose(1, 2).reshape(h.shape)


def _work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """A few operations per element, which is read and written once, in the forward and in the backward pass."""
    elements = sizes["V"] * sizes["T"] * _MODALITIES * sizes["d"]
    once = Work(3.0 * elements, 2 * 4.0 * elements)
    return once, Work(2 * once.flops, 2 * once.bytes)


BENCHMARKS = [
    Benchmark(
        name="modality_mean",
        shapes=(
            Shape("1×4×3 d=8 (smallest)", {"V": 1, "T": 4, "d": 8}, quick=True),
            Shape("MOSI: 93×24×3 d=256", {"V": 93, "T": 24, "d": 256}, decisive=True),
        ),
        inputs=_states,
        providers=(
            plain("msacore", msacore.modality_mean),
            plain("reference", reference.propagation.modality_mean),
            plain("torch, sum less own", others),
            compiled("torch.compile of it", others),
        ),
        work=_work,
    ),
    Benchmark(
        name="window_mean",
        shapes=(
            Shape("1×4×3 d=8 w=1 (smallest)", {"V": 1, "T": 4, "d": 8, "w": 1}, quick=True),
            Shape("MOSI: 93×24×3 d=256 w=2", {"V": 93, "T": 24, "d": 256, "w": 2}, decisive=True),
        ),
        inputs=_conversations,
        providers=(
            plain("msacore", msacore.window_mean),
            plain("reference", reference.propagation.window_mean),
            plain("torch, avg_pool1d", pooled),
            compiled("torch.compile of it", pooled),
        ),
        work=_work,
    ),
]
