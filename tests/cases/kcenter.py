"""Arguments of the selection kernels. They have no gradient, so they are not OpCases; see tests/test_kcenter.py."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msacore.ops import kcenter
from tests.opcase import BadInput


@dataclass(frozen=True)
class KernelCase:
    name: str
    op: Callable[..., Any]
    arguments: Callable[[torch.device, torch.dtype], dict[str, Any]]
    bad_inputs: dict[str, BadInput]

    def split(self, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments before the `*` of the operator's schema, which are passed by position, and the others."""
        names = [a.name for a in self.op._schema.arguments if not a.kwarg_only]
        return tuple(arguments[n] for n in names), {k: v for k, v in arguments.items() if k not in names}

    def run(self, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        args, kwargs = self.split(arguments)
        out = self.op(*args, **kwargs)
        return out if isinstance(out, tuple) else (out,)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pool(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    pool = draw(40, 6).to(device, dtype)
    return {
        "pool": pool,
        "rows": torch.arange(1, 31, device=device),
        "centers": pool[5:12].double(),
        "shift": pool.double().mean(0),
        "scale": 0.25,
        "metric": 0,
    }


def _fold(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return _pool(device, dtype) | {
        "start": torch.arange(30, device=device) % 8,
        "delta": torch.full((30,), 2.5, dtype=torch.float64, device=device),
        "owner": torch.full((30,), -1, device=device),
    }


def _greedy(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    ones = torch.ones(40, dtype=torch.float64, device=device)
    return {
        "candidates": draw(40, 6).to(device, dtype),
        "weight": ones,
        "delta": 5 * ones,
        "index": torch.arange(40, device=device),
        "group": torch.arange(40, device=device) % 7,
        "room": torch.arange(7, device=device),
        "bound": torch.tensor([1.0], dtype=torch.float64, device=device),
        "bound_index": torch.tensor([40], device=device),
        "limit": 10,
        "metric": 0,
    }


def change(name: str, value: Callable[[Any], Any], *words: str, values: bool = False) -> BadInput:
    return BadInput(lambda arguments: arguments | {name: value(arguments[name])}, (f"`{name}`", *words), values)


_POOL = {
    "pool of one dimension": change("pool", lambda t: t[0], "[N, d]"),
    "integer pool": change("pool", lambda t: t.long(), "float32"),
    "rows of another dtype": change("rows", lambda t: t.int(), "int64"),
    "row outside": change("rows", lambda t: t + 20, "[0, 40)", values=True),
    "centres of another width": change("centers", lambda t: t[:, :5], "[n, d]"),
    "centres of another dtype": change("centers", lambda t: t.float(), "float64"),
    "shift of another width": change("shift", lambda t: t[:5], "[d]"),
    "metric": change("metric", lambda m: 2, "cosine"),
}

CASES = [
    KernelCase(
        "kcenter_scan",
        kcenter.scan,
        lambda device, dtype: {"pool": draw(40, 6).to(device, dtype)},
        {name: _POOL[name] for name in ("pool of one dimension", "integer pool")},
    ),
    KernelCase(
        "kcenter_rank",
        kcenter.rank,
        lambda device, dtype: {"score": draw(40).to(device), "count": 7},
        {
            "score of two dimensions": change("score", lambda t: t[None], "[N]"),
            "score of another dtype": change("score", lambda t: t.float(), "float64"),
            "negative count": change("count", lambda n: -1, "at least 0"),
        },
    ),
    KernelCase(
        "kcenter_fold",
        kcenter.fold,
        _fold,
        {
            **_POOL,
            "start of another length": change("start", lambda t: t[1:], "[A]"),
            "start outside": change("start", lambda t: t + 5, "[0, 8)", values=True),
            "delta of another dtype": change("delta", lambda t: t.float(), "float64"),
            "owner of another length": change("owner", lambda t: t[1:], "[A]"),
        },
    ),
    KernelCase("kcenter_count", kcenter.count, lambda device, dtype: _pool(device, dtype) | {"radius": 2.0}, _POOL),
    KernelCase(
        "kcenter_products",
        kcenter.products,
        lambda device, dtype: {k: v for k, v in _pool(device, dtype).items() if k not in ("scale", "metric")},
        {name: bad for name, bad in _POOL.items() if name != "metric"},
    ),
    KernelCase(
        "kcenter_greedy",
        kcenter.greedy,
        _greedy,
        {
            "integer candidates": change("candidates", lambda t: t.long(), "float32"),
            "weight of another length": change("weight", lambda t: t[1:], "[m]"),
            "index of another dtype": change("index", lambda t: t.int(), "int64"),
            "group of another length": change("group", lambda t: t[1:], "[m] or [0]"),
            "group outside": change("group", lambda t: t + 1, "[0, 7)", values=True),
            "room of another dtype": change("room", lambda t: t.int(), "int64"),
            "no room": change("room", lambda t: t[:0], "entry per group"),
            "bound of two": change("bound", lambda t: t.expand(2), "[1]"),
            "negative limit": change("limit", lambda n: -1, "at least 0"),
            "metric": change("metric", lambda m: -1, "euclidean"),
        },
    ),
]
