"""Similarities that the forward pass of a contrastive loss keeps for its backward pass."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from msacore import info_nce
from tests.cuda_on_host.dispatch import CudaOnHost


def _gradients(x: Tensor, y: Tensor | None, keep: bool, **options: Any) -> tuple[list[Tensor], Tensor]:
    """Loss and gradients by the operators, whose callers choose whether similarities are kept; and what was kept."""
    numbers = dict(temperature=0.2, normalize=True, denominator=0, reduction=1)
    flags = numbers | dict(symmetric=False, exclude_self=False) | options
    tensors = [x, y, None, *flags.pop("labels", (None, None)), flags.pop("weights", None), *[None] * 4]
    loss, rows, columns, kept = torch.ops.msacore.info_nce(*tensors, **flags, keep=keep)
    found = torch.ops.msacore.info_nce_backward(torch.ones_like(loss), *tensors, rows, columns, kept, **flags)
    return [loss, *found], kept


@pytest.fixture(params=["cpu", "cuda on the host"])
def device_path(request: pytest.FixtureRequest) -> Iterator[None]:
    with CudaOnHost() if request.param != "cpu" else nullcontext():
        yield


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [5, 130])
def test_kept_similarities_are_those_that_would_be_computed_again(n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(n)
    x, y, weights = torch.randn(n, 70).to(dtype), torch.randn(n, 70).to(dtype), torch.rand(n, n).to(dtype)
    labels = torch.arange(n) % 3
    cases: list[tuple[Tensor | None, dict[str, Any]]] = [
        (y, {}),
        (y, dict(symmetric=True, temperature=0.001)),
        (None, dict(labels=(labels, labels), exclude_self=True)),
        (y, dict(labels=(labels, labels), denominator=1, symmetric=True)),
        (y, dict(weights=weights, denominator=2)),
    ]
    for other, options in cases:
        kept, similarities = _gradients(x, other, True, **options)
        again, nothing = _gradients(x, other, False, **options)
        assert similarities.numel() >= n * n and nothing.numel() == 0
        for a, b in zip(kept, again, strict=True):
            assert torch.equal(a, b), options


def test_similarities_are_kept_of_wide_rows_while_they_are_few_and_a_gradient_is_wanted() -> None:
    def kept(n: int, d: int, keep: bool = True) -> tuple[int, ...]:
        return _gradients(torch.ones(n, d), None, keep)[1].shape

    assert kept(40, 64) == (48, 48)
    assert kept(40, 63) == kept(40, 64, keep=False) == kept(1449, 64) == (0,)


def test_a_second_backward_pass_finds_what_the_first_did() -> None:
    x = torch.randn(130, 64, requires_grad=True)
    loss = info_nce(x, torch.randn(130, 64))
    first, second = (torch.autograd.grad(loss, x, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)


def test_opcheck_of_kept_similarities() -> None:
    x, y = torch.randn(20, 64, requires_grad=True), torch.randn(20, 64, requires_grad=True)
    options = dict(temperature=0.2, symmetric=True, exclude_self=False, normalize=True, denominator=0, reduction=1)
    torch.library.opcheck(torch.ops.msacore.info_nce.default, (x, y, *[None] * 8), {**options, "keep": True})


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize(("learned", "temperature"), [(False, 0.001), (False, 0.2), (True, 0.2)])
@pytest.mark.parametrize("n", [5, 150])
def test_kept_similarities_of_the_nine_terms(n: int, learned: bool, temperature: float) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(n, 20, requires_grad=True) for _ in range(7)]
    call = torch.ops.msacore.hierarchical_contrastive_loss
    options: dict[str, Any] = dict(tier_weights=[0.2, 0.3, 0.5], temperatures=[0.1, temperature, 0.5])
    arguments = (rows[:3], rows[3], rows[4:], None, None, torch.tensor(0.3) if learned else None, None, None)
    found = []
    for keep in (True, False):
        loss, _, _, kept = call(*arguments, **options, intra_modal=False, normalize=True, keep=keep)
        assert kept.numel() == (9 * (-(-n // 16) * 16) ** 2 if keep else 0)
        found.append(torch.autograd.grad(loss, rows))
    for a, b in zip(*found, strict=True):
        if n > 128:
            assert torch.equal(a, b)
        else:  # the CPU keeps exponentials where a term is one tile, CUDA the similarities of one direction
            torch.testing.assert_close(a, b)


def test_devices_keep_the_same_similarities() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(70, 64), torch.randn(70, 64)
    _, on_cpu = _gradients(x, y, True)
    with CudaOnHost():
        _, on_cuda = _gradients(x, y, True)
    torch.testing.assert_close(on_cuda, on_cpu)
