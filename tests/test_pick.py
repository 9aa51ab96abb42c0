"""Picks: from the unlabelled, with reasons; the page asks people, keeps what they say, and gives it back as a file."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.al_hcl import pick
from examples.al_hcl.__main__ import main
from examples.msa.annotate import media_link, write_page
from examples.msa.corpus import Corpus
from examples.msa.predictions import read_labels
from examples.msa.synthetic import synthetic

QUICK = "--pretrain-steps 3 --steps 4 --width 8"
HOSTILE = [
    "</script><script>document.title = 'broken in'</script>",
    '<img src="https://example.org/x.png" onerror="document.title = \'broken in\'">',
    'he said "no", then left\nand came back',
    "{{ 7 * 7 }} &amp; \u2028 ende",
]


@pytest.fixture(scope="module")
def truth() -> Corpus:
    return synthetic(size=90, dims=(10, 5, 6))


@pytest.fixture
def pool(truth: Corpus) -> Corpus:
    """Nothing is labelled; ids and transcripts are of the kinds that users may have."""
    ids = np.array([f"v{v}_{c}" for v, c in zip(truth.video_index, truth.positions, strict=True)], dtype=object)
    said = np.array([HOSTILE[i % len(HOSTILE)] for i in range(90)], dtype=object)
    ids[:4] = ["a,b_1", '"q"_2', "<b>_3", "é ü_4"]
    media = np.array([["javascript:alert(1)", "https://example.org/a.mp4", ""][i % 3] for i in range(90)], dtype=object)
    return replace(
        truth,
        utterance_ids=ids.astype(str),
        labels=np.full(90, np.nan, np.float32),
        transcripts=said,
        media=media,
    )


def run(monkeypatch: pytest.MonkeyPatch, corpus: Corpus, command: str) -> int:
    monkeypatch.setattr(pick, "load_from", lambda args: corpus)
    return main(["pick", *command.split(), *QUICK.split()])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "picks.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def give(path: Path, truth: Corpus, pool: Corpus, names: list[str], before: Path | None = None) -> Path:
    """Labels for some ids, as a person would give them."""
    label = dict(zip(pool.utterance_ids.tolist(), truth.labels.tolist(), strict=True))
    rows = [["id", "label"], *([n, f"{label[n]:.1f}"] for n in names)]
    if before:
        with before.open(newline="") as file:
            rows += list(csv.reader(file))[1:]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_rounds_of_picks_go_on_from_the_labels_file(
    monkeypatch: pytest.MonkeyPatch, truth: Corpus, pool: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, pool, f"--budget 12 --out {tmp_path / 'r1'}") == 0
    said = capsys.readouterr().err
    assert "too few to train on" in said and "a share of 0.5 is drawn at random" in said
    first = table(tmp_path / "r1")
    scores = [float(r["score"]) for r in first]
    assert scores[:6] == [0.0] * 6 and min(scores[6:]) > 0, "six are drawn, six lower the variance of the rest"
    assert tuple(first[0]) == pick.COLUMNS and len(first) == 12
    assert all(r["uncertainty"] == "" and r["nearest labelled clip"] == "" for r in first)
    split = dict(zip(pool.utterance_ids.tolist(), pool.split.tolist(), strict=True))
    assert len({split[r["id"]] for r in first}) > 1, "nothing is labelled: picks come from all parts"
    labels = give(tmp_path / "labels.csv", truth, pool, [r["id"] for r in first])
    assert run(monkeypatch, pool, f"--labels {labels} --budget 9 --out {tmp_path / 'r2'}") == 0
    assert "serve as one" not in capsys.readouterr().err
    second = table(tmp_path / "r2")
    names = {r["id"] for r in first}
    assert len(second) == 9 and not names & {r["id"] for r in second}
    assert all(float(r["uncertainty"]) > 0 and r["nearest labelled clip"] in names for r in second)
    rows = dict(zip(pool.utterance_ids.tolist(), range(90), strict=True))
    for r in second:
        assert int(r["clip"]) == pool.positions[rows[r["id"]]]
    labels = give(tmp_path / "more.csv", truth, pool, [r["id"] for r in second], labels)
    assert run(monkeypatch, pool, f"--labels {labels} --budget 200 --out {tmp_path / 'r3'}") == 0
    assert "fewer than the budget of 200" in capsys.readouterr().err
    assert len(table(tmp_path / "r3")) == 90 - 12 - 9
    again = tmp_path / "again"
    assert run(monkeypatch, pool, f"--labels {tmp_path / 'labels.csv'} --budget 9 --out {again}") == 0
    assert (again / "picks.csv").read_text() == (tmp_path / "r2" / "picks.csv").read_text()


def test_picks_of_a_partly_labelled_set_come_from_its_train_part(
    monkeypatch: pytest.MonkeyPatch, truth: Corpus, tmp_path: Path
) -> None:
    labels = truth.labels.copy()
    hidden = truth.rows("train")[20:]
    labels[hidden] = np.nan
    videos = np.array([f"v{v:04d}" for v in range(len(truth.video_ptr) - 1)], dtype=object)
    assert run(monkeypatch, replace(truth, labels=labels, videos=videos), f"--budget 7 --out {tmp_path}") == 0
    assert {r["id"] for r in table(tmp_path)} <= set(truth.utterance_ids[hidden].tolist())
    assert {r["video"] for r in table(tmp_path)} <= {f"v{v:04d}" for v in truth.video_index[hidden]}
    assert run(monkeypatch, truth, f"--out {tmp_path}") == 2


def test_the_choice_depends_on_strategy_and_labels(
    monkeypatch: pytest.MonkeyPatch, truth: Corpus, pool: Corpus, tmp_path: Path
) -> None:
    names = pool.utterance_ids[::4].tolist()
    labels = give(tmp_path / "labels.csv", truth, pool, names)
    picked = {}
    for strategy in ("topk", "kcenter", "random"):
        out = tmp_path / strategy
        assert (
            run(monkeypatch, pool, f"--labels {labels} --strategy {strategy} --explore 0 --budget 8 --out {out}") == 0
        )
        picked[strategy] = table(out)
    assert len({tuple(r["id"] for r in rows) for rows in picked.values()}) == 3
    doubts = [float(r["uncertainty"]) for r in picked["topk"]]
    assert doubts == sorted(doubts, reverse=True)
    assert set(doubts) >= {max(float(r["uncertainty"]) for rows in picked.values() for r in rows)}


@pytest.mark.parametrize(("text", "message"), [
    ("name,label\n", r"lacks the column\(s\) \['id'\]"),
    ("id,label\nnobody,1\n", "line 2: 'nobody' is not an utterance"),
    ("id,label\nv0_0,4\n", r"line 2: the label of 'v0_0' is '4', expected a number in \[-3, 3\]"),
    ("id,label\nv0_0,good\n", "is 'good', expected a number"),
    ("id,label\nv0_0,nan\n", "is 'nan', expected a number"),
    ("id,label\nv0_0,1\nv0_0,2\n", "line 3: 'v0_0' has two labels, 1 and 2"),
])  # fmt: skip
def test_a_labels_file_that_cannot_be_meant_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    corpus = synthetic(size=30, dims=(4, 4, 4))
    ids = np.array([f"v{v}_{c}" for v, c in zip(corpus.video_index, corpus.positions, strict=True)])
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "labels.csv", replace(corpus, utterance_ids=ids))


def test_a_labels_file_is_read_as_spreadsheets_write_it(tmp_path: Path) -> None:
    corpus = synthetic(size=30, dims=(4, 4, 4))
    names = corpus.utterance_ids
    (tmp_path / "labels.csv").write_bytes(
        f"\ufeffid,note,label\r\n{names[3]},,1.5\r\n{names[1]},unsure,\r\n{names[3]},,1.5\r\n".encode()
    )
    labels = read_labels(tmp_path / "labels.csv", corpus)
    assert labels[3] == 1.5 and np.isnan(np.delete(labels, 3)).all()


def test_links_of_the_page_open_recordings_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a b.mp4").touch()
    assert media_link("a b.mp4", tmp_path) == (tmp_path / "a b.mp4").as_uri()
    assert media_link("other.mp4", tmp_path) == "other.mp4"
    for script in ("javascript:alert(1)", " JavaScript:alert(1)", "data:text/html,x", "vbscript:x", "java\nscript:x"):
        assert media_link(script, tmp_path) == "" or ":" not in media_link(script, tmp_path)


def browser() -> str:
    found = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if found is None:
        pytest.skip("NO CHROMIUM: the annotation page was not clicked through (apt-get install chromium)")
    return found


@pytest.mark.slow  # starts a browser
def test_a_person_labels_clips_in_a_browser(
    monkeypatch: pytest.MonkeyPatch, truth: Corpus, pool: Corpus, tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright drives the browser")
    executable = browser()
    before = give(tmp_path / "before.csv", truth, pool, pool.utterance_ids[4:7].tolist())
    page_file = write_page(
        tmp_path / "annotate.html", pool, list(range(4)), {n: float(v) for n, v in list(csv.reader(before.open()))[1:]}
    )
    requests: list[str] = []
    with playwright.sync_playwright() as control:
        chromium = control.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=executable, args=["--no-sandbox"], accept_downloads=True
        )
        page = chromium.pages[0]
        page.on("request", lambda request: requests.append(request.url))
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.goto(page_file.as_uri())
        assert page.title() == "4 clips of synthetic MOSI"
        assert page.locator("blockquote").all_text_contents() == HOSTILE
        heads = page.locator(".clip h2").all_text_contents()
        assert [h.split(" · ")[0] for h in heads] == ["1. a,b_1", '2. "q"_2', "3. <b>_3", "4. é ü_4"]
        assert page.locator("a").count() == 1 and page.locator("img").count() == 0
        done = page.locator("#done")
        assert done.text_content() == "0 of 4 labelled"
        # The first by keys: three steps up from 0; the second by its digit; the third with the slider, by the mouse.
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.keyboard.press("7")
        page.keyboard.press("ArrowDown")
        box = page.locator("input").nth(2).bounding_box()
        page.mouse.click(box["x"] + 2, box["y"] + box["height"] / 2)
        assert done.text_content() == "3 of 4 labelled"
        assert page.locator("output").all_text_contents() == ["0.3", "3.0", "-3.0", "no label yet"]
        page.reload()
        assert done.text_content() == "3 of 4 labelled", "progress is kept in the browser"
        assert page.locator("output").all_text_contents() == ["0.3", "3.0", "-3.0", "no label yet"]
        page.keyboard.press("Enter")
        page.locator(".clip button").nth(1).click()
        assert done.text_content() == "3 of 4 labelled"
        with page.expect_download() as waiting:
            page.locator("#download").click()
        labels = tmp_path / "labels.csv"
        waiting.value.save_as(labels)
        assert waiting.value.suggested_filename == "labels.csv"
        chromium.close()
    assert problems == []
    assert {url for url in requests if not url.startswith("blob:")} == {page_file.as_uri()}
    found = read_labels(labels, pool)
    assert found[[0, 2, 3]].tolist() == pytest.approx([0.3, -3.0, 0.0]) and np.isnan(found[1])
    assert found[4:7] == pytest.approx(truth.labels[4:7], abs=0.051) and np.isnan(found[7:]).all()
    assert run(monkeypatch, pool, f"--labels {labels} --budget 5 --out {tmp_path / 'next'}") == 0
    assert not {r["id"] for r in table(tmp_path / "next")} & set(pool.utterance_ids[np.isfinite(found)].tolist())


def test_the_page_is_self_contained_and_escaped(pool: Corpus, tmp_path: Path) -> None:
    page = write_page(tmp_path / "a.html", pool, list(range(8)), {"x</script>": 1.0}).read_text()
    assert page.count("<script") == page.count("</script>") == 2 and "<img" not in page
    assert "default-src 'none'" in page and "&lt;img src=" in page and "javascript:" in page
    assert 'href="javascript' not in page and page.count('href="https://example.org/a.mp4"') == 3
    text = page.split('id="round">')[1].split("</script>")[0]
    facts = json.loads(text)
    assert facts["known"] == [["x</script>", 1.0]] and facts["ids"][2] == "<b>_3" and "<" not in text
