"""Cases of low-rank fusion."""

from typing import Any

import torch
from torch import Tensor

import msacore
from msacore import reference
from tests.opcase import BadInput, OpCase, Sample


def low_rank_arguments(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    rank: int,
    width: int,
    features: tuple[int, ...],
    missing: bool = False,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch + 31 * rank + 961 * width + sum(features))

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    arguments: dict[str, Any] = dict(
        features=[draw(batch, d) for d in features],
        factors=[draw(rank, d + 1, width, scale=(d + 1) ** -0.5) for d in features],
        rank_weight=draw(rank),
        bias=draw(width),
    )
    if missing:
        available = torch.rand(batch, len(features), generator=generator) < 0.6
        available[-1:] = False
        arguments["available"] = available.to(device)
    return arguments


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, *sizes: Any, small: bool = True, missing: bool = False) -> Sample:
        return Sample(name, low_rank_arguments(device, dtype, *sizes, missing=missing), small)

    return [
        sample("odd", 3, 2, 5, (3, 4, 2), missing=True),
        sample("another size", 5, 3, 4, (2, 5, 3), missing=True),
        sample("complete", 4, 2, 3, (3, 2), small=False),
        sample("one modality", 3, 2, 2, (3,), missing=True),
        sample("size one", 1, 1, 1, (1, 1)),
        sample("no samples", 0, 2, 3, (3, 2), missing=True),
        sample("no rank", 3, 0, 2, (3, 2), small=False),
        sample("no width", 3, 2, 0, (3, 2), small=False),
        sample("no features", 3, 2, 2, (0, 2), missing=True, small=False),
        sample("large", 301, 5, 67, (70, 33, 129), missing=True, small=False),
        sample("large and complete", 65, 4, 128, (128, 60, 30), small=False),
        sample("large, whole pieces", 70, 2, 72, (136, 64), missing=True, small=False),
    ]


def _hidden(arguments: dict[str, Any]) -> list[tuple[tuple[Any, ...], Tensor]]:
    if "available" not in arguments:
        return []
    gone = ~arguments["available"]
    return [(("features", m), gone[:, m, None].expand(x.shape)) for m, x in enumerate(arguments["features"])]


def changed(**changes: Any) -> Any:
    return lambda arguments: {**arguments, **{k: f(arguments[k]) for k, f in changes.items()}}


def _member(name: str, index: int, change: Any) -> Any:
    return changed(**{name: lambda f: [change(x) if i == index else x for i, x in enumerate(f)]})


BAD_INPUTS = {
    "a dict of features": BadInput(changed(features=lambda f: dict(enumerate(f))), ("`features`", "sequence", "dict")),
    "one tensor of factors": BadInput(changed(factors=lambda f: f[0]), ("`factors`", "sequence", "tensor", "unbind")),
    "a NumPy modality": BadInput(_member("features", 1, lambda x: x.cpu().numpy()), ("`features[1]`", "NumPy")),
    "a number as bias": BadInput(changed(bias=lambda _: 0.5), ("`bias`", "tensor", "0.5")),
    "no modality": BadInput(changed(features=lambda f: f[:0]), ("`features`", "1")),
    "a factor too few": BadInput(changed(factors=lambda f: f[:2]), ("`factors`", "M = 3", "got 2")),
    "integer features": BadInput(_member("features", 0, lambda x: x.long()), ("`features[0]`", "float32", "int64")),
    "features of three dimensions": BadInput(_member("features", 1, lambda x: x[None]), ("`features[1]`", "[B, d_m]")),
    "another batch size": BadInput(_member("features", 2, lambda x: x[1:]), ("`features[2]`", "[3, *]", "[2, 2]")),
    "factors without the 1": BadInput(
        _member("factors", 1, lambda x: x[:, 1:]), ("`factors[1]`", "[r, d_m + 1, h]", "[2, 4, 5]")
    ),
    "factors of another dtype": BadInput(_member("factors", 0, lambda x: x.double()), ("`factors[0]`", "float64")),
    "rank_weight of two dimensions": BadInput(changed(rank_weight=lambda w: w[None]), ("`rank_weight`", "[r]")),
    "bias of two dimensions": BadInput(changed(bias=lambda b: b[None]), ("`bias`", "[h]")),
    "available of floats": BadInput(changed(available=lambda a: a.float()), ("`available`", "bool", "float32")),
    "available of another width": BadInput(changed(available=lambda a: a[:, 1:]), ("`available`", "[B, M]")),
}

CASES = [
    OpCase(
        name="low_rank_fusion",
        op=msacore.low_rank_fusion,
        reference=reference.low_rank_fusion.low_rank_fusion,
        samples=_samples,
        gradients=("features", "factors", "rank_weight", "bias"),
        bad_inputs=BAD_INPUTS,
        hidden=_hidden,
    ),
]
