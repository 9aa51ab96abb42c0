"""Numbers of every size in the CUDA code of the contrastive losses, run on the CPU: none over- or underflows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from msacore import hierarchical_contrastive_loss, info_nce
from tests.cuda_on_host.dispatch import CudaOnHost

# Squares of such numbers are out of range; the entries of a row and their gradients are not.
SCALES = [(torch.float32, 2.0**100), (torch.float32, 2.0**-100), (torch.float64, 2.0**900), (torch.float64, 2.0**-900)]


def _rows(n: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _info_nce(x: Tensor) -> Tensor:
    return info_nce(x, _rows(len(x), 2, x.dtype), temperature=0.2, symmetric=True)


def _hierarchical(x: Tensor) -> Tensor:
    second, fused, pair = (_rows(len(x), seed, x.dtype) for seed in (2, 3, 4))
    return hierarchical_contrastive_loss([x, second], fused, [pair])


def _value_and_gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with CudaOnHost() as on_host:
        value = loss(x)
        (gradient,) = torch.autograd.grad(value, x)
    assert on_host.calls
    return value.detach(), gradient


@pytest.mark.parametrize(
    ("loss", "n"), [(_info_nce, 6), (_hierarchical, 6), (_hierarchical, 150)], ids=["info_nce", "few", "many"]
)
@pytest.mark.parametrize(("dtype", "scale"), SCALES, ids=str)
def test_a_power_of_two_changes_no_bit_but_its_own(
    loss: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype, scale: float
) -> None:
    x = _rows(n, 1, dtype)
    value, gradient = _value_and_gradient(loss, x)
    scaled_value, scaled_gradient = _value_and_gradient(loss, x * scale)
    assert torch.equal(value, scaled_value)
    assert torch.equal(gradient, scaled_gradient * scale)


@pytest.mark.parametrize("loss", [_info_nce, _hierarchical], ids=["info_nce", "few"])
@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 1e-40), (torch.float64, 1e-320)], ids=str)
def test_denormal_rows_are_no_zero_rows(loss: Callable[[Tensor], Tensor], dtype: torch.dtype, number: float) -> None:
    """All rows point the same way, as rows of ones do; gradients may be out of range, but are not NaN."""
    ones = torch.ones(3, 9, dtype=dtype)
    value, gradient = _value_and_gradient(loss, number * ones)
    torch.testing.assert_close(value, _value_and_gradient(loss, ones)[0])
    assert not gradient.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_temperature_far_below_what_decides_has_no_gradient(dtype: torch.dtype) -> None:
    """The positives lead by so much that no other candidate counts, and sums of large exponents cancel exactly."""
    x = _rows(16, 1, dtype)
    temperature = torch.tensor(1e-4, requires_grad=True)
    with CudaOnHost() as on_host:
        info_nce(x, x.clone(), temperature=temperature, symmetric=True).backward()
    assert on_host.calls
    assert temperature.grad == 0
