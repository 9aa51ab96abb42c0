"""Hidden tokens: LNLN's protocol in training and in tests, drawn and read from files, in both systems."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.al_hcl.__main__ import main as al_hcl
from examples.msa.metrics import REPORTED
from examples.msa.patterns import read_mask
from examples.msa.synthetic import synthetic
from examples.msa.tokens import hide_tokens, hide_tokens_in_training, read_token_mask, write_token_mask
from examples.sslmm.__main__ import main as sslmm
from tests.test_msa_data import mmsa, write

AL_HCL = "--sequences --steps 2 --pretrain-steps 2 --width 8 --view all"
SSLMM = "--width 8 --steps 2 --pretrain-epochs 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), mmsa(n=(30, 10, 12)))


def test_the_ends_of_a_text_stay(tmp_path: Path) -> None:
    corpus = synthetic(size=60, dims=(6, 5, 4), pooled=False, length=12)
    hidden, _ = hide_tokens(corpus, 0.9, 3, ["text"])
    before, after = corpus.masks["text"], hidden.masks["text"]
    for row, kept in zip(before, after, strict=True):
        places = np.flatnonzero(row)
        assert kept[places[0]] and kept[places[-1]]
    assert 0.3 < 1 - after.sum() / before.sum() < 0.85
    assert 1 - hidden.masks["audio"].sum() / corpus.masks["audio"].sum() > 0.85
    with pytest.raises(ValueError, match="no modality"):
        hide_tokens(corpus, 0.9, 3, ["smell"])


def test_a_token_mask_comes_back_from_its_file_whatever_the_padding_and_the_order(tmp_path: Path) -> None:
    corpus = synthetic(size=60, dims=(6, 5, 4), pooled=False, length=12)
    hidden, pattern = hide_tokens(corpus, 0.6, 3, ["text"])
    file = tmp_path / "tokens.json"
    assert write_token_mask(file, corpus, 0.6, 3, ["text"]) == pattern
    again, read = read_token_mask(file, corpus)
    assert read == pattern and all(np.array_equal(again.masks[k], m) for k, m in hidden.masks.items())
    assert np.array_equal(again.available, hidden.available)
    wider = {k: np.pad(x, ((0, 0), (3, 0), (0, 0))) for k, x in corpus.features.items()}
    front = replace(corpus, features=wider, masks={k: np.pad(m, ((0, 0), (3, 0))) for k, m in corpus.masks.items()})
    part = front.keep_modalities(("vision", "text", "audio")).keep_videos(np.arange(2))
    for name, mask in read_token_mask(file, part)[0].masks.items():
        assert np.array_equal(mask[:, 3:], hidden.masks[name][: len(part)])


def test_token_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    corpus = synthetic(size=60, dims=(6, 5, 4), pooled=False, length=12)
    file = tmp_path / "tokens.json"
    write_token_mask(file, corpus, 0.6, 3, [])
    text = file.read_text()
    with pytest.raises(ValueError, match="it hides tokens, which fit --token-mask and evaluate --test-mask read"):
        read_mask(file, corpus)
    shorter = replace(corpus, masks={k: m & (np.arange(m.shape[1]) < 2) for k, m in corpus.masks.items()})
    with pytest.raises(ValueError, match="has no token of"):
        read_token_mask(file, shorter)
    with pytest.raises(ValueError, match="no tokens to hide"):
        read_token_mask(file, corpus.pooled())
    with pytest.raises(ValueError, match="hides tokens of"):
        read_token_mask(file, corpus.keep_modalities(("text",)))
    names = corpus.utterance_ids.copy()
    names[5] = "new_000"
    with pytest.raises(ValueError, match="does not list 1 utterances"):
        read_token_mask(file, replace(corpus, utterance_ids=names))
    for changed, message in [
        (text.replace(": [[", ": [[0, 0, ", 1), "do not have the hash"),
        (text.replace(": [[", ": [[0.5, ", 1), "do not have the hash"),
        (text[:-9], "not a file of hidden tokens"),
        (text.replace('"hidden"', '"seen"'), "not a file of hidden tokens"),
    ]:
        file.write_text(changed)
        with pytest.raises(ValueError, match=message):
            read_token_mask(file, corpus)


def test_training_under_lnln_hides_other_tokens_in_every_draw_and_leaves_the_test_part_whole() -> None:
    corpus = synthetic(size=120, dims=(6, 5, 4), pooled=False, length=12)
    hidden, origin, facts = hide_tokens_in_training(corpus, 3, seed=1)
    train, valid, test = (corpus.split == s for s in (0, 1, 2))
    assert len(hidden) == len(origin) == len(corpus) + 2 * train.sum() and facts["draws"] == 3
    assert np.array_equal(hidden.labels, corpus.labels[origin], equal_nan=True)
    assert all(np.array_equal(x, corpus.features[k][origin]) for k, x in hidden.features.items())
    for name, mask in hidden.masks.items():
        first = mask[: len(corpus)]
        assert not (mask & ~corpus.masks[name][origin]).any()
        assert np.array_equal(first[test], corpus.masks[name][test])
        assert 1 - first[valid].sum() / corpus.masks[name][valid].sum() == pytest.approx(0.5, abs=0.15)
        second = mask[len(corpus) : len(corpus) + train.sum()]
        for draw in (first[train], second):
            lost = 1 - draw.sum(1) / corpus.masks[name][train].sum(1)
            # Half of them stay whole, and some of the others lose nothing either.
            assert 0.35 < (lost == 0).mean() < 0.75 and lost.max() > 0.6
        assert not np.array_equal(first[train], second)
    assert facts["realised"]["train"] == pytest.approx(0.25, abs=0.08)


@pytest.mark.parametrize("system", ["al_hcl", "sslmm"])
def test_models_are_trained_with_tokens_hidden(system: str, data: Path, tmp_path: Path) -> None:
    run, flags = (al_hcl, AL_HCL) if system == "al_hcl" else (sslmm, f"{SSLMM} --finetune-epochs 3")
    mask = tmp_path / "tokens.json"
    sslmm(f"mask --data {data} --tokens --rate 0.5 --keep-ends text --seed 4 --out {mask}".split())
    options = {"whole": "", "drawn": "--train-token-draws 2 --keep-ends text", "mask": f"--token-mask {mask}"}
    cards = {}
    for name, option in options.items():
        assert not run(f"fit --data {data} --out {tmp_path / name} {flags} {option}".split())
        cards[name] = json.loads((tmp_path / name / "model.json").read_text())
        assert len((tmp_path / name / "predictions.csv").read_text().splitlines()) == 1 + 30 + 10 + 12
    assert cards["whole"]["tokens"] is None and cards["drawn"]["tokens"]["draws"] == 2
    assert cards["mask"]["tokens"]["sha256"] == json.loads(mask.read_text())["sha256"]
    assert len({json.dumps(card["scores"]) for card in cards.values()}) == 3
    assert len({json.dumps(card["data"]) for card in cards.values()}) == 1
    out = tmp_path / "scores.json"
    rates = "--test-token-rates 0.5 --keep-ends text --seed 4"
    run(f"evaluate --model {tmp_path / 'drawn'} --data {data} --out {out} {rates} --test-mask {mask}".split())
    _, drawn, read = json.loads(out.read_text())["patterns"]
    assert read["name"] == "mask tokens" and drawn["missing"] == read["missing"] and drawn["scores"] == read["scores"]


@pytest.mark.parametrize("system", ["al_hcl", "sslmm"])
def test_a_model_for_each_metric_is_kept_where_asked(system: str, data: Path, tmp_path: Path) -> None:
    run, flags = (al_hcl, f"{AL_HCL} --steps 30") if system == "al_hcl" else (sslmm, f"{SSLMM} --finetune-epochs 6")
    assert not run(f"fit --data {data} --out {tmp_path} {flags} --each-metric".split())
    one = json.loads((tmp_path / "model.json").read_text())
    folders = sorted(p.name for p in (tmp_path / "by_metric").iterdir())
    assert folders == sorted(REPORTED["mosi"])
    cards = {name: json.loads((tmp_path / "by_metric" / name / "model.json").read_text()) for name in folders}
    assert cards["mae"]["scores"] == one["scores"]

    def judged(card: dict, name: str) -> float:
        """Score on what chose the checkpoint: labelled videos left out, or the validation part by the graph alone."""
        scores = card["scores"]["labelled videos left out"] if system == "al_hcl" else card["graph"]
        return (-1 if name == "mae" else 1) * scores[name]

    assert all(judged(card, name) >= judged(one, name) - 1e-6 for name, card in cards.items())
    out = tmp_path / "scores.json"
    model = tmp_path / "by_metric" / "corr"
    assert not run(f"evaluate --model {model} --data {data} --out {out}".split())
    found = json.loads(out.read_text())["patterns"][0]["scores"]["test"]["mae"]
    assert found == pytest.approx(cards["corr"]["scores"]["test"]["mae"], rel=1e-5)


@pytest.mark.parametrize(("flags", "message"), [
    ("--keep-ends text", "belongs to --train-token-draws"),
    ("--train-token-draws 0", "at least 1"),
    ("--train-token-draws 2 --keep-ends smell", "no modality ['smell']"),
    ("--train-token-draws 2 --token-mask none.json", "leave out --train-token-draws"),
    ("--token-mask none.json", "not a file of hidden tokens"),
])  # fmt: skip
def test_options_of_hidden_tokens_that_contradict_themselves_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        sslmm(f"fit --data {data} --out {tmp_path} {flags}".split())
    assert message in capsys.readouterr().err
