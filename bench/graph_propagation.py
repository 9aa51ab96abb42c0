"""Propagation over any CSR graph, against the same peers as propagation over conversations."""

import torch
from torch import Tensor

import msacore
from bench.harness import Benchmark, Call, Growth, Inputs, Provider, Shape, Work
from bench.peers import compiled, package, plain
from bench.propagation import ALPHA, sparse_peers
from msacore import reference


def _random_graph(sizes: dict[str, int], device: torch.device) -> Inputs:
    n, edges = sizes["n"], sizes["E"]
    target = torch.randint(0, n, (edges,), device=device).sort().values
    rowptr = torch.zeros(n + 1, dtype=torch.int64, device=device)
    rowptr[1:] = torch.bincount(target, minlength=n).cumsum(0)
    return {
        "x": torch.randn(n, sizes["d"], device=device, requires_grad=True),
        "rowptr": rowptr,
        "col": torch.randint(0, n, (edges,), device=device),
        "weight": torch.rand(edges, device=device),
        "steps": sizes["K"],
        "alpha": ALPHA,
    }


def _given_graph(inputs: Inputs) -> list[Tensor]:
    n = len(inputs["x"])
    return [torch.sparse_csr_tensor(inputs["rowptr"], inputs["col"], inputs["weight"], (n, n))]


def _geometric(inputs: Inputs) -> Call:
    x, rowptr, steps = inputs["x"], inputs["rowptr"], inputs["steps"]
    layers = package("torch_geometric.nn", "torch-geometric")
    layer = layers.APPNP(steps, inputs["alpha"], add_self_loops=False, normalize=False)
    target = torch.repeat_interleave(torch.arange(len(x), device=x.device), rowptr.diff())
    edges = torch.stack([inputs["col"], target])
    return lambda: layer(x, edges, inputs["weight"])


def _graph_work(sizes: dict[str, int]) -> tuple[Work, Work]:
    """Per step one multiply-add per edge and column; edges are read, states read and written once."""
    n, edges, d, k = (sizes[name] for name in ("n", "E", "d", "K"))
    once = Work(2.0 * edges * d * k, k * (12.0 * edges + 2 * 4 * n * d))
    return once, Work(2 * once.flops, 2 * once.bytes)


BENCHMARKS = [
    Benchmark(
        name="graph_propagate",
        shapes=(
            Shape("n=2304 E=12k d=256 K=1", {"n": 2304, "E": 12000, "d": 256, "K": 1}, quick=True),
            Shape("n=8 E=24 d=8 K=1 (smallest)", {"n": 8, "E": 24, "d": 8, "K": 1}, quick=True),
            Shape("n=20k E=400k d=128 K=1", {"n": 20000, "E": 400000, "d": 128, "K": 1}, decisive=True),
            Shape("n=20k E=400k d=128 K=4", {"n": 20000, "E": 400000, "d": 128, "K": 4}),
        ),
        inputs=_random_graph,
        providers=(
            plain("msacore", msacore.graph_propagate),
            plain("reference", reference.graph_propagation.graph_propagate),
            *sparse_peers(_given_graph),
            Provider("torch-geometric APPNP", _geometric),
            compiled("torch.compile of the reference", reference.graph_propagation.graph_propagate),
        ),
        work=_graph_work,
        growth=(Growth("E", (50000, 100000, 200000, 400000), {"n": 20000, "d": 64, "K": 2}, slope=1),),
    ),
]
