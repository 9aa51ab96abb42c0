"""Cases of the hierarchical contrastive loss."""

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

import msacore
from msacore import reference
from tests.opcase import Arguments, BadInput, OpCase, Sample

_SMALL = {"three modalities", "intra-modal", "one modality", "learned temperatures", "learned, intra-modal"}


def _sample(
    device: torch.device, dtype: torch.dtype, name: str, sizes: tuple[int, int, int, int], **options: Any
) -> Sample:
    n, modalities, d, d3 = sizes
    generator = torch.Generator().manual_seed(n + 31 * modalities + 7 * d + d3)

    def draw(width: int) -> Tensor:
        return torch.randn(n, width, generator=generator).to(device, dtype)

    arguments: Arguments = dict(
        unimodal=[draw(d) for _ in range(modalities)],
        fused=draw(d),
        high_level=[draw(d3) for _ in combinations(range(modalities), 2)],
    )
    if options.pop("available", False):
        arguments["available"] = (torch.rand(n, modalities, generator=generator) > 0.3).to(device)
    if options.get("tier1") == "intra_modal":
        arguments["labels"] = torch.randint(-1, 2, (n,), generator=generator).to(device)
    if "learned" in options:
        arguments["temperatures"] = [
            value if isinstance(value, int) else torch.tensor(value, device=device, dtype=dtype)
            for value in options.pop("learned")
        ]
    return Sample(name, {**arguments, **options}, small=name in _SMALL, on_host=modalities <= 6 and n <= 200)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return [
        _sample(device, dtype, name, sizes, **options)
        for name, sizes, options in [
            ("three modalities", (6, 3, 4, 3), dict(available=True, return_tiers=True)),
            ("three modalities, another size", (8, 3, 5, 2), dict(available=True, return_tiers=True)),
            ("two modalities", (7, 2, 3, 4), {}),
            ("intra-modal", (8, 2, 4, 3), dict(tier1="intra_modal", available=True, return_tiers=True)),
            ("one modality", (4, 1, 3, 0), dict(available=True)),
            ("one sample", (1, 3, 3, 2), dict(return_tiers=True)),
            ("no samples", (0, 3, 3, 2), dict(return_tiers=True)),
            ("weights and temperatures", (5, 3, 4, 4), dict(tier_weights=(1, 0, 2.5), temperatures=(1.0, 0.02, 0.3))),
            ("four modalities", (40, 4, 20, 9), dict(available=True, return_tiers=True)),
            ("large", (150, 3, 33, 18), dict(return_tiers=True)),
            ("large, intra-modal", (150, 3, 20, 20), dict(tier1="intra_modal", available=True)),
            ("large: seven modalities", (5, 7, 4, 3), dict(available=True)),
            ("six modalities", (5, 6, 4, 3), dict(available=True)),
            ("two tiles of candidates", (140, 1, 70, 0), dict(available=True)),
            ("two tiles of candidates, intra-modal", (132, 2, 12, 8), dict(tier1="intra_modal", available=True)),
            ("learned temperatures", (6, 3, 4, 3), dict(available=True, learned=(0.3, 0.2, 0.5), return_tiers=True)),
            (
                "learned, intra-modal",
                (8, 2, 4, 3),
                dict(tier1="intra_modal", available=True, learned=(0.4, 1, 0.5), return_tiers=True),
            ),
            ("large, learned, intra-modal", (150, 2, 8, 5), dict(tier1="intra_modal", learned=(0.1, 0.02, 0.5))),
            ("dot products", (9, 3, 4, 3), dict(available=True, normalize=False, temperatures=(1.0, 0.5, 2.0))),
            ("dot products, learned", (9, 2, 4, 3), dict(normalize=False, learned=(1.0, 2.0, 0.5))),
            ("rows too wide to keep", (3, 2, 1900, 2), {}),
            ("large: classes of several pieces", (300, 2, 4, 3), dict(tier1="intra_modal")),
        ]
    ]


def _hidden(arguments: Arguments) -> list[tuple[tuple[Any, ...], Tensor]]:
    available = arguments.get("available")
    if available is None:
        return []
    found: list[tuple[tuple[Any, ...], Tensor]] = []
    for m, tensor in enumerate(arguments["unimodal"]):
        found.append((("unimodal", m), ~available[:, m, None].expand_as(tensor)))
    for p, (m, k) in enumerate(combinations(range(available.shape[1]), 2)):
        exists = available[:, m] & available[:, k]
        found.append((("high_level", p), ~exists[:, None].expand_as(arguments["high_level"][p])))
    return found


def _member(name: str, index: int, change: Any) -> Any:
    def mutate(arguments: Arguments) -> Arguments:
        members = list(arguments[name])
        members[index] = change(members[index])
        return {**arguments, name: members}

    return mutate


def _with(**values: Any) -> Any:
    return lambda arguments: {**arguments, **values}


CASES = [
    OpCase(
        name="hierarchical_contrastive_loss",
        op=msacore.hierarchical_contrastive_loss,
        reference=reference.hierarchical_contrastive.hierarchical_contrastive_loss,
        samples=_samples,
        gradients=("unimodal", "fused", "high_level", "temperatures"),
        loss=True,
        hidden=_hidden,
        bad_inputs={
            "no modality": BadInput(_with(unimodal=[]), ("`unimodal`", "got 0")),
            "integer features": BadInput(_member("unimodal", 0, lambda t: t.long()), ("`unimodal[0]`", "int64")),
            "another width": BadInput(_member("unimodal", 1, lambda t: t[:, 1:]), ("`unimodal[1]`", "[N, d]")),
            "another dtype": BadInput(_member("unimodal", 2, lambda t: t.double()), ("`unimodal[2]`", "float64")),
            "fused too short": BadInput(lambda a: {**a, "fused": a["fused"][1:]}, ("`fused`", "[N, d]")),
            "a pair too few": BadInput(
                lambda a: {**a, "high_level": a["high_level"][1:]}, ("`high_level`", "M(M-1)/2 = 3", "got 2")
            ),
            "pairs of other widths": BadInput(
                _member("high_level", 1, lambda t: t[:, 1:]), ("`high_level[1]`", "[N, d3]")
            ),
            "high level of three dimensions": BadInput(
                _member("high_level", 0, lambda t: t[None]), ("`high_level[0]`", "[N, d3]")
            ),
            "availability of floats": BadInput(
                lambda a: {**a, "available": a["available"].float()}, ("`available`", "bool", "float32")
            ),
            "availability of another shape": BadInput(
                lambda a: {**a, "available": a["available"][:, 1:]}, ("`available`", "[N, M]")
            ),
            "no labels": BadInput(_with(tier1="intra_modal"), ("`labels`", "intra_modal")),
            "labels of floats": BadInput(_with(tier1="intra_modal", labels=torch.zeros(6)), ("`labels`", "int64")),
            "unknown tier": BadInput(_with(tier1="both"), ("`tier1`", "both")),
            "two weights": BadInput(_with(tier_weights=(0.5, 0.5)), ("`tier_weights`", "got 2")),
            "four temperatures": BadInput(_with(temperatures=(1, 1, 1, 1)), ("`temperatures`", "got 4")),
            "one temperature": BadInput(_with(temperatures=0.1), ("`temperatures`", "0.1")),
            "temperature of two numbers": BadInput(
                _with(temperatures=[torch.ones(2), 0.1, 0.1]), ("`temperatures[0]`", "[2]")
            ),
            "one weight": BadInput(_with(tier_weights=1.0), ("`tier_weights`", "1.0")),
            "learned temperature of zero": BadInput(
                _with(temperatures=[0.1, torch.tensor(0.0), 0.1]), ("`temperatures[1]`", "positive"), values=True
            ),
            "weights that learn": BadInput(
                _with(tier_weights=[torch.ones((), requires_grad=True), 0.1, 0.1]),
                ("`tier_weights[0]`", "requires grad"),
            ),
            "features as a dict": BadInput(_with(unimodal={"text": 1}), ("`unimodal`", "dict")),
            "temperature of zero": BadInput(_with(temperatures=(0.1, 0.0, 0.1)), ("`temperatures`", "positive")),
        },
    ),
]
