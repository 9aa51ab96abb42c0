"""Cases of the matrix fusion family."""

from typing import Any

import torch
from torch import Tensor

import msacore
from msacore import reference
from tests.opcase import BadInput, OpCase, Sample


def fusion_arguments(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int, int],
    *,
    augment: bool = True,
    pooled: bool = False,
    masked: bool = False,
    missing: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Random arguments for (B, L, k, M, q, C); weights are scaled so that activations get inputs of both signs."""
    batch, length, width, modalities, rows, channels = sizes
    generator = torch.Generator().manual_seed(sum(n * 31**i for i, n in enumerate(sizes)))

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    shape = (batch, width) if pooled else (batch, length, width)
    arguments: dict[str, Any] = dict(
        features=[draw(*shape) for _ in range(modalities)],
        row_weight=draw(rows, width + augment, scale=(width + 1) ** -0.5),
        row_bias=draw(rows, scale=0.3),
        pair_weight=draw(channels, modalities * (modalities - 1) // 2),
        pair_bias=draw(channels, scale=0.3),
    )
    if masked:
        mask = torch.rand(batch, length, generator=generator) < 0.6
        mask[:1] = False
        arguments["mask"] = mask.to(device)
    if missing:
        available = torch.rand(batch, modalities, generator=generator) < 0.6
        available[-1:] = False
        arguments["available"] = available.to(device)
    return {**arguments, "augment": augment, **options}


def _samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, *sizes: int, small: bool = True, on_host: bool = True, **options: Any) -> Sample:
        return Sample(name, fusion_arguments(device, dtype, sizes, **options), small, on_host)  # type: ignore[arg-type]

    # On a GPU a block takes 64 tokens, rows or columns, 16 to 32 tokens at a time, and as many channels as fit into its
    # shared memory; features whose width is a multiple of 16 bytes are copied in pieces of that size.
    big, tiles = dict(small=False, on_host=False), dict(small=False)

    return [
        sample("odd", 3, 5, 3, 3, 2, 3, masked=True, missing=True),
        sample("another size", 4, 2, 5, 3, 3, 2, masked=True, missing=True),
        sample("complete", 2, 3, 4, 3, 2, 3, small=False),
        sample("gelu", 3, 4, 3, 2, 2, 2, masked=True, missing=True, activation="gelu"),
        sample("identity", 3, 4, 3, 2, 2, 2, masked=True, missing=True, activation="identity", small=False),
        sample("without the 1", 4, 3, 3, 3, 2, 2, masked=True, missing=True, augment=False),
        sample("four modalities", 3, 2, 3, 4, 2, 2, missing=True),
        sample("pooled", 4, 1, 5, 3, 2, 3, pooled=True, masked=True, missing=True),
        sample("pooled without the 1", 3, 1, 4, 3, 2, 2, pooled=True, missing=True, augment=False, activation="gelu"),
        sample("size one", 1, 1, 1, 2, 1, 1),
        sample("no samples", 0, 3, 4, 3, 2, 3, masked=True),
        sample("no tokens", 2, 0, 3, 3, 2, 2, small=False),
        sample("no features", 2, 3, 0, 3, 2, 2, small=False),
        sample("no rows", 2, 3, 3, 3, 0, 2, small=False),
        sample("no channels", 2, 3, 3, 3, 2, 0, small=False),
        sample("large", 37, 33, 65, 3, 17, 4, masked=True, missing=True, **big),
        sample("large and complete", 40, 21, 130, 3, 32, 3, **big),
        sample("large gelu", 19, 30, 130, 3, 31, 3, missing=True, activation="gelu", **big),
        sample("large pooled", 50, 1, 200, 4, 33, 3, pooled=True, masked=True, missing=True, **big),
        sample("several tiles", 5, 25, 130, 3, 65, 2, masked=True, missing=True, **tiles),
        sample("several tiles, complete", 7, 11, 70, 2, 33, 3, **tiles),
        sample("several tiles, gelu", 3, 18, 40, 3, 17, 3, missing=True, activation="gelu", **tiles),
        sample("several tiles, whole pieces", 4, 37, 72, 3, 24, 2, masked=True, missing=True, **tiles),
        sample("several tiles of tokens", 3, 67, 24, 2, 18, 2, masked=True, missing=True, augment=False, **tiles),
        sample("many channels", 3, 3, 8, 3, 5, 11, masked=True, missing=True, activation="gelu", **tiles),
        sample("several tiles, pooled", 9, 1, 140, 4, 33, 3, pooled=True, masked=True, missing=True, **tiles),
    ]


def _hidden(arguments: dict[str, Any]) -> list[tuple[tuple[Any, ...], Tensor]]:
    hidden = []
    for m, x in enumerate(arguments["features"]):
        gone = torch.zeros(x.shape[: max(2, x.dim() - 1)], dtype=torch.bool, device=x.device)
        gone = gone[:, :1] if x.dim() == 2 else gone
        if arguments.get("mask") is not None:
            gone = gone | ~arguments["mask"]
        if arguments.get("available") is not None:
            gone = gone | ~arguments["available"][:, m, None]
        hidden.append((("features", m), (gone if x.dim() == 2 else gone[..., None]).expand(x.shape)))
    return hidden


def changed(**changes: Any) -> Any:
    return lambda arguments: {**arguments, **{k: f(arguments[k]) for k, f in changes.items()}}


def _feature(index: int, change: Any) -> Any:
    return changed(features=lambda f: [change(x) if i == index else x for i, x in enumerate(f)])


BAD_INPUTS = {
    "a dict of features": BadInput(changed(features=lambda f: dict(enumerate(f))), ("`features`", "sequence", "dict")),
    "a number for features": BadInput(changed(features=lambda _: 3), ("`features`", "sequence", "3")),
    "a NumPy modality": BadInput(_feature(1, lambda x: x.cpu().numpy()), ("`features[1]`", "tensor", "NumPy")),
    "pooled modalities of two widths": BadInput(
        changed(features=lambda f: [f[0][:, 0], f[1][:, 0, 1:], f[2][:, 0]]), ("`features[1]`", "[B, k]", "[3, 2]")
    ),
    "no row_weight": BadInput(changed(row_weight=lambda _: None), ("`row_weight`", "tensor", "None")),
    "a list as mask": BadInput(changed(mask=lambda m: m.tolist()), ("`mask`", "tensor", "list")),
    "augment of 1": BadInput(lambda a: {**a, "augment": 1}, ("`augment`", "True or False", "1")),
    "one modality": BadInput(changed(features=lambda f: f[:1]), ("`features`", "2", "got 1")),
    "integer features": BadInput(_feature(0, lambda x: x.long()), ("`features[0]`", "float32", "int64")),
    "features of four dimensions": BadInput(_feature(0, lambda x: x[None]), ("`features[0]`", "[B, L, k]")),
    "one pooled modality": BadInput(_feature(1, lambda x: x[:, 0]), ("`features[1]`", "[B, L, k]")),
    "another width": BadInput(_feature(2, lambda x: x[..., 1:]), ("`features[2]`", "[3, 5, 3]", "[3, 5, 2]")),
    "mixed dtypes": BadInput(_feature(1, lambda x: x.double()), ("`features[1]`", "float32", "float64")),
    "row_weight without the 1": BadInput(changed(row_weight=lambda w: w[:, 1:]), ("`row_weight`", "[q, k + 1]")),
    "row_weight of another dtype": BadInput(changed(row_weight=lambda w: w.half()), ("`row_weight`", "float16")),
    "row_bias of another length": BadInput(changed(row_bias=lambda w: w[1:]), ("`row_bias`", "[q]")),
    "pair_weight of another length": BadInput(changed(pair_weight=lambda w: w[:, 1:]), ("`pair_weight`", "[C, P]")),
    "pair_bias of two dimensions": BadInput(changed(pair_bias=lambda w: w[None]), ("`pair_bias`", "[C]")),
    "mask of floats": BadInput(changed(mask=lambda m: m.float()), ("`mask`", "bool", "float32")),
    "mask of another length": BadInput(changed(mask=lambda m: m[:, 1:]), ("`mask`", "[B, L]")),
    "available of another width": BadInput(changed(available=lambda a: a[:, 1:]), ("`available`", "[B, M]")),
    "unknown activation": BadInput(lambda a: {**a, "activation": "tanh"}, ("`activation`", "'tanh'")),
}

CASES = [
    OpCase(
        name="matrix_fusion",
        op=msacore.matrix_fusion,
        reference=reference.matrix_fusion.matrix_fusion,
        samples=_samples,
        gradients=("features", "row_weight", "row_bias", "pair_weight", "pair_bias"),
        bad_inputs=BAD_INPUTS,
        hidden=_hidden,
    ),
]
