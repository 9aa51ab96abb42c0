"""Many rows in bfloat16, which matrix instructions multiply where the processor has them.

They multiply the rows as given, so the loss is as exact as in float32; the gradients round each probability once.
"""

from typing import Any

import pytest
import torch

import msacore
from msacore import reference

CASES: dict[str, dict[str, Any]] = {
    "one direction": {},
    "two-sided": {"symmetric": True},
    "dot products": {"normalize": False, "temperature": 8.0},
    "cold": {"temperature": 0.01, "symmetric": True},
    "negatives": {"negatives": 45},
    "masked": {"masked": True, "symmetric": True},
    "classes": {"classes": 7, "exclude_self": True},
}


def _draw(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _arguments(n: int, d: int, case: dict[str, Any]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    options = {"temperature": 0.1} | case
    rows = [_draw(n, d, 0), _draw(n, d, 1)]
    if options.pop("masked", False):
        present = torch.arange(n) % 5 > 0
        options |= {"anchor_mask": present, "candidate_mask": present.roll(1)}
    if classes := options.pop("classes", 0):
        labels = torch.arange(n) * 3 % classes
        options["labels"] = (labels, labels)
        rows = [rows[0], rows[0]]
    if negatives := options.pop("negatives", 0):
        options["negatives"] = _draw(negatives, d, 2)
    return rows, options


def _both(function: Any, rows: list[torch.Tensor], options: dict[str, Any], dtype: torch.dtype) -> list[torch.Tensor]:
    leaves = [r.to(dtype, copy=True).requires_grad_() for r in rows[: 1 if rows[0] is rows[1] else 2]]
    given = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    loss = function(leaves[0], leaves[-1], **given)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("n", "d"), [(128, 32), (150, 70), (301, 129)])
def test_many_rows_are_as_exact_as_one_rounding_of_probabilities(n: int, d: int, case: dict[str, Any]) -> None:
    rows, options = _arguments(n, d, case)
    loss, *grads = _both(msacore.info_nce, rows, options, torch.bfloat16)
    exact, *expected = _both(reference.info_nce.info_nce, rows, options, torch.float64)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=1e-5)
    for grad, true in zip(grads, expected, strict=True):
        assert float((grad.double() - true).abs().max() / true.abs().max()) < 2**-7
    again = _both(msacore.info_nce, rows, options, torch.bfloat16)
    assert all(map(torch.equal, again, [loss, *grads]))


@pytest.mark.parametrize("exponent", [-125, -60, 60, 120])
def test_rows_of_any_magnitude_give_the_same_loss(exponent: int) -> None:
    rows, options = _arguments(160, 40, {"symmetric": True})
    expected = msacore.info_nce(*rows, **options)
    far = [r * (2.0**exponent) ** (torch.arange(160) % 2)[:, None] for r in rows]
    far = [r.bfloat16() for r in far]
    # Scaling to the smallest numbers of bfloat16 loses digits before the operator gets them.
    tolerance = 5e-2 if exponent == -125 else 1e-5
    torch.testing.assert_close(msacore.info_nce(*far, **options), expected, rtol=tolerance, atol=0)


def test_zero_rows_count_and_numbers_that_are_none_show() -> None:
    rows, options = _arguments(160, 40, {})
    rows[0][3] = 0
    loss, *grads = _both(msacore.info_nce, rows, options, torch.bfloat16)
    exact, *_ = _both(reference.info_nce.info_nce, rows, options, torch.float64)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=0)
    assert bool(grads[0][3].eq(0).all())
    for bad in (torch.inf, torch.nan):
        rows[1][7, 5] = bad
        assert msacore.info_nce(*rows, **options).isnan()
