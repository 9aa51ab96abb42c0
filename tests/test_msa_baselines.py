"""Baselines: what they read, what they reproduce."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from examples.msa.baselines import fill, fit_boosting, fit_mlp
from examples.msa.closed_form import Design, fit_views
from examples.msa.data import load
from examples.msa.metrics import REPORTED, evaluate
from examples.msa.missing import label_mask, missing_mask
from examples.msa.synthetic import synthetic

from .real_data import MOSI, needs_real_data


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On problems this small, several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus():
    return synthetic(size=300, dims=(32, 5, 20))


def hide(corpus, observed, value):
    columns = enumerate(corpus.features.items())
    features = {k: np.where(observed[:, [m]], x, value).astype(np.float32) for m, (k, x) in columns}
    return replace(corpus, features=features)


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_hidden_features_are_never_read(corpus, how):
    observed, _ = missing_mask(corpus, "exact", 0.5, 0)
    clean, hidden = fill(corpus, observed, how), fill(hide(corpus, observed, np.nan), observed, how)
    assert np.isfinite(clean).all() and np.array_equal(clean, hidden)


def test_fills_differ_as_named(corpus):
    observed, _ = missing_mask(corpus, "exact", 0.5, 0)
    first = ~observed[:, 0]
    width = corpus.dims[0]
    assert (fill(corpus, observed, "mean")[first, :width] == 0).all()
    zero = fill(corpus, observed, "zero")[:, :width]
    raw = np.where(observed[:, [0]], corpus.features["text"], 0)
    train = corpus.rows("train")
    assert np.allclose(zero[first][0], -raw[train].mean(0) / raw[train].std(0), atol=1e-4)
    with pytest.raises(ValueError, match="how must be"):
        fill(corpus, observed, "median")


def test_baselines_read_labels_of_labelled_rows_only(corpus):
    labelled, _ = label_mask(corpus, 0.5, 0)
    x = fill(corpus, np.ones((len(corpus), 3), bool), "mean")
    unread = (corpus.split == 0) & ~labelled | (corpus.split == 2)
    corrupted = replace(corpus, labels=np.where(unread, 99, corpus.labels).astype(np.float32))
    a, b = (fit_mlp(x, c, labelled, epochs=3) for c in (corpus, corrupted))
    assert np.array_equal(a.prediction, b.prediction)
    rows = np.flatnonzero(~unread)
    a, b = (fit_boosting(x, c.labels, rows) for c in (corpus, corrupted))
    assert np.array_equal(a, b)
    test, y = corpus.rows("test"), corpus.labels
    assert np.corrcoef(a[test], y[test])[0, 1] > 0.3


def test_mlp_learns_repeats_and_leaves_the_generator_alone(corpus):
    x = fill(corpus, np.ones((len(corpus), 3), bool), "mean")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (fit_mlp(x, corpus, seed=s, epochs=20) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(first.prediction, second.prediction) and not np.array_equal(
        first.prediction, other.prediction
    )
    test, y = corpus.rows("test"), corpus.labels
    assert first.per_metric["mae"]["when"] == first.facts["best_epoch"]
    assert first.per_metric["mae"]["test"] == pytest.approx(np.abs(first.prediction[test] - y[test]).mean(), rel=1e-5)
    assert set(first.per_metric) == set(REPORTED["mosi"])
    constant = np.abs(y[test] - np.median(y[corpus.rows("train")])).mean()
    assert np.abs(first.prediction[test] - y[test]).mean() < 0.9 * constant


def test_without_labels_or_validation_the_fit_is_refused(corpus):
    x = fill(corpus, np.ones((len(corpus), 3), bool), "mean")
    with pytest.raises(ValueError, match="no labelled train row"):
        fit_mlp(x, corpus, np.zeros(len(corpus), bool))
    without = replace(corpus, split=np.where(corpus.split == 1, 2, corpus.split).astype(np.int8))
    with pytest.raises(ValueError, match="no validation row"):
        fit_mlp(x, without)


@needs_real_data
def test_ridge_reproduces_the_published_numbers_of_the_text_features():
    corpus = load(MOSI)
    rows = np.flatnonzero((corpus.split == 0) | (corpus.split == 1))
    design, test = Design.of(corpus.standardise()), corpus.rows("test")
    names = ["ridge, text", "ridge, text and neighbours"]
    found = fit_views(design, corpus.labels, rows, corpus.video_index, only=names)
    alone, near = (evaluate(found[k](design.values[test]), corpus.labels[test], "mosi") for k in names)
    # The notes on the data report .767, .949 and .695, and .787 with neighbours.
    assert alone["acc2_has0"] >= 0.767 and alone["mae"] <= 0.96 and alone["corr"] >= 0.695
    assert near["acc2_has0"] >= 0.787 and near["mae"] < alone["mae"]
