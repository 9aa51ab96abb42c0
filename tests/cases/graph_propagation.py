"""Cases of the propagation family."""

from typing import Any

import torch

import msacore
from msacore import reference
from tests.opcase import BadInput, OpCase, Sample


def random_csr(
    nodes: int, edges: int, generator: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different lengths, some empty; repeated edges allowed."""
    target = (torch.rand(edges, generator=generator) ** 2 * nodes).long().sort().values
    rowptr = torch.zeros(nodes + 1, dtype=torch.int64)
    rowptr[1:] = torch.bincount(target, minlength=nodes).cumsum(0)
    col = torch.randint(0, max(nodes, 1), (edges,), generator=generator)
    return rowptr.to(device), col.to(device)


def _graph_sample(
    device: torch.device, dtype: torch.dtype, name: str, nodes: int, width: int, edges: int, **options: Any
) -> Sample:
    generator = torch.Generator().manual_seed(nodes + 31 * width + edges)
    weighted = options.pop("weighted", True)
    rowptr, col = random_csr(nodes, edges, generator, device)
    weight = torch.randn(edges, generator=generator).to(device, dtype) if weighted else None
    x = torch.randn(nodes, width, generator=generator).to(device, dtype)
    return Sample(name, dict(x=x, rowptr=rowptr, col=col, weight=weight, **options), small=nodes * width < 100)


def _graph_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return [
        _graph_sample(device, dtype, name, *sizes, **options)
        for name, sizes, options in [
            ("odd", (7, 5, 19), dict(steps=2, alpha=0.1)),
            ("another size", (9, 4, 30), dict(steps=2, alpha=0.1)),
            ("plain sum", (6, 3, 11), dict(weighted=False)),
            ("one node", (1, 1, 1), dict(steps=3, alpha=0.5)),
            ("no edges", (4, 3, 0), dict(steps=1, alpha=0.2)),
            ("no nodes", (0, 3, 0), dict(steps=1)),
            ("no width", (4, 0, 6), dict(steps=1)),
            ("no steps", (5, 2, 8), dict(steps=0, alpha=0.3)),
            ("large", (300, 67, 2500), dict(steps=4, alpha=0.2)),
        ]
    ]


def changed(**changes: Any) -> Any:
    return lambda arguments: {**arguments, **{k: f(arguments[k]) for k, f in changes.items()}}


GRAPH_BAD_INPUTS = {
    "integer features": BadInput(changed(x=lambda x: x.long()), ("`x`", "float32", "int64")),
    "features of one dimension": BadInput(changed(x=lambda x: x[:, 0]), ("`x`", "[n, d]")),
    "rowptr too short": BadInput(changed(rowptr=lambda r: r[:-1]), ("`rowptr`", "[n + 1]")),
    "rowptr of int32": BadInput(changed(rowptr=lambda r: r.int()), ("`rowptr`", "int64", "int32")),
    "col of two dimensions": BadInput(changed(col=lambda c: c[None]), ("`col`", "[E]")),
    "weight of another length": BadInput(changed(weight=lambda w: w[1:]), ("`weight`", "[E]")),
    "weight of another dtype": BadInput(changed(weight=lambda w: w.double()), ("`weight`", "float32", "float64")),
    "negative steps": BadInput(changed(steps=lambda _: -1), ("`steps`", "-1")),
    "alpha above one": BadInput(changed(alpha=lambda _: 1.5), ("`alpha`", "1.5")),
    "decreasing rowptr": BadInput(
        changed(rowptr=lambda r: torch.cat([r[:1], r[1:-1].flip(0), r[-1:]])), ("`rowptr`", "decreasing"), values=True
    ),
    "rowptr that misses edges": BadInput(
        changed(rowptr=lambda r: r.clamp(max=int(r[-1]) - 1)), ("`rowptr[-1]`",), values=True
    ),
    "col out of range": BadInput(changed(col=lambda c: c + 7), ("`col`", "[0, n = 7)"), values=True),
}

CASES = [
    OpCase(
        name="graph_propagate",
        op=msacore.graph_propagate,
        reference=reference.graph_propagation.graph_propagate,
        samples=_graph_samples,
        gradients=("x", "weight"),
        bad_inputs=GRAPH_BAD_INPUTS,
    ),
]
