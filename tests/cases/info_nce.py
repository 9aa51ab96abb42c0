"""Cases of `info_nce`."""

from typing import Any

import torch
from torch import Tensor

import msacore
from msacore import reference
from tests.cases.propagation import changed
from tests.opcase import Arguments, BadInput, OpCase, Sample

# Few, because expensive tests run them: every argument, every form of positives, one direction and both.
_SMALL = {
    "weighted",
    "symmetric and masked",
    "symmetric, per anchor",
    "labels, both ways",
    "with itself",
    "with itself, masks differ",
    "nothing left",
    "queue",
    "negatives, labels and queue, both ways",
    "negatives, weights",
    "negatives, with itself",
    "decoupled, labels, both ways",
    "decoupled, weights and queue",
    "dot products",
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
        arguments["labels"] = (draw[0], draw[1]) if "candidates" in arguments else draw[0]
    if "weights" in options:
        share = options.pop("weights")  # of the pairs that are positive; the others have a weight of 0
        weights = 0.1 + torch.rand(n, m, generator=generator)  # finite differences must not make one negative
        if share < 1:
            weights *= torch.rand(n, m, generator=generator) < share
        arguments["weights"] = weights.to(device, dtype)
    if "queue" in options:
        q = options.pop("queue")
        arguments["negatives"] = torch.randn(q, d, generator=generator).to(device, dtype)
        arguments["negative_mask"] = (torch.rand(q, generator=generator) > 0.3).to(device)
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
            ("weighted", (7, 9, 5), dict(weights=1, anchor_mask=True, learned=0.5)),
            ("weighted, another size", (9, 6, 4), dict(weights=1, anchor_mask=True, learned=0.5)),
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
            ("with itself, weighted", (7, 7, 3), dict(self=True, weights=1, symmetric=True, exclude_self=True)),
            ("nothing left", (4, 4, 3), dict(exclude_self=True)),
            ("queue", (5, 5, 3), dict(queue=6, symmetric=True, learned=0.4)),
            ("queue, with itself", (8, 8, 4), dict(self=True, labels=2, exclude_self=True, queue=9)),
            ("queue, small temperature", (6, 6, 4), dict(queue=40, temperature=0.01)),
            (
                "negatives, labels and queue, both ways",
                (7, 5, 3),
                dict(labels=2, symmetric=True, queue=4, denominator="negatives", learned=0.3),
            ),
            (
                "negatives, weights",
                (6, 7, 3),
                dict(weights=1, denominator="negatives", symmetric=True, queue=5),
            ),
            (
                "negatives, with itself",
                (8, 8, 4),
                dict(self=True, labels=3, exclude_self=True, denominator="negatives", learned=0.4),
            ),
            ("negatives, no negative", (4, 5, 3), dict(labels=1, denominator="negatives", symmetric=True)),
            (
                "negatives, no negative, small temperature",
                (4, 5, 3),
                dict(labels=1, denominator="negatives", symmetric=True, temperature=0.01),
            ),
            ("negatives, diagonal", (6, 6, 3), dict(denominator="negatives", symmetric=True, queue=3)),
            (
                "decoupled, labels, both ways",
                (7, 6, 3),
                dict(labels=3, symmetric=True, denominator="decoupled", candidate_mask=True, learned=0.4),
            ),
            (
                "decoupled, weights and queue",
                (5, 6, 3),
                dict(weights=1, denominator="decoupled", queue=4, anchor_mask=True),
            ),
            ("decoupled, diagonal, per anchor", (6, 6, 4), dict(denominator="decoupled", reduction="none")),
            (
                "decoupled, with itself",
                (8, 8, 4),
                dict(self=True, labels=3, exclude_self=True, denominator="decoupled"),
            ),
            ("decoupled, no negative", (4, 5, 3), dict(labels=1, denominator="decoupled", symmetric=True)),
            ("dot products", (6, 5, 3), dict(labels=2, symmetric=True, normalize=False, queue=3, learned=0.7)),
            ("dot products, small temperature", (9, 9, 4), dict(normalize=False, temperature=0.05, symmetric=True)),
            ("one row", (1, 1, 3), dict(symmetric=True)),
            ("no rows", (0, 0, 3), dict(symmetric=True)),
            ("no candidates", (4, 0, 3), dict(labels=2)),
            ("no candidates, weights and queue", (4, 0, 3), dict(weights=1, queue=5)),
            ("no candidates, labels and queue", (5, 0, 3), dict(labels=2, queue=5)),
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
            ("large, negatives", (150, 140, 20), dict(labels=4, symmetric=True, denominator="negatives", queue=150)),
            (
                "large, negatives, weighted",
                (140, 150, 20),
                dict(weights=0.3, denominator="negatives", temperature=0.02),
            ),
            ("large, negatives, with itself", (270, 270, 9), dict(self=True, labels=5, denominator="negatives")),
            ("large, decoupled", (140, 260, 20), dict(labels=9, symmetric=True, denominator="decoupled", queue=130)),
            ("large, dot products", (150, 150, 20), dict(normalize=False, symmetric=True, queue=40)),
            ("large, weighted", (150, 170, 20), dict(weights=0.6, symmetric=True, candidate_mask=True)),
        ]
    ]


def _hidden(arguments: Arguments) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Rows that are masked or unlabelled, and the weights of pairs that take no part."""
    anchors, candidates = arguments["anchors"], arguments.get("candidates")
    n, m = len(anchors), len(anchors if candidates is None else candidates)
    rows = torch.ones(n, dtype=torch.bool) & arguments.get("anchor_mask", torch.tensor(True))
    columns = torch.ones(m, dtype=torch.bool) & arguments.get("candidate_mask", torch.tensor(True))
    if "labels" in arguments:
        labels = arguments["labels"]
        of_rows, of_columns = (labels, labels) if isinstance(labels, Tensor) else labels
        rows, columns = rows & (of_rows >= 0), columns & (of_columns >= 0)
    found = [(("anchors",), ~(rows | columns) if candidates is None else ~rows)]
    if candidates is not None:
        found.append((("candidates",), ~columns))
    if "negatives" in arguments:
        found.append((("negatives",), ~arguments["negative_mask"]))
    if arguments.get("weights") is not None:
        pairs = rows[:, None] & columns[None, :]
        if arguments.get("exclude_self"):
            pairs = pairs & ~torch.eye(n, m, dtype=torch.bool)
        found.append((("weights",), ~pairs))
    return [
        (
            path,
            mask if path[0] == "weights" else mask[:, None].expand_as(arguments[path[0]]),
        )
        for path, mask in found
    ]


CASES = [
    OpCase(
        name="info_nce",
        op=msacore.info_nce,
        reference=reference.info_nce.info_nce,
        samples=_samples,
        gradients=("anchors", "candidates", "temperature", "weights", "negatives"),
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
            "labels for one side": BadInput(lambda a: {**a, "labels": torch.zeros(7).long()}, ("`labels`", "pair")),
            "labels of floats": BadInput(
                lambda a: {**a, "weights": None, "labels": (torch.zeros(7), torch.zeros(9).long())},
                ("`labels[0]`", "int64", "float32"),
            ),
            "negatives of another width": BadInput(
                lambda a: {**a, "negatives": torch.zeros(4, 6)}, ("`negatives`", "[Q, d]")
            ),
            "negatives of another dtype": BadInput(
                lambda a: {**a, "negatives": torch.zeros(4, 5).double()}, ("`negatives`", "float32", "float64")
            ),
            "negative mask without negatives": BadInput(
                lambda a: {**a, "negative_mask": torch.ones(4, dtype=torch.bool)}, ("`negative_mask`", "`negatives`")
            ),
            "negative mask too short": BadInput(
                lambda a: {**a, "negatives": torch.zeros(4, 5), "negative_mask": torch.ones(3, dtype=torch.bool)},
                ("`negative_mask`", "[Q]"),
            ),
            "unknown denominator": BadInput(lambda a: {**a, "denominator": "some"}, ("`denominator`", "some")),
            "normalize of a number": BadInput(lambda a: {**a, "normalize": 2}, ("`normalize`", "2")),
            "an array": BadInput(lambda a: {**a, "anchors": [[1.0]]}, ("`anchors`", "list")),
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
                changed(temperature=lambda t: t.repeat(2)), ("`temperature`", "[2]")
            ),
            "temperature tensor of zero": BadInput(
                changed(temperature=torch.zeros_like), ("`temperature`", "positive"), values=True
            ),
            "negative weights": BadInput(changed(weights=lambda w: w - 0.5), ("`weights`", "at least 0"), values=True),
        },
    ),
]
