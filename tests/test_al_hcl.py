"""AL-HCL: the model reads what it may, runs resume bit by bit, labels are bought once, the page says what was found."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import examples.al_hcl.first as first_module
from examples.al_hcl.__main__ import main
from examples.al_hcl.acquire import MEASURES, SelectionConfig, acquire
from examples.al_hcl.active import Arm, Run
from examples.al_hcl.arms import REFERENCE, ablations
from examples.al_hcl.config import TrainConfig
from examples.al_hcl.data import Data, label_classes
from examples.al_hcl.first import experimental_design, first_count, first_labels, informative_rows
from examples.al_hcl.model import Inputs, ModelConfig, SentimentModel
from examples.al_hcl.predict import Prediction
from examples.al_hcl.pretrain import pretrain
from examples.al_hcl.train import train
from examples.msa.synthetic import synthetic

MODEL = ModelConfig(width=8, rows=4, heads=2, projection=8)
TRAINING = TrainConfig(
    steps=6, batch=8, contrast_rows=8, pretrain_steps=3, pretrain_rows=8, folds=2, check_every=3, passes=3
)
SELECTION = SelectionConfig(budget=4, rounds=2)
ARM = Arm(REFERENCE, MODEL, TRAINING, SELECTION)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """These models are too small for threads to help, and equal bits are promised only for equal numbers of threads."""
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


def new_model(corpus, config=MODEL):
    torch.manual_seed(0)
    return SentimentModel(corpus.dims, corpus.sequences, corpus.aligned, config)


def new_models(corpus, config=MODEL):
    return [new_model(corpus, config) for _ in range(TRAINING.folds)]


def finish(run):
    for state in run.rounds():
        last = state
    return last


@pytest.mark.parametrize("keep_training", [False, True])
def test_resume_equals_an_uninterrupted_run_bit_by_bit(corpus, data, tmp_path, keep_training):
    arm = replace(ARM, selection=replace(SELECTION, keep_training=keep_training))
    whole = finish(Run(arm, corpus, data, 3, tmp_path / "whole.pt"))
    next(Run(arm, corpus, data, 3, tmp_path / "cut.pt").rounds())
    torch.manual_seed(99)
    resumed = Run(arm, corpus, data, 3, tmp_path / "cut.pt", resume=True)
    assert len(resumed.state.records) == 1
    rest = finish(resumed)
    assert rest.labelled == whole.labelled
    assert rest.records == whole.records
    assert torch.equal(rest.embedding, whole.embedding) and torch.equal(rest.prediction, whole.prediction)
    for member, other in zip(rest.weights, whole.weights, strict=True):
        for a, b in zip(member, other, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in a)
    assert bool(rest.weights) == keep_training


def test_a_share_of_a_round_is_drawn_from_what_the_strategy_left():
    n, config = 40, SelectionConfig("topk", budget=9, explore=1 / 3)
    passes = torch.linspace(0, 1, n).expand(2, n)
    pool = Prediction(passes, torch.ones(2, n), passes, passes, torch.randn(n, 3))
    available, labelled = torch.ones(n, 2, dtype=torch.bool), torch.zeros(1, 3)
    drawn = [acquire(pool, available, labelled, config, seed) for seed in (0, 0, 1)]
    # Those nearest to neutral come first.
    assert all(picks.positions[:6].tolist() == [0, 1, 2, 3, 4, 5] for picks in drawn)
    assert all(len(set(picks.positions.tolist())) == 9 for picks in drawn)
    assert torch.equal(drawn[0].positions, drawn[1].positions)
    assert not torch.equal(drawn[0].positions, drawn[2].positions)
    assert torch.equal(drawn[0].uncertainty, MEASURES["margin"](pool, available)[drawn[0].positions])
    everything = acquire(pool, available, labelled, replace(config, explore=1.0, budget=n), 0)
    assert sorted(everything.positions.tolist()) == list(range(n))
    alone = acquire(pool, available, labelled, replace(config, explore=0.0), 0)
    assert alone.positions.tolist() == list(range(9))


def test_first_labels_tell_most_about_the_rest(data):
    """Every pick is the one that lowers the variances most according to a full covariance matrix."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(40, 9, generator=g, dtype=torch.float64)
    covariance, candidates = features @ features.T, torch.rand(40, generator=g) < 0.7
    picks, lowered = experimental_design(covariance.clone(), 12, candidates, 3, noise=0.5)
    free = candidates & (torch.arange(40) >= 3)
    for t, i in enumerate([0, 1, 2, *picks.tolist()]):
        if t >= 3:
            gains = covariance.square().sum(0) / (covariance.diagonal() + 0.5)
            assert free[i] and i == int(torch.where(free, gains, -torch.inf).argmax())
            torch.testing.assert_close(lowered[t - 3], gains[i])
            free[i] = False
        covariance = covariance - torch.outer(covariance[i], covariance[i]) / (covariance[i, i] + 0.5)


def test_first_labels_read_no_label_and_are_partly_drawn(data, monkeypatch):
    learned = torch.randn(len(data.labels), 5, generator=torch.Generator().manual_seed(0))
    blind = replace(data, labels=torch.full_like(data.labels, torch.nan))
    count = round(0.1 * len(data.buyable))
    picked = first_labels(data, SELECTION, 0, learned)
    assert picked == first_labels(blind, SELECTION, 0, learned) and len(set(picked)) == count
    assert count == first_count(data, SELECTION)
    drawn, share = first_labels(data, replace(SELECTION, informative=0.0), 0), count - round(0.5 * count)
    assert picked[:share] == drawn[:share] and picked[share:] != drawn[share:]
    alone = [first_labels(data, replace(SELECTION, informative=1.0), seed, learned) for seed in (0, 1)]
    assert alone[0] == alone[1] != picked
    assert sorted(first_labels(data, replace(SELECTION, initial=1.0), 0)) == data.buyable.tolist()
    some, known = data.buyable[::2], data.buyable[:6:2]
    for limit in (first_module.LIMIT, 20):  # all rows, and a sample of them
        monkeypatch.setattr(first_module, "LIMIT", limit)
        rows, _ = informative_rows(blind, some, 8, known, learned, 0)
        assert len(set(rows.tolist())) == 8 and set(rows.tolist()) <= set(some[3:].tolist())
        everything, _ = informative_rows(blind, some, len(some) - 3, known, learned, 0)
        assert sorted(everything.tolist()) == some[3:].tolist()


def test_a_finished_run_is_not_repeated_and_the_seed_matters(corpus, data, tmp_path):
    first = finish(Run(ARM, corpus, data, 0, tmp_path / "a.pt"))
    assert list(Run(ARM, corpus, data, 0, tmp_path / "a.pt", resume=True).rounds()) == []
    other = finish(Run(ARM, corpus, data, 1, tmp_path / "b.pt"))
    assert other.labelled != first.labelled


def test_labels_are_bought_once_from_the_train_part(corpus, data, tmp_path):
    state = finish(Run(ARM, corpus, data, 0, tmp_path / "a.pt"))
    train_rows = set(corpus.rows("train").tolist())
    first = round(0.1 * len(train_rows))
    assert state.counts == [first, first + 4, first + 8]
    assert len(set(state.labelled)) == len(state.labelled) == first + 8
    assert set(state.labelled) <= train_rows
    bought = [p["row"] for r in state.records for p in r["picks"]]
    assert bought == state.labelled[first:]
    assert [len(r["picks"]) for r in state.records] == [4, 4, 0]
    ids = {p["id"]: p["row"] for r in state.records for p in r["picks"]}
    assert all(corpus.utterance_ids[row] == name for name, row in ids.items())


def test_labels_that_are_not_there_are_neither_bought_nor_scored(corpus, tmp_path):
    labels = corpus.labels.copy()
    labels[::3] = np.nan
    holes = replace(corpus, labels=labels)
    state = finish(Run(ARM, holes, Data.of(holes), 0, tmp_path / "a.pt"))
    assert np.isfinite(labels[state.labelled]).all() and state.counts[0] == round(
        0.1 * np.isfinite(labels[corpus.split == 0]).sum()
    )
    assert all(b["n"] == state.records[0]["test"]["n"] for b in state.records[0]["baselines"].values())
    assert all(r["test"]["n"] == len(holes.rows("test", labelled=True)) for r in state.records)
    assert all(np.isfinite(r["test"]["mae"]) for r in state.records)


@pytest.mark.slow  # seven trainings
def test_replaying_arms_train_on_the_labels_of_the_reference(corpus, data, tmp_path):
    reference = finish(Run(ARM, corpus, data, 0, tmp_path / "a.pt"))
    arms = ablations(ARM, 3)
    assert len(arms) == 13 and len(ablations(ARM, 2)) == 12
    for i, arm in enumerate(a for a in arms if a.replay):
        state = finish(Run(arm, corpus, data, 0, tmp_path / f"{i}.pt", replayed=reference))
        assert state.labelled == reference.labelled
        # Scores may be equal, because a network that does not help out of fold has no weight.
        assert [r["members"] for r in state.records] != [r["members"] for r in reference.records]


def test_every_ablation_changes_the_objective(corpus, data):
    rows = data.train[:16]
    target = data.labels[rows]

    def objective(arm):
        model = new_model(corpus, arm.model).eval()
        for head in (model.head, model.noise_head):
            torch.nn.init.constant_(head.weight, 0.1)
        out = model(data.inputs[rows])
        loss = (out.correction - target).square().mean()
        if arm.training.contrast_weight:
            loss = loss + arm.training.contrast_weight * model.contrastive_loss(
                out, data.inputs[rows].available, data.classes[rows]
            )
        return float(loss.detach())

    values = {arm.name: objective(arm) for arm in ablations(ARM, 3) if arm.replay}
    values[REFERENCE] = objective(ARM)
    assert len(set(values.values())) == len(values) == 9, values


def test_labels_outside_the_labelled_set_are_not_read(corpus, data):
    labelled = data.train[:20]
    hidden = data.labels.clone()
    hidden[data.train[20:]] = math.nan
    hidden[data.test] = math.nan
    hidden[corpus.rows("valid")] = math.nan
    found = []
    for labels in (data.labels, hidden):
        hidden_data, models = replace(data, labels=labels), new_models(corpus)
        learned = pretrain(new_model(corpus), hidden_data, TRAINING, 0)
        found.append(train(models, hidden_data, labelled, learned, TRAINING, 0))
    assert torch.equal(found[0].everywhere, found[1].everywhere) and found[0].weight == found[1].weight
    for one, other in zip(found[0].models, found[1].models, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("high_level", ["matrix", "mlp", "none"])
@pytest.mark.parametrize("form", ["pooled", "aligned", "unaligned"])
def test_what_is_missing_is_not_read(form, high_level):
    corpus = synthetic(size=40, dims=(16, 5, 12), pooled=form == "pooled", length=6).standardise()
    corpus = replace(corpus, aligned=form == "aligned")
    full = Inputs.of(corpus)
    available = full.available.clone()
    available[::2, 1] = False
    available[1::3, 0] = False
    masks = [m & available[:, i : i + 1] for i, m in enumerate(full.masks)]
    model = new_model(corpus, replace(MODEL, high_level=high_level)).eval()
    clean = model(Inputs(full.features, masks, available, full.design))
    poisoned = [torch.where(m[..., None], x, torch.nan) for x, m in zip(full.features, masks, strict=True)]
    dirty = model(Inputs(poisoned, masks, available, full.design))
    for name in ("correction", "log_variance", "fused", "unimodal_mean"):
        assert torch.equal(getattr(clean, name), getattr(dirty, name)) and getattr(clean, name).isfinite().all(), name
    classes = -1 - torch.arange(len(available))
    loss = model.contrastive_loss(dirty, available, classes)
    assert torch.equal(loss, model.contrastive_loss(clean, available, classes)) and loss > 0
    assert not torch.equal(clean.fused, model(full).fused)


def test_two_modalities_have_an_empty_third_tier(corpus):
    pair = corpus.keep_modalities(("text", "audio"))
    model, inputs = new_model(pair).eval(), Inputs.of(pair)
    without = new_model(pair, replace(MODEL, tier_weights=(0.2, 0.3, 0.0))).eval()
    out = model(inputs)
    assert len(out.high_level) == 1
    classes = -1 - torch.arange(len(inputs))
    losses = [m.contrastive_loss(out, inputs.available, classes) for m in (model, without)]
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="two or more modalities, got 1"):
        new_model(corpus.keep_modalities(("text",)))


def test_contrast_before_labels_lowers_its_loss_and_has_none_without_weight(corpus, data):
    def loss(model):
        torch.manual_seed(0)
        with torch.no_grad():
            out = model.eval()(data.inputs[data.train])
            return float(model.contrastive_loss(out, data.inputs.available[data.train], -1 - data.train))

    config = replace(TRAINING, pretrain_steps=60, pretrain_rows=48)
    trained, fresh = new_model(corpus), new_model(corpus)
    embedding = pretrain(trained, data, config, 0)
    assert loss(trained) < 0.9 * loss(fresh)
    assert embedding.shape == (len(data.labels), MODEL.width + 3 * MODEL.rows)
    untouched = new_model(corpus)
    pretrain(untouched, data, replace(config, contrast_weight=0.0), 0)
    assert loss(untouched) == loss(fresh)


def test_supervised_first_tier_reads_the_classes_of_labelled_rows_only(corpus, data):
    model = new_model(corpus, replace(MODEL, tier1="intra_modal", tier_weights=(1.0, 0.0, 0.0))).eval()
    rows = data.train[:16]
    out, available = model(data.inputs[rows]), data.inputs.available[rows]
    nobody, pairs = -1 - torch.arange(16), torch.arange(16) // 2
    assert model.contrastive_loss(out, available, nobody) == 0
    assert model.contrastive_loss(out, available, pairs) > 0
    assert label_classes(np.array([-3.4, -0.2, 1.2, 2.8]), "mosi").tolist() == [0, 3, 4, 6]
    assert label_classes(np.array([-0.8, -0.2, 0.0, 0.6, 1.0], np.float32), "sims").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("measure", sorted(MEASURES))
def test_measures_are_finite_and_rank_a_doubtful_sample_first(measure):
    g = torch.Generator().manual_seed(0)
    certain = 2 + 0.01 * torch.randn(4, 5, generator=g)
    doubtful = torch.tensor([1.0, -1.0, 1.2, -1.1])[:, None]
    passes = torch.cat([certain, doubtful], 1)
    noise = torch.full_like(passes, 0.5)
    noise[:, -1] = 0.6
    p = Prediction(passes, noise, passes, passes[:3], torch.randn(6, 3, generator=g))
    available = torch.ones(6, 3, dtype=torch.bool)
    value = MEASURES[measure](p, available)
    assert value.isfinite().all() and (value >= 0).all() and int(value.argmax()) == 5
    picks = acquire(p, available, p.embedding[:2], SelectionConfig("topk", measure, budget=1), 0)
    assert picks.positions.tolist() == [5] and torch.equal(picks.uncertainty, value[5:])


def test_checkpoints_that_cannot_be_resumed_say_why(corpus, data, tmp_path):
    path = tmp_path / "a.pt"
    next(Run(ARM, corpus, data, 0, path).rounds())
    with pytest.raises(ValueError, match=r"other arguments.*gamma"):
        Run(replace(ARM, selection=replace(SELECTION, gamma=2.0)), corpus, data, 0, path, resume=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content[: len(content) * 3 // 4]))
    with pytest.raises(ValueError, match=r"a\.pt: corrupt checkpoint"):
        Run(ARM, corpus, data, 0, path, resume=True)


def test_impossible_protocols_are_refused(corpus, data, tmp_path, capsys):
    with pytest.raises(ValueError, match="no labelled sample"):
        train(new_models(corpus), data, data.train[:0], data.inputs.features[0][:, 0], TRAINING, 0)
    with pytest.raises(ValueError, match="no labelled sample"):
        Run(replace(ARM, selection=replace(SELECTION, initial=0.0)), corpus, data, 0, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"ask for \d+ labels, but the train part has \d+"):
        Run(replace(ARM, selection=replace(SELECTION, budget=81, rounds=1)), corpus, data, 0, tmp_path / "a.pt")
    without = replace(corpus, split=np.where(corpus.split == 1, 0, corpus.split).astype(np.int8))
    assert len(Data.of(without).given) == 0
    with pytest.raises(ValueError, match="no utterance in its valid part"):
        Data.of(without, validation=True)
    quick = ["--size", "60", "--no-progress", "--out", str(tmp_path / "out")]
    for options, message in [
        (["--rounds", "0"], "at least 1"),
        (["--uncertainty", "ensemble_variance"], "--members 2"),
        (["--seeds", "1", "1"], "must differ"),
        (["--ablate", "without tier 7"], "there are without tier 1"),
        (["--data", str(tmp_path / "none.pkl")], "no such file"),
        (["--option", "delta"], "KEY=NUMBER"),
    ]:
        options = options if "--data" in options else [*quick, *options]
        assert main([*options, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
