"""Selection: seeds, first picks, forms of a pool, budgets, errors, progress and the command line."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import msacore
from msacore import select
from msacore.selection import STRATEGIES
from msacore.selection import __main__ as cli
from msacore.selection.greedy import Cover
from tests.selection_reference import Plain
from tests.test_selection import arguments, draw, every_distance, every_strategy, pool_of

ROOT = Path(__file__).resolve().parent.parent


def test_random_and_sampling_follow_the_seed() -> None:
    x = pool_of("gaussian", 500)
    for strategy in ("random", "kmeans++"):
        first, same, other = (select(x, 30, strategy=strategy, seed=s).indices for s in (1, 1, 2))
        assert first.equal(same)
        assert not first.equal(other)
    picks = torch.cat([select(x[:20], 5, strategy="random", seed=s).indices for s in range(400)])
    counts = torch.bincount(picks, minlength=20)
    assert counts.min() > 60
    assert counts.max() < 140


def test_first_picks_and_their_scores() -> None:
    x, u = pool_of("gaussian"), torch.rand(160, generator=torch.Generator().manual_seed(3))
    farthest = int((x.double() - x.double().mean(0)).norm(dim=1).argmax())
    for strategy, expected in {
        "kcenter": farthest,
        **dict.fromkeys(("uncertainty_kcenter", "mmr", "prefilter"), int(u.argmax())),
        **dict.fromkeys(("lcmd", "maxdet", "kmeans++"), int(x.norm(dim=1).argmax())),
    }.items():
        got = select(x, 3, uncertainty=u, strategy=strategy)
        assert got.indices[0] == expected, strategy
        assert got.scores.isinf().tolist() == [True, False, False]
        assert select(x, 3, uncertainty=u, strategy=strategy, labeled=[5]).scores.isfinite().all()


def test_constant_uncertainty_gives_plain_kcenter_weights_and_gamma_sharpens() -> None:
    x = pool_of("gaussian")
    flat = select(x, 20, uncertainty=torch.full((160,), 0.3), labeled=[0])
    assert flat.indices.equal(select(x, 20, strategy="kcenter", labeled=[0]).indices)
    u = torch.rand(160, generator=torch.Generator().manual_seed(3))
    for gamma in (0.0, 0.5, 4):
        got = select(x, 20, uncertainty=u, gamma=gamma)
        assert got.indices.tolist() == Plain(x, 20, u, None, "euclidean").uncertainty_kcenter(gamma)


def test_labelled_samples_count_when_uncertainty_is_scaled() -> None:
    x, u = pool_of("gaussian"), torch.rand(160, generator=torch.Generator().manual_seed(6))
    u[7] = 50.0
    got = select(x, 30, uncertainty=u, labeled=[7])
    assert got.indices.tolist() == Plain(x, 30, u, [7], "euclidean").uncertainty_kcenter()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@every_distance
def test_every_dtype_is_decided_on_its_stored_values(dtype: torch.dtype, distance: str) -> None:
    x = pool_of("gaussian", 300, 17).to(dtype)
    got = select(x, 50, strategy="kcenter", distance=distance)
    assert got.indices.tolist() == Plain(x, 50, None, None, distance).kcenter()


@pytest.mark.parametrize("magnitude", [1e-120, 1e-20, 1e20, 1e120])
def test_extreme_magnitudes(magnitude: float) -> None:
    x = pool_of("gaussian", 300).double() * magnitude
    assert select(x, 40, strategy="kcenter").indices.tolist() == Plain(x, 40, None, None, "euclidean").kcenter()


def test_forms_of_a_pool_are_equivalent(tmp_path: Path) -> None:
    x = pool_of("gaussian", 400, 12)
    np.save(tmp_path / "pool.npy", x.numpy())
    np.save(tmp_path / "fortran.npy", np.asfortranarray(x.numpy()))
    wide = torch.zeros(400, 30)
    wide[:, 3:15] = x
    forms = {
        "numpy": x.numpy(),
        "strided": wide[:, 3:15],
        "transposed": x.T.contiguous().T,
        "reversed": np.ascontiguousarray(x.numpy()[::-1])[::-1],
        "big-endian": x.numpy().astype(">f4"),
        "memmap": np.load(tmp_path / "pool.npy", mmap_mode="r"),
        "fortran memmap": np.load(tmp_path / "fortran.npy", mmap_mode="r"),
        "requires grad": x.clone().requires_grad_(),
    }
    for strategy in STRATEGIES:
        expected = select(x, 30, uncertainty=np.arange(400), **arguments(strategy))
        for name, form in forms.items():
            got = select(form, 30, uncertainty=torch.arange(400), **arguments(strategy))
            assert got.indices.equal(expected.indices), (strategy, name)
            resumed = select(form, 30, uncertainty=np.arange(400), state=expected.state, **arguments(strategy))
            assert resumed.radius == expected.radius, (strategy, name)
    whole = np.arange(60).reshape(20, 3)
    assert select(whole, 5, strategy="kcenter").indices.equal(select(whole * 1.0, 5, strategy="kcenter").indices)


@every_strategy
def test_work_cut_small_gives_the_same_picks(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, u, known = pool_of("clustered", 400, 12), np.arange(400), draw(70, 12, seed=2)
    expected = select(x, 30, uncertainty=u, labeled=known, **arguments(strategy))
    monkeypatch.setattr("msacore.selection.pool._PAIRS", 1000)  # far fewer than 400 · 70
    got = select(x, 30, uncertainty=u, labeled=known, **arguments(strategy))
    assert got.indices.equal(expected.indices)
    assert got.radius == expected.radius


def test_a_chunked_pool_gives_the_same_picks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msacore.selection import pool as pool_module

    monkeypatch.setattr(pool_module, "_CHUNK_BYTES", 37 * 12 * 4)
    x = pool_of("clustered", 400, 12)
    np.save(tmp_path / "pool.npy", x.numpy())
    mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    for strategy in STRATEGIES:
        got = select(mapped, 30, uncertainty=np.arange(400), **arguments(strategy))
        expected = select(x, 30, uncertainty=np.arange(400), **arguments(strategy))
        assert got.indices.equal(expected.indices), strategy
        assert got.radius == expected.radius
    broken = x.numpy().copy()
    broken[361, 4] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    with pytest.raises(ValueError, match="first in row 361"):
        select(np.load(tmp_path / "broken.npy", mmap_mode="r"), 3, strategy="random")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on data pages is Linux's")
def test_a_pool_of_eight_times_the_allowed_memory(tmp_path: Path) -> None:
    code = f"""
        import mmap, resource, sys
        import numpy as np, torch
        from msacore import select
        n, d = 65536, 512
        path = {str(tmp_path / "pool.npy")!r}
        pool = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(n, d))
        for begin in range(0, n, 4096):
            pool[begin : begin + 4096] = torch.randn(4096, d, generator=torch.Generator().manual_seed(begin))
        pool.flush()
        small = np.random.default_rng(0).random((2000, 16), dtype=np.float32)
        select(small, 40, strategy="kcenter")  # threads and libraries are there before the limit is set
        used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
        allowed = n * d * 4 // 8
        resource.setrlimit(resource.RLIMIT_DATA, (used + allowed, used + allowed))
        del pool
        try:
            # Asked of the kernel itself: an allocator may serve an array from what it has kept.
            mmap.mmap(-1, n * d * 4 // 4, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            sys.exit("the limit does not hold")
        except OSError:
            pass
        got = select(np.load(path, mmap_mode="r"), 20, strategy="kcenter")
        print(*got.indices.tolist())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Large arrays get pages of their own, which go back to the system when freed: nothing is kept for later arrays.
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    expected = select(np.load(tmp_path / "pool.npy"), 20, strategy="kcenter").indices
    assert [int(i) for i in done.stdout.split()] == expected.tolist()


@every_strategy
def test_budgets_nothing_everything_and_too_much(strategy: str) -> None:
    x, u = pool_of("duplicated", 40), torch.rand(40)
    given_arguments = arguments(strategy) | {"uncertainty": u}
    nothing = select(x, 0, **given_arguments)
    assert nothing.indices.shape == nothing.scores.shape == (0,)
    assert nothing.indices.dtype == torch.int64
    assert nothing.radius == float("inf")
    everything = select(x, 40, **given_arguments)
    assert sorted(everything.indices.tolist()) == list(range(40))
    assert everything.radius == 0
    assert select(x, 0, labeled=range(40), **given_arguments).radius == 0
    for budget, known in ((41, None), (40, [0])):
        with pytest.raises(ValueError, match=f"`budget`.*at most the {40 - len(known or [])} .*got {budget}"):
            select(x, budget, labeled=known, **given_arguments)
    assert len(select(x[:0], 0, **given_arguments | {"uncertainty": u[:0]}).indices) == 0


def test_radius_bounds_the_optimum() -> None:
    x = pool_of("gaussian", 14, 2)
    got = select(x, 3, strategy="kcenter")
    from itertools import combinations

    all_distances = torch.cdist(x.double(), x.double())
    optimum = min(float(all_distances[:, list(c)].amin(1).max()) for c in combinations(range(14), 3))
    assert got.lower_bound <= optimum <= got.radius


BAD = {
    "strategy": ({"strategy": "best"}, "`strategy`.*kcenter.*'best'"),
    "distance": ({"distance": "l1"}, "`distance`.*cosine.*'l1'"),
    "backend": ({"backend": "gpu"}, "`backend`.*faiss.*'gpu'"),
    "negative budget": ({"budget": -1}, "`budget`.*-1"),
    "budget no integer": ({"budget": 2.0}, "`budget`.*2.0"),
    "one dimension": ({"embeddings": torch.ones(4)}, r"`embeddings`.*\[N, d\].*\[4\]"),
    "complex pool": ({"embeddings": torch.ones(4, 2, dtype=torch.complex64)}, "`embeddings`.*complex64"),
    "text pool": ({"embeddings": np.array([["a"]])}, "`embeddings`.*real numbers"),
    "nan": ({"embeddings": torch.tensor([[1.0], [2.0], [float("nan")]])}, "`embeddings`.*row 2"),
    "inf": ({"embeddings": torch.tensor([[1.0], [-float("inf")], [float("nan")]])}, "`embeddings`.*row 1"),
    "overflow": ({"embeddings": torch.full((3, 1), 1e300, dtype=torch.float64)}, "`embeddings`.*overflow"),
    "no uncertainty": ({"uncertainty": None}, "uncertainty_kcenter.*`uncertainty`"),
    "short uncertainty": ({"uncertainty": torch.ones(3)}, r"`uncertainty`.*\[8\].*\[3\]"),
    "negative uncertainty": ({"uncertainty": torch.arange(8) - 2}, "`uncertainty`.*negative.*row 0"),
    "nan uncertainty": ({"uncertainty": torch.tensor([0, 0, 0, float("nan"), 0, 0, 0, 0])}, "`uncertainty`.*row 3"),
    "label outside": ({"labeled": [0, 8]}, r"`labeled`.*\[0, N = 8\).*8"),
    "negative label": ({"labeled": [-1]}, "`labeled`.*-1"),
    "label mask": ({"labeled": torch.ones(8).bool()}, "`labeled`.*bool"),
    "label width": ({"labeled": torch.ones(2, 5)}, r"`labeled`.*\[2, 5\]"),
    "label nan": ({"labeled": torch.full((2, 3), float("nan"))}, "`labeled`.*row 0"),
    "unknown option": ({"options": {"deltas": 1}}, "unknown option `deltas`.*mmr_weight"),
    "option range": ({"options": {"mmr_weight": 1.5}}, r"`mmr_weight`.*\[0, 1\].*1.5"),
    "no delta": ({"strategy": "probcover"}, "probcover.*delta"),
    "gamma": ({"gamma": -1}, "`gamma`.*-1"),
    "seed": ({"seed": 1.5}, "`seed`.*integer.*1.5"),
    "large seed": ({"seed": 2**64}, "`seed`.*64-bit"),
    "label overflow": ({"labeled": torch.full((1, 3), 1e300, dtype=torch.float64)}, "`labeled`.*overflow"),
}


@pytest.mark.parametrize("label", list(BAD))
def test_bad_arguments_are_named(label: str) -> None:
    change, words = BAD[label]
    good: dict[str, Any] = {"embeddings": draw(8, 3), "budget": 2, "uncertainty": torch.rand(8)}
    with pytest.raises(ValueError, match=f"select: .*{words}"):
        select(**good | change)


def test_progress_bar_shows_the_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    select(pool_of("gaussian"), 30, strategy="lcmd", progress=True)
    shown = capsys.readouterr().err
    assert "lcmd: 100%" in shown
    assert "30/30" in shown
    select(pool_of("gaussian"), 30, strategy="lcmd")
    assert capsys.readouterr().err == ""


@every_strategy
def test_long_steps_without_a_pick_give_a_sign_of_life(
    strategy: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msacore.selection._NOTE_SECONDS", 0.0)
    select(pool_of("gaussian"), 5, uncertainty=torch.rand(160), progress=True, **arguments(strategy))
    shown = capsys.readouterr().err
    assert "checking row 0 of 160" in shown
    said = {
        "typiclust": ("seed 1 of 5", "pass 1 over 5", "neighbours in cluster 1"),
        "probcover": ("comparing sample",),
    }
    for words in said.get(strategy, ()):
        assert words in shown
    assert "checking" not in shown.rsplit("\r", 1)[-1]  # the message disappears with the next pick


def _command(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "msacore.selection", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_the_command_line_selects_resumes_and_writes_whole_files(tmp_path: Path) -> None:
    x, u = pool_of("gaussian", 500), torch.rand(500)
    for name, value in {"pool": x.numpy(), "u": u.numpy(), "labeled": np.array([4, 9])}.items():
        np.save(tmp_path / f"{name}.npy", value)
    out = tmp_path / "picks.json"
    common = [tmp_path / "pool.npy", "--uncertainty", tmp_path / "u.npy", "--labeled", tmp_path / "labeled.npy"]
    for budget in (7, 20):
        done = _command(*common, "--budget", budget, "--out", out)
        assert done.returncode == 0, done.stderr
        assert f"{budget}/{budget}" in done.stderr
        expected = select(x, budget, uncertainty=u, labeled=[4, 9])
        result = json.loads(out.read_text())
        assert result["indices"] == expected.indices.tolist()
        assert result["radius"] == expected.radius
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "labeled.npy",
        "picks.json",
        "picks.json.state",
        "pool.npy",
        "u.npy",
    ]

    before = out.read_text()
    done = _command(*common, "--budget", 30, "--out", out, "--strategy", "kcenter")
    assert done.returncode == 1
    assert "another `strategy`" in done.stderr
    assert "picks.json.state" in done.stderr
    assert "Traceback" not in done.stderr
    assert out.read_text() == before
    done = _command(tmp_path / "absent.npy", "--budget", 3, "--out", tmp_path / "x.json")
    assert done.returncode == 1
    assert "absent.npy" in done.stderr
    assert not (tmp_path / "x.json").exists()


def test_the_command_line_says_what_it_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "pool.npy", pool_of("gaussian").numpy())
    (tmp_path / "picks.json.state").write_bytes(b"no state")
    for out, words in (("absent/picks.json", "there is no folder"), ("picks.json", "picks.json.state cannot be read")):
        command = [tmp_path / "pool.npy", "--budget", 3, "--strategy", "kcenter", "--out", tmp_path / out]
        assert cli.main([str(part) for part in command]) == 1
        assert words in capsys.readouterr().err
        assert not (tmp_path / out).exists()


def test_a_crash_costs_no_more_than_what_came_after_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "pool.npy", pool_of("gaussian", 300).numpy())
    command = [tmp_path / "pool.npy", "--budget", 30, "--strategy", "lcmd", "--out", tmp_path / "picks.json", "--quiet"]
    command = [str(part) for part in command]

    def crash(*_: Any) -> float:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(cli, "_CHECKPOINT_SECONDS", 0.0)
        patched.setattr(Cover, "radius", crash)
        with pytest.raises(RuntimeError, match="out of luck"):
            cli.main(command)
    made = torch.load(tmp_path / "picks.json.state", weights_only=True)["indices"]
    assert len(made) == 30
    assert cli.main(command) == 0
    assert json.loads((tmp_path / "picks.json").read_text())["indices"] == made.tolist()
    assert made.equal(select(np.load(tmp_path / "pool.npy"), 30, strategy="lcmd").indices)


def test_the_command_line_reports_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "pool.npy", pool_of("gaussian").numpy())

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    command = [str(tmp_path / "pool.npy"), "--budget", "3", "--strategy", "kcenter", "--out", str(tmp_path / "picks")]
    assert cli.main(command) == 1
    printed = capsys.readouterr().err
    assert re.search(rf"error: {re.escape(str(tmp_path / 'picks'))}\S*: no space left", printed), printed
    assert [path.name for path in tmp_path.iterdir()] == ["pool.npy"]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.slow  # 1,500 picks of a slow strategy
def test_the_command_line_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    np.save(tmp_path / "pool.npy", pool_of("gaussian", 2000, 8).numpy())
    given = [str(tmp_path / "pool.npy"), "--strategy", "lcmd", "--budget", "1500"]
    given += ["--out", str(tmp_path / "picks.json")]
    command = [sys.executable, "-m", "msacore.selection", *given]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    shown = ""
    while not re.search(r"[1-9]\d*/1500", shown):
        piece = process.stderr.read(40)
        assert piece, shown
        shown += piece
    process.send_signal(signal.SIGINT)
    rest = process.communicate()[1]
    assert process.returncode == 130, rest
    assert "the same command goes on from there" in rest
    assert not (tmp_path / "picks.json").exists()
    made = torch.load(tmp_path / "picks.json.state", weights_only=True)["indices"]
    assert 0 < len(made) < 1500
    assert cli.main([*given, "--quiet"]) == 0
    picks = json.loads((tmp_path / "picks.json").read_text())["indices"]
    assert picks[: len(made)] == made.tolist()
    assert picks == select(np.load(tmp_path / "pool.npy"), 1500, strategy="lcmd").indices.tolist()


def test_select_is_a_typed_public_function() -> None:
    assert "select" in msacore.__all__ and msacore.select is select
