"""Command lines: settings files, devices, logs, TensorBoard, demos on data, one sentence for each error."""

import argparse
import builtins
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.al_hcl import __main__ as al_hcl
from examples.msa.command import check_device, parse
from examples.msa.timing import progress
from examples.sslmm import __main__ as sslmm
from tests.test_msa_data import mmsa, write

QUICK = {
    "al_hcl": "--rounds 1 --budget 3 --steps 2 --pretrain-steps 2 --width 8 --seeds 0",
    "sslmm": "--width 8 --steps 2 --pretrain-epochs 1 --finetune-epochs 2 --seeds 0 --jobs 1 --methods SSLMM",
}
SYSTEMS = {"al_hcl": al_hcl, "sslmm": sslmm}
# The first tier has only the shorter of the whole runs with their reports.
each_system = pytest.mark.parametrize("system", [pytest.param("al_hcl", marks=pytest.mark.slow), "sslmm"])


def run(system: str, *arguments: str) -> int:
    try:
        return SYSTEMS[system].main([word for a in arguments for word in a.split()])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def parsed(system: str, text: str, tmp_path: Path, *flags: str) -> argparse.Namespace:
    (tmp_path / "settings.toml").write_text(text)
    command = SYSTEMS[system].COMMANDS["run"]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    parser.add_argument("--config", type=Path)
    return parse(parser, ["--config", str(tmp_path / "settings.toml"), *flags], command.demo)


def test_settings_come_from_a_file_and_flags_win(tmp_path: Path) -> None:
    text = """
        seeds = [4, 5]
        rate = 0.3
        [data]
        size = 77
        [model]
        learning-rate = 1e-4
        teacher_passes = 5
        grid = true
        resume = false
        methods = ["SSLMM", "mean-filled MLP"]
    """
    args = parsed("sslmm", text, tmp_path, "--rate", "0.1", "--seeds", "9")
    assert (args.rate, args.seeds, args.size, args.learning_rate) == (0.1, [9], 77, 1e-4)
    assert args.teacher_passes == 5 and args.grid and not args.resume and args.methods[1] == "mean-filled MLP"
    text = "lambda = 0.2\ntier_weights = [0.1, 0.2, 0.7]\noption = ['delta=2']\nout = 'a folder'"
    args = parsed("al_hcl", text, tmp_path)
    assert args.contrast_weight == 0.2 and args.tier_weights == [0.1, 0.2, 0.7] and args.option == ["delta=2"]
    assert args.out == Path("a folder")
    assert parsed("al_hcl", text, tmp_path, "--option", "delta=3").option == ["delta=3"]
    assert parsed("al_hcl", "contrast_weight = 0.4", tmp_path).contrast_weight == 0.4


@pytest.mark.parametrize(("text", "message"), [
    ("raet = 1", r"unknown option 'raet'; did you mean 'rate'\?"),
    ("rate = 'much'", "rate = 'much': expected float"),
    ("rate = [1, 2]", "expected one value, not a list"),
    ("rate = true", "expected text or a number"),
    ("grid = 1", "expected true or false"),
    ("pattern = 'stripes'", "choose from exact, "),
    ("width = 8.5", "width = '8.5': expected int"),
    ("rate = 1\n[a]\nrate = 2", "'rate' is given twice"),
    ("rate = ", "not a TOML file"),
    ("day = 2020-01-01", "unknown option 'day'"),
    ("config = 'other.toml'", "unknown option 'config'"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused_by_file_and_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        parsed("sslmm", text, tmp_path)
    assert "settings.toml" in str(refused.value)


def test_a_run_takes_its_settings_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "s.toml").write_text(
        "size = 60\nseeds = [3]\nmethods = ['mean-filled MLP']\njobs = 1\nno_progress = true"
    )
    assert run("sslmm", f"--config {tmp_path / 's.toml'} --out {tmp_path / 'out'}") == 0
    cells = json.loads((tmp_path / "out" / "report.json").read_text())["data"]["cells"]
    assert [(c["cell"]["method"], c["cell"]["seed"]) for c in cells] == [("mean-filled MLP", 3)]
    assert run("sslmm", f"--config {tmp_path / 'none.toml'}") == 2
    assert "none.toml: there is no such file" in capsys.readouterr().err


@pytest.mark.parametrize("system", sorted(SYSTEMS))
@pytest.mark.parametrize("command", ["run", "fit", "predict", "evaluate"])
@pytest.mark.parametrize(("device", "message"), [
    ("cudaa", "torch knows no such device; give cpu, cuda or cuda:N"),
    ("meta", "msacore computes on cpu and cuda only"),
    ("cpu:3", "there is one cpu device"),
    ("cuda", "torch sees no CUDA device"),
    ("cuda:1", "torch sees no CUDA device"),
])  # fmt: skip
def test_a_device_that_cannot_be_used_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, system: str, command: str, device: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = "--model none" if command in ("predict", "evaluate") else ""
    assert run(system, f"{command} {model} --size 60 --device {device}") == 2
    error = capsys.readouterr().err
    assert error == f"{system}: --device {device}: {error.partition(f'{device}: ')[2]}" and message in error
    assert error.count("\n") == 1


def test_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == torch.device("cuda:1") and check_device("cpu:0") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"sees 2 CUDA device\(s\)"):
        check_device("cuda:2")


@each_system
def test_commands_are_named_and_run_is_the_default(system: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(system, "learn --size 60") == 2
    assert "there is no command 'learn'; the commands are run, " in capsys.readouterr().err
    for command in SYSTEMS[system].COMMANDS:
        assert run(system, f"{command} --help") == 0
        assert f"python -m examples.{system} {command}" in capsys.readouterr().out
    data = write(tmp_path, mmsa(n=(30, 10, 12)))
    reports = []
    for words in ("", "run "):
        out = tmp_path / f"out{len(words)}"
        assert run(system, f"{words}--data {data} --out {out} --no-progress {QUICK[system]}") == 0
        reports.append((out / "predictions").iterdir())
    first, second = ({f.name: f.read_text() for f in files} for files in reports)
    assert first == second and first


@pytest.mark.parametrize(("system", "lines"), [pytest.param("al_hcl", 7, marks=pytest.mark.slow), ("sslmm", 1)])
def test_a_log_has_a_line_for_everything_that_is_finished(
    system: str, lines: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = write(tmp_path, mmsa(n=(30, 10, 12)))
    assert run(system, f"--data {data} --out {tmp_path / 'out'} {QUICK[system]}") == 0
    log = capsys.readouterr().err.splitlines()
    found = [line for line in log if "seed 0" in line and "MAE" in line]
    assert len(found) == lines and f"1/{lines}: " in found[0], log


def test_lines_appear_as_soon_as_things_are_done(capsys: pytest.CaptureFixture) -> None:
    steps = progress("ab", "step", 2, describe=str.upper)
    assert next(steps) == "a"
    assert capsys.readouterr().err.startswith("step 1/2: A (")
    assert list(steps) == ["b"]


@each_system
def test_a_demo_on_data_takes_the_data_and_flags_win(system: str, tmp_path: Path) -> None:
    data = write(tmp_path, mmsa(n=(80, 12, 14)))
    quick = "--steps 2 --width 8 --no-progress --seeds 5"
    extra = {"al_hcl": "--budget 4 --pretrain-steps 2", "sslmm": "--finetune-epochs 2 --jobs 1 --methods SSLMM"}[system]
    assert run(system, f"--demo --data {data} --out {tmp_path / 'out'} {quick} {extra}") == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    arguments = content["run"]["arguments"]
    assert (
        arguments["size"] is None
        and arguments["seeds"] == [5]
        and content["run"]["corpus"]["utterances"]["train"] == 80
    )
    assert arguments["rounds"] == 2 if system == "al_hcl" else arguments["pretrain_epochs"] == 8
    assert arguments.get("finetune_epochs", 2) == 2


@pytest.mark.slow  # a whole run with its report
def test_a_demo_on_few_data_buys_what_is_there(tmp_path: Path) -> None:
    data = write(tmp_path, mmsa(n=(24, 8, 8)))
    assert (
        run(
            "al_hcl",
            f"--demo --data {data} --out {tmp_path / 'out'} --no-progress --steps 2 --pretrain-steps 2 --seeds 0",
        )
        == 0
    )
    rounds = json.loads((tmp_path / "out" / "report.json").read_text())["data"]["summary"]["AL-HCL"]["labels"]
    assert len(rounds) == 3 and rounds[-1] <= 24


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_curves_for_tensorboard_hold_the_scores(system: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("the package tensorboard is not installed")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = write(tmp_path, mmsa(n=(30, 10, 12)))
    board, out = tmp_path / "board", tmp_path / "out"
    assert run(system, f"--data {data} --out {out} --tensorboard {board} --no-progress {QUICK[system]}") == 0
    content = json.loads((out / "report.json").read_text())["data"]
    if system == "al_hcl":
        name, expected = "al-hcl-seed0", [r["test"]["mae"] for r in content["runs"]["AL-HCL"][0]["rounds"]]
    else:
        name, expected = next(board.iterdir()).name, [content["cells"][0]["test"]["mae"]]
    events = accumulator.EventAccumulator(str(board / name))
    events.Reload()
    assert [e.value for e in events.Scalars("test/mae")] == pytest.approx(expected, rel=1e-5)
    if system == "sslmm":
        assert [e.step for e in events.Scalars("finetune/supervised")] == [1, 2]


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_tensorboard_that_is_not_there_is_said_before_any_work(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "tensorboard":
            raise ImportError(name)
        return real(name, *rest)

    for name in [m for m in __import__("sys").modules if m.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(__import__("sys").modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert run(system, f"--size 60 --out {tmp_path / 'out'} --tensorboard {tmp_path / 'board'}") == 2
    assert "the package tensorboard is not installed; pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
