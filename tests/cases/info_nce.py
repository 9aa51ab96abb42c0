"""Cases of `info_nce`."""

from typing import Any

import torch
from torch import Tensor

import msacore
from msacore import reference
from tests.cases.propagation import changed
from tests.opcase import Arguments, BadInput, OpCase, Sample

# Few, because they are the expensive ones: every argument, every form of positives, one and two sides.
_SMALL = {
    "weighted",
    "symmetric and masked",
    "symmetric, per anchor",
    "labels, both ways",
    "with itself",
    "with itself, masks differ",
    "nothing left",
}


def _sample(device: torch.device, dtype: torch.dtype, name: str, sizes: tuple[int, int, int], **options: Any) -> Sample:
    n, m, d = sizes
    generator = torch.Generator().manual_seed(n + 31 * m + 7 * d)
    arguments: Arguments = dict(anchors=torch.randn(n, d, generator=generator).to(device, dtype))
    if not options.pop("self", False):
        arguments["candidates"] = torch.randn(m, d, generator=generator).to(device, dtype)
    if "labels" in options:
        classes = options.pop("labels")
        draw = [torch.randint(-1, classes, (k,), generator=generator).to(device) for k in (n, m)]
        arguments["labels"] = (draw[0], draw[1] if "candidates" in arguments else draw[0])
    if options.pop("weights", False):
        weights = 0.1 + torch.rand(n, m, generator=generator)  # finite differences need room below
        if n > 100:
            weights *= torch.rand(n, m, generator=generator) > 0.4
        arguments["weights"] = weights.to(device, dtype)
    for mask, rows in (("anchor_mask", n), ("candidate_mask", m)):
        if options.pop(mask, False):
            arguments[mask] = (torch.rand(rows, generator=generator) > 0.3).to(device)
    if "learned" in options:
        arguments["temperature"] = torch.tensor(options.pop("learned"), device=device, dtype=dtype)
    return Sample(name, {**arguments, **options}, small=name in _SMALL)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return [
        _sample(device, dtype, name, sizes, **options)
        for name, sizes, options in [
            ("weighted", (7, 9, 5), dict(weights=True, anchor_mask=True, learned=0.5)),
            ("weighted, another size", (9, 6, 4), dict(weights=True, anchor_mask=True, learned=0.5)),
            ("diagonal", (6, 6, 5), {}),
            (
                "symmetric and masked",
                (8, 8, 3),
                dict(symmetric=True, anchor_mask=True, candidate_mask=True),
            ),
            ("symmetric, per anchor", (7, 7, 3), dict(symmetric=True, reduction="none", anchor_mask=True)),
            ("labels", (9, 7, 4), dict(labels=3, learned=0.2, reduction="sum")),
            (
                "labels, both ways",
                (6, 9, 4),
                dict(labels=2, symmetric=True, candidate_mask=True, exclude_self=True),
            ),
            ("with itself", (9, 9, 4), dict(self=True, labels=3, exclude_self=True, learned=0.3)),
            ("with itself, per anchor", (8, 8, 4), dict(self=True, labels=2, exclude_self=True, reduction="none")),
            (
                "with itself, masks differ",
                (9, 9, 3),
                dict(self=True, labels=2, exclude_self=True, anchor_mask=True),
            ),
            ("with itself, weighted", (7, 7, 3), dict(self=True, weights=True, symmetric=True, exclude_self=True)),
            ("nothing left", (4, 4, 3), dict(exclude_self=True)),
            ("one row", (1, 1, 3), dict(symmetric=True)),
            ("no rows", (0, 0, 3), dict(symmetric=True)),
            ("no candidates", (4, 0, 3), dict(labels=2)),
            ("no width", (3, 3, 0), {}),
            ("small temperature", (9, 9, 4), dict(temperature=0.01, symmetric=True)),
            ("small temperature, with itself", (9, 9, 4), dict(self=True, labels=2, temperature=0.01)),
            ("large, labels", (300, 300, 67), dict(self=True, labels=9, exclude_self=True)),
            ("large, symmetric", (290, 290, 40), dict(symmetric=True, candidate_mask=True)),
            ("large, rectangular", (70, 600, 33), dict(labels=11, symmetric=True, learned=0.07)),
            (
                "large, small temperature",
                (200, 200, 20),
                dict(self=True, labels=5, temperature=0.02),
            ),
            ("large, weighted", (150, 170, 20), dict(weights=True, symmetric=True, candidate_mask=True)),
        ]
    ]


def _hidden(arguments: Arguments) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Rows that are masked or unlabelled, and the weights of pairs that take no part."""
    anchors, candidates = arguments["anchors"], arguments.get("candidates")
    n, m = len(anchors), len(anchors if candidates is None else candidates)
    rows = torch.ones(n, dtype=torch.bool) & arguments.get("anchor_mask", torch.tensor(True))
    columns = torch.ones(m, dtype=torch.bool) & arguments.get("candidate_mask", torch.tensor(True))
    if "labels" in arguments:
        rows, columns = rows & (arguments["labels"][0] >= 0), columns & (arguments["labels"][1] >= 0)
    found = [(("anchors",), ~(rows | columns) if candidates is None else ~rows)]
    if candidates is not None:
        found.append((("candidates",), ~columns))
    if "weights" in arguments:
        pairs = rows[:, None] & columns[None, :]
        if arguments.get("exclude_self"):
            pairs = pairs & ~torch.eye(n, m, dtype=torch.bool)
        found.append((("weights",), ~pairs))
    return [
        (
            path,
            mask[:, None].expand_as(arguments["anchors" if path[0] == "anchors" else "candidates"])
            if path[0] != "weights"
            else mask,
        )
        for path, mask in found
    ]


CASES = [
    OpCase(
        name="info_nce",
        op=msacore.info_nce,
        reference=reference.info_nce.info_nce,
        samples=_samples,
        gradients=("anchors", "candidates", "temperature", "weights"),
        loss=True,
        hidden=_hidden,
        bad_inputs={
            "integer anchors": BadInput(changed(anchors=lambda x: x.long()), ("`anchors`", "float32", "int64")),
            "anchors of one dimension": BadInput(changed(anchors=lambda x: x[:, 0]), ("`anchors`", "[N, d]")),
            "candidates of another width": BadInput(
                changed(candidates=lambda x: x[:, 1:]), ("`candidates`", "[N', d]")
            ),
            "candidates of another dtype": BadInput(
                changed(candidates=lambda x: x.double()), ("`candidates`", "float32", "float64")
            ),
            "weights of another shape": BadInput(changed(weights=lambda w: w[:, 1:]), ("`weights`", "[N, N']")),
            "weights of another dtype": BadInput(changed(weights=lambda w: w.half()), ("`weights`", "float16")),
            "labels and weights": BadInput(
                lambda a: {**a, "labels": (torch.zeros(7).long(), torch.zeros(9).long())}, ("`labels`", "both")
            ),
            "labels that are no pair": BadInput(lambda a: {**a, "labels": torch.zeros(7).long()}, ("`labels`", "pair")),
            "labels of int32": BadInput(
                lambda a: {**a, "weights": None, "labels": (torch.zeros(7).int(), torch.zeros(9).long())},
                ("`labels[0]`", "int64", "int32"),
            ),
            "labels too short": BadInput(
                lambda a: {**a, "weights": None, "labels": (torch.zeros(7).long(), torch.zeros(8).long())},
                ("`labels[1]`", "[N']"),
            ),
            "mask of floats": BadInput(changed(anchor_mask=lambda m: m.float()), ("`anchor_mask`", "bool", "float32")),
            "mask too long": BadInput(
                lambda a: {**a, "candidate_mask": torch.ones(10, dtype=torch.bool)}, ("`candidate_mask`", "[N']")
            ),
            "no positives given for unequal sizes": BadInput(
                changed(weights=lambda _: None), ("`candidates`", "`anchors` (7)", "got 9")
            ),
            "unequal sizes, symmetric, per anchor": BadInput(
                lambda a: {**a, "symmetric": True, "reduction": "none"}, ("`symmetric`", "`reduction`", "got 9")
            ),
            "unknown reduction": BadInput(lambda a: {**a, "reduction": "median"}, ("`reduction`", "median")),
            "negative temperature": BadInput(changed(temperature=lambda _: -0.5), ("`temperature`", "-0.5")),
            "temperature of two numbers": BadInput(
                changed(temperature=lambda t: t.repeat(2)), ("`temperature`", "0-d")
            ),
            "temperature tensor of zero": BadInput(
                changed(temperature=torch.zeros_like), ("`temperature`", "positive"), values=True
            ),
            "negative weights": BadInput(changed(weights=lambda w: w - 0.5), ("`weights`", "at least 0"), values=True),
        },
    ),
]
