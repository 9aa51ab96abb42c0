"""Messages near the largest number: means and gradients that are representable are found, on the CPU and in CUDA code.

The sums behind them are not representable.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import msacore
from tests.cases.propagation import conversations
from tests.cuda_on_host.dispatch import CudaOnHost

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OFFSETS = conversations(9, 0, 1, 14)
PRESENT = torch.rand(24, 3, generator=torch.Generator().manual_seed(3)) < 0.6
PRESENT[10:13] = False

_CALLS: dict[str, Callable[..., Any]] = {
    "modality_mean": msacore.modality_mean,
    "modality_mean of senders": lambda h: msacore.modality_mean(h, senders=PRESENT),
}
for _name, _options in {
    "": dict(),
    " of the whole": dict(window=-1),
    " without self": dict(window=(3, -1), include_self=False),
    " of gaps": dict(window=5, positions=(torch.arange(24) * 7) // 3),
}.items():
    _CALLS |= {
        f"window_mean{_name}": lambda h, o=_options: msacore.window_mean(h, OFFSETS, **o),
        f"window_mean of senders{_name}": lambda h, o=_options: msacore.window_mean(h, OFFSETS, senders=PRESENT, **o),
        f"propagate{_name}": lambda h, o=_options: msacore.propagate(h, OFFSETS, **o),
    } | {
        f"propagate, {send}{_name}": lambda h, o=_options, s=send: msacore.propagate(
            h, OFFSETS, available=PRESENT, send=s, alpha=0.3, **o
        )
        for send in ("after_fill", "never")
    }


@pytest.fixture(params=["cpu", "cuda"])
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    device: AbstractContextManager[Any] = CudaOnHost() if request.param == "cuda" else nullcontext()
    with device:
        yield


def _value_and_gradient(call: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = call(x)
    (gradient,) = torch.autograd.grad(value, x, cotangent)
    return value.detach(), gradient


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS)
def test_columns_near_the_largest_number_have_the_results_of_float64(
    call: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Every third column has numbers up to half the largest one, of both signs; the operators are linear."""
    generator = torch.Generator().manual_seed(2)
    shape, limits = (24, 3, 20), torch.finfo(dtype)
    top = 2.0 ** (math.frexp(limits.max)[1] - 1)
    scale = torch.ones(20, dtype=torch.float64)
    scale[::3] = top
    x = torch.rand(shape, generator=generator, dtype=torch.float64).sub(0.45).to(dtype)
    cotangent = torch.randint(-8, 9, shape, generator=generator).to(dtype) / 8
    small = _value_and_gradient(call, x.double(), cotangent.double())
    large = _value_and_gradient(call, (x * scale).to(dtype), (cotangent * scale).to(dtype))
    for name, ours, exact in zip(("value", "gradient"), large, small, strict=True):
        inside = (exact * scale / limits.max).abs() < 1
        assert inside.float().mean() > 0.9
        assert not ours.isnan().any(), name
        error = torch.where(inside, ours / scale - exact, 0.0).abs().max()
        assert error <= 4 * limits.eps * exact.abs().max(), f"{name}: error {float(error):.3e}"


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS)
def test_means_of_the_largest_number_are_no_larger(call: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    x = torch.full((24, 3, 17), limits.max, dtype=dtype)
    ones = call(torch.ones(24, 3, 17, dtype=torch.float64))
    assert ((call(x) / limits.max).double() - ones).abs().max() <= 8 * limits.eps
    assert torch.equal(call(-x), -call(x))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("number", [math.inf, math.nan, 3e38])
def test_what_does_not_send_changes_no_bit_of_a_column_near_the_largest_number(number: float) -> None:
    x = torch.randn(24, 3, 5, generator=torch.Generator().manual_seed(4)) * 1e-40
    x[:, :, 0] = 3e38
    x[PRESENT.logical_not()] = 0.0
    spoilt = x.masked_fill(~PRESENT[..., None], number)
    for call in (_CALLS["window_mean of senders"], _CALLS["propagate, never"]):
        before, after = call(x), call(spoilt)
        kept = PRESENT if call is _CALLS["propagate, never"] else torch.ones_like(PRESENT)
        assert torch.equal(before[kept], after[kept])


@pytest.mark.usefixtures("on_device")
def test_infinities_stay_in_reach_beside_the_largest_numbers() -> None:
    x = torch.full((24, 1, 4), 3e38)
    x[3, 0, 1], x[4, 0, 2] = math.inf, math.nan
    mean = msacore.window_mean(x, OFFSETS, window=(1, 1))
    torch.testing.assert_close(mean[:, 0, 0], torch.full((24,), 3e38))
    assert mean[:, 0, 1].isinf().nonzero().flatten().tolist() == [2, 3, 4]
    assert mean[:, 0, 2].isnan().nonzero().flatten().tolist() == [3, 4, 5]
