"""Cases of Rank-N-Contrast."""

from typing import Any

import torch
from torch import Tensor

import msacore
from msacore import reference
from tests.cases.propagation import changed
from tests.opcase import Arguments, BadInput, OpCase, Sample


def _sample(device: torch.device, dtype: torch.dtype, name: str, samples: int, width: int, **options: Any) -> Sample:
    """Labels are multiples of 1/8 in [-3, 3], whose gaps every dtype holds exactly: the same ties in all of them."""
    generator = torch.Generator().manual_seed(samples + 31 * width)
    embeddings = torch.randn(samples, width, generator=generator) * options.pop("spread", 1.0) + options.pop("shift", 0)
    if apart := options.pop("in_pairs", 0.0):
        embeddings[1::2] = embeddings[: 2 * (samples // 2) : 2] + apart * embeddings[1::2]
    if options.pop("repeated", False):
        embeddings[samples // 2 :] = embeddings[: samples - samples // 2]
    levels = options.pop("levels", 48)
    targets = torch.randint(0, levels + 1, (samples,), generator=generator) * (6 / levels) - 3
    masked = options.pop("masked", 0)
    mask = torch.randperm(samples, generator=generator).to(device) >= masked if masked else None
    arguments = dict(embeddings=embeddings.to(device, dtype), targets=targets.to(device, dtype), mask=mask, **options)
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
        ]
    ]


def _hidden(arguments: Arguments) -> list[tuple[tuple[Any, ...], Tensor]]:
    mask = arguments.get("mask")
    if mask is None:
        return []
    rows = ~mask
    return [(("embeddings",), rows[:, None].expand_as(arguments["embeddings"])), (("targets",), rows)]


BAD_INPUTS = {
    "integer embeddings": BadInput(changed(embeddings=lambda e: e.long()), ("`embeddings`", "float32", "int64")),
    "embeddings of one dimension": BadInput(changed(embeddings=lambda e: e[:, 0]), ("`embeddings`", "[N, d]")),
    "integer targets": BadInput(changed(targets=lambda t: t.long()), ("`targets`", "float32", "int64")),
    "too few targets": BadInput(changed(targets=lambda t: t[1:]), ("`targets`", "[N]", "[7]", "[6]")),
    "targets of two dimensions": BadInput(changed(targets=lambda t: t[:, None]), ("`targets`", "[N]")),
    "mask of floats": BadInput(changed(mask=lambda _: torch.ones(7)), ("`mask`", "bool", "float32")),
    "mask too long": BadInput(changed(mask=lambda _: torch.ones(8, dtype=torch.bool)), ("`mask`", "[N]", "[8]")),
    "temperature of zero": BadInput(lambda arguments: {**arguments, "temperature": 0.0}, ("`temperature`", "0")),
}

CASES = [
    OpCase(
        name="rank_n_contrast",
        op=msacore.rank_n_contrast,
        reference=reference.rank_n_contrast.rank_n_contrast,
        samples=_samples,
        gradients=("embeddings",),
        bad_inputs=BAD_INPUTS,
        hidden=_hidden,
        loss=True,
    ),
]
