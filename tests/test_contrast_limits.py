"""Contrastive losses at numeric limits: rows of any length, small temperatures, empty batches, learned temperatures."""

from typing import Any

import pytest
import torch
from torch import Tensor

from msacore import hierarchical_contrastive_loss, info_nce
from msacore.nn import HierarchicalContrastiveLoss, InfoNCE

DOUBLE = torch.float64


def _loss_and_gradients(scale: float, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of 7 anchors and 7 candidates of length about ``scale``; gradients in units of 1 / scale."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(7, 5, generator=generator, dtype=DOUBLE) for _ in range(2))
    x, y = ((t * 2.0**-30 * (scale * 2.0**30)).to(dtype).requires_grad_() for t in (x, y))
    loss = info_nce(x, y, temperature=0.3, symmetric=True, **options)
    gx, gy = torch.autograd.grad(loss, (x, y))
    return loss.detach(), *((g.double() * 2.0**-30 * (scale * 2.0**30)) for g in (gx, gy))


@pytest.mark.parametrize("scale", [2.0**66, 2.0**-66, 2.0**-120, 2.0**-126])
def test_rows_of_any_length_have_the_loss_and_gradients_of_float32_rows_near_1(scale: float) -> None:
    expected = _loss_and_gradients(1.0, torch.float32)
    for ours, ref in zip(_loss_and_gradients(scale, torch.float32), expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, ref, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-600, 2.0**600, 2.0**1000])
def test_rows_of_any_length_have_the_loss_and_gradients_of_float64_rows_near_1(scale: float) -> None:
    expected = _loss_and_gradients(1.0, DOUBLE)
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(7, 5, generator=generator, dtype=DOUBLE) * scale for _ in range(2))
    x.requires_grad_(), y.requires_grad_()
    loss = info_nce(x, y, temperature=0.3, symmetric=True)
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    for ours, ref in zip(torch.autograd.grad(loss, (x, y)), expected[1:], strict=True):
        torch.testing.assert_close(ours * scale, ref, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e-40), (DOUBLE, 1e-320)])
def test_denormal_rows_are_rows(dtype: torch.dtype, value: float) -> None:
    """Equal rows have zero gradients; gradients of other rows may overflow but are never NaN."""
    x = torch.full((3, 4), value, dtype=dtype, requires_grad=True)
    loss = info_nce(x)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(3.0)).item(), rel=1e-6)
    assert not torch.autograd.grad(loss, x)[0].isnan().any()
    y = (torch.eye(3, 4, dtype=dtype) * value).requires_grad_()
    loss = info_nce(y, temperature=1.0)
    assert loss.item() == pytest.approx(0.5514447, rel=1e-5)  # that of unit rows, not of rows of zeros
    assert not torch.autograd.grad(loss, y)[0].isnan().any()


def test_zero_rows_stay_zero_rows_beside_tiny_ones() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-40, 0.0]], requires_grad=True)
    each = info_nce(x, torch.eye(2), temperature=1.0, reduction="none")
    assert each[0].item() == pytest.approx(0.6931472, rel=1e-6)
    assert (torch.autograd.grad(each[0], x, retain_graph=True)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_every_positive_is_far_ahead_a_tiny_temperature_has_no_gradient(dtype: torch.dtype) -> None:
    x = torch.randn(16, 32).to(dtype)
    for options in (dict(), dict(symmetric=True), dict(labels=(torch.arange(16), torch.arange(16)))):
        temperature = torch.tensor(1e-4, requires_grad=True)
        loss = info_nce(x, x.clone(), temperature=temperature, **options)
        loss.backward()
        assert temperature.grad is not None
        assert loss.item() == pytest.approx(0, abs=1e-3)
        assert abs(temperature.grad.item()) < 20  # the rounding error of float32 over the squared temperature


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gradients_of_anchors_that_are_candidates_are_added_before_they_overflow(dtype: torch.dtype) -> None:
    """Denormal rows have gradients of ±inf; infinities of opposite signs for the two roles would add up to NaN."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 5, generator=generator, dtype=DOUBLE)
    tiny = rows * (1e-40 if dtype == torch.float32 else 1e-320)
    options = dict(
        weights=torch.rand(6, 6, generator=generator).to(dtype),
        anchor_mask=torch.tensor([True, False, True, True, True, True]),
        candidate_mask=torch.tensor([True, True, True, False, True, True]),
        temperature=0.02,
    )
    x = tiny.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(info_nce(x, **options), x)
    large = rows.clone().requires_grad_()
    (direction,) = torch.autograd.grad(info_nce(large, **options | dict(weights=options["weights"].double())), large)
    assert not gradient.isnan().any()
    decided = direction.abs() > 0.1
    assert decided.float().mean() > 0.8
    assert torch.equal(gradient.sign()[decided].double(), direction.sign()[decided])
    assert gradient[decided].isinf().all()


@pytest.mark.parametrize("denominator", ["all", "negatives", "decoupled"])
@pytest.mark.parametrize(("n", "m", "q"), [(0, 0, 0), (0, 0, 3), (0, 4, 2), (4, 0, 3), (3, 2, 0)])
def test_empty_sides_give_finite_losses_and_zero_gradients(n: int, m: int, q: int, denominator: str) -> None:
    x, y, queue = (torch.randn(k, 3, requires_grad=True) for k in (n, m, q))
    labels = torch.arange(n), torch.arange(m) + 100
    for symmetric in (False, True):
        options: dict[str, Any] = dict(labels=labels, denominator=denominator, symmetric=symmetric)
        loss = info_nce(x, y, negatives=queue, **options)
        assert loss.item() == 0
        for grad in torch.autograd.grad(loss, (x, y, queue)):
            assert (grad == 0).all()


def test_negatives_are_columns_that_are_positive_for_none() -> None:
    x, y, queue = (torch.randn(k, 6, dtype=DOUBLE) for k in (5, 5, 9))
    filled = torch.tensor([True] * 6 + [False] * 3)
    weights = torch.cat([torch.eye(5, dtype=DOUBLE), torch.zeros(5, 6, dtype=DOUBLE)], 1)
    for denominator in ("all", "negatives", "decoupled"):
        ours = info_nce(x, y, negatives=queue, negative_mask=filled, denominator=denominator)
        joined = info_nce(x, torch.cat([y, queue[:6]]), weights=weights, denominator=denominator)
        torch.testing.assert_close(ours, joined, rtol=1e-12, atol=0)


def test_with_one_positive_a_row_two_denominators_are_the_same_loss() -> None:
    x, y = (torch.randn(8, 4, dtype=DOUBLE) for _ in range(2))
    labels = torch.arange(8), torch.arange(8)
    torch.testing.assert_close(info_nce(x, y, labels=labels, denominator="negatives"), info_nce(x, y))


def test_a_weight_of_zero_has_no_gradient_with_negatives_and_the_others_sum_to_zero() -> None:
    x, y = (torch.randn(8, 4, dtype=DOUBLE) for _ in range(2))
    weights = (torch.rand(8, 8, dtype=DOUBLE) * (torch.rand(8, 8) > 0.5)).requires_grad_()
    loss = info_nce(x, y, weights=weights, denominator="negatives", symmetric=True, reduction="sum")
    (grad,) = torch.autograd.grad(loss, weights)
    assert (grad[weights == 0] == 0).all()
    assert (grad[weights != 0] != 0).any()


def test_labels_of_any_integer_dtype_are_labels() -> None:
    x = torch.randn(6, 4)
    labels = torch.tensor([0, 0, 1, 1, -1, 2])
    expected = info_nce(x, labels=(labels, labels), exclude_self=True)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        assert info_nce(x, labels=labels.to(dtype), exclude_self=True) == expected
        assert info_nce(x, labels=(labels.to(dtype), labels), exclude_self=True) == expected
    unimodal, fused = [x, x + 1], x * 2
    losses = [
        hierarchical_contrastive_loss(unimodal, fused, [x], labels=labels.to(dtype), tier1="intra_modal")
        for dtype in (torch.int32, torch.int64)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("tier", [0, 1, 2])
def test_a_learned_temperature_of_a_tier_has_the_difference_quotient(tier: int) -> None:
    unimodal = [torch.randn(9, 5, dtype=DOUBLE) for _ in range(3)]
    fused, high = torch.randn(9, 5, dtype=DOUBLE), [torch.randn(9, 4, dtype=DOUBLE) for _ in range(3)]
    labels = torch.randint(-1, 3, (9,))

    def loss(temperature: Any, tier1: str) -> Tensor:
        temperatures = [0.3, 0.2, 0.5]
        temperatures[tier] = temperature
        return hierarchical_contrastive_loss(
            unimodal, fused, high, temperatures=temperatures, tier1=tier1, labels=labels
        )

    for tier1 in ("cross_modal", "intra_modal"):
        temperature = torch.tensor([0.4], dtype=DOUBLE, requires_grad=True)  # one element is enough
        (grad,) = torch.autograd.grad(loss(temperature, tier1), temperature)
        quotient = (loss(0.4 + 1e-6, tier1) - loss(0.4 - 1e-6, tier1)) / 2e-6
        assert grad.shape == (1,)
        assert grad.item() == pytest.approx(quotient.item(), rel=1e-6)


def test_modules_pass_their_options_and_learn_their_temperatures() -> None:
    x, y, queue = torch.randn(6, 4), torch.randn(6, 4), torch.randn(3, 4)
    labels = torch.arange(6) // 2
    module = InfoNCE(0.2, denominator="decoupled", normalize=False, symmetric=True, exclude_self=True, reduction="none")
    options: dict[str, Any] = dict(labels=(labels, labels), negatives=queue, anchor_mask=torch.arange(6) < 5)
    expected = info_nce(
        x, y, temperature=0.2, denominator="decoupled", normalize=False, symmetric=True, exclude_self=True,
        reduction="none", **options,
    )  # fmt: skip
    assert torch.equal(module(x, y, **options), expected)
    assert list(module.parameters()) == []
    learned = InfoNCE(0.2, learn_temperature=True)
    assert "temperature=0.2" in repr(learned)
    torch.testing.assert_close(learned(x, y), info_nce(x, y, temperature=0.2))
    learned(x, y).backward()
    assert learned.log_temperature.grad != 0
    hierarchy = HierarchicalContrastiveLoss(4, 3, projection=5, modalities=2, normalize=False, learn_temperature=True)
    hierarchy([x, y], x + y, [torch.randn(6, 3)]).backward()
    grad = hierarchy.log_temperature.grad
    assert grad.shape == (3,)
    assert (grad[:2] != 0).all()
    assert grad[2] == 0  # two modalities have one pair, and no pair of pairs
    with pytest.raises(ValueError, match="InfoNCE: expected temperatures that are positive"):
        InfoNCE(0.0)
