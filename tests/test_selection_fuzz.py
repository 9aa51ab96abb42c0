"""Selection under attack, with fixed seeds: damaged states and inputs, writes that fail, kills at random moments."""

import errno
import itertools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msacore import select
from msacore.selection import STRATEGIES, files
from msacore.selection import __main__ as cli
from tests.test_selection import draw

ROOT = Path(__file__).resolve().parent.parent
N, BUDGET = 80, 24

# Hundreds of runs of the command, and processes that are killed, belong to the second tier.
pytestmark = pytest.mark.slow


def command(folder: Path, strategy: str, *more: Any) -> list[str]:
    given = [folder / "pool.npy", "--uncertainty", folder / "u.npy", "--out", folder / "picks.json", "--quiet"]
    given += ["--strategy", strategy, *(["--option", "delta=1.5"] if strategy == "probcover" else [])]
    return [str(part) for part in [*given, *more]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "pool.npy", draw(N, 4).numpy())
    np.save(tmp_path / "u.npy", np.random.default_rng(0).random(N))
    return tmp_path


def expected(folder: Path, strategy: str, budget: int = BUDGET) -> list[int]:
    x, u = np.load(folder / "pool.npy"), np.load(folder / "u.npy")
    options = {"delta": 1.5} if strategy == "probcover" else None
    picks: list[int] = select(x, budget, strategy=strategy, uncertainty=u, options=options).indices.tolist()
    return picks


def damaged(content: bytes, random_source: random.Random, count: int) -> Iterator[bytes]:
    """``content`` with one bit flipped, eight bytes overwritten, or the end cut off, one after another."""
    for case in range(count):
        place = random_source.randrange(len(content))
        changed = bytearray(content)
        if case % 4 == 3:
            yield content[:place]
            continue
        if case % 4 == 2:
            changed[place : place + 8] = random_source.randbytes(len(changed[place : place + 8]))
        else:
            changed[place] ^= 1 << random_source.randrange(8)
        yield bytes(changed)


@pytest.mark.parametrize("strategy", ["kcenter", "maxdet", "kmeans++"])
def test_a_damaged_state_file_is_refused_or_gives_the_same_picks(
    strategy: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(folder, strategy, "--budget", "9")) == 0
    state, whole = folder / "picks.json.state", expected(folder, strategy)
    good, refused, cases = state.read_bytes(), 0, 400
    for content in damaged(good, random.Random(strategy), cases):
        state.write_bytes(content)
        (folder / "picks.json").unlink(missing_ok=True)
        status = cli.main(command(folder, strategy, "--budget", str(BUDGET)))
        told = capsys.readouterr().err
        if status == 0:
            assert json.loads((folder / "picks.json").read_text())["indices"] == whole
        else:
            assert status == 1
            assert "picks.json.state" in told
            refused += 1
    print(f"{strategy}: {cases} damaged states, {refused} refused, {cases - refused} with the same picks")
    assert refused > cases // 2


@pytest.mark.parametrize("name", ["pool.npy", "u.npy", "two.npz", "pool.pt"])
def test_a_damaged_input_ends_in_a_sentence_or_in_picks(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x = np.load(folder / "pool.npy")
    np.savez(folder / "two.npz", x)
    torch.save(torch.from_numpy(x), folder / "pool.pt")
    good, refused, cases = (folder / name).read_bytes(), 0, 200
    for content in damaged(good, random.Random(name), cases):
        (folder / name).write_bytes(content)
        for file in ("picks.json", "picks.json.state"):
            (folder / file).unlink(missing_ok=True)
        given = command(folder, "uncertainty_kcenter", "--budget", "5")
        given[0] = str(folder / (name if name != "u.npy" else "pool.npy"))
        status = cli.main(given)
        told = capsys.readouterr().err
        assert status in (0, 1)
        if status:
            assert name in told or "expected `budget`" in told, told
            refused += 1
        else:
            assert len(json.loads((folder / "picks.json").read_text())["indices"]) == 5
    print(f"{name}: {cases} damaged inputs, {refused} refused")


class Failing:
    """Makes call number ``at`` of one step of writing fail: open, write (after half is written), fsync or replace."""

    def __init__(self, patched: pytest.MonkeyPatch, step: str, at: int) -> None:
        self.step, self.at, self.calls = step, at, 0
        open_, fsync, replace = Path.open, os.fsync, os.replace

        def opened(path: Path, mode: str = "r", *given: Any, **named: Any) -> Any:
            if "w" not in mode:
                return open_(path, mode, *given, **named)
            self.count("open")
            file: Any = open_(path, mode, *given, **named)
            return _Written(file, self) if step == "write" else file

        def counted(name: str, original: Any) -> Any:
            return lambda *given, **named: (self.count(name), original(*given, **named))[1]

        patched.setattr(Path, "open", opened)
        patched.setattr(files.os, "fsync", counted("fsync", fsync))
        patched.setattr(files.os, "replace", counted("replace", replace))

    def count(self, step: str) -> None:
        self.calls += step == self.step
        if step == self.step and self.calls == self.at:
            raise OSError(errno.EIO, "Input/output error")


class _Written:
    """An open file; a write that fails leaves the first half of its content."""

    def __init__(self, file: Any, failing: Failing) -> None:
        self._file, self._failing = file, failing

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: bytes) -> int:
        try:
            self._failing.count("write")
        except OSError:
            self._file.write(content[: len(content) // 2])
            raise
        written: int = self._file.write(content)
        return written


def test_an_error_at_any_write_keeps_the_last_good_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of open, write, flush to disk and rename fails once, at every one of its calls, with every strategy."""
    monkeypatch.setattr(cli, "_CHECKPOINT_SECONDS", -1.0)
    cases = 0
    for strategy in STRATEGIES:
        for file in ("picks.json", "picks.json.state"):
            (folder / file).unlink(missing_ok=True)
        whole = expected(folder, strategy, 6)
        for name, at in itertools.product(("open", "write", "fsync", "replace"), range(1, 12)):
            with monkeypatch.context() as patched:
                failing = Failing(patched, name, at)
                status = cli.main(command(folder, strategy, "--budget", "6"))
            cases += 1
            told = capsys.readouterr().err
            assert status == (1 if "error: " in told else 0)
            assert "Traceback" not in told
            if (folder / "picks.json.state").exists():
                made = torch.load(folder / "picks.json.state", weights_only=True)["indices"].tolist()
                assert made == whole[: len(made)]
            if (folder / "picks.json").exists():
                assert json.loads((folder / "picks.json").read_text())["indices"] == whole
            assert not list(folder.glob(".*.part"))
            if failing.calls < at:
                break
        assert failing.calls
        assert cli.main(command(folder, strategy, "--budget", "6")) == 0
        assert json.loads((folder / "picks.json").read_text())["indices"] == whole
    print(f"{cases} runs with one write that failed")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_kill_at_any_moment_loses_no_more_than_the_last_steps(strategy: str, folder: Path) -> None:
    """A process that saves after every round is killed at a random moment; the next one ends what it began."""
    source = random.Random(strategy)
    code = (
        "import sys, time; from msacore.selection import __main__ as cli; cli._CHECKPOINT_SECONDS = -1.0\n"
        "from msacore.selection.job import Job; add = Job.add\n"
        "def slow(self, *given): time.sleep(0.02); add(self, *given)\n"
        "Job.add = slow; print('begins', flush=True); sys.exit(cli.main(sys.argv[1:]))"
    )
    given = command(folder, strategy, "--budget", str(BUDGET))
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code, *given], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"begins\n"
        time.sleep(source.random() * 0.4)
        process.kill()
        process.communicate()
        if (folder / "picks.json.state").exists():
            made = torch.load(folder / "picks.json.state", weights_only=True)["indices"].tolist()
            assert made == expected(folder, strategy)[: len(made)]
    assert cli.main(given) == 0
    assert json.loads((folder / "picks.json").read_text())["indices"] == expected(folder, strategy)
    assert not list(folder.glob(".*.part"))
    print(f"{strategy}: killed twice")
