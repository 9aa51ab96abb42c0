"""AL-HCL's closed-form path and what its networks add: stacked and judged by fits that left the video out."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.al_hcl.active import Run
from examples.al_hcl.data import Data
from examples.al_hcl.path import LENGTHS, VIEWS, bumps, coordinates, fit_path
from examples.al_hcl.predict import predict
from examples.al_hcl.pretrain import pretrain
from examples.al_hcl.train import correction_weight, train
from examples.msa.synthetic import synthetic
from tests.test_al_hcl import ARM, TRAINING, finish, new_model, new_models


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for threads to help."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus():
    return synthetic(size=120, dims=(24, 5, 12)).standardise()


@pytest.fixture(scope="module")
def data(corpus):
    return Data.of(corpus)


def path_of(corpus, data, labelled, learned, view=None):
    ridges = data.ridges(labelled)
    return ridges, fit_path(ridges, data.design, learned, data.train, data.labels, labelled, data.video, view)


@pytest.mark.parametrize("view", [None, *VIEWS])
def test_the_path_is_the_weighted_sum_of_its_parts_and_not_worse_than_the_best(corpus, data, view):
    labelled = data.train[:40]
    learned = torch.randn(len(data.labels), 6, generator=torch.Generator().manual_seed(0))
    ridges, path = path_of(corpus, data, labelled, learned, view)
    y = data.labels[labelled].double()
    error = float((path.left_out - y).square().mean())
    if view is None:
        assert set(ridges) < set(path.weights) and error <= min(r.error for r in ridges.values()) + 1e-9
    else:
        names = {"first": ["ridge, text and neighbours"], "all": ["ridge, all modalities"]}
        learned_names = [f"kernel, learned embedding, length {length:g}" for length in LENGTHS]
        assert list(path.weights) == names.get(view, learned_names)
    assert all(w >= 0 for w in path.weights.values())
    everywhere = path(data.inputs.design, learned)
    value = np.full(len(corpus), path.offset) + data.design.values @ path.coefficient.numpy()
    for kernel in path.kernels:
        z = path.scale(learned) if not kernel.blocks else None
        points = coordinates(kernel.blocks, data.inputs.design, z)
        d = ((points[:, None] - kernel.support) ** 2).sum(-1)
        assert torch.allclose(bumps(points, kernel.support, kernel.length), torch.exp(-d / 2 / kernel.length**2))
        value += np.exp(-d.numpy() / 2 / kernel.length**2) @ kernel.coefficient.numpy()
    np.testing.assert_allclose(everywhere.numpy(), value, atol=1e-8)


def test_a_kernel_finds_what_an_embedding_tells_through_few_rows(corpus, data, monkeypatch):
    labelled, y = data.train[:60], data.labels[:, None]
    noise = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(0))
    learned = torch.cat([y.square(), 0.1 * noise[:, :1], y.sign() + 0.1 * noise[:, 1:2], y + 0.1 * noise[:, 2:]], 1)
    _, whole = path_of(corpus, data, labelled, learned, "learned")
    truth = data.labels[labelled].double()
    assert float((whole.left_out - truth).square().mean()) < 0.3 * float(truth.var())
    monkeypatch.setattr("examples.al_hcl.path.LANDMARKS", 10)
    _, few = path_of(corpus, data, labelled, learned, "learned")
    assert few.kernels and all(len(k.support) == 10 for k in few.kernels)
    assert float((few.left_out - truth).square().mean()) < 0.5 * float(truth.var())


def test_a_correction_counts_only_if_it_helps_beyond_chance():
    rng = np.random.default_rng(0)
    rest, groups = rng.standard_normal(200), np.arange(200) // 10
    assert correction_weight(rest, rest, groups) == pytest.approx(1.0)
    assert correction_weight(4 * rest, rest, groups) == pytest.approx(0.25)
    assert correction_weight(-rest, rest, groups) == 0 == correction_weight(np.zeros(200), rest, groups)
    noise = [correction_weight(rng.standard_normal(200), rest, groups) for _ in range(50)]
    assert np.mean(noise) < 0.02 and np.median(noise) == 0
    assert 0.3 < correction_weight(rest + rng.standard_normal(200), rest, groups) < 0.6


def test_the_whole_is_judged_by_networks_that_did_not_see_the_video(corpus, data):
    labelled = data.train[:60]
    learned = pretrain(new_model(corpus), data, TRAINING, 0)
    trained = train(new_models(corpus), data, labelled, learned, replace(TRAINING, steps=9, patience=9), 0)
    y = data.labels[labelled].double().numpy()
    assert trained.facts["left_out_rmse"] == pytest.approx(np.sqrt(np.square(trained.left_out - y).mean()))
    assert trained.facts["left_out_rmse"] <= trained.facts["path_left_out_rmse"] + 1e-12
    assert [h["step"] for h in trained.history] == [0, 3, 6, 9] and trained.history[0]["weight"] == 0
    tested = predict([trained], data.inputs, [trained.everywhere], data.test, 4, 0)
    assert tested.passes.shape == (4, len(data.test))
    if trained.weight == 0:
        assert torch.equal(tested.mean, trained.everywhere[data.test].float())


def test_training_ends_where_the_correction_keeps_deserving_no_weight(corpus, data):
    labelled = data.train[:60]
    learned = pretrain(new_model(corpus), data, TRAINING, 0)

    def history(patience):
        return train(
            new_models(corpus), data, labelled, learned, replace(TRAINING, steps=12, patience=patience), 0
        ).history

    whole, short = history(9), history(2)
    idle = [h["weight"] == 0 for h in whole]
    ends = next((i for i in range(2, len(idle)) if idle[i] and idle[i - 1]), len(idle) - 1)
    assert ends < len(idle) - 1
    assert short == whole[: ends + 1]


def test_labels_of_the_validation_part_are_used_and_counted_when_asked(corpus, data, tmp_path):
    valid = corpus.rows("valid", labelled=True)
    assert len(data.given) == 0
    both = Data.of(corpus, validation=True)
    assert both.given.tolist() == valid.tolist()
    with_them = finish(Run(ARM, corpus, both, 0, tmp_path / "a.pt"))
    without = finish(Run(ARM, corpus, data, 0, tmp_path / "b.pt"))
    assert with_them.counts == [c + len(valid) for c in without.counts]
    assert not set(with_them.labelled) & set(valid.tolist())
    ours, theirs = (s.records[0]["baselines"]["ridge, text"]["mae"] for s in (with_them, without))
    assert ours != theirs
