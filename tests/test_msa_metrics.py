"""Metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest

from examples.msa.metrics import area_under_curve, evaluate, mean_interval, paired_difference


def test_mosi_accuracies_by_hand():
    y = np.array([0.0, -1.0, 2.0, 0.5, -2.5, 3.0])
    pred = np.array([-0.1, -0.4, 2.5, 1.5, 0.2, 4.0])
    m = evaluate(pred, y, "mosi")
    # has0: the zero label counts as non-negative, so row 0 is wrong; row 4 is wrong.
    assert m["acc2_has0"] == pytest.approx(4 / 6)
    assert m["acc2_non0"] == pytest.approx(4 / 5)
    # Rounded half to even: labels 0,-1,2,0,-2,3; predictions 0,0,2,2,0,3.
    assert m["acc7"] == pytest.approx(3 / 6)
    # Clipped to 2: labels 0,-1,2,0,-2,2; predictions 0,0,2,2,0,2. Clipped to 1: 0,-1,1,0,-1,1 and 0,0,1,1,0,1.
    assert m["acc5"] == pytest.approx(3 / 6)
    assert m["acc3"] == pytest.approx(3 / 6)
    assert m["mae"] == pytest.approx((0.1 + 0.6 + 0.5 + 1.0 + 2.7 + 1.0) / 6)
    assert m["n"] == 6 and m["corr_defined"] is True


def test_zero_is_nonnegative_with_zeros_and_left_out_without():
    m = evaluate(np.array([0.0, 0.0, -1.0]), np.array([0.0, 1.0, -1.0]), "mosei")
    assert m["acc2_has0"] == 1.0
    # Without zero labels a prediction of exactly 0 counts as negative.
    assert m["acc2_non0"] == 0.5


def test_f1_weights_classes_by_the_truth():
    truth, pred = np.array([-1.0] * 4 + [1.0] * 2), np.array([-1.0] * 3 + [1.0, -1.0, -1.0])
    # negative: precision 3/5, recall 3/4, F1 2/3, weight 4/6; positive: F1 0. Weighted by pred: 5/9.
    assert evaluate(pred, truth, "mosi")["f1_non0"] == pytest.approx(4 / 9)
    truth, pred = np.array([-1.0] * 4 + [1.0]), np.array([-1.0, 1.0, 1.0, 1.0, 1.0])
    # negative: precision 1, recall 1/4; positive: precision 1/4, recall 1: F1 .4 each.
    assert evaluate(pred, truth, "mosi")["f1_has0"] == pytest.approx(0.4)


@pytest.mark.parametrize(("value", "bin3", "bin5"), [
    (-1.0, 0, 0), (-0.7, 0, 0), (-0.6, 0, 1), (-0.1, 0, 1), (0.0, 1, 2), (0.1, 1, 2), (0.2, 2, 3), (0.7, 2, 3), (0.8,
    2, 4), (1.0, 2, 4),
])  # fmt: skip
def test_sims_bins_close_on_the_right(value, bin3, bin5):
    centres3, centres5 = np.array([-0.5, 0.05, 0.9]), np.array([-0.9, -0.4, 0.05, 0.4, 0.9])
    for dtype in (np.float32, np.float64):
        y = np.full(5, value, dtype=dtype)
        assert evaluate(centres5.astype(dtype), y, "sims")["acc5"] == pytest.approx(0.2)
        hits5 = [evaluate(np.array([c], dtype=dtype), y[:1], "sims")["acc5"] for c in centres5]
        hits3 = [evaluate(np.array([c], dtype=dtype), y[:1], "sims")["acc3"] for c in centres3]
        assert int(np.argmax(hits5)) == bin5 and int(np.argmax(hits3)) == bin3


def test_sims_clips_and_counts_zero_as_negative():
    m = evaluate(np.array([0.0, 5.0, -3.0]), np.array([-0.2, 1.0, -1.0]), "sims")
    assert m["acc2"] == 1.0 and m["mae"] == pytest.approx(0.2 / 3)
    assert evaluate(np.array([0.1]), np.array([0.0]), "sims")["acc2"] == 0.0
    assert "acc7" not in m and "acc2_has0" not in m


def test_constant_prediction_has_no_correlation():
    m = evaluate(np.full(3, 0.1), np.array([1.0, 2.0, -1.0]), "mosi")
    assert math.isnan(m["corr"]) and m["corr_defined"] is False


def test_correlation_is_pearson():
    m = evaluate(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0]), "mosi")
    assert m["corr"] == pytest.approx(0.5)


def test_all_zero_labels_leave_non0_undefined():
    m = evaluate(np.array([0.3, -0.2]), np.zeros(2), "mosi")
    assert math.isnan(m["acc2_non0"]) and math.isnan(m["f1_non0"]) and m["acc2_has0"] == 0.5


@pytest.mark.parametrize(("pred", "y", "family", "message"), [
    ([1.0], [1.0, 2.0], "mosi", "equal length"),
    ([], [], "mosi", "nothing to score"),
    ([np.nan, 1.0], [1.0, 2.0], "mosi", "1 of 2 values of pred"),
    ([1.0], [np.inf], "mosi", "values of y"),
    ([1.0], [1.0], "iemocap", "family"),
])  # fmt: skip
def test_bad_input_is_named(pred, y, family, message):
    with pytest.raises(ValueError, match=message):
        evaluate(np.array(pred), np.array(y), family)


def test_area_is_the_mean_height():
    assert area_under_curve([0, 1, 3], [1.0, 1.0, 1.0]) == 1.0
    assert area_under_curve([0, 1, 3], [0.0, 1.0, 0.0]) == pytest.approx(0.5)
    # Over log labels each doubling weighs the same.
    assert area_under_curve([10, 20, 40], [0.0, 1.0, 1.0], log=True) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="rise"):
        area_under_curve([0, 0], [1, 1])
    with pytest.raises(ValueError, match="positive"):
        area_under_curve([0, 1], [1, 1], log=True)
    with pytest.raises(ValueError, match="two or more"):
        area_under_curve([1], [1])


def test_interval_is_students():
    # Values 1, 2, 3: deviation 1, t(.975, 2) = 4.302653, half width 4.302653 / sqrt(3).
    r = mean_interval([1.0, 2.0, 3.0])
    assert (r["mean"], r["sd"]) == (2.0, 1.0)
    assert r["high"] - r["mean"] == pytest.approx(2.484138, abs=1e-6)
    one = mean_interval([1.5])
    assert one["mean"] == 1.5 and math.isnan(one["sd"])


def test_paired_difference_uses_the_pairs():
    a, b = [0.5, 0.7, 0.9], [0.4, 0.6, 0.79]
    r = paired_difference(a, b)
    assert r["mean"] == pytest.approx(0.31 / 3) and r["excludes_zero"]
    assert not paired_difference(a, [0.6, 0.6, 0.95])["excludes_zero"]
    with pytest.raises(ValueError, match="not paired"):
        paired_difference(a, b[:2])
