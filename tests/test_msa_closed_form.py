"""Closed forms: exact where they say so, against scikit-learn; neighbours by position; weights fitted out of fold."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from examples.msa import closed_form
from examples.msa.closed_form import (
    NEARBY,
    STRENGTHS,
    WINDOW,
    Decomposition,
    Design,
    fit_views,
    fold_of,
    stack_weights,
    stacked,
    views,
)
from examples.msa.corpus import Corpus
from examples.msa.missing import missing_mask
from examples.msa.synthetic import synthetic


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return synthetic(size=150, dims=(24, 5, 8))


def scattered(corpus: Corpus) -> Corpus:
    """Splits that cut through videos, and gaps in the clip numbers."""
    split = np.random.default_rng(0).integers(0, 3, len(corpus)).astype(np.int8)
    return replace(corpus, split=split, clips=corpus.positions * 2 - (corpus.positions % 3 == 1))


@pytest.mark.parametrize("transductive", [False, True])
def test_neighbours_are_those_within_the_window_that_may_be_heard(corpus: Corpus, transductive: bool) -> None:
    data = scattered(corpus)
    observed, _ = missing_mask(data, "exact", 0.4, 0)
    standard = data.standardise(observed)
    design = Design.of(standard, observed, transductive)
    assert design.modalities == data.modalities
    for m, (name, x) in enumerate(standard.features.items()):
        own, near = design.values[:, design.columns[name]], design.values[:, design.columns[name + NEARBY]]
        assert np.array_equal(own, np.column_stack([np.where(observed[:, [m]], x, 0), ~observed[:, m]]))
        for i in range(len(data)):
            heard = [
                j
                for j in range(len(data))
                if j != i
                and data.video_index[i] == data.video_index[j]
                and abs(data.positions[i] - data.positions[j]) <= WINDOW
                and (transductive or data.split[i] == data.split[j])
                and observed[j, m]
            ]
            expected = np.append(x[heard].mean(0), 0) if heard else np.append(np.zeros(x.shape[1]), 1)
            np.testing.assert_allclose(near[i], expected, atol=1e-5)


def test_hidden_features_are_not_read(corpus: Corpus) -> None:
    observed, _ = missing_mask(corpus, "exact", 0.5, 0)
    standard = corpus.standardise(observed)
    dirty = {k: np.where(observed[:, [m]], x, np.float32(np.nan)) for m, (k, x) in enumerate(standard.features.items())}
    clean, other = (Design.of(c, observed).values for c in (standard, replace(standard, features=dirty)))
    assert np.isfinite(clean).all() and np.array_equal(clean, other)


@pytest.mark.parametrize(("n", "d"), [(60, 12), (30, 70)], ids=["columns", "rows"])
def test_left_out_predictions_are_those_of_fits_without_the_video(n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    x, groups = rng.standard_normal((n, d)) + 3, rng.integers(0, 6, n)
    y = x[:, :3].sum(1) + rng.standard_normal(n)
    errors = {}
    for strength in STRENGTHS:
        expected = np.empty(n)
        for g in np.unique(groups):
            fitted = Ridge(alpha=strength).fit(x[groups != g], y[groups != g])
            expected[groups == g] = fitted.predict(x[groups == g])
        coefficient, offset, left_out, _ = Decomposition(x, groups).fit(y, [strength])
        whole = Ridge(alpha=strength).fit(x, y)
        np.testing.assert_allclose(left_out, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(coefficient, whole.coef_, rtol=1e-6, atol=1e-8)
        assert offset == pytest.approx(whole.intercept_)
        errors[strength] = np.square(y - expected).mean()
    assert Decomposition(x, groups).fit(y)[3] == min(errors, key=errors.__getitem__)


def test_rows_are_left_out_where_there_is_one_video() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((20, 4)), rng.standard_normal(20)
    left_out = Decomposition(x, np.zeros(20)).fit(y, [3.0])[2]
    expected = [Ridge(alpha=3.0).fit(np.delete(x, i, 0), np.delete(y, i)).predict(x[[i]])[0] for i in range(20)]
    np.testing.assert_allclose(left_out, expected, rtol=1e-6)


def test_a_sketch_stands_for_very_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((120, 6)) @ rng.standard_normal((6, 100)) + 0.01 * rng.standard_normal((120, 100))
    y, groups = x[:, :5].sum(1), rng.integers(0, 9, 120)
    exact = Decomposition(x, groups).fit(y, [1.0])
    monkeypatch.setattr(closed_form, "LIMIT", 20)
    sketch = Decomposition(x, groups)
    assert len(sketch.power) <= 20
    found = sketch.fit(y, [1.0])
    np.testing.assert_allclose(x @ found[0] + found[1], x @ exact[0] + exact[1], atol=0.02 * y.std())


def test_views_read_what_their_names_say_and_only_given_labels(corpus: Corpus) -> None:
    design = Design.of(corpus.standardise())
    rows, groups = corpus.rows("train")[:60], corpus.video_index
    labels = np.full(len(corpus), np.nan)
    labels[rows] = corpus.labels[rows]
    found = fit_views(design, labels, rows, groups)
    sums = {"ridge, sum over modalities", "ridge, sum over modalities and neighbours"}
    assert set(found) == set(views(corpus.modalities)) | sums and len(found) == 10
    for name, blocks in views(corpus.modalities).items():
        read = np.flatnonzero(found[name].coefficient)
        allowed = np.concatenate([np.arange(design.values.shape[1])[design.columns[b]] for b in blocks])
        assert set(read) <= set(allowed) and len(read) > 0
        x = design.values[rows][:, allowed].astype(np.float64)
        plain = Ridge(alpha=found[name].strength).fit(x, labels[rows])
        np.testing.assert_allclose(found[name](design.values[rows]), plain.predict(x), atol=1e-6)
        assert found[name].error == pytest.approx(np.square(found[name].left_out - labels[rows]).mean())
    total = found["ridge, sum over modalities"]
    best = min(found[f"ridge, {m}"].error for m in corpus.modalities)
    assert total.error <= best + 1e-9
    name = "ridge, sum over modalities and neighbours"
    alone = fit_views(design, labels, rows, groups, only=[name])
    assert list(alone) == [name] and np.array_equal(alone[name].coefficient, found[name].coefficient)
    again = fit_views(design, labels, rows, groups)
    assert all(np.array_equal(found[k].coefficient, again[k].coefficient) for k in found)


def test_the_stack_is_not_worse_than_its_best_part_and_noise_gets_no_weight() -> None:
    rng = np.random.default_rng(0)
    y, groups = rng.standard_normal(300), np.arange(300) // 10
    good, other = y + rng.standard_normal(300), y + rng.standard_normal(300)
    noise = rng.standard_normal(300)
    weights, added = stack_weights(np.column_stack([good, other, noise]), y, groups)
    assert (weights >= 0).all() and weights[0] > 0.2 and weights[1] > 0.2 and weights[2] < 0.05
    stack = np.column_stack([good, other, noise]) @ weights + added
    assert np.square(stack - y).mean() < 0.8 * np.square(good - y).mean()
    # The truth itself needs no other predictor.
    weights, added = stack_weights(np.column_stack([noise, y]), y, groups)
    assert weights.tolist() == [0.0, 1.0] and added == 0.0


def test_a_stack_of_linear_predictors_is_one(corpus: Corpus) -> None:
    design, rows = Design.of(corpus.standardise()), corpus.rows("train")
    found = fit_views(design, corpus.labels, rows, corpus.video_index)
    whole, weights = stacked(found, corpus.labels[rows].astype(np.float64), corpus.video_index[rows])
    mix = sum(w * found[k](design.values) for k, w in weights.items())
    difference = whole(design.values) - mix
    np.testing.assert_allclose(difference, difference[0], atol=1e-9)
    assert whole.error <= min(f.error for f in found.values()) + 1e-12


def test_folds_keep_videos_whole_and_balanced() -> None:
    groups = np.repeat(np.arange(9), [9, 8, 7, 6, 5, 4, 3, 2, 1])
    fold = fold_of(groups, 3)
    assert all(len(set(fold[groups == g])) == 1 for g in range(9))
    assert np.bincount(fold).max() <= 18 and len(np.bincount(fold)) == 3
    assert set(fold_of(np.zeros(7), 3)) == {0, 1, 2}
