"""Weights that are drawn towards one part."""

import numpy as np

from examples.al_hcl.stack import PRIOR_ROWS, drawn_weights
from examples.msa.closed_form import STRETCH, stack_weights


def _parts(rng, n, noises):
    """Truth with a standard deviation of 1, one predictor per noise level, and ten rows per video."""
    y = rng.standard_normal(n)
    return y, np.column_stack([y + s * rng.standard_normal(n) for s in noises]), np.arange(n) // 10


def test_few_labels_keep_the_weights_at_home_and_chance_gets_little():
    strays, free = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        y = rng.standard_normal(80)
        home = 0.4 * y + 0.5 * rng.standard_normal(80)
        predictions = np.column_stack([home, home[:, None] + 0.2 * rng.standard_normal((80, 8))])
        weights, _ = drawn_weights(predictions, y, np.arange(80) // 10, 0)
        assert (weights >= 0).all() and weights.sum() <= STRETCH + 1e-6
        strays.append(weights[1:].sum() / weights.sum())
        other = stack_weights(predictions, y, np.arange(80) // 10)[0]
        free.append(other[1:].sum() / other.sum())
    assert np.mean(strays) < 0.2 and np.mean(strays) < np.mean(free) / 2


def test_a_part_that_is_much_better_is_believed():
    y, predictions, groups = _parts(np.random.default_rng(0), 400, (2.0, 0.1, 2.0))
    weights, added = drawn_weights(predictions, y, groups, 0)
    assert weights[1] > 0.95 and weights[0] < 0.05
    assert np.square(predictions @ weights + added - y).mean() < 0.02


def test_what_is_too_timid_is_stretched_about_the_mean():
    rng = np.random.default_rng(1)
    truth = rng.standard_normal(500)
    y = 2 + truth + 0.1 * rng.standard_normal(500)
    predictions = (2 + 0.8 * truth)[:, None]
    weights, added = drawn_weights(predictions, y, np.arange(500) // 10, 0)
    np.testing.assert_allclose(predictions @ weights + added, 2 + truth, atol=0.1)
    assert max(PRIOR_ROWS) == PRIOR_ROWS[0]
