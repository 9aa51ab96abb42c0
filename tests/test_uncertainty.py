"""Uncertainty measures against NumPy, hand-worked numbers and their bounds."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from msacore import uncertainty

CLASSIFIERS = (uncertainty.entropy, uncertainty.least_confidence, uncertainty.margin)


def _distribution(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("measure", [uncertainty.mc_variance, uncertainty.ensemble_variance])
def test_variances_divide_by_the_number_of_passes(measure: Callable[[Tensor], Tensor]) -> None:
    values = torch.randn(7, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    np.testing.assert_allclose(measure(values), np.var(values.numpy(), axis=0), rtol=1e-12)
    assert measure(values[:1]).eq(0).all()
    assert measure(values[:, :0]).shape == (0,)


def test_modality_disagreement_reads_available_heads_only() -> None:
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bits = torch.arange(8)[:, None]
    available = (bits >> torch.arange(3)[None, :]) % 2 == 1
    expected = [np.var(values[available[i], i].numpy()) if available[i].any() else 0.0 for i in range(8)]
    clean = uncertainty.modality_disagreement(values, available)
    np.testing.assert_allclose(clean, expected, rtol=1e-12)
    assert clean[available.sum(1) < 2].eq(0).all()
    hidden = values.masked_fill(~available.T, float("nan"))
    assert torch.equal(uncertainty.modality_disagreement(hidden, available), clean)
    torch.testing.assert_close(uncertainty.modality_disagreement(values), uncertainty.mc_variance(values))


def test_classification_measures_match_their_formulas() -> None:
    p = _distribution(50, 5)
    ordered = np.sort(p.numpy(), axis=1)
    np.testing.assert_allclose(uncertainty.entropy(p), -(p * p.log()).sum(1), rtol=1e-12)
    np.testing.assert_allclose(uncertainty.least_confidence(p), 1 - ordered[:, -1], rtol=1e-12)
    np.testing.assert_allclose(uncertainty.margin(p), 1 - (ordered[:, -1] - ordered[:, -2]), rtol=1e-12)


@pytest.mark.parametrize("measure", CLASSIFIERS)
def test_uniform_is_most_uncertain_and_certain_is_least(measure: Callable[[Tensor], Tensor]) -> None:
    uniform, certain, drawn = torch.full((1, 4), 0.25), torch.eye(4)[:1], _distribution(30, 4).float()
    low, high, between = measure(certain), measure(uniform), measure(drawn)
    assert low.item() == 0
    assert (between > low).all()
    assert (between < high).all()
    assert measure(drawn[:0]).shape == (0,)


def test_bald_is_zero_without_disagreement_and_bounded() -> None:
    p = _distribution(6, 20, 3)
    mean = p.mean(0)
    expected = -(mean * mean.log()).sum(-1) + (p * p.log()).sum(-1).mean(0)
    np.testing.assert_allclose(uncertainty.bald(p), expected, rtol=1e-9)
    split = torch.eye(2)[:, None, :]
    assert uncertainty.bald(split).item() == pytest.approx(np.log(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("passes", [1, 2, 3, 7, 10])
def test_equal_predictions_give_exactly_zero(passes: int, dtype: torch.dtype) -> None:
    """A model whose dropout is off predicts the same in every pass; rounding must not look like uncertainty."""
    generator = torch.Generator().manual_seed(passes)
    one = (torch.randn(500, generator=generator, dtype=torch.float64) * 3).to(dtype)
    for measure in (uncertainty.mc_variance, uncertainty.ensemble_variance, uncertainty.modality_disagreement):
        assert measure(one.expand(passes, -1)).eq(0).all(), measure.__name__
    available = torch.rand(500, passes, generator=generator) < 0.6
    hidden = one.expand(passes, -1).masked_fill(~available.T, float("nan"))
    assert uncertainty.modality_disagreement(hidden, available).eq(0).all()
    p = torch.randn(500, 7, generator=generator, dtype=torch.float64).mul(4).softmax(-1).to(dtype)
    assert uncertainty.bald(p.expand(passes, -1, -1)).eq(0).all()


def test_nothing_is_negative_where_probabilities_sum_to_a_little_more_than_one() -> None:
    p = torch.tensor([[1 + 1.2e-7, 0.0], [1.004, 0.0], [0.0, 1.0]])
    for measure in CLASSIFIERS:
        assert measure(p).ge(0).all(), measure.__name__
    generator = torch.Generator().manual_seed(0)
    near = torch.randn(300, 5, generator=generator).softmax(-1).expand(6, -1, -1)
    near = near + 1e-7 * torch.rand(near.shape, generator=generator)
    assert uncertainty.bald(near).ge(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_accumulate_in_float32(dtype: torch.dtype) -> None:
    p = _distribution(40, 6).to(dtype)
    for measure in CLASSIFIERS:
        assert measure(p).dtype == torch.float32
        np.testing.assert_allclose(measure(p), measure(p.float()), rtol=0, atol=0)
    predictions = torch.randn(9, 4).to(dtype)
    assert torch.equal(uncertainty.mc_variance(predictions), uncertainty.mc_variance(predictions.float()))


@pytest.mark.parametrize("measure", [*CLASSIFIERS, uncertainty.bald])
def test_confidence_of_a_single_logit_is_refused(measure: Callable[[Tensor], Tensor]) -> None:
    shape = (3, 5, 1) if measure is uncertainty.bald else (5, 1)
    with pytest.raises(ValueError, match=rf"{measure.__name__}: .*single-logit"):
        measure(torch.ones(shape))
    with pytest.raises(ValueError, match="single-logit"):
        measure(torch.ones(5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: uncertainty.mc_variance(torch.ones(3)), r"mc_variance: expected `predictions` .*\[S, N\].*\[3\]"),
        (lambda: uncertainty.ensemble_variance(torch.ones(0, 3)), "ensemble_variance: .*S >= 1"),
        (
            lambda: uncertainty.modality_disagreement(torch.ones(2, 3), torch.ones(2, 3).bool()),
            r"`available`.*\[N, M\]",
        ),
        (lambda: uncertainty.modality_disagreement(torch.ones(2, 3), torch.ones(3, 2)), "`available`.*bool"),
        (lambda: uncertainty.entropy(torch.tensor([[2.0, -1.0]])), "softmax"),
        (lambda: uncertainty.margin(torch.tensor([[2.0, 1.0]])), "sum to 1.*got 3"),
        (lambda: uncertainty.entropy(torch.ones(2, 3, 4) / 4), r"\[N, K\].*\[2, 3, 4\]"),
        (lambda: uncertainty.bald(torch.ones(0, 3, 4)), "S >= 1"),
        (lambda: uncertainty.entropy(torch.ones(3, 0)), "K >= 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_inputs_are_named(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
