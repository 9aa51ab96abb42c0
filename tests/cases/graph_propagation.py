"""Cases of the propagation family."""

from typing import Any

import torch

import msacore
from msacore import reference
from tests.opcase import Arguments, BadInput, OpCase, Sample


def random_csr(
    nodes: int, edges: int, generator: torch.Generator, device: torch.device, targets: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different lengths, some empty; edges may repeat. Targets are `targets` other nodes, or the same."""
    rows = nodes if targets is None else targets
    target = (torch.rand(edges, generator=generator) ** 2 * rows).long().sort().values
    rowptr = torch.zeros(rows + 1, dtype=torch.int64)
    rowptr[1:] = torch.bincount(target, minlength=rows).cumsum(0)
    col = torch.randint(0, max(nodes, 1), (edges,), generator=generator)
    return rowptr.to(device), col.to(device)


def _graph_sample(
    device: torch.device, dtype: torch.dtype, name: str, nodes: int, width: int, edges: int, **options: Any
) -> Sample:
    generator = torch.Generator().manual_seed(nodes + 31 * width + edges)
    weighted, heads, per_head = options.pop("weighted", True), options.pop("heads", ()), options.pop("per_head", ())
    rowptr, col = random_csr(nodes, edges, generator, device, options.pop("targets", None))
    weight = torch.randn(edges, *per_head, generator=generator).to(device, dtype) if weighted else None
    x = torch.randn(nodes, *heads, width, generator=generator).to(device, dtype)
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
            ("unheard nodes", (9, 4, 6), dict(steps=3)),
            ("large", (300, 67, 2500), dict(steps=4, alpha=0.2)),
            ("a weight per head", (7, 3, 19), dict(steps=2, alpha=0.1, heads=(2,), per_head=(2,))),
            ("heads of one weight", (7, 4, 19), dict(steps=2, heads=(3,))),
            ("heads without weights", (6, 2, 15), dict(heads=(3,), weighted=False, alpha=0.2)),
            ("no head", (6, 2, 15), dict(heads=(0,), per_head=(0,))),
            ("one head", (6, 2, 15), dict(heads=(1,), per_head=(1,))),
            ("fewer targets", (9, 4, 20), dict(targets=5)),
            ("more targets", (5, 3, 20), dict(targets=12, heads=(2,), per_head=(2,))),
            ("targets alone", (0, 3, 0), dict(targets=4)),
            ("sources alone", (4, 3, 0), dict(targets=0)),
            ("large heads", (120, 69, 900), dict(steps=3, alpha=0.2, heads=(3,), per_head=(3,))),
            ("wide heads", (60, 64, 500), dict(targets=90, heads=(4,), per_head=(4,))),
        ]
    ]


def _alternating_sample(
    device: torch.device, dtype: torch.dtype, name: str, nodes: int, width: int, edges: int, **options: Any
) -> Sample:
    generator = torch.Generator().manual_seed(nodes + 31 * width + edges)

    def graph(count: int, weighted: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        weight = torch.randn(count, generator=generator).to(device, dtype) if weighted else None
        return (*random_csr(nodes, count, generator, device), weight)

    x = torch.randn(nodes, width, generator=generator).to(device, dtype)
    arguments = dict(x=x, intra=graph(edges), inter=graph(edges, options.pop("weighted", True)))
    if options.pop("first", False):
        arguments["first_intra"] = graph(edges)
    return Sample(name, {**arguments, **options}, small=nodes * width < 50)


def _alternating_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return [
        _alternating_sample(device, dtype, name, *sizes, **options)
        for name, sizes, options in [
            ("odd", (7, 5, 40), dict(steps=2, alpha=0.1, first=True)),
            ("another size", (9, 4, 50), dict(steps=2, alpha=0.1, first=True)),
            ("two graphs", (6, 3, 21), dict(alpha=0.0)),
            ("no weights", (5, 3, 8), dict(steps=1, weighted=False)),
            ("no nodes", (0, 3, 0), dict(steps=1)),
            ("no steps", (5, 2, 8), dict(steps=0, first=True)),
            ("unheard nodes", (8, 4, 5), dict(steps=2, alpha=0.0, first=True)),
            ("large", (200, 67, 900), dict(steps=3, alpha=0.2, first=True)),
        ]
    ]


def _unheard(arguments: Arguments) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
    """With alpha 0 a node keeps no share of itself: one that sends to no node in the first half-step is never read."""
    x, alternates = arguments["x"], "intra" in arguments
    if arguments.get("alpha", 0.1 if alternates else 0.0) != 0 or arguments.get("steps", 1) == 0:
        return []
    col = (arguments.get("first_intra") or arguments["intra"])[1] if alternates else arguments["col"]
    mask = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, col, False)
    return [(("x",), mask.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x))]


def changed(**changes: Any) -> Any:
    return lambda arguments: {**arguments, **{k: f(arguments[k]) for k, f in changes.items()}}


GRAPH_BAD_INPUTS = {
    "integer features": BadInput(changed(x=lambda x: x.long()), ("`x`", "float32", "int64")),
    "features of one dimension": BadInput(changed(x=lambda x: x[:, 0]), ("`x`", "[n, d]")),
    "rowptr too short": BadInput(changed(rowptr=lambda r: r[:-1]), ("`rowptr`", "[n + 1]")),
    "rowptr of floats": BadInput(changed(rowptr=lambda r: r.float()), ("`rowptr`", "int64", "float32")),
    "empty rowptr": BadInput(
        changed(rowptr=lambda r: r[:0], steps=lambda _: 1, alpha=lambda _: 0), ("`rowptr`", "[m + 1]")
    ),
    "other targets in two steps": BadInput(
        changed(rowptr=lambda r: torch.cat([r, r[-1:]]), alpha=lambda _: 0), ("`rowptr`", "[n + 1] = [8]", "[9]")
    ),
    "other targets with a share of x": BadInput(
        changed(rowptr=lambda r: torch.cat([r, r[-1:]]), steps=lambda _: 1), ("`rowptr`", "[n + 1] = [8]", "[9]")
    ),
    "a weight per head without heads": BadInput(
        changed(weight=lambda w: w[:, None]), ("`weight`", "[E] = [19]", "[19, 1]")
    ),
    "weights of other heads": BadInput(
        changed(x=lambda x: x[:, None], weight=lambda w: torch.stack([w, w], 1)),
        ("`weight`", "[E, H] = [19, 1]", "[19, 2]"),
    ),
    "features of four dimensions": BadInput(changed(x=lambda x: x[:, None, None]), ("`x`", "[n, d] or [n, H, d]")),
    "a NumPy array": BadInput(changed(rowptr=lambda r: r.numpy()), ("`rowptr`", "NumPy")),
    "col of two dimensions": BadInput(changed(col=lambda c: c[None]), ("`col`", "[E]")),
    "weight of another length": BadInput(changed(weight=lambda w: w[1:]), ("`weight`", "[E]")),
    "weight of another dtype": BadInput(changed(weight=lambda w: w.double()), ("`weight`", "float32", "float64")),
    "negative steps": BadInput(changed(steps=lambda _: -1), ("`steps`", "-1")),
    "alpha above one": BadInput(changed(alpha=lambda _: 1.5), ("`alpha`", "1.5")),
    "alpha with gradient": BadInput(
        changed(alpha=lambda a: torch.tensor(a, requires_grad=True)), ("`alpha`", "not differentiable")
    ),
    "steps with a fraction": BadInput(changed(steps=lambda _: 1.5), ("`steps`", "integer", "1.5")),
    "decreasing rowptr": BadInput(
        changed(rowptr=lambda r: torch.cat([r[:1], r[1:-1].flip(0), r[-1:]])), ("`rowptr`", "decreasing"), values=True
    ),
    "rowptr that misses edges": BadInput(
        changed(rowptr=lambda r: r.clamp(max=int(r[-1]) - 1)), ("`rowptr[-1]`",), values=True
    ),
    "col out of range": BadInput(changed(col=lambda c: c + 7), ("`col`", "[0, n = 7)"), values=True),
}


def _changed_graph(name: str, position: int, change: Any) -> Any:
    def mutate(arguments: dict[str, Any]) -> dict[str, Any]:
        graph = list(arguments[name])
        graph[position] = change(graph[position])
        return {**arguments, name: tuple(graph)}

    return mutate


ALTERNATING_BAD_INPUTS = {
    "features of one dimension": BadInput(changed(x=lambda x: x[:, 0]), ("`x`", "[n, d]")),
    "intra rowptr too short": BadInput(_changed_graph("intra", 0, lambda r: r[1:]), ("`intra_rowptr`", "[n + 1]")),
    "inter col of bools": BadInput(_changed_graph("inter", 1, lambda c: c > 0), ("`inter_col`", "int64", "bool")),
    "no intra col": BadInput(_changed_graph("intra", 1, lambda c: None), ("`intra_col`", "None")),
    "features with heads": BadInput(changed(x=lambda x: x[:, None]), ("`x`", "[n, d]")),
    "weights with heads": BadInput(_changed_graph("intra", 2, lambda w: w[:, None]), ("`intra_weight`", "[E]")),
    "a graph of one tensor": BadInput(changed(intra=lambda g: g[0]), ("`intra`", "(rowptr, col, weight)")),
    "first weight of another length": BadInput(
        _changed_graph("first_intra", 2, lambda w: w[1:]), ("`first_intra_weight`", "[E]")
    ),
    "half a first graph": BadInput(_changed_graph("first_intra", 1, lambda c: None), ("`first_intra_col`", "together")),
    "a graph of two": BadInput(changed(inter=lambda g: g[:2]), ("`inter`", "(rowptr, col, weight)")),
    "negative steps": BadInput(changed(steps=lambda _: -1), ("`steps`", "-1")),
    "alpha above one": BadInput(changed(alpha=lambda _: 1.5), ("`alpha`", "1.5")),
    "inter col out of range": BadInput(
        _changed_graph("inter", 1, lambda c: c + 7), ("`inter_col`", "[0, n = 7)"), values=True
    ),
}

CASES = [
    OpCase(
        name="graph_propagate",
        op=msacore.graph_propagate,
        reference=reference.graph_propagation.graph_propagate,
        samples=_graph_samples,
        gradients=("x", "weight"),
        bad_inputs=GRAPH_BAD_INPUTS,
        hidden=_unheard,
    ),
    OpCase(
        name="alternating_graph_propagate",
        op=msacore.alternating_graph_propagate,
        reference=reference.graph_propagation.alternating_graph_propagate,
        samples=_alternating_samples,
        gradients=("x", "intra", "inter", "first_intra"),
        bad_inputs=ALTERNATING_BAD_INPUTS,
        hidden=_unheard,
    ),
]
