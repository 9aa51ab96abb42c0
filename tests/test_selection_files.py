"""The command line of selection: what it reads, what it refuses, and that nothing is lost, whatever ends it."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msacore import select
from msacore.selection import __main__ as cli
from msacore.selection import files
from msacore.selection.greedy import Cover
from tests.test_selection import draw

ROOT = Path(__file__).resolve().parent.parent
N = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "pool.npy", draw(N, 4).numpy())
    np.save(tmp_path / "u.npy", np.arange(N) / 7)
    return tmp_path


def run(folder: Path, *more: Any, pool: Any = "pool.npy", out: Any = "picks.json", budget: Any = 6) -> int:
    pools = pool if isinstance(pool, list) else [pool]
    command = [folder / one for one in pools] + ["--out", folder / out, "--quiet"]
    command += [] if budget is None else ["--budget", budget]
    command += [] if "--strategy" in more else ["--strategy", "kcenter"]
    return cli.main([str(part) for part in [*command, *more]])


def result(folder: Path, name: str = "picks.json") -> dict[str, Any]:
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    loaded: dict[str, Any] = json.loads((folder / name).read_text(), parse_constant=refuse)
    return loaded


def test_every_form_of_input_gives_the_same_picks(folder: Path) -> None:
    x, expected = draw(N, 4), select(draw(N, 4), 6, strategy="kcenter").indices.tolist()
    np.savez(folder / "one.npz", x.numpy())
    np.savez_compressed(folder / "two.npz", a=x.numpy(), b=np.zeros(3))
    torch.save(x, folder / "pool.pt")
    (folder / "parts").mkdir()
    for i, part in enumerate(x.split([10, 50])):
        np.save(folder / "parts" / f"{i}.npy", part.numpy())
    forms: list[Any] = ["pool.npy", "one.npz", "two.npz:a", "pool.pt", "parts", ["parts/0.npy", "parts/1.npy"]]
    for i, form in enumerate(forms):
        assert run(folder, pool=form, out=f"{i}.json") == 0, form
        assert result(folder, f"{i}.json")["indices"] == expected, form


def test_every_option_has_a_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, groups = draw(N, 4), np.arange(N) % 5
    np.save(folder / "groups.npy", groups)
    np.save(folder / "mask.npy", groups > 0)
    np.savez(folder / "rows.npz", c=np.arange(30), other=np.zeros(1))
    common: dict[str, Any] = {"strategy": "kcenter"}
    cases: list[tuple[list[Any], int | None, dict[str, Any]]] = [
        (["--radius", "1.5"], None, {"radius": 1.5}),
        (["--radius", "1.5"], 3, {"radius": 1.5}),
        (["--candidates", folder / "mask.npy"], 6, {"candidates": groups > 0}),
        (["--candidates", f"{folder / 'rows.npz'}:c"], 6, {"candidates": np.arange(30)}),
        (["--groups", folder / "groups.npy", "--max-per-group", 2], 6, {"groups": groups, "max_per_group": 2}),
        (["--first", 7], 6, {"first": 7}),
        (["--seed", 3, "--strategy", "kmeans++"], 6, {"seed": 3, "strategy": "kmeans++"}),
        (["--distance", "cosine", "--backend", "native"], 6, {"distance": "cosine"}),
        (
            ["--uncertainty", folder / "u.npy", "--gamma", 2, "--strategy", "uncertainty_kcenter"],
            6,
            {"uncertainty": np.arange(N) / 7, "gamma": 2, "strategy": "uncertainty_kcenter"},
        ),
        (["--option", "delta=1.5", "--strategy", "probcover"], 6, {"options": {"delta": 1.5}, "strategy": "probcover"}),
    ]
    for i, (flags, budget, given) in enumerate(cases):
        assert run(folder, *flags, out=f"{i}.json", budget=budget) == 0, (flags, capsys.readouterr().err)
        expected, got = select(x, budget, **(common | given)), result(folder, f"{i}.json")
        assert got["indices"] == expected.indices.tolist(), flags
        assert got["radius"] == expected.radius
        limited = {"candidates", "groups"} & set(given) or given.get("distance") == "cosine"
        assert got["lower_bound"] == (None if limited else expected.radius / 2)
    for bad in ([], ["--budget", "many"], ["--budget", "3", "--nonsense"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(folder / "pool.npy"), "--out", str(folder / "x.json"), *bad])
        assert ended.value.code == 2
    capsys.readouterr()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
REFUSED: dict[str, tuple[str, bytes | str, str]] = {
    "empty": ("x.npy", b"", "is empty"),
    "pointer": ("x.npy", POINTER, "Git-LFS pointer.*git lfs pull"),
    "csv": ("x.csv", "1,2\n3,4\n", r"is text \(\.csv\)"),
    "junk": ("x.npy", b"\x00\x01junk", "neither .npy nor .npz nor .pt"),
    "cut npy": ("x.npy", "cut", "cannot be read"),
    "cut zip": ("x.npz", b"PK\x03\x04broken", "cannot be read"),
    "junk pt": ("x.pt", b"\x80\x02}q\x00.", "expected one tensor, got dict|cannot be read as a tensor"),
    "text npy": ("x.npy", "strings", "expected real numbers, got dtype <U1"),
    "objects": ("x.npy", "objects", "cannot be read"),
}


@pytest.mark.parametrize("label", list(REFUSED))
@pytest.mark.parametrize("flag", ["pool", "--uncertainty", "--labeled", "--candidates", "--groups"])
def test_what_cannot_be_used_is_named_for_what_it_is(
    label: str, flag: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, words = REFUSED[label]
    path = folder / name
    if content == "cut":
        path.write_bytes((folder / "pool.npy").read_bytes()[:300])
    elif content == "strings":
        np.save(path, np.array([["a"], ["b"]]))
    elif content == "objects":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    more = [] if flag == "pool" else [flag, path]
    more += ["--max-per-group", 1] if flag == "--groups" else []
    assert run(folder, *more, pool=name if flag == "pool" else "pool.npy") == 1
    told = capsys.readouterr().err
    assert str(path) in told
    assert re.search(words, told), told
    assert "Traceback" not in told
    assert not (folder / "picks.json").exists()


def test_archives_say_what_they_hold(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(folder / "two.npz", first=np.zeros((3, 2)), second=np.zeros(3))
    torch.save({"weight": torch.ones(2, 2)}, folder / "model.pt")
    (folder / "nothing").mkdir()
    for pool, words in (
        ("two.npz", "one of first, second"),
        ("two.npz:third", "one of first, second, got third"),
        ("model.pt", "got dict with weight"),
        ("nothing", "a folder without .npy files"),
        ("absent.npy", "absent.npy"),
    ):
        assert run(folder, pool=pool) == 1
        assert words in capsys.readouterr().err


def test_messages_of_select_name_the_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = draw(N, 4).numpy()
    broken[31, 2] = np.nan
    np.save(folder / "broken.npy", broken)
    np.save(folder / "short.npy", np.ones(3))
    np.save(folder / "wide.npy", np.ones((3, 9), np.float32))
    for pool, more, words in (
        ("broken.npy", [], ["broken.npy", "row 31"]),
        (["pool.npy", "wide.npy"], [], ["wide.npy", "width"]),
        ("pool.npy", ["--uncertainty", folder / "short.npy"], ["short.npy", f"[{N}]"]),
        ("pool.npy", ["--labeled", folder / "wide.npy"], ["wide.npy", "width 4"]),
        ("short.npy", [], ["short.npy", "[N, d]"]),
    ):
        assert run(folder, *more, pool=pool) == 1
        told = capsys.readouterr().err
        assert all(word in told for word in words), told


@pytest.mark.parametrize("target", ["pool.npy", "u.npy"])
@pytest.mark.parametrize("way", ["itself", "symlink", "hard link", "relative", "its state"])
def test_an_output_that_is_an_input_is_refused_whatever_leads_to_it(
    way: str, target: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, out = (folder / target).read_bytes(), folder / target
    given = {"pool": "pool.npy", "u": "u.npy"}
    if way == "symlink":
        out = folder / "link.json"
        out.symlink_to(folder / target)
    elif way == "hard link":
        out = folder / "hard.json"
        os.link(folder / target, out)
    elif way == "relative":
        (folder / "deep").mkdir()
        monkeypatch.chdir(folder / "deep")
        out = Path("..") / target
    elif way == "its state":
        (folder / target).rename(folder / "picks.state")
        given[target.removesuffix(".npy")] = "picks.state"
        out = folder / "picks"
    command = [str(folder / given["pool"]), "--budget", "3", "--uncertainty", str(folder / given["u"])]
    assert cli.main([*command, "--out", str(out), "--quiet"]) == 1
    assert "is the input" in capsys.readouterr().err
    assert (folder / (target if way != "its state" else "picks.state")).read_bytes() == before


def test_an_output_that_could_not_be_written_is_refused_before_the_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def worked(*_: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("msacore.selection.run", worked)
    (folder / "taken").mkdir()
    (folder / "other.state").mkdir()
    os.mkfifo(folder / "pipe")
    for out, words in (
        ("taken", "is a folder"),
        ("other", "other.state is a folder"),
        ("absent/x.json", "there is no folder"),
        ("pipe", "not a regular file"),
    ):
        assert run(folder, out=out) == 1
        assert words in capsys.readouterr().err

    def denied(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "touch", denied)
    assert run(folder) == 1
    assert "cannot be written to (Permission denied)" in capsys.readouterr().err


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No file whose name contains ``name`` can be written any more."""
    original = files.write

    def write(path: Path, content: bytes) -> None:
        if name in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(files, "write", write)


def test_a_full_disk_keeps_the_last_good_state_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(folder, budget=3) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patched:
        full_disk(patched, "picks")
        assert run(folder, budget=20) == 1
    told = capsys.readouterr().err
    assert "picks.json: No space left on device" in told
    assert "the same command goes on from there" in told
    assert "Traceback" not in told
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run(folder, budget=20) == 0
    assert result(folder)["indices"] == select(draw(N, 4), 20, strategy="kcenter").indices.tolist()


def test_a_state_that_finds_no_room_does_not_end_a_long_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_CHECKPOINT_SECONDS", -1.0)
    calls = 0
    original = files.write

    def write(path: Path, content: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls < 10:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(files, "write", write)
    assert run(folder, "--strategy", "lcmd", budget=20) == 0
    assert capsys.readouterr().err.count("could not be saved") == 1
    assert len(result(folder)["indices"]) == 20


def test_real_writes_that_fail_leave_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder / "file"
    files.write(target, b"good")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:

            def fail(*_: Any) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            patched.setattr(os, name, fail)
            with pytest.raises(OSError, match=r"No space left on device: .*file"):  # a full disk itself names no file
                files.write(target, b"bad")
        assert target.read_bytes() == b"good"
        assert not list(folder.glob(".*.part"))


def test_what_killed_runs_left_is_taken_away(folder: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [f".picks.json.{gone.pid}.part", f".picks.json.state.{gone.pid}.part"]
    kept = [f".picks.json.{os.getppid()}.part", f".other.json.{gone.pid}.part", ".picks.json.x.part"]
    for name in left + kept:
        (folder / name).write_text("part")
    assert run(folder) == 0
    names = {path.name for path in folder.iterdir()}
    assert not names & set(left)
    assert set(kept) <= names


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_the_state(
    number: int, status: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = Cover.add, 0

    def add(self: Cover, centers: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            os.kill(os.getpid(), number)
        original(self, centers)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(Cover, "add", add)
        assert run(folder, "--strategy", "lcmd", budget=30) == status
    assert signal.getsignal(signal.SIGTERM) is before
    assert "the same command goes on from there" in capsys.readouterr().err
    made = torch.load(folder / "picks.json.state", weights_only=True)["indices"]
    assert 0 < len(made) < 30
    assert not (folder / "picks.json").exists()
    assert run(folder, "--strategy", "lcmd", budget=30) == 0
    assert result(folder)["indices"] == select(draw(N, 4), 30, strategy="lcmd").indices.tolist()


def test_a_stopped_run_that_cannot_save_says_so_and_keeps_the_last_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, "--strategy", "lcmd", budget=3) == 0
    before = (folder / "picks.json.state").read_bytes()
    original, calls = Cover.add, 0

    def add(self: Cover, centers: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise KeyboardInterrupt
        original(self, centers)

    with monkeypatch.context() as patched:
        patched.setattr(Cover, "add", add)
        full_disk(patched, "state")
        assert run(folder, "--strategy", "lcmd", budget=30) == 1
    assert "could not be saved" in capsys.readouterr().err
    assert (folder / "picks.json.state").read_bytes() == before


def _launch(folder: Path, *arguments: Any, processes: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    command += ["-m", "msacore.selection", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow  # starts processes that import torch
def test_two_processes_share_a_folder_and_give_the_picks_of_one(folder: Path) -> None:
    x = draw(N, 4)
    (folder / "parts").mkdir()
    for i, part in enumerate(x.split([45, 1, 14])):
        np.save(folder / "parts" / f"{i}.npy", part.numpy())
    np.save(folder / "groups.npy", np.arange(N) % 6)
    np.save(folder / "labeled.npy", np.array([3, 50]))
    given = ["--uncertainty", folder / "u.npy", "--labeled", folder / "labeled.npy", "--budget", 12, "--quiet"]
    given += ["--groups", folder / "groups.npy", "--max-per-group", 4, "--out", folder / "picks.json"]
    running = _launch(folder, folder / "parts", *given)
    told = running.communicate(timeout=180)[0]
    assert running.returncode == 0, told
    groups: dict[str, Any] = {"groups": np.arange(N) % 6, "max_per_group": 4}
    expected = select(x, 12, uncertainty=np.arange(N) / 7, labeled=[3, 50], **groups)
    got = result(folder)
    assert got["indices"] == expected.indices.tolist()
    assert got["radius"] == expected.radius
    # One process goes on from the state of two.
    given[given.index(12)] = 20
    assert cli.main([str(part) for part in [folder / "parts", *given]]) == 0
    whole = select(x, 20, uncertainty=np.arange(N) / 7, labeled=[3, 50], **groups)
    assert result(folder)["indices"] == whole.indices.tolist()


def test_threads_beside_the_main_one_may_call_the_command(folder: Path) -> None:
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(run(folder)))
    thread.start()
    thread.join(60)
    assert ended == [0]
