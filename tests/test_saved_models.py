"""Saved models: what was fitted predicts the same later, other data are read as they are, damage is named."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.al_hcl import __main__ as al_hcl
from examples.al_hcl.fit import open_model as open_al_hcl
from examples.msa.corpus import SPLITS, Corpus
from examples.msa.metrics import evaluate
from examples.msa.predictions import COLUMNS, write_predictions
from examples.msa.saved import calibrate, calibrated, fit_inputs, load_model, rescaled
from examples.msa.synthetic import synthetic
from examples.msa.tool import with_validation
from examples.sslmm import __main__ as sslmm
from examples.sslmm.fit import open_model as open_sslmm
from tests.test_msa_data import mmsa, write

QUICK = {
    "al_hcl": "--steps 4 --pretrain-steps 3 --width 8 --members 2 --view learned",
    "sslmm": "--width 8 --steps 2 --pretrain-epochs 1 --finetune-epochs 2",
}
OPEN = {"al_hcl": open_al_hcl, "sslmm": open_sslmm}


def run(system: str, command: str) -> int:
    try:
        return {"al_hcl": al_hcl.main, "sslmm": sslmm.main}[system](command.split())
    except SystemExit as stopped:
        return int(stopped.code or 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), mmsa(n=(40, 12, 14)))


@pytest.fixture(scope="module", params=sorted(QUICK))
def fitted(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param) / "model"
    assert run(request.param, f"fit --data {data} --out {folder} {QUICK[request.param]}") == 0
    return request.param, folder


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_saved_model_predicts_what_it_did_when_it_was_fitted(
    fitted: tuple[str, Path], data: Path, tmp_path: Path
) -> None:
    system, folder = fitted
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "predictions.csv", "weights.safetensors"]
    out = tmp_path / "predictions.csv"
    assert run(system, f"predict --model {folder} --data {data} --out {out}") == 0
    rows = table(out)
    assert tuple(rows[0]) == COLUMNS and len(rows) == 40 + 12 + 14
    assert out.read_text() == (folder / "predictions.csv").read_text()
    assert all(float(r["uncertainty"]) > 0 and np.isfinite(float(r["value"])) and r["missing"] == "" for r in rows)
    card = json.loads((folder / "model.json").read_text())
    assert card["system"] == system and len(card["data"]["sha256"]) == 64 and card["modalities"]["text"] == 7
    assert set(card["statistics"]) == {"text", "audio", "vision"} and len(card["statistics"]["audio"]["mean"]) == 5


def test_predictions_are_scored_as_the_report_of_the_fit_says(
    fitted: tuple[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    system, folder = fitted
    numbers = tmp_path / "scores.json"
    command = f"evaluate --model {folder} --data {data} --test-subsets --test-rates 0.3 --out {numbers}"
    assert run(system, command) == 0
    patterns = {p["name"]: p for p in json.loads(numbers.read_text())["patterns"]}
    names = ["only text", "only audio", "only vision", "only text+audio", "only text+vision", "only audio+vision"]
    assert list(patterns) == ["as given", *names, "only text+audio+vision", "exact 0.3"]
    card = json.loads((folder / "model.json").read_text())
    assert patterns["as given"]["scores"]["test"] == pytest.approx(card["scores"]["test"], nan_ok=True)
    assert patterns["only text+audio+vision"]["scores"] == patterns["as given"]["scores"]
    maes = {name: p["scores"]["test"]["mae"] for name, p in patterns.items() if name != "only text+audio+vision"}
    # Labels are random here: a graph that tells nothing about them has no weight, and its inputs then change no score.
    silent = system == "sslmm" and card["closed_form"]["network"] == 0
    assert len(set(maes.values())) == len(maes) or silent
    assert patterns["exact 0.3"]["missing"]["realised"] == pytest.approx(0.3, abs=0.01)
    assert "only audio+vision" in capsys.readouterr().out


def test_other_data_lack_modalities_or_have_more(fitted: tuple[str, Path], data: Path) -> None:
    system, folder = fitted
    model = load_model(folder, system)
    predict = OPEN[system](model, torch.device("cpu"))
    other = synthetic(size=40, dims=(7, 5, 6))
    full, _ = predict(fit_inputs(other, model))
    features = {"smell": other.features["text"], "audio": other.features["audio"], "text": other.features["text"]}
    changed = replace(other, features=features, available=None)
    adapted = fit_inputs(changed, model)
    assert adapted.modalities == ("text", "audio", "vision") and not adapted.available[:, 2].any()
    assert any("missing in every utterance: vision" in n for n in adapted.notes)
    assert any("not read by the model: smell" in n for n in adapted.notes)
    value, variance = predict(adapted)
    hidden = replace(other, available=np.array([[True, True, False]] * 40))
    assert np.array_equal(value, predict(fit_inputs(hidden, model))[0])
    assert np.isfinite(value).all() and np.isfinite(variance).all() and not np.array_equal(value, full)
    nothing = replace(hidden, available=np.zeros((40, 3), bool))
    assert np.isfinite(predict(fit_inputs(nothing, model))[0]).all()


def test_what_a_model_cannot_read_is_refused_with_both_sides(fitted: tuple[str, Path]) -> None:
    system, folder = fitted
    model = load_model(folder, system)
    with pytest.raises(ValueError, match=r"audio has width 9, but the model .* width 5: .*same extractor"):
        fit_inputs(synthetic(size=40, dims=(7, 9, 6)), model)
    smell = synthetic(size=40)
    with pytest.raises(ValueError, match=r"none of the modalities \['text', 'audio', 'vision'\]"):
        fit_inputs(replace(smell, features={"smell": smell.features["text"]}, available=None), model)
    with pytest.raises(ValueError, match="fitted on one vector per utterance"):
        fit_inputs(synthetic(size=40, dims=(7, 5, 6), pooled=False, length=4), model)


def test_models_that_cannot_be_opened_say_why(
    fitted: tuple[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    system, folder = fitted

    def copy(**changes: bytes) -> Path:
        target = tmp_path / "copy"
        target.mkdir(exist_ok=True)
        for file in folder.iterdir():
            (target / file.name).write_bytes(changes.get(file.stem, file.read_bytes()))
        return target

    weights, card = (folder / "weights.safetensors").read_bytes(), (folder / "model.json").read_bytes()
    flipped = bytearray(weights)
    flipped[-1] ^= 1
    other = "sslmm" if system == "al_hcl" else "al_hcl"
    assert run(system, f"predict --model {tmp_path / 'none'} --data {data} --out {tmp_path / 'p.csv'}") == 2
    assert "holds no saved model" in capsys.readouterr().err
    for changes, message in [
        ({"weights": bytes(flipped)}, "weights.safetensors: damaged"),
        ({"model": card[:-40]}, "model.json: damaged"),
        ({"model": b'{"format": 9}'}, "not a model of format"),
        ({"model": card.replace(b'"width": 8', b'"width": 9', 1)}, "card and weights do not fit together"),
        ({"model": card.replace(f'"{system}"'.encode(), f'"{other}"'.encode(), 1)}, f"fitted by {other}"),
    ]:
        assert run(system, f"predict --model {copy(**changes)} --data {data} --out {tmp_path / 'p.csv'}") == 2
        assert message in capsys.readouterr().err and not (tmp_path / "p.csv").exists()
    assert run(system, f"predict --model {folder} --data {data} --out {tmp_path}") == 2
    assert "is a folder; name a file" in capsys.readouterr().err


def test_a_model_serves_a_set_with_another_label_range(
    fitted: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    system, folder = fitted
    sims = write(tmp_path, mmsa(n=(10, 5, 8), sims=True))
    out, scores = tmp_path / "p.csv", tmp_path / "s.json"
    assert run(system, f"predict --model {folder} --data {sims} --family sims --out {out}") == 0
    assert run(system, f"evaluate --model {folder} --data {sims} --family sims --out {scores}") == 0
    assert "fitted on mosi, scored as sims" in capsys.readouterr().err
    from examples.msa.data import load

    corpus = load(sims, family="sims")
    value = np.array([float(r["value"]) for r in table(out)])
    rows = corpus.rows("test")
    expected = evaluate(value[rows] / 3, corpus.labels[rows].astype(float), "sims")
    assert json.loads(scores.read_text())["patterns"][0]["scores"]["test"]["mae"] == pytest.approx(
        expected["mae"], rel=1e-4
    )
    assert rescaled(np.array([3.0]), "mosei", "sims") == 1.0


def test_the_missing_column_names_what_was_not_there(tmp_path: Path) -> None:
    corpus = synthetic(size=30, dims=(4, 4, 4))
    available = np.ones((30, 3), bool)
    available[1] = False, True, False
    file = write_predictions(tmp_path / "p.csv", replace(corpus, available=available), np.arange(30.0))
    rows = table(file)
    assert [r["missing"] for r in rows[:3]] == ["", "text+vision", ""] and rows[2]["uncertainty"] == ""
    assert [float(r["value"]) for r in rows] == list(range(30))


def test_uncertainty_is_the_expected_error_on_the_validation_part() -> None:
    rng = np.random.default_rng(0)
    variance, error = rng.random(50), rng.standard_normal(50)
    for scale in (0.01, 100.0):
        claimed = calibrated(variance * scale, calibrate(variance * scale, error))
        assert np.mean(claimed**2) == pytest.approx(np.mean(error**2))
        assert np.array_equal(np.argsort(claimed), np.argsort(variance))
    assert np.isfinite(calibrated(np.zeros(3), calibrate(np.zeros(3), error[:3]))).all()


def without_valid(corpus: Corpus) -> Corpus:
    return replace(corpus, split=np.where(corpus.split == SPLITS["valid"], 0, corpus.split).astype(np.int8))


def test_a_validation_part_is_made_where_there_is_none() -> None:
    corpus = synthetic(size=120, dims=(4, 4, 4))
    assert with_validation(corpus) is corpus
    made = with_validation(without_valid(corpus))
    valid = made.rows("valid")
    videos = made.video_index
    assert 0.1 < len(valid) / (made.split != 2).sum() < 0.25
    assert not set(videos[valid]) & set(videos[made.rows("train")])
    assert "serve as one" in made.notes[-1]
    few = without_valid(corpus)
    labels = np.full(120, np.nan, np.float32)
    labels[few.rows("train")[:2]] = 1.0
    made = with_validation(replace(few, labels=labels))
    assert len(made.rows("valid", True)) == len(made.rows("train", True)) == 1
    labels[few.rows("train")[1]] = np.nan
    with pytest.raises(ValueError, match=r"1 labelled train utterance\(s\); training needs at least two"):
        with_validation(replace(few, labels=labels))


@pytest.mark.slow  # whole runs with their reports
def test_runs_export_their_test_predictions(tmp_path: Path, data: Path) -> None:
    assert run("sslmm", f"run --data {data} --out {tmp_path} --seeds 0 --jobs 1 --no-progress {QUICK['sslmm']}") == 0
    files = sorted((tmp_path / "predictions").iterdir())
    assert len(files) == len(sslmm.METHODS)
    ours = table(next(f for f in files if f.name.startswith("SSLMM_")))
    assert len(ours) == 14 and sum(bool(r["missing"]) for r in ours) > 0
    from examples.msa.data import load

    corpus = load(data)
    truth = {str(i): y for i, y in zip(corpus.utterance_ids, corpus.labels, strict=True)}
    error = np.mean([abs(float(r["value"]) - truth[r["id"]]) for r in ours])
    content = json.loads((tmp_path / "report.json").read_text())
    cell = next(c for c in content["data"]["cells"] if c["cell"]["method"] == "SSLMM")
    assert error == pytest.approx(cell["test"]["mae"], rel=1e-4)


@pytest.mark.slow  # a whole fit
@pytest.mark.parametrize("aligned", [True, False])
def test_models_of_sequences_read_sequences(aligned: bool, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = write(tmp_path, mmsa(n=(30, 10, 12), aligned=aligned))
    folder, out = tmp_path / "model", tmp_path / "p.csv"
    assert run("al_hcl", f"fit --data {data} --sequences --out {folder} {QUICK['al_hcl']}") == 0
    assert run("al_hcl", f"predict --model {folder} --data {data} --out {out}") == 0
    assert out.read_text() == (folder / "predictions.csv").read_text()
    model = load_model(folder, "al_hcl")
    assert model.card["sequences"] and model.card["aligned"] == aligned
    other = synthetic(size=40, dims=(7, 5, 6), pooled=False, length=9)
    part = fit_inputs(other.keep_modalities(("text", "vision")), model)
    hidden = replace(other, available=np.array([[True, False, True]] * 40))
    predict = open_al_hcl(model, torch.device("cpu"))
    value, _ = predict(part)
    assert np.array_equal(value, predict(fit_inputs(hidden, model))[0]) and np.isfinite(value).all()
    if aligned:
        with pytest.raises(ValueError, match="fitted on aligned sequences, these are not"):
            fit_inputs(replace(other, aligned=False), model)
