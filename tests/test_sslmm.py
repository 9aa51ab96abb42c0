"""The SSLMM system: what is hidden stays unread, runs resume bit by bit, every stage and option does something."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.msa.checkpoint import save_checkpoint
from examples.msa.closed_form import Design
from examples.msa.corpus import Corpus
from examples.msa.missing import label_mask, missing_mask
from examples.msa.synthetic import synthetic
from examples.sslmm.__main__ import main
from examples.sslmm.closed import BOOSTING, RIDGES, blend
from examples.sslmm.config import ABLATIONS, Config, ablated
from examples.sslmm.evaluate import BASELINES, METHODS, Cell, Grid, run_cell
from examples.sslmm.losses import drop_one_modality, ramp_up, supervised_loss
from examples.sslmm.model import Dropout
from examples.sslmm.train import Trainer

QUICK = Config(width=8, steps=2, pretrain_epochs=2, finetune_epochs=3, teacher_passes=2, conversations=4)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return synthetic(size=60, dims=(12, 5, 6))


def _trainer(corpus: Corpus, config: Config = QUICK, seed: int = 0, features: dict | None = None) -> Trainer:
    observed, _ = missing_mask(corpus, rate=0.5, seed=1)
    labelled, _ = label_mask(corpus, 0.5, seed=1)
    standard = corpus.standardise(observed)
    if features is not None:
        standard = replace(standard, features=features)
    return Trainer(standard, observed, labelled, config, seed)


def _weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("unlabelled", ["mean_teacher", "rankup"])
@pytest.mark.parametrize("variant", ["linear", "gcnii", "gated"])
def test_hidden_features_change_nothing_in_training_or_evaluation(
    corpus: Corpus, variant: str, unlabelled: str
) -> None:
    config = replace(QUICK, variant=variant, unlabelled=unlabelled)
    plain = _trainer(corpus, config)
    observed, _ = missing_mask(corpus, rate=0.5, seed=1)
    raw = {k: np.where(observed[:, [m]], x, np.nan) for m, (k, x) in enumerate(corpus.features.items())}
    standard = replace(corpus, features=raw).standardise(observed)
    poisoned = _trainer(corpus, config, features=standard.features)
    assert any(np.isnan(x).any() for x in standard.features.values())
    first, second = plain.fit(), poisoned.fit()
    assert np.isfinite(first.prediction).all()
    assert torch.equal(_weights(plain), _weights(poisoned))
    assert np.array_equal(first.prediction, second.prediction)


def test_oracle_reconstruction_reads_what_was_hidden(corpus: Corpus) -> None:
    config = replace(QUICK, reconstruction="oracle")
    observed, _ = missing_mask(corpus, rate=0.5, seed=1)
    standard = corpus.standardise(observed).features
    shifted = {k: x + (~observed[:, [m]]).astype(np.float32) for m, (k, x) in enumerate(standard.items())}
    plain, other = _trainer(corpus, config, features=standard), _trainer(corpus, config, features=shifted)
    plain.fit(), other.fit()
    assert not torch.equal(_weights(plain), _weights(other))


def test_unlabelled_targets_are_not_read(corpus: Corpus) -> None:
    labelled, _ = label_mask(corpus, 0.5, seed=1)
    hidden = (corpus.split == 0) & ~labelled
    other = replace(corpus, labels=np.where(hidden, np.float32(2.5), corpus.labels))
    first, second = _trainer(corpus), _trainer(other)
    # Strata follow the labels, so the second corpus is given the first one's label mask.
    second.labelled = first.labelled.clone()
    first.fit(), second.fit()
    assert torch.equal(_weights(first), _weights(second))


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(corpus: Corpus, tmp_path: Path, stop: int) -> None:
    whole = _trainer(corpus)
    expected = whole.fit()
    interrupted = _trainer(corpus)
    epochs = interrupted._epochs()
    for _ in range(stop):
        next(epochs)
    file = save_checkpoint(tmp_path / "run.pt", interrupted.state_dict(), {"config": asdict(QUICK), "seed": 0})
    resumed = _trainer(corpus)
    torch.rand(17)
    result = resumed.fit(file, resume=True)
    assert torch.equal(_weights(whole), _weights(resumed))
    assert np.array_equal(expected.prediction, result.prediction)
    assert result.history == expected.history


def test_each_ablation_changes_the_run(corpus: Corpus) -> None:
    weights = {}
    for method in ABLATIONS:
        trainer = _trainer(corpus, ablated(QUICK, method))
        trainer.fit()
        weights[method] = _weights(trainer)
        stages = {name: bool(epochs) for name, epochs in trainer.history.items()}
        assert stages == {"pretrain": method not in ("no pre-training", "supervised graph"), "finetune": True}
    methods = list(weights)
    for i, a in enumerate(methods):
        for b in methods[i + 1 :]:
            assert not torch.equal(weights[a], weights[b]), f"{a} and {b} train alike"


@pytest.mark.parametrize(
    "option",
    [
        {"task": "mse"},
        {"send": "never"},
        {"window": 0},
        {"noise": 0.5},
        {"mask_share": 0.2},
        {"readout": "nodes"},
        {"contrast_weight": 0.0},
        {"node_weight": 0.0},
        {"modality_weight": 0.0},
        {"view_weight": 0.5},
    ],
    ids=str,
)
def test_an_option_changes_the_run(corpus: Corpus, option: dict) -> None:
    default, other = _trainer(corpus), _trainer(corpus, replace(QUICK, **option))
    default.fit(), other.fit()
    assert not torch.equal(_weights(default), _weights(other))


def test_products_read_what_is_rebuilt_where_a_modality_is_missing(corpus: Corpus) -> None:
    trainer = _trainer(corpus)
    before = trainer.predict()
    with torch.no_grad():
        for decoder in trainer.model.decoders:
            decoder.bias += 1
    rebuilt = ~trainer.observed.all(1).numpy()
    assert 0 < rebuilt.sum() < len(rebuilt)
    assert np.array_equal(before != trainer.predict(), rebuilt)


@pytest.mark.parametrize("unlabelled", ["mean_teacher", "rankup", "none"])
def test_the_mean_teacher_predicts(corpus: Corpus, unlabelled: str) -> None:
    trainer = _trainer(corpus, replace(QUICK, unlabelled=unlabelled, finetune_epochs=1))
    trainer.fit()
    teacher = torch.cat([p.flatten() for p in trainer.teacher.parameters()])
    assert torch.equal(_weights(trainer), teacher) == (unlabelled == "mean_teacher")


def test_dropping_a_modality_always_leaves_one() -> None:
    observed = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0]], dtype=torch.bool)
    for _ in range(20):
        left = drop_one_modality(observed)
        assert left.sum(1).tolist() == [2, 1, 1]
        assert not (left & ~observed).any()


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    layer, x = Dropout(0.3), torch.ones(1000, 33)
    y = layer(x)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_supervised_loss_is_the_mean_over_labelled() -> None:
    prediction, labels = torch.tensor([1.0, 5.0, -1.0]), torch.tensor([0.0, float("nan"), 1.0])
    labelled = torch.tensor([True, False, True])
    assert supervised_loss(prediction, labels, labelled, "l1").item() == 1.5
    assert supervised_loss(prediction, labels, labelled, "mse").item() == 2.5
    assert supervised_loss(prediction, labels, ~labelled & labelled, "l1").item() == 0


def test_the_ramp_rises_to_one() -> None:
    values = [ramp_up(t / 10, 0.3) for t in range(11)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(np.exp(-5))
    assert values[3:] == [1.0] * 8


def test_gaps_and_other_splits_are_heard_as_configured(corpus: Corpus) -> None:
    """An utterance of another split between two clips: its place stays empty, or it takes part without its label."""
    split = np.random.default_rng(0).permutation(corpus.split).astype(np.int8)
    mixed = replace(corpus, split=split)
    observed = np.ones((len(mixed), 3), bool)
    labelled = split == 0
    test = split == 2
    standard = mixed.standardise(observed)
    louder = {k: x + test[:, None].astype(np.float32) for k, x in standard.features.items()}
    wrong = replace(mixed, labels=np.where(test, np.float32(3), mixed.labels))

    def predictions(config: Config, source: Corpus, features: dict, positions: bool = True) -> np.ndarray:
        numbers = source.positions if positions else source.positions * 100
        data = replace(source, features=features, clips=numbers.astype(np.int64))
        trainer = Trainer(data, observed, labelled, config)
        return trainer.predict()

    for transductive in (False, True):
        config = replace(QUICK, transductive=transductive)
        plain = predictions(config, mixed, standard.features)
        assert np.isfinite(plain).all()
        changed = plain != predictions(config, mixed, louder)
        assert changed[test].any() and changed[~test].any() == transductive
        assert np.array_equal(plain, predictions(config, wrong, standard.features))
        # Clips that are far apart do not hear each other.
        assert not np.array_equal(plain, predictions(config, mixed, standard.features, positions=False))


def test_labels_of_other_splits_train_nothing_when_they_are_heard(corpus: Corpus) -> None:
    split = np.random.default_rng(0).permutation(corpus.split).astype(np.int8)
    weights = []
    for wrong in (0.0, 2.5):
        labels = np.where(split == 2, np.float32(wrong), corpus.labels)
        mixed = replace(corpus, split=split, labels=labels)
        standard = mixed.standardise()
        observed = np.ones((len(mixed), 3), bool)
        trainer = Trainer(standard, observed, split == 0, replace(QUICK, transductive=True))
        trainer.fit()
        weights.append(_weights(trainer))
    assert torch.equal(*weights)


@pytest.mark.parametrize("method", [*RIDGES, BOOSTING])
def test_closed_forms_read_the_labels_that_the_system_reads(corpus: Corpus, method: str) -> None:
    result = run_cell(corpus, Cell(method, 0.4, 0.5, 3), QUICK)
    ours = run_cell(corpus, Cell("mean-filled MLP", 0.4, 0.5, 3), QUICK)
    assert result["missing"] == ours["missing"] and result["labels"] == ours["labels"]
    labelled, _ = label_mask(corpus, 0.5, 3)
    read = np.isin(corpus.split, (0, 1)) & (labelled | (corpus.split == 1))
    assert result["fit"]["labels"] == read.sum()
    other = replace(corpus, labels=np.where(corpus.split == 2, np.float32(1.5), corpus.labels))
    assert run_cell(other, Cell(method, 0.4, 0.5, 3), QUICK)["valid"] == result["valid"]


def test_the_blend_gives_weight_to_what_tells_and_judges_out_of_fold() -> None:
    corpus = synthetic(size=400, dims=(12, 5, 6))  # enough validation rows that noise cannot look useful by chance
    labelled = corpus.split == 0
    standard = corpus.standardise()
    design = Design.of(standard)
    truth = corpus.labels.astype(np.float64)
    right = blend(standard, design, labelled, truth)
    assert right.network == pytest.approx(1.0, abs=0.05) and np.abs(right.left_out - truth[right.rows]).mean() < 0.05
    for seed in range(3):
        noise = np.random.default_rng(seed).standard_normal(len(corpus))
        assert blend(standard, design, labelled, noise).network < 0.3
    assert right.rows.tolist() == corpus.rows("valid", labelled=True).tolist()
    value = right(design.values, truth)
    expected = right.offset + design.values @ right.coefficient.numpy() + right.network * truth
    np.testing.assert_allclose(value, expected)


@pytest.fixture
def holes(corpus: Corpus) -> Corpus:
    """Every third utterance of each part has no label."""
    labels = corpus.labels.copy()
    labels[::3] = np.nan
    return replace(corpus, labels=labels)


def test_utterances_without_a_label_train_no_loss_and_are_not_scored(holes: Corpus) -> None:
    for method in ("SSLMM", "mean-filled MLP"):
        result = run_cell(holes, Cell(method, 0.4, 1.0, 0), QUICK)
        assert result["labels"]["labels"] == len(holes.rows("train", labelled=True)) < len(holes.rows("train"))
        for part in ("valid", "test"):
            assert result[part]["n"] == len(holes.rows(part, labelled=True)) < len(holes.rows(part))
            assert np.isfinite(result[part]["mae"])


def test_no_labelled_sample_is_an_error(corpus: Corpus) -> None:
    observed, _ = missing_mask(corpus, rate=0.5)
    with pytest.raises(ValueError, match="no labelled train utterance"):
        Trainer(corpus, observed, np.zeros(len(corpus), dtype=bool), QUICK)


def test_methods_of_a_seed_share_masks_and_labels(corpus: Corpus) -> None:
    ours, mlp = (run_cell(corpus, Cell(m, 0.4, 0.5, 3), QUICK) for m in ("SSLMM", "mean-filled MLP"))
    assert ours["missing"] == mlp["missing"]
    assert ours["labels"]["sha256"] == mlp["labels"]["sha256"]
    assert ours["missing"]["realised"] == pytest.approx(0.4, abs=0.01)


@pytest.mark.slow  # starts processes
def test_processes_that_share_the_cells_give_the_same_bits(corpus: Corpus, tmp_path: Path) -> None:
    cells = [Cell(m, 0.5, 0.5, 0) for m in ("SSLMM", "mean-filled MLP", "supervised graph")]
    alone = list(Grid(corpus, QUICK, tmp_path / "a").run(cells))
    assert list(Grid(corpus, QUICK, tmp_path / "b", jobs=2).run(cells)) == alone


def test_a_grid_goes_on_where_it_stopped_and_refuses_another_run(corpus: Corpus, tmp_path: Path) -> None:
    cells = [Cell("SSLMM", 0.5, 0.5, s) for s in (0, 1)]
    whole = list(Grid(corpus, QUICK, tmp_path / "a").run(cells))
    list(Grid(corpus, QUICK, tmp_path / "b").run(cells[:1]))
    assert list(Grid(corpus, QUICK, tmp_path / "b", resume=True).run(cells)) == whole
    with pytest.raises(ValueError, match="--resume"):
        Grid(corpus, QUICK, tmp_path / "b")
    with pytest.raises(ValueError, match=r"width: 8 then, 9 now"):
        Grid(corpus, replace(QUICK, width=9), tmp_path / "b", resume=True)


ARGUMENTS = [
    "--size",
    "60",
    "--width",
    "8",
    "--steps",
    "2",
    "--pretrain-epochs",
    "1",
    "--finetune-epochs",
    "2",
    "--jobs",
    "1",
]


def test_the_command_writes_a_report_with_every_number(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    grid = ["--grid", "--rates", "0", "0.5", "--shares", "0.5", "1", "--seeds", "0", "1", "--no-progress"]
    assert main([*ARGUMENTS, *grid, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    for words in (
        "re-implemented from the paper",
        "0.802",
        "other features",
        "no pre-training",
        "zero-filled MLP",
        "ridge, sum over modalities and neighbours",
        "gradient boosting",
        "comparisons",
        "share one test part",
        "they leave gaps",
        "the graph alone",
        "Losses of the fine-tuning",
        "Over the missing rate",
        "Missing rates and labelled shares",
        "details are not public",
        "What a missing rate of 0.5 costs",
        "data:image/svg+xml",
    ):
        assert words in page
    stored = json.loads((tmp_path / "report.json").read_text())
    assert len(stored["data"]["cells"]) == (len(METHODS) + 2 * 4 - 2) * 2
    assert stored["run"]["missing"]["sha256"]
    at = {
        (c["cell"]["method"], c["cell"]["rate"], c["cell"]["seed"]): c
        for c in stored["data"]["cells"]
        if c["cell"]["share"] == 0.5
    }
    added = [at["SSLMM", 0.5, s]["test"]["mae"] - at["SSLMM", 0.0, s]["test"]["mae"] for s in (0, 1)]
    assert stored["data"]["cost_of_missing"]["SSLMM"]["mae"] == pytest.approx(added)
    assert all(cell["missing"]["kind"] == "exact" for cell in stored["data"]["cells"])
    # The sentence at the end of the run and on top of the page: the best baseline at the main point in each metric.
    mean = {
        m: np.mean([at[m, 0.5, s]["test"]["mae"] for s in (0, 1)]) for m in ("SSLMM", *BASELINES, *RIDGES, BOOSTING)
    }
    best = stored["data"]["against_best"][1]
    assert best["mean"] == pytest.approx(min(v for m, v in mean.items() if m != "SSLMM") - mean["SSLMM"])
    assert f"MAE {best['mean']:+.3f} [" in stored["headline"] and stored["headline"] in said and "report.html" in said


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--rate", "0.9"], "rate"),
        (["--share", "0"], "share"),
        (["--jobs", "-1"], "--jobs"),
        (["--seeds", "0", "0", "0"], "must differ"),
        (["--data", "nowhere.pkl"], "no such file"),
    ],
    ids=["rate", "share", "jobs", "seeds", "file"],
)
def test_bad_arguments_end_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, extra: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*ARGUMENTS, "--no-progress", "--out", str(tmp_path), *extra])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
