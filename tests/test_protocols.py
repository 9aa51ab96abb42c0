"""Protocols: fixed and test-time patterns, masks as files, one checkpoint and one per metric, in both systems."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.al_hcl.__main__ import main as al_hcl
from examples.msa.best import EACH, ONE, BestPerMetric
from examples.msa.corpus import Corpus
from examples.msa.metrics import REPORTED, evaluate
from examples.msa.missing import missing_mask
from examples.msa.patterns import possible_rates, read_mask, write_mask
from examples.msa.synthetic import synthetic
from examples.msa.tokens import hide_tokens
from examples.sslmm.__main__ import main as sslmm
from examples.sslmm.cell import Cell, Tests, run_cell
from examples.sslmm.config import Config
from tests.test_msa_data import mmsa, write

QUICK = Config(width=8, steps=2, pretrain_epochs=1, finetune_epochs=6, teacher_passes=2, conversations=4)
FLAGS = "--width 8 --steps 2 --pretrain-epochs 1 --finetune-epochs 3 --seeds 0 --jobs 1 --no-progress"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return synthetic(size=60, dims=(12, 5, 6))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), mmsa(n=(30, 10, 12)))


def test_a_mask_comes_back_from_its_file_for_rows_in_any_order(corpus: Corpus, tmp_path: Path) -> None:
    observed, pattern = missing_mask(corpus, "closed_form", 0.4, 3)
    file = write_mask(tmp_path / "mask.json", corpus, observed, pattern)
    content = json.loads(file.read_text())
    assert {k: content[k] for k in ("kind", "rate", "seed", "sha256")} == {
        "kind": "closed_form", "rate": 0.4, "seed": 3, "sha256": pattern.sha256,
    }  # fmt: skip
    again, read = read_mask(file, corpus)
    assert np.array_equal(again, observed) and read == pattern
    other = corpus.keep_modalities(("vision", "text", "audio"))
    assert np.array_equal(read_mask(file, other)[0], observed[:, [2, 0, 1]])
    part = corpus.keep_videos(np.arange(2))
    assert np.array_equal(read_mask(file, part)[0], observed[: len(part)])


def test_masks_that_do_not_fit_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    observed, pattern = missing_mask(corpus, "exact", 0.4, 3)
    text = write_mask(tmp_path / "mask.json", corpus, observed, pattern).read_text()
    first = str(corpus.utterance_ids[0])
    flipped = f'"{first}": [{", ".join(str(1 - v) for v in observed[0].astype(int))}]'
    old = f'"{first}": [{", ".join(map(str, observed[0].astype(int)))}]'
    for changed, message in [
        (text.replace(old, flipped), "does not have the hash it states"),
        (text[:-9], "not a mask file"),
        (text.replace('"observed"', '"seen"'), "not a mask file"),
        (text.replace(old, f'"{first}": [2, 0, 1]'), "0 or 1"),
    ]:
        (tmp_path / "changed.json").write_text(changed)
        with pytest.raises(ValueError, match=message):
            read_mask(tmp_path / "changed.json", corpus)
    names = corpus.utterance_ids.copy()
    names[5] = "new_000"
    with pytest.raises(ValueError, match=r"does not list 1 utterances of .*'new_000'"):
        read_mask(tmp_path / "mask.json", replace(corpus, utterance_ids=names))
    with pytest.raises(ValueError, match=r"a mask for .*, but .* has"):
        read_mask(tmp_path / "mask.json", corpus.keep_modalities(("text",)))
    with pytest.raises(ValueError, match="calls 60 entries observed that"):
        available = np.ones((60, 3), bool)
        whole, facts = missing_mask(corpus, "exact", 0.0)
        available[:, 1] = False
        read_mask(write_mask(tmp_path / "all.json", corpus, whole, facts), replace(corpus, available=available))


def test_fixed_patterns_may_take_all_that_an_utterance_has_when_asked(corpus: Corpus) -> None:
    available = np.ones((60, 3), bool)
    available[:7, 1] = False
    some = replace(corpus, available=available)
    with pytest.raises(ValueError, match="leaves 7 utterances"):
        missing_mask(some, "fixed", keep=("audio",))
    observed, pattern = missing_mask(some, "fixed", keep=("audio",), keep_one=False)
    assert observed.sum() == 53 and observed[:, 1].sum() == 53
    assert pattern.realised == pytest.approx(1 - 53 / (180 - 7))
    assert possible_rates(corpus) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_a_cell_reads_its_mask_from_a_file_as_if_it_were_drawn(corpus: Corpus, tmp_path: Path) -> None:
    drawn = run_cell(corpus, Cell("SSLMM", 0.4, 0.5, 3), QUICK, tests=Tests(masks=tmp_path))
    file = tmp_path / "exact_missing0.4_seed3.json"
    read = run_cell(corpus, Cell("SSLMM", 0.4, 0.5, 3, "mask"), QUICK, tests=Tests(mask=read_mask(file, corpus)))
    assert read["test"] == drawn["test"] and read["missing"] == drawn["missing"]


def test_each_metric_has_its_own_best_checkpoint(corpus: Corpus) -> None:
    rng = np.random.default_rng(0)
    truth = np.clip(rng.normal(0, 1.5, 40), -3, 3)
    offers = [truth + rng.normal(0, s, 40) for s in (2.0, 0.5, 1.0)] + [3 * truth + 1, np.zeros(40)]
    best = BestPerMetric("mosi", truth)
    for i, prediction in enumerate(offers):
        best.offer(prediction, i, lambda i=i: i)
    scores = [evaluate(p, truth, "mosi") for p in offers]
    assert set(best.state["best"]) == set(REPORTED["mosi"])
    for metric, found in best.state["best"].items():
        values = [-s[metric] if metric == "mae" else s[metric] for s in scores]
        assert found["when"] == int(np.nanargmax(values)) and found["valid"] == scores[found["when"]][metric]
    assert best.state["best"]["corr"]["when"] == 3 != best.state["best"]["mae"]["when"]
    assert set(best.state["weights"]) == {b["when"] for b in best.state["best"].values()}
    tested = best.scores(lambda kept: offers[kept][:20], truth[:20])
    assert tested["corr"]["test"] == evaluate(offers[3][:20], truth[:20], "mosi")["corr"]


def test_both_kinds_of_checkpoint_agree_where_they_must(corpus: Corpus) -> None:
    result = run_cell(corpus, Cell("SSLMM", 0.3, 1.0, 0), QUICK)
    each, graph = result["test_per_metric"], result["fit"]["graph"]["valid"]
    # The single checkpoint is that of the least absolute error: for this metric both kinds are the same.
    assert each["mae"]["when"] == result["fit"]["best_epoch"]
    assert each["mae"]["test"] == pytest.approx(result["test"]["mae"], rel=1e-6)
    assert each["mae"]["valid"] == pytest.approx(graph["mae"], rel=1e-6)
    for metric, found in each.items():
        sign = -1 if metric == "mae" else 1
        assert sign * found["valid"] >= sign * graph[metric] - 1e-6


@pytest.mark.slow  # a whole run with its report
def test_a_run_reports_subsets_and_checkpoints(data: Path, tmp_path: Path) -> None:
    sslmm(f"run --data {data} --out {tmp_path} --rate 0 --share 1 --test-subsets {FLAGS}".split())
    content = json.loads((tmp_path / "report.json").read_text())["data"]
    subsets = ["text", "audio", "vision", "text+audio", "text+vision", "audio+vision", "text+audio+vision"]
    assert list(content["test_patterns"]) == ["as given", *(f"only {s}" for s in subsets)]
    for method in ("SSLMM", "mean-filled MLP", "zero-filled MLP"):
        scores = {p: v[method]["mae"]["mean"] for p, v in content["test_patterns"].items()}
        cell = next(c for c in content["cells"] if c["cell"]["method"] == method)
        assert scores["as given"] == scores["only text+audio+vision"] == pytest.approx(cell["test"]["mae"], rel=1e-6)
        # A graph that carries nothing gets no weight in SSLMM's predictions: hiding its inputs changes none.
        weights = cell["fit"].get("weights", {"graph": 1.0})
        assert len(set(scores.values())) == 7 or weights["graph"] == 0
    assert {"SSLMM", "mean-filled MLP", "zero-filled MLP"} <= set(content["checkpoints"])
    for kinds in content["checkpoints"].values():
        assert set(kinds) == {ONE, EACH} and kinds[ONE]["mae"]["mean"] == pytest.approx(kinds[EACH]["mae"]["mean"])
    page = (tmp_path / "report.html").read_text()
    assert ONE in page and EACH in page and "only audio+vision: SSLMM" in page


def test_a_fixed_pattern_hides_the_rest_in_training_too(data: Path, tmp_path: Path) -> None:
    methods = "--methods SSLMM"
    sslmm(f"run --data {data} --out {tmp_path / 'a'} --pattern fixed --keep text vision {methods} {FLAGS}".split())
    cell = json.loads((tmp_path / "a" / "report.json").read_text())["data"]["cells"][0]
    assert cell["cell"]["pattern"] == "fixed" and cell["missing"]["keep"] == ["text", "vision"]
    assert cell["missing"]["realised"] == pytest.approx(1 / 3)
    poisoned = mmsa(n=(30, 10, 12))
    for part in poisoned.values():
        part["audio"] = part["audio"] * 7 + 1
    other = write(tmp_path, poisoned)
    sslmm(f"run --data {other} --out {tmp_path / 'b'} --pattern fixed --keep text vision {methods} {FLAGS}".split())
    assert json.loads((tmp_path / "b" / "report.json").read_text())["data"]["cells"][0]["test"] == cell["test"]


@pytest.mark.parametrize(("flags", "message"), [
    ("--pattern fixed", "needs --keep with some of text, audio, vision"),
    ("--keep text", "belongs to --pattern fixed"),
    ("--pattern fixed --keep smell", "keep must name some of"),
    ("--pattern fixed --keep text --grid", "leave no room"),
    ("--mask none.json", "no such file"),
    ("--test-rates 0.9", "must lie in"),
    ("--test-mask none.json", "no such file"),
])  # fmt: skip
def test_protocols_that_contradict_themselves_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        sslmm(f"run --data {data} --out {tmp_path} {FLAGS} {flags}".split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow  # a whole run with its report
def test_al_hcl_tests_its_last_models_under_patterns_too(data: Path, tmp_path: Path) -> None:
    flags = "--seeds 0 --rounds 1 --budget 4 --steps 4 --pretrain-steps 2 --width 8 --view learned --no-progress"
    mask = tmp_path / "mask.json"
    sslmm(f"mask --data {data} --rate 0.5 --out {mask}".split())
    assert al_hcl(f"run --data {data} --out {tmp_path} --test-subsets --test-mask {mask} {flags}".split()) == 0
    content = json.loads((tmp_path / "report.json").read_text())["data"]
    last = content["runs"]["AL-HCL"][0]["rounds"][-1]
    assert last["patterns"]["as given"]["mae"] == pytest.approx(last["test"]["mae"], rel=1e-5)
    assert last["patterns"]["only text"]["mae"] != last["test"]["mae"] != last["patterns"]["mask mask"]["mae"]
    assert last["test_per_metric"]["mae"]["test"] == pytest.approx(last["test"]["mae"], rel=1e-5)
    assert set(content["checkpoints"]["AL-HCL"]) == {ONE, EACH} and "mask mask" in content["test_patterns"]


def test_hidden_tokens_are_hidden_at_their_rate_and_stay_hidden_at_higher_ones() -> None:
    corpus = synthetic(size=60, dims=(6, 5, 4), pooled=False, length=12)
    before = None
    for rate in (0.0, 0.3, 0.6, 0.9, 1.0):
        hidden, facts = hide_tokens(corpus, rate, 2)
        masks = np.concatenate(list(hidden.masks.values()), 1)
        assert facts.realised == pytest.approx(rate, abs=0.05) and facts.seed == 2
        assert np.array_equal(hidden.available, np.stack([m.any(1) for m in hidden.masks.values()], 1))
        assert before is None or not (masks & ~before).any()
        before = masks
    assert not np.array_equal(
        hide_tokens(corpus, 0.5, 1)[0].masks["text"], hide_tokens(corpus, 0.5, 2)[0].masks["text"]
    )
    # What is hidden is not read, in means as in sequences.
    hidden, _ = hide_tokens(corpus, 0.5, 1)
    poisoned = {k: np.where(hidden.masks[k][..., None], x, np.float32(np.nan)) for k, x in corpus.features.items()}
    for a, b in zip(
        hidden.pooled().features.values(), replace(hidden, features=poisoned).pooled().features.values(), strict=True
    ):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match="no tokens to hide"):
        hide_tokens(corpus.pooled(), 0.5)
    with pytest.raises(ValueError, match=r"\[0, 1\], got 2"):
        hide_tokens(corpus, 2)


@pytest.mark.parametrize("system", ["al_hcl", "sslmm"])
def test_models_are_scored_with_tokens_hidden(system: str, data: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "scores.json"
    if system == "al_hcl":
        run, fit = al_hcl, "--sequences --steps 2 --pretrain-steps 2 --width 8 --view all"
    else:
        run, fit = sslmm, "--width 8 --steps 2 --pretrain-epochs 1 --finetune-epochs 3"
    assert not run(f"fit --data {data} --out {model} {fit}".split())
    assert not run(f"evaluate --model {model} --data {data} --out {out} --test-token-rates 0 0.5 0.9".split())
    patterns = {p["name"]: p for p in json.loads(out.read_text())["patterns"]}
    assert list(patterns) == ["as given", "tokens 0", "tokens 0.5", "tokens 0.9"]
    assert patterns["tokens 0"]["scores"] == patterns["as given"]["scores"]
    maes = [p["scores"]["test"]["mae"] for p in list(patterns.values())[1:]]
    assert len(set(maes)) == 3 and patterns["tokens 0.5"]["missing"]["realised"] == pytest.approx(0.5, abs=0.08)
