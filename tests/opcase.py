"""What a test must know about an operator; `tests/test_ops.py` runs every generic test over every case."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[
    str, Any
]  # keyword arguments of the public function; a value may be a sequence (of sequences) of tensors
FLOAT32, FLOAT64 = torch.float32, torch.float64
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Sample:
    """One set of arguments. `small` ones are also used where a test is expensive (gradcheck, opcheck, compile).

    `on_host=False`: too large for CUDA code executed on the CPU, where other samples reach the same branches.
    """

    id: str
    arguments: Arguments
    small: bool = True
    on_host: bool = True


@dataclass(frozen=True)
class BadInput:
    """A mutation of the first sample's arguments that must raise, with words that the message must contain.

    `values=True`: what is wrong is a value inside a tensor, which only CPU kernels look at.
    """

    mutate: Callable[[Arguments], Arguments]
    words: tuple[str, ...]
    values: bool = False


@dataclass(frozen=True)
class OpCase:
    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.device, torch.dtype], list[Sample]]
    gradients: tuple[str, ...]  # names of the differentiable arguments, with every member of a sequence
    bad_inputs: dict[str, BadInput]
    # Positions that must stay unread, as (path to the tensor, boolean mask of its shape).
    hidden: Callable[[Arguments], list[tuple[tuple[Any, ...], Tensor]]]
    # A hidden position still has its own result and gradient (missing nodes of `propagate`).
    hidden_keeps_own_result: bool = False
    loss: bool = False  # losses of 16-bit inputs are float32

    def arguments(self, sample: str, device: torch.device, dtype: torch.dtype) -> Arguments:
        """Arguments of the sample of that name, which a test may change; all samples of a case are drawn together."""
        return copy.deepcopy(_drawn(self.samples, device, dtype)[sample])


@functools.cache
def _drawn(
    samples: Callable[[torch.device, torch.dtype], list[Sample]], device: torch.device, dtype: torch.dtype
) -> dict[str, Arguments]:
    return {sample.id: sample.arguments for sample in samples(device, dtype)}


def tensors_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor inside nested dicts, lists and tuples, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors_of(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_of(item, (*path, index))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, change) for item in value)
    return value


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def to_dtype(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    return map_tensors(arguments, lambda t: t.detach().to(dtype) if t.is_floating_point() else t)


def non_contiguous(t: Tensor) -> Tensor:
    """The same values with strides other than those of a fresh tensor."""
    if t.dim() >= 2:
        return t.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_(t.requires_grad)
    if t.dim() == 1:
        return torch.stack([t.detach(), t.detach()], 1)[:, 0].requires_grad_(t.requires_grad)
    return t


def leaves(case: OpCase, arguments: Arguments) -> tuple[Arguments, list[tuple[tuple[Any, ...], Tensor]]]:
    """A copy of the arguments whose differentiable tensors are fresh leaves, and those leaves."""
    found: list[tuple[tuple[Any, ...], Tensor]] = []
    copy: Arguments = {}
    for name, value in arguments.items():
        if name in case.gradients:
            value = map_tensors(value, lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t)
            found += [(path, t) for path, t in tensors_of(value, (name,)) if t.is_floating_point()]
        copy[name] = value
    return copy, found


def outputs_of(result: Any) -> list[Tensor]:
    return [t for _, t in tensors_of(result if isinstance(result, tuple) else (result,))]


def cotangents(outputs: list[Tensor], seed: int = 7) -> list[Tensor]:
    """Fixed random output gradients: multiples of 1/16, which every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(o.shape, generator=generator, dtype=FLOAT64) * 16).round().div(16).to(o) for o in outputs]


def run(case: OpCase, function: Callable[..., Any], arguments: Arguments) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradient of every leaf (zeros where autograd says there is none)."""
    arguments, wanted = leaves(case, arguments)
    outputs = outputs_of(function(**arguments))
    grads = torch.autograd.grad(outputs, [t for _, t in wanted], cotangents(outputs), allow_unused=True)
    return [o.detach() for o in outputs], [
        torch.zeros_like(t) if g is None else g for g, (_, t) in zip(grads, wanted, strict=True)
    ]


def assert_as_accurate_as_torch(
    ours: Tensor, ref64: Tensor, torch_same_dtype: Tensor, what: str, factor: float = 2.0
) -> None:
    """Error at most `factor` times that of the same computation in torch at the same dtype."""
    assert ours.shape == ref64.shape, f"{what}: shape {list(ours.shape)}, expected {list(ref64.shape)}"
    if ours.numel() == 0:
        return
    assert torch.equal(ours.isfinite(), ref64.isfinite()), f"{what}: finite where the reference is not, or the reverse"
    error = (ours.double() - ref64).nan_to_num(0, 0, 0).abs().max()
    base = (torch_same_dtype.double() - ref64).nan_to_num(0, 0, 0).abs().max()
    # A correctly rounded 16-bit result is off by up to eps / 2, although by luck torch may be off by less on a small
    # tensor. In float64 the reference is its own yardstick, and both round.
    floors = {FLOAT64: 1e-13, FLOAT32: 1e-6}
    floor = floors.get(ours.dtype, torch.finfo(ours.dtype).eps / 2) * ref64.nan_to_num(0, 0, 0).abs().max()
    assert error <= factor * base + floor, f"{what}: error {error:.3e} against torch's own {base:.3e}"
