"""Cases of Rank-N-Contrast."""

from typing import Any

import torch
from torch import Tensor

import msacore
from msacore import reference
from tests.cases.propagation import changed
from tests.opcase import Arguments, BadInput, OpCase, Sample


def _sample(device: torch.device, dtype: torch.dtype, name: str, samples: int, width: int, **options: Any) -> Sample:
    """Labels are multiples of 1/8 in [-3, 3]; every dtype holds their gaps exactly and therefore has the same ties."""
    generator = torch.Generator().manual_seed(samples + 31 * width)
    embeddings = torch.randn(samples, width, generator=generator) * options.pop("spread", 1.0) + options.pop("shift", 0)
    if apart := options.pop("in_pairs", 0.0):
        embeddings[1::2] = embeddings[: 2 * (samples // 2) : 2] + apart * embeddings[1::2]
    if options.pop("repeated", False):
        embeddings[samples // 2 :] = embeddings[: samples - samples // 2]
    if far := options.pop("far", 0.0):
        embeddings[samples // 3] *= far
    levels, labels = options.pop("levels", 48), options.pop("labels", None)
    shape = (samples,) if labels is None else (samples, labels)
    targets = torch.randint(0, levels + 1, shape, generator=generator)
    if (integer := options.pop("integer", None)) is None:
        targets = (targets * (6 / levels) - 3).to(dtype)
    else:
        targets = targets.to(integer)
    if "learned" in options:
        options["temperature"] = torch.tensor(options.pop("learned"), device=device, dtype=dtype)
    masked = options.pop("masked", 0)
    mask = torch.randperm(samples, generator=generator).to(device) >= masked if masked else None
    arguments = dict(embeddings=embeddings.to(device, dtype), targets=targets.to(device), mask=mask, **options)
    return Sample(name, arguments, small=samples * width < 100)


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    return [
        _sample(device, dtype, name, *sizes, **options)
        for name, sizes, options in [
            ("odd", (7, 5), {}),
            ("another size", (9, 4), {}),
            ("masked", (9, 3), dict(masked=4)),
            ("few labels", (11, 3), dict(levels=2, temperature=0.5)),
            ("all but one masked", (5, 3), dict(masked=4)),
            ("all masked", (3, 2), dict(masked=3)),
            ("two samples", (2, 4), {}),
            ("one sample", (1, 4), {}),
            ("no samples", (0, 3), {}),
            ("no width", (5, 0), {}),
            ("large", (150, 33), dict(masked=20, temperature=1.0)),
            ("large, few labels", (90, 16), dict(levels=6)),
            ("wide range", (40, 16), dict(temperature=0.02)),
            ("far from the origin", (40, 16), dict(shift=8.0)),
            ("close pairs", (70, 9), dict(in_pairs=1e-4, spread=100.0)),
            ("repeated embeddings", (30, 9), dict(repeated=True, spread=2.0)),
            ("learned temperature", (8, 4), dict(learned=0.75, masked=1)),
            ("two labels", (8, 5), dict(labels=2, masked=2)),
            ("integers", (9, 5), dict(integer=torch.int64, levels=4, learned=2.0)),
            ("large, three labels", (100, 17), dict(labels=3, masked=7, learned=0.5)),
            ("large, two integers", (90, 9), dict(labels=2, integer=torch.int16, levels=5, temperature=0.05)),
            ("no labels", (6, 3), dict(labels=0)),
            ("a far row", (70, 9), dict(far=1e3, masked=3, learned=16.0)),
            ("a far row, two labels", (40, 7), dict(far=1e3, labels=2, temperature=16.0)),
        ]
    ]


def _hidden(arguments: Arguments) -> list[tuple[tuple[Any, ...], Tensor]]:
    mask = arguments.get("mask")
    if mask is None:
        return []
    rows, targets = ~mask, arguments["targets"]
    hidden = [(("embeddings",), rows[:, None].expand_as(arguments["embeddings"]))]
    if targets.is_floating_point():
        hidden.append((("targets",), rows.reshape(-1, *[1] * (targets.dim() - 1)).expand_as(targets)))
    return hidden


BAD_INPUTS = {
    "integer embeddings": BadInput(changed(embeddings=lambda e: e.long()), ("`embeddings`", "float32", "int64")),
    "embeddings of one dimension": BadInput(changed(embeddings=lambda e: e[:, 0]), ("`embeddings`", "[N, d]")),
    "NumPy embeddings": BadInput(changed(embeddings=lambda e: e.numpy()), ("`embeddings`", "tensor", "NumPy")),
    "bool targets": BadInput(changed(targets=lambda t: t > 0), ("`targets`", "float32", "int64", "bool")),
    "a list of targets": BadInput(changed(targets=lambda t: t.tolist()), ("`targets`", "tensor", "list of 7")),
    "targets that require grad": BadInput(
        changed(targets=lambda t: t.requires_grad_()), ("`targets`", "grad", "detach")
    ),
    "too few targets": BadInput(changed(targets=lambda t: t[1:]), ("`targets`", "[N]", "[7]", "[6]")),
    "too few pairs of targets": BadInput(
        changed(targets=lambda t: t[1:, None].repeat(1, 2)), ("`targets`", "[N, k]", "[7, *]", "[6, 2]")
    ),
    "targets of three dimensions": BadInput(
        changed(targets=lambda t: t[:, None, None]), ("`targets`", "[N] or [N, k]")
    ),
    "mask of floats": BadInput(changed(mask=lambda _: torch.ones(7)), ("`mask`", "bool", "float32")),
    "mask too long": BadInput(changed(mask=lambda _: torch.ones(8, dtype=torch.bool)), ("`mask`", "[N]", "[8]")),
    "temperature of zero": BadInput(lambda arguments: {**arguments, "temperature": 0.0}, ("`temperature`", "0")),
    "infinite temperature": BadInput(
        lambda arguments: {**arguments, "temperature": float("inf")}, ("`temperature`", "finite", "inf")
    ),
    "temperature of two numbers": BadInput(
        lambda arguments: {**arguments, "temperature": torch.ones(2)}, ("`temperature`", "one element", "[2]")
    ),
    "integer temperature tensor": BadInput(
        lambda arguments: {**arguments, "temperature": torch.tensor(1)}, ("`temperature`", "floating", "int64")
    ),
    "temperature tensor of zero": BadInput(
        lambda arguments: {**arguments, "temperature": torch.zeros(())}, ("`temperature`", "positive"), values=True
    ),
}

CASES = [
    OpCase(
        name="rank_n_contrast",
        op=msacore.rank_n_contrast,
        reference=reference.rank_n_contrast.rank_n_contrast,
        samples=_samples,
        gradients=("embeddings", "temperature"),
        bad_inputs=BAD_INPUTS,
        hidden=_hidden,
        loss=True,
    ),
]
