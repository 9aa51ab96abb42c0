"""Reports: self-contained, escaped, valid, whole or absent."""

import base64
import html.parser
import json
import os
import re

import numpy as np
import pytest
import torch

from examples.msa import files
from examples.msa.data import load
from examples.msa.headline import against_best, headline
from examples.msa.metrics import mean_interval
from examples.msa.plots import bars, curves, embedding_map, heat_map
from examples.msa.report import Report, figure_uri, format_cell, run_card, to_json, versions
from examples.msa.timing import StageTimer, progress


class Page(html.parser.HTMLParser):
    """Collects what is on a page, and checks that every tag is closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def sample_report():
    rng = np.random.default_rng(0)
    report = Report("A <title> & more", "What was run.", data={"scores": rng.random((2, 3)), "undefined": float("nan")})
    first = report.section("Curves")
    first.note("A note with <b>markup</b>.")
    first.figure(
        curves([10, 20, 40], {"active": rng.random((3, 3)), "random": rng.random((3, 3))}, "labels", "acc", True), "c"
    )
    second = report.section("Table")
    interval = mean_interval([0.1, 0.2, 0.3])
    second.table(["name", "acc", "mae"], [["x", 0.5, interval], ["y<z", float("nan"), 2]], "Scores", strong=[1])
    second.figure(heat_map(np.array([[0.1, np.nan], [0.3, 0.9]]), ["a", "b"], ["c", "d"], "rate", "share"), "h")
    second.figure(bars({"with": [1.0, 2.0], "without": [0.5, 0.7]}, "gain", reference=0.0), "b")
    second.figure(embedding_map(rng.random((40, 5)), rng.random(40), "label"), "e")
    second.figure(embedding_map(rng.random((40, 5)), np.arange(40) % 3, "round", ("seed", "1", "2")), "f")
    return report


def test_page_is_self_contained_and_escaped(tmp_path):
    report = sample_report()
    report.run = run_card(load(size=60), {"out": tmp_path, "rate": 0.5}, [0, 1], StageTimer({"train": 1.23456}))
    page_path, _ = report.write(tmp_path)
    source = page_path.read_text()
    page = Page(source)
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in page.links)
    assert not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    assert "url(" not in source and "@import" not in source
    assert "A <title> & more" in page.text and "A note with <b>markup</b>." in page.text and "y<z" in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [i["alt"] for i in images] == ["c", "h", "b", "e", "f"]
    assert all(b"<svg" in base64.b64decode(i["src"].partition(",")[2]) for i in images)
    # Links of the table of contents lead somewhere.
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {link[1:] for link in page.links if link.startswith("#")} <= ids
    assert "0.200\u00a0±\u00a00.100 [-0.048,\u00a00.448]" in page.text and "–" in page.text
    assert "train: 1.235" in "".join(page.text)


def test_json_holds_every_number_and_no_nan(tmp_path):
    report = sample_report()
    _, path = report.write(tmp_path)
    stored = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert np.allclose(stored["data"]["scores"], report.data["scores"])
    assert stored["data"]["undefined"] is None and stored["title"] == "A <title> & more"


def test_run_card_names_versions_data_and_seeds(tmp_path):
    corpus = load(size=60)
    card = json.loads(to_json(run_card(corpus, {"epochs": 3}, [4, 5], StageTimer(), stopped_early=True)))
    assert card["versions"]["torch"] == torch.__version__ and card["versions"]["numpy"] == np.__version__
    assert card["corpus"]["sha256"] == corpus.sha256 and card["corpus"]["utterances"]["train"] > 0
    assert card["seeds"] == [4, 5] and card["arguments"] == {"epochs": 3} and card["stopped_early"] is True
    assert card["peak_memory_mib"]["process"] > 10
    assert card["build"]
    assert set(versions()) >= {"python", "torch", "msacore", "sklearn", "faiss"}


def test_equal_figures_give_equal_bytes():
    def draw():
        return figure_uri(curves([1, 2], {"a": np.array([[0.1, 0.2], [0.2, 0.4]])}, "x", "y"))

    assert draw() == draw()


def test_one_run_draws_without_a_band():
    assert figure_uri(curves([1, 2], {"a": np.array([[0.1, 0.2]])}, "x", "y"))
    assert figure_uri(bars({"a": [0.1]}, "x"))


def test_cells_are_readable():
    assert format_cell(0.12345) == "0.123" and format_cell(np.float32(2)) == "2.000" and format_cell(3) == "3"
    assert format_cell(float("nan")) == format_cell(None) == "–" and format_cell(np.bool_(True)) == "yes"
    assert format_cell(mean_interval([0.25])) == "0.250"
    with pytest.raises(ValueError, match="a row has 1 cells, expected 2"):
        Report("t", "l").section("x").table(["a", "b"], [["only"]])


def test_the_best_baseline_by_hand():
    baselines = {"a": [1.5, 1.2], "b": [1.3, 1.3], "undefined": [0.1, float("nan")], "short": [0.0]}
    found = against_best("mae", [1.1, 1.0], baselines)
    # For an error, the baseline with the least mean is best: b. X is better than b by .2 and .3.
    assert (found["baseline"], found["among"], found["metric"]) == ("b", 2, "mae")
    assert found["mean"] == pytest.approx(0.25) and found["sd"] == pytest.approx(0.05 * 2**0.5)
    assert found["low"] == pytest.approx(0.25 - 12.7062 * 0.05, abs=1e-4) and not found["excludes_zero"]
    assert against_best("mae", [1.1, float("nan")], baselines) is None
    assert against_best("mae", [], {"a": []}) is None and against_best("mae", [1.0], {}) is None


def test_the_headline_says_what_the_numbers_say(tmp_path):
    apart = against_best("acc2_non0", [0.7, 0.8, 0.75], {"a": [0.5, 0.61, 0.56]})
    level = against_best("mae", [1.0, 1.2, 1.1], {"a": [1.3, 1.1, 1.2]})
    text = headline("X", "test part", [apart, level, None])
    assert "Acc-2 neg/pos +0.193 [+0.179, +0.208], which excludes zero (best: a)" in text
    assert "MAE +0.100 [-0.397, +0.597], which does not exclude zero" in text and "3 seeds" in text
    alone = headline("X", "test part", [against_best("mae", [1.0], {"a": [1.3]})])
    assert alone.endswith("1 seed and therefore no interval, positive where X is better: MAE +0.300 (best: a).")
    assert headline("X", "test part", [None]) == ""
    report = Report("t", "What was run.", headline=text)
    page_path, numbers = report.write(tmp_path)
    page = Page(page_path.read_text()).text
    assert page.index(text) < page.index("What was run.") and json.loads(numbers.read_text())["headline"] == text
    assert 'class="headline"' not in Report("t", "l").html()


def test_json_refuses_what_it_cannot_hold():
    assert json.loads(to_json({1: (np.int8(2), torch.tensor([1.5]), np.inf, True, None)})) == {
        "1": [2, [1.5], None, True, None]
    }
    with pytest.raises(TypeError, match="cannot hold a set"):
        to_json({"a": {1}})


def test_a_failed_report_leaves_the_old_one(tmp_path):
    Report("first", "lead").write(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(before) == {"report.html", "report.json"}
    with pytest.raises(TypeError):
        Report("second", "lead", data={"bad": object()}).write(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    files.write_atomic(tmp_path / "sub" / "f", "old")
    monkeypatch.setattr(files.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(tmp_path / "sub" / "f", "new")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["f"]
    assert (tmp_path / "sub" / "f").read_text() == "old"


def test_written_files_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        path = files.write_atomic(tmp_path / "f", b"x")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_timer_adds_up_also_after_an_error():
    timer = StageTimer({"train": 5.0})
    with pytest.raises(RuntimeError), timer("train"):
        raise RuntimeError
    with timer("evaluate"):
        pass
    assert timer.seconds["train"] > 5.0 and list(timer.seconds) == ["train", "evaluate"]


def test_progress_is_one_line_in_a_log_and_silent_when_hidden(capsys):
    assert list(progress(range(3), "epochs")) == [0, 1, 2]
    assert re.fullmatch(r"epochs: 3 in \d+\.\d s\n", capsys.readouterr().err)
    assert list(progress(iter("ab"), "epochs", hide=True)) == ["a", "b"]
    assert capsys.readouterr().err == ""
