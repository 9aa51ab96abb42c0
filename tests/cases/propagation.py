"""Cases of propagation over conversations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import msacore
from msacore import reference
from tests.cases.graph_propagation import changed
from tests.opcase import Arguments, BadInput, OpCase, Sample


def conversations(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def gaps(lengths: Any, generator: torch.Generator) -> Tensor:
    """Positions of utterances, with gaps between them; the last conversation spans the whole range of int64."""
    limits = torch.iinfo(torch.int64)
    steps = torch.randint(1, 4, (sum(lengths),), generator=generator)
    parts = [
        part.cumsum(0) + torch.randint(-5, 6, (), generator=generator)
        for part in steps.split(list(lengths))
        if len(part)
    ]
    if parts and len(parts[-1]) > 2:
        parts[-1][0], parts[-1][-1] = limits.min, limits.max
    return torch.cat(parts) if parts else steps


def _sample(
    device: torch.device, dtype: torch.dtype, first: str, gate: str | None, name: str, sizes: Any, **options: Any
) -> Sample:
    lengths, modalities, width = sizes
    utterances = sum(lengths)
    generator = torch.Generator().manual_seed(utterances + 31 * modalities + width)
    arguments: Arguments = {first: torch.randn(utterances, modalities, width, generator=generator).to(device, dtype)}
    arguments["offsets"] = conversations(*lengths).to(device)
    if gate is not None:
        arguments[gate] = (torch.rand(utterances, modalities, generator=generator) < 0.6).to(device)
    if options.pop("gaps", False):
        arguments["positions"] = gaps(lengths, generator).to(device)
    return Sample(name, {**arguments, **options}, small=name in SMALL, on_host=not name.startswith("statistics"))


# lengths of the conversations, modalities, width
SIZES = {
    "odd": ((4, 0, 3), 3, 4),
    "another size": ((3, 5, 1), 3, 3),
    "two modalities": ((6,), 2, 3),
    "five modalities": ((3, 1), 5, 2),
    "one modality": ((5,), 1, 3),
    "one node": ((1,), 1, 1),
    "no utterance": ((0, 0), 3, 4),
    "no conversation": ((), 3, 4),
    "no modality": ((2,), 0, 4),
    "no width": ((3,), 3, 0),
    "large": ((24, 7, 0, 13, 1), 3, 37),
    "many modalities": ((14, 5), 6, 20),
    "one long": ((60, *[1] * 9), 3, 5),  # on a GPU its states are in global memory
    "real": ((24,) * 8, 3, 128),
}
SMALL = (
    *("odd", "another size", "five modalities", "no utterance", "ungated", "odd, never", "alpha 0, never"),
    *("odd, gaps without self", "nobody in reach"),
)
WINDOWS = {
    "narrow": (1, 0),
    "whole": (-1, -1),
    "past": (-1, 1),
    "future": (2, -1),
    "wider than all": (30, 25),
    "equal": 3,
}


def _propagate_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    def sample(name: str, size: str, **options: Any) -> None:
        gate = None if options.pop("ungated", False) else "available"
        samples.append(_sample(device, dtype, "x", gate, name, SIZES[size], **options))

    samples: list[Sample] = []
    for size in SIZES:
        if size != "real":
            sample(size, size, steps=3, send="after_fill")
    for send in ("after_fill", "never"):
        for name, window in WINDOWS.items():
            sample(f"{name} window, {send}", "large", steps=2, window=window, alpha=0.3, send=send)
        sample(f"no steps, {send}", "odd", steps=0, send=send)
        sample(f"one step, {send}", "odd", steps=1, send=send)
    for size in ("odd", "five modalities", "one modality", "large", "many modalities", "one long"):
        sample(f"{size}, never", size, steps=3, send="never")
    for size in ("odd", "five modalities", "large", "one long"):
        sample(f"{size}, all available", size, ungated=True)
    for send in ("after_fill", "never"):
        sample(f"gaps, {send}", "large", steps=2, window=(3, 1), gaps=True, send=send)
        sample(f"without self, {send}", "large", steps=2, window=(2, 3), include_self=False, send=send)
        sample(f"others of the whole, {send}", "many modalities", window=-1, include_self=False, send=send)
    sample("odd, gaps without self", "odd", gaps=True, include_self=False, window=(1, 2), alpha=0.3, send="never")
    sample("five modalities, gaps without self", "five modalities", gaps=True, include_self=False, window=(2, -1))
    sample("one long, gaps without self", "one long", steps=2, gaps=True, include_self=False, window=(9, 4))
    sample("nobody in reach", "odd", ungated=True, include_self=False, window=0, steps=2)
    sample("alpha 0, never", "odd", alpha=0.0, send="never")
    sample("alpha 1", "odd", alpha=1.0)
    # Lengths and width of real use, for counting instructions: a block takes as many columns at a time as it can.
    sample("statistics", "real", steps=10, ungated=True)
    sample("statistics, whole window", "real", steps=10, window=-1, ungated=True)
    sample("statistics, gated", "real", steps=10, send="never")
    return samples


def _window_mean_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    samples = [_sample(device, dtype, "h", "senders", name, sizes) for name, sizes in SIZES.items()]
    for name, window in WINDOWS.items():
        samples.append(_sample(device, dtype, "h", "senders", f"{name} window", SIZES["large"], window=window))
    for name, gate, size, options in [
        ("ungated", None, "odd", dict(window=(-1, 1))),
        ("gaps", "senders", "large", dict(window=(3, 1), gaps=True)),
        ("ungated gaps", None, "many modalities", dict(window=(2, -1), gaps=True)),
        ("without self", "senders", "large", dict(window=(2, 3), include_self=False)),
        ("odd, gaps without self", "senders", "odd", dict(window=2, gaps=True, include_self=False)),
        ("one long, gaps without self", None, "one long", dict(window=(9, 4), gaps=True, include_self=False)),
        ("nobody in reach", "senders", "odd", dict(window=(0, 0), include_self=False)),
    ]:
        samples.append(_sample(device, dtype, "h", gate, name, SIZES[size], **options))
    return samples


def _modality_mean_samples(device: torch.device, dtype: torch.dtype) -> list[Sample]:
    samples = [_sample(device, dtype, "h", "senders", name, sizes) for name, sizes in SIZES.items()]
    for name in ("odd", "one modality", "many modalities"):
        samples.append(_sample(device, dtype, "h", None, f"{name}, ungated", SIZES[name]))
    return [Sample(s.id, {k: v for k, v in s.arguments.items() if k != "offsets"}, small=s.small) for s in samples]


def _non_senders(
    first: str, gate: str, send: str = "never"
) -> Callable[[Arguments], list[tuple[tuple[Any, ...], Tensor]]]:
    def hidden(arguments: Arguments) -> list[tuple[tuple[Any, ...], Tensor]]:
        if gate not in arguments or arguments.get("send", send) == "after_fill":
            return []
        return [((first,), ~arguments[gate][..., None].expand_as(arguments[first]))]

    return hidden


def _bad_states(first: str, gate: str) -> dict[str, BadInput]:
    return {
        "integer states": BadInput(changed(**{first: lambda x: x.long()}), (f"`{first}`", "float32", "int64")),
        "states of two dimensions": BadInput(changed(**{first: lambda x: x[0]}), (f"`{first}`", "[N, M, d]")),
        "gate of integers": BadInput(changed(**{gate: lambda g: g.long()}), (f"`{gate}`", "bool", "int64")),
        "gate of another size": BadInput(changed(**{gate: lambda g: g[:, :2]}), (f"`{gate}`", "[N, M]")),
    }


def _added(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Arguments]:
    """Adds the argument `name`: the row numbers of the first sample after `change`."""
    return lambda arguments: {**arguments, name: change(torch.arange(7))}


BAD_WINDOWS = {
    "offsets of floats": BadInput(changed(offsets=lambda o: o.float()), ("`offsets`", "int64", "float32")),
    "offsets of two dimensions": BadInput(changed(offsets=lambda o: o[None]), ("`offsets`", "[V + 1]")),
    "empty offsets": BadInput(changed(offsets=lambda o: o[:0]), ("`offsets`", "[V + 1]", "[0]")),
    "offsets that start late": BadInput(changed(offsets=lambda o: o.clamp(min=1)), ("`offsets[0]`", "1"), values=True),
    "offsets that end early": BadInput(changed(offsets=lambda o: o.clamp(max=5)), ("`offsets[-1]`", "5"), values=True),
    "decreasing offsets": BadInput(
        changed(offsets=lambda o: o[[0, 3, 1, 3]]), ("`offsets`", "non-decreasing"), values=True
    ),
    "window below -1": BadInput(lambda a: {**a, "window": (2, -2)}, ("`window`", "at least -1", "-2")),
    "window of three": BadInput(lambda a: {**a, "window": (1, 2, 3)}, ("`window`", "(past, future)")),
    "window of a float": BadInput(lambda a: {**a, "window": 1.5}, ("`window`", "integer", "1.5")),
    "include_self of a number": BadInput(lambda a: {**a, "include_self": 1}, ("`include_self`", "True or False")),
    "positions of floats": BadInput(_added("positions", Tensor.float), ("`positions`", "int64", "float32")),
    "positions of another length": BadInput(_added("positions", lambda p: p[1:]), ("`positions`", "[N] = [7]", "[6]")),
    "equal positions": BadInput(
        _added("positions", lambda p: p // 2), ("`positions`", "increase strictly", "got 0 before 0"), values=True
    ),
    "falling positions": BadInput(
        _added("positions", lambda p: -p), ("`positions`", "increase strictly", "got 0 before -1"), values=True
    ),
}

CASES = [
    OpCase(
        name="propagate",
        op=msacore.propagate,
        reference=reference.propagation.propagate,
        samples=_propagate_samples,
        gradients=("x",),
        bad_inputs={
            **_bad_states("x", "available"),
            **BAD_WINDOWS,
            "negative steps": BadInput(changed(steps=lambda _: -1), ("`steps`", "-1")),
            "alpha above one": BadInput(lambda a: {**a, "alpha": 1.5}, ("`alpha`", "1.5")),
            "alpha with gradient": BadInput(
                lambda a: {**a, "alpha": torch.tensor(0.1, requires_grad=True)}, ("`alpha`", "not differentiable")
            ),
            "steps of a float": BadInput(changed(steps=lambda _: 2.0), ("`steps`", "integer", "2.0")),
            "unknown send": BadInput(changed(send=lambda _: "always"), ("`send`", "after_fill", "always")),
        },
        hidden=_non_senders("x", "available", "after_fill"),
        hidden_keeps_own_result=True,
    ),
    OpCase(
        name="window_mean",
        op=msacore.window_mean,
        reference=reference.propagation.window_mean,
        samples=_window_mean_samples,
        gradients=("h",),
        bad_inputs={**_bad_states("h", "senders"), **BAD_WINDOWS},
        hidden=_non_senders("h", "senders"),
    ),
    OpCase(
        name="modality_mean",
        op=msacore.modality_mean,
        reference=reference.propagation.modality_mean,
        samples=_modality_mean_samples,
        gradients=("h",),
        bad_inputs=_bad_states("h", "senders"),
        hidden=_non_senders("h", "senders"),
    ),
]
