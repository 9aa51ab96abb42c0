"""AL-HCL's report: every number, the page in a browser, the metrics of each set."""

import json
import shutil
import subprocess

import numpy as np
import pytest

from examples.al_hcl.__main__ import main
from examples.al_hcl.arms import REFERENCE
from tests.test_al_hcl import one_thread  # noqa: F401
from tests.test_msa_data import mmsa, write


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("al_hcl")
    options = (
        "--size 90 --seeds 0 1 --rounds 2 --budget 3 --steps 4 --pretrain-steps 3 --width 8 --ablate "
        "--sweep-lambda .05 --no-progress"
    )
    assert main([*options.split(), "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow  # its run trains every arm
def test_report_holds_every_number(report):
    content = json.loads((report / "report.json").read_text())
    summary, runs = content["data"]["summary"], content["data"]["runs"]
    assert {
        "AL-HCL",
        "random selection",
        "ridge that buys by margin",
        "all labels",
        "without tier 3",
        "uncertainty only",
        "λ = 0.05",
    } <= set(summary)
    first = runs["AL-HCL"][0]["rounds"]
    areas = [np.trapezoid([r["test"]["acc2_has0"] for r in run["rounds"]]) / 2 for run in runs["AL-HCL"]]
    assert summary["AL-HCL"]["area"]["acc2_has0"]["mean"] == pytest.approx(np.mean(areas))
    assert [r["labels"] for r in first] == summary["AL-HCL"]["labels"]
    assert all(len(r["picks"]) == 3 for r in first[:-1])
    baselines = content["data"]["baselines"]
    assert set(baselines) == {"AL-HCL", "random selection", "ridge that buys by margin"}
    for buyer, found in baselines.items():
        runs_of = [run["rounds"] for run in runs[buyer]]
        for name, scores in found.items():
            maes = [np.trapezoid([r["baselines"][name]["mae"] for r in rounds]) / 2 for rounds in runs_of]
            assert scores["mae"]["area"]["mean"] == pytest.approx(np.mean(maes))
            ahead = np.mean(maes) - summary["AL-HCL"]["area"]["mae"]["mean"]
            assert scores["mae"]["reference_minus"]["mean"] == pytest.approx(ahead)
    accuracies = {
        (buyer, name): np.mean(
            [np.trapezoid([r["baselines"][name]["acc2_has0"] for r in run["rounds"]]) / 2 for run in runs[buyer]]
        )
        for buyer, found in baselines.items()
        for name in found
    }
    best = content["data"]["against_best"][0]
    assert best["mean"] == pytest.approx(np.mean(areas) - max(accuracies.values()))
    assert best["among"] == len(accuracies) and f"Acc-2 has0 {best['mean']:+.3f} [" in content["headline"]
    assert content["data"]["labels_given"] == 0 and np.isfinite(content["data"]["gradient_boosting"]["mae"])
    card = content["run"]
    assert len(card["corpus"]["sha256"]) == 64 and card["seeds"] == [0, 1] and card["seconds"]["experiment"] > 0
    page = (report / "report.html").read_text()
    assert "<script" not in page and 'src="http' not in page
    for text in (
        "Learning curves",
        "without matrix fusion",
        "text and neighbours",
        "comparisons",
        "share one test part",
        "Acc-2 neg/pos",
        "none of the validation part",
        "network (share of its correction)",
        "first picks",
        first[0]["picks"][0]["id"],
    ):
        assert text in page
    assert sorted(p.name for p in report.iterdir()) == [
        "checkpoints",
        "predictions",
        "report.html",
        "report.json",
    ]


@pytest.mark.slow  # as above
def test_report_in_a_browser(report, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no headless Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400"]
    page = (report / "report.html").as_uri()
    dom = subprocess.run([*command, "--dump-dom", page], capture_output=True, text=True, timeout=60).stdout
    assert "AL-HCL on synthetic MOSI" in dom and "Run card" in dom and dom.count("<figure>") >= 10
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page], capture_output=True, timeout=60, check=True)
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1400, 1000)
    assert (pixels < 0.5).any(-1).mean() > 0.002 and pixels.std() > 0.02


@pytest.mark.slow  # two whole runs with their reports
@pytest.mark.parametrize(("aligned", "family", "metrics"), [
    (True, "sims", {"acc2", "acc2_non0", "f1", "acc5", "acc3", "mae", "corr"}),
    (False, "mosi", {"acc2_has0", "acc2_non0", "f1_has0", "f1_non0", "acc7", "mae", "corr"}),
])  # fmt: skip
def test_mmsa_pickles_run_to_the_report_in_the_metrics_of_their_set(tmp_path, aligned, family, metrics):
    path = write(tmp_path, mmsa(n=(40, 12, 12), aligned=aligned, sims=family == "sims"))
    options = "--sequences --seeds 0 1 --rounds 1 --budget 4 --steps 2 --pretrain-steps 2 --width 8 --no-progress"
    out = tmp_path / "out"
    assert main(["--data", str(path), "--family", family, "--out", str(out), *options.split()]) == 0
    content = json.loads((out / "report.json").read_text())
    assert set(content["data"]["summary"][REFERENCE]["area"]) == metrics
