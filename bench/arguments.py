"""What the arguments of version 0.2 cost: each call beside the same call without the argument, and the plain form.

The call without the argument computes something else, so only its time is compared, not its output.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

import msacore
from bench.harness import Benchmark, Inputs, Provider, Shape, Work
from bench.peers import at_most, plain
from msacore import reference

_HEADS = 4
Sizes = dict[str, int]
Make = Callable[[Sizes, torch.device], Inputs]


def _beside(
    operator: str,
    argument: str,
    call: Callable[..., Any],
    by_hand: Callable[..., Any] | None,
    shapes: tuple[Shape, ...],
    inputs: Make,
    work: Callable[[Sizes], Work],
    leave_out: Collection[str],
    **benchmark: Any,
) -> Benchmark:
    """`by_hand` is None where no plain form fits into memory; `leave_out` names the inputs that are the argument."""

    def without(given: Inputs) -> Any:
        rest = {name: value for name, value in given.items() if name not in leave_out}
        return lambda: call(**rest)

    providers = [plain("msacore", call), Provider("msacore without it", without, tolerance=math.inf)]
    if by_hand is not None:
        providers.append(plain("reference", by_hand, at_most(lambda given: 32.0 * _rows(given) ** 2)))

    def both(sizes: Sizes) -> tuple[Work, Work]:
        once = work(sizes)
        return once, Work(4 * once.flops, 3 * once.bytes)

    return Benchmark(
        name=f"{operator}: {argument}", shapes=shapes, inputs=inputs, providers=tuple(providers), work=both, **benchmark
    )


def _rows(inputs: Inputs) -> int:
    return max(len(t) for t in inputs.values() if isinstance(t, Tensor) and t.dim())


def _leaf(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


_LOSS = (
    Shape("N=128 d=128 (one batch)", {"N": 128, "d": 128}, quick=True),
    Shape("N=2048 d=128", {"N": 2048, "d": 128}),
)


def _loss_inputs(**more: Callable[[Sizes, torch.device], Any]) -> Make:
    def make(sizes: Sizes, device: torch.device) -> Inputs:
        pair = {name: _leaf(sizes["N"], sizes["d"], device=device) for name in ("anchors", "candidates")}
        return pair | {name: value(sizes, device) for name, value in more.items()}

    return make


def _products(sizes: Sizes) -> Work:
    return Work(2.0 * sizes["N"] ** 2 * sizes["d"], 8.0 * sizes["N"] * sizes["d"])


def _labels(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    labels = torch.arange(sizes["N"], device=device) % 7
    return labels, labels


def _loss(argument: str, leave_out: Collection[str], **more: Callable[[Sizes, torch.device], Any]) -> Benchmark:
    plain_form = reference.info_nce.info_nce
    return _beside(
        "info_nce", argument, msacore.info_nce, plain_form, _LOSS, _loss_inputs(**more), _products, leave_out
    )


def _learned(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.tensor(0.1, device=device, requires_grad=True)


_RANKED = (
    Shape("N=64 d=128 (one batch)", {"N": 64, "d": 128}, quick=True),
    Shape("N=1024 d=128", {"N": 1024, "d": 128}),
)


def _ranked(sizes: Sizes, device: torch.device) -> Inputs:
    targets = torch.randn(sizes["N"], 2, device=device)
    return {
        "embeddings": _leaf(sizes["N"], sizes["d"], device=device),
        "targets": targets,
        "temperature": _learned(sizes, device),
    }


_CONVERSATIONS = (
    Shape("1×4×3 d=8 (smallest)", {"V": 1, "T": 4, "d": 8}, quick=True),
    Shape("MOSI: 93×24×3 d=256", {"V": 93, "T": 24, "d": 256}),
)


def _conversations(**more: Callable[[Sizes, torch.device], Any]) -> Make:
    def make(sizes: Sizes, device: torch.device) -> Inputs:
        n = sizes["V"] * sizes["T"]
        offsets = torch.arange(0, n + 1, sizes["T"], device=device)
        states = {"x": _leaf(n, 3, sizes["d"], device=device), "offsets": offsets}
        return states | {name: value(sizes, device) for name, value in more.items()}

    return make


def _steps(sizes: Sizes) -> Work:
    elements = 3.0 * sizes["V"] * sizes["T"] * sizes["d"]
    return Work(4 * 10 * elements, 8 * elements)


def _propagation(argument: str, **more: Callable[[Sizes, torch.device], Any]) -> Benchmark:
    plain_form = reference.propagation.propagate
    inputs = _conversations(**more)
    return _beside("propagate", argument, msacore.propagate, plain_form, _CONVERSATIONS, inputs, _steps, tuple(more))


def _half_step(argument: str, **more: Callable[[Sizes, torch.device], Any]) -> Benchmark:
    def make(sizes: Sizes, device: torch.device) -> Inputs:
        given = _conversations(**more)(sizes, device)
        return {"h": given.pop("x"), **given}

    plain_form = reference.propagation.window_mean
    call = msacore.window_mean
    return _beside("window_mean", argument, call, plain_form, _CONVERSATIONS, make, _steps, tuple(more))


def _senders(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.arange(3 * sizes["V"] * sizes["T"], device=device).view(-1, 3) % 4 != 0


def _hierarchy(**more: Callable[[Sizes, torch.device], Any]) -> Make:
    def make(sizes: Sizes, device: torch.device) -> Inputs:
        embeddings = [_leaf(sizes["N"], sizes["d"], device=device) for _ in range(7)]
        of = {"unimodal": embeddings[:3], "fused": embeddings[3], "high_level": embeddings[4:]}
        return of | {name: value(sizes, device) for name, value in more.items()}

    return make


def _nine_terms(argument: str, **more: Callable[[Sizes, torch.device], Any]) -> Benchmark:
    def work(sizes: Sizes) -> Work:
        return Work(9 * _products(sizes).flops, 7 * 4.0 * sizes["N"] * sizes["d"])

    plain_form = reference.hierarchical_contrastive.hierarchical_contrastive_loss
    call = msacore.hierarchical_contrastive_loss
    return _beside(call.__name__, argument, call, plain_form, _RANKED, _hierarchy(**more), work, tuple(more))


def _sorted_edges(edge_index: Tensor, num_nodes: int, weight: Tensor) -> tuple[Tensor, ...]:
    """The same as `from_edge_index`, in plain torch."""
    order = edge_index[1].argsort(stable=True)
    counts = torch.bincount(edge_index[1], minlength=num_nodes)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), edge_index[0][order], weight[order], order


def _edge_index(sizes: Sizes, device: torch.device) -> Inputs:
    edges = 8 * sizes["n"]
    return {
        "edge_index": torch.randint(sizes["n"], (2, edges), device=device),
        "num_nodes": sizes["n"],
        "weight": torch.rand(edges, device=device),
    }


def _sorting(sizes: Sizes) -> tuple[Work, Work]:
    """Every edge and its weight are read once, counted, and written once with their place; one operation per edge."""
    edges = 8.0 * sizes["n"]
    once = Work(edges, edges * (16 + 4 + 8 + 4 + 8))
    return once, once


def _positions(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.arange(sizes["V"] * sizes["T"], device=device) * 3 // 2


_GRAPHS = (Shape("n=64 d=8", {"n": 64, "d": 8}, quick=True), Shape("n=20000 d=64", {"n": 20000, "d": 64}))


def _attention(sizes: Sizes, device: torch.device) -> Inputs:
    n, degree = sizes["n"], 8
    return {
        "x": _leaf(n, _HEADS, sizes["d"], device=device),
        "rowptr": torch.arange(0, n * degree + 1, degree, device=device),
        "col": torch.randint(n, (n * degree,), device=device),
        "weight": torch.rand(n * degree, _HEADS, device=device, requires_grad=True),
    }


def _edges(sizes: Sizes) -> Work:
    return Work(2.0 * 8 * sizes["n"] * _HEADS * sizes["d"], 8.0 * sizes["n"] * _HEADS * sizes["d"])


_POOL = (
    Shape("N=500 d=16 budget=20", {"N": 500, "d": 16, "budget": 20}, quick=True),
    Shape("N=20000 d=128 budget=200", {"N": 20000, "d": 128, "budget": 200}),
)


def _pool(**more: Callable[[Sizes, torch.device], Any]) -> Make:
    def make(sizes: Sizes, device: torch.device) -> Inputs:
        pool = {"embeddings": torch.randn(sizes["N"], sizes["d"], device=device), "budget": sizes["budget"]}
        return pool | {name: value(sizes, device) for name, value in more.items()}

    return make


def _picks(**given: Any) -> Tensor:
    return msacore.select(strategy="kcenter", **given).indices


def _selection(argument: str, **more: Callable[[Sizes, torch.device], Any]) -> Benchmark:
    def once(sizes: Sizes) -> Work:
        return Work(2.0 * sizes["N"] * sizes["d"], 4.0 * sizes["N"] * sizes["d"])

    return _beside("select", argument, _picks, None, _POOL, _pool(**more), once, tuple(more), differentiable=False)


BENCHMARKS = [
    _loss("negatives", ["negatives"], negatives=lambda s, device: _leaf(s["N"], s["d"], device=device)),
    _loss(
        "denominator='negatives'",
        ["denominator"],
        labels=_labels,
        exclude_self=lambda s, device: True,
        denominator=lambda s, device: "negatives",
    ),
    _loss(
        "denominator='decoupled'",
        ["denominator"],
        labels=_labels,
        exclude_self=lambda s, device: True,
        denominator=lambda s, device: "decoupled",
    ),
    _loss(
        "normalize=False",
        ["normalize"],
        normalize=lambda s, device: False,
        temperature=lambda s, device: float(s["d"]),
    ),
    _loss(
        "weights",
        ["weights"],
        weights=lambda s, device: torch.rand(s["N"], s["N"], device=device, requires_grad=True),
    ),
    _loss("learned temperature", ["temperature"], temperature=_learned),
    _nine_terms("learned temperatures", temperatures=lambda s, device: [_learned(s, device) for _ in range(3)]),
    _nine_terms("normalize=False", normalize=lambda s, device: False, temperatures=lambda s, device: [s["d"]] * 3),
    _nine_terms(
        "tier1='intra_modal'",
        tier1=lambda s, device: "intra_modal",
        labels=lambda s, device: torch.arange(s["N"], device=device) % 7,
    ),
    _beside(
        "rank_n_contrast",
        "learned temperature",
        msacore.rank_n_contrast,
        None,
        _RANKED,
        _ranked,
        _products,
        ["temperature"],
    ),
    _propagation("positions", positions=_positions),
    _propagation("include_self=False", include_self=lambda s, device: False),
    _half_step("positions", positions=_positions),
    _half_step("include_self=False", include_self=lambda s, device: False),
    _half_step("senders", senders=_senders),
    Benchmark(
        name="from_edge_index",
        shapes=_GRAPHS,
        inputs=_edge_index,
        providers=(
            plain("msacore", msacore.graph.from_edge_index),
            plain("torch, argsort and bincount", _sorted_edges),
        ),
        work=_sorting,
        differentiable=False,
    ),
    _beside(
        "graph_propagate",
        "a weight per head",
        msacore.graph_propagate,
        None,
        _GRAPHS,
        _attention,
        _edges,
        ["weight"],
    ),
    _selection("candidates", candidates=lambda s, device: torch.arange(s["N"], device=device) % 2 == 0),
    _selection(
        "groups",
        groups=lambda s, device: torch.arange(s["N"], device=device) % 50,
        max_per_group=lambda s, device: 1 + s["budget"] // 40,
    ),
    _selection("radius", radius=lambda s, device: 0.0),
]
