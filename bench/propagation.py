"""Propagation against sparse products in torch and against the gather and index_add idiom of graph libraries."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import msacore
from bench.harness import Benchmark, Call, Growth, Inputs, Provider, Shape, Work
from bench.peers import compiled, package, plain
from msacore import reference

ALPHA = 0.1
_MODALITIES = 3


def _mix(a: Tensor, h: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(x, a, h, beta=ALPHA, alpha=1 - ALPHA)


class _SparseLoop(torch.autograd.Function):
    """Steps as `addmm` with CSR matrices; backward does the same with transposes that were prepared beforehand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, graphs: list[Tensor], transposed: list[Tensor], steps: int) -> Tensor:
        ctx.transposed, ctx.steps = transposed, steps
        h = x
        for _ in range(steps):
            for a in graphs:
                h = _mix(a, h, x)
        return h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        to_x, nothing = torch.zeros_like(grad), torch.zeros_like(grad)
        for _ in range(ctx.steps):
            for a in reversed(ctx.transposed):
                to_x.add_(grad, alpha=ALPHA)
                grad = torch.addmm(nothing, a, grad, beta=0, alpha=1 - ALPHA)
        return to_x + grad, None, None, None


def _transposed(graphs: list[Tensor]) -> list[Tensor]:
    return [a.to_sparse_coo().t().coalesce().to_sparse_csr() for a in graphs]


def _sparse_loop(graphs_of: Callable[[Inputs], list[Tensor]]) -> Callable[[Inputs], Call]:
    def bind(inputs: Inputs) -> Call:
        graphs, x, steps = graphs_of(inputs), inputs["x"], inputs["steps"]
        transposed = _transposed(graphs)
        return lambda: _SparseLoop.apply(x.reshape(-1, x.shape[-1]), graphs, transposed, steps).view(x.shape)

    return bind


def _sparse_sum(graphs_of: Callable[[Inputs], list[Tensor]]) -> Callable[[Inputs], Call]:
    """torch.sparse.mm with an explicit "sum", through autograd."""

    def bind(inputs: Inputs) -> Call:
        graphs, x, steps = graphs_of(inputs), inputs["x"], inputs["steps"]

        def run() -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            h = flat
            for _ in range(steps):
                for a in graphs:
                    h = (1 - ALPHA) * torch.sparse.mm(a, h, "sum") + ALPHA * flat
            return h.view(x.shape)

        return run

    return bind


def _index_add(graphs_of: Callable[[Inputs], list[Tensor]]) -> Callable[[Inputs], Call]:
    """One message per edge: gather, scale, index_add."""

    def bind(inputs: Inputs) -> Call:
        x, steps = inputs["x"], inputs["steps"]
        edges = [(*a.to_sparse_coo().coalesce().indices(), a.values()) for a in graphs_of(inputs)]

        def run() -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            h = flat
            for _ in range(steps):
                for target, source, weight in edges:
                    messages = weight[:, None] * h[source]
                    h = (1 - ALPHA) * torch.zeros_like(h).index_add(0, target, messages) + ALPHA * flat
            return h.view(x.shape)

        return run

    return bind


def _geometric(graphs_of: Callable[[Inputs], list[Tensor]]) -> Callable[[Inputs], Call]:
    """Message passing of torch-geometric: a sum of weighted neighbours per half-step."""

    def bind(inputs: Inputs) -> Call:
        step = package("torch_geometric.nn", "torch-geometric").SimpleConv(aggr="sum")
        x, steps = inputs["x"], inputs["steps"]
        edges = [(a.to_sparse_coo().coalesce().indices().flip(0), a.values()) for a in graphs_of(inputs)]

        def run() -> Tensor:
            flat = x.reshape(-1, x.shape[-1])
            h = flat
            for _ in range(steps):
                for ends, weight in edges:
                    h = (1 - ALPHA) * step(h, ends, weight) + ALPHA * flat
            return h.view(x.shape)

        return run

    return bind


def _conversations(sizes: dict[str, int], device: torch.device) -> Inputs:
    n = sizes["V"] * sizes["T"]
    return {
        "x": torch.randn(n, _MODALITIES, sizes["d"], device=device, requires_grad=True),
        "offsets": torch.arange(0, n + 1, sizes["T"], device=device),
        "window": (sizes["w"], sizes["w"]),
        "steps": sizes["K"],
        "alpha": ALPHA,
    }


def _window_graphs(inputs: Inputs) -> list[Tensor]:
    n = len(inputs["x"])
    window = msacore.graph.window_edges(inputs["offsets"], _MODALITIES, inputs["window"])
    warnings.filterwarnings("ignore", "Sparse")  # "is in beta state"
    graphs = window, msacore.graph.modality_edges(n, _MODALITIES)
    return [torch.sparse_csr_tensor(*graph, (n * _MODALITIES, n * _MODALITIES)) for graph in graphs]


def _window_work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """About ten operations per element and step; with all steps in one pass x is read, the result written once."""
    elements = sizes["V"] * sizes["T"] * _MODALITIES * sizes["d"]
    once = Work(10.0 * elements * sizes["K"], 2 * 4.0 * elements)
    return once, Work(2 * once.flops, 2 * once.bytes)


def sparse_peers(graphs_of: Callable[[Inputs], list[Tensor]]) -> tuple[Provider, ...]:
    return (
        Provider("torch.sparse addmm, transposes ready", _sparse_loop(graphs_of)),
        Provider('torch.sparse.mm(…, "sum")', _sparse_sum(graphs_of)),
        Provider("gather, index_add", _index_add(graphs_of)),
        Provider("torch-geometric, SimpleConv", _geometric(graphs_of)),
    )


BENCHMARKS = [
    Benchmark(
        name="propagate",
        shapes=(
            Shape("MOSI batch: 32×24×3 d=256 K=4", {"V": 32, "T": 24, "d": 256, "w": 2, "K": 4}, quick=True),
            Shape("1×4×3 d=8 K=1 (smallest)", {"V": 1, "T": 4, "d": 8, "w": 2, "K": 1}, quick=True),
            Shape("MOSI: 93×24×3 d=256 K=10", {"V": 93, "T": 24, "d": 256, "w": 2, "K": 10}, decisive=True),
            Shape("MOSEI: 3300×7×3 d=128 K=10", {"V": 3300, "T": 7, "d": 128, "w": 2, "K": 10}),
            Shape("1e6×3 d=128 K=10", {"V": 41667, "T": 24, "d": 128, "w": 2, "K": 10}, large=True),
        ),
        inputs=_conversations,
        providers=(
            plain("msacore", msacore.propagate),
            plain("reference", reference.propagation.propagate),
            *sparse_peers(_window_graphs),
            compiled("torch.compile of the reference", reference.propagation.propagate),
        ),
        work=_window_work,
        growth=(
            Growth("w", (2, 8, 32, 128), {"V": 8, "T": 512, "d": 64, "K": 4}, slope=0),
            Growth("V", (32, 64, 128, 256), {"T": 24, "d": 128, "w": 2, "K": 4}, slope=1),
            Growth("K", (4, 8, 16, 32), {"V": 93, "T": 24, "d": 128, "w": 2}, slope=1),
            Growth("d", (64, 128, 256, 512), {"V": 93, "T": 24, "w": 2, "K": 4}, slope=1),
        ),
    ),
]
