"""The commands of examples/README.md, in its order, on a tiny set; a person's answers are made from picks.csv."""

import csv
import re
import shlex
import time
from pathlib import Path

import numpy as np
import pytest

from examples.al_hcl.__main__ import main as al_hcl
from examples.msa.__main__ import main as msa
from examples.msa.corpus import Corpus
from examples.msa.synthetic import synthetic
from examples.sslmm.__main__ import main as sslmm

README = Path(__file__).parents[1] / "examples" / "README.md"
MAIN = {"examples.al_hcl": al_hcl, "examples.msa": msa, "examples.sslmm": sslmm}
CORPUS = synthetic(size=60, dims=(6, 4, 5))
SEQUENCES = synthetic(size=60, dims=(6, 4, 5), pooled=False, length=6)


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


def folder(path: Path, labelled: bool, lacking: str = "", corpus: Corpus = CORPUS) -> None:
    """A folder of clips as a user has them."""
    path.mkdir()
    with (path / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "video", "clip", "transcript", *(["split", "label"] if labelled else [])])
        for i, name in enumerate(corpus.utterance_ids.tolist()):
            video, clip = name.split("_")
            known = [["train", "valid", "test"][corpus.split[i]], f"{corpus.labels[i]:.1f}"] if labelled else []
            writer.writerow([name, video, int(clip), f"words of <{i}>", *known])
    for name, x in corpus.features.items():
        if name == "audio":
            (path / name).mkdir()
            for i, utterance in enumerate(corpus.utterance_ids.tolist()):
                if i % 5:
                    np.save(path / name / f"{utterance}.npy", x[i])
        elif name != lacking:
            np.save(path / f"{name}.npy", x)


def annotate(round_folder: Path, labels: Path) -> None:
    """What a person does on annotate.html: adds labels for the picks to those given before."""
    truth = dict(zip(CORPUS.utterance_ids.tolist(), CORPUS.labels.tolist(), strict=True))
    before = labels.read_text() if labels.exists() else "id,label\n"
    with (round_folder / "picks.csv").open(newline="") as file:
        labels.write_text(before + "".join(f"{r['id']},{truth[r['id']]:.1f}\n" for r in csv.DictReader(file)))


@pytest.mark.slow  # two fits and what follows them
def test_every_command_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "clips", labelled=False)
    folder(tmp_path / "labelled", labelled=True)
    folder(tmp_path / "new", labelled=False, lacking="vision")
    folder(tmp_path / "sequences", labelled=True, corpus=SEQUENCES)
    lines = commands()
    assert [(line[2].split(".")[1], line[3]) for line in lines] == [
        ("msa", "describe"),
        ("sslmm", "fit"),
        ("sslmm", "predict"),
        ("sslmm", "evaluate"),
        ("msa", "describe"),
        ("al_hcl", "pick"),
        ("al_hcl", "pick"),
        ("sslmm", "fit"),
        ("sslmm", "predict"),
        ("sslmm", "mask"),
        ("sslmm", "evaluate"),
        ("sslmm", "fit"),
        ("sslmm", "evaluate"),
    ]
    for line in lines:
        assert line[:2] == ["python", "-m"]
        begun = time.perf_counter()
        assert not MAIN[line[2]](line[3:]), line
        print(f"{time.perf_counter() - begun:.1f} s: {' '.join(line)}")
        if line[3] == "pick":
            out = tmp_path / line[line.index("--out") + 1]
            assert "words of &lt;" in (out / "annotate.html").read_text()
            annotate(out, tmp_path / "labels.csv")
    with (tmp_path / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["id"] for r in rows] == CORPUS.utterance_ids.tolist()
    assert all("vision" in r["missing"] for r in rows) and sum("audio" in r["missing"] for r in rows) == 12
    with (tmp_path / "labels.csv").open(newline="") as file:
        assert len({r["id"] for r in csv.DictReader(file)}) == 24
    with (tmp_path / "final.csv").open(newline="") as file:
        final = np.array([float(r["value"]) for r in csv.DictReader(file)])
    assert np.corrcoef(final, CORPUS.labels)[0, 1] > 0.3, "24 labels teach something"
