"""Checkpoints: runs resume bit by bit; differences and damage are refused."""

import errno
import os
import pickle
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.msa.checkpoint import load_checkpoint, save_checkpoint, seed_everything

ARGUMENTS = {"epochs": 4, "rate": 0.5, "out": Path("runs"), "tiers": [0.2, 0.3, 0.5]}


@pytest.fixture(autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


def train(steps, path=None, resume=False):
    """A run that draws from every generator; saves half-way when given a path."""
    seed_everything(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    start = 0
    if resume:
        state = load_checkpoint(path, ARGUMENTS)
        net.load_state_dict(state["net"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    for step in range(start, steps):
        x = torch.from_numpy(np.random.randn(5, 4).astype(np.float32)) + random.random()
        loss = net(x).square().mean() + random.gauss(0, 1) * net[0].weight.sum() * np.random.randn()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if path and step == steps // 2 - 1 and not resume:
            # An odd number of normal draws leaves a spare one inside the generator: it must survive too.
            state = {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
            save_checkpoint(path, state, ARGUMENTS)
            return net
    return net


def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = train(6)
    train(6, tmp_path / "run.pt")
    resumed = train(6, tmp_path / "run.pt", resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_other_arguments_are_named(tmp_path):
    path = save_checkpoint(tmp_path / "c.pt", {"x": 1}, ARGUMENTS)
    with pytest.raises(
        ValueError, match=r"c\.pt.*other arguments \(epochs: 4 then, 5 now; rate: 0\.5 then, 'absent' now\)"
    ):
        load_checkpoint(path, {"epochs": 5, "out": "runs", "tiers": (0.2, 0.3, 0.5)})
    assert load_checkpoint(path, ARGUMENTS | {"epochs": 9}, may_differ=["epochs"]) == {"x": 1}


def test_a_refused_checkpoint_leaves_the_generators_alone(tmp_path):
    path = save_checkpoint(tmp_path / "c.pt", {}, ARGUMENTS)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="other arguments"):
        load_checkpoint(path, {})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", ["head", "middle", "cut", "empty", "text"])
def test_damage_is_reported(tmp_path, where):
    path = save_checkpoint(tmp_path / "c.pt", {"w": torch.arange(4096.0)}, ARGUMENTS)
    data = bytearray(path.read_bytes())
    middle = data.find(torch.arange(4096.0).numpy().tobytes()[400:440])
    assert middle > 0
    data[middle] ^= 1 if where == "middle" else 0
    damaged = {"head": b"\0" * 40 + data[40:], "cut": data[:-300], "empty": b"", "text": b"hello"}.get(where, data)
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=r"c\.pt: corrupt checkpoint, or not one"):
        load_checkpoint(path, ARGUMENTS)


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path("hostile"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "arguments": {}, "rng": {}, "state": Hostile()}, "c.pt")
    with pytest.raises(ValueError, match=r"c\.pt: corrupt checkpoint"):
        load_checkpoint("c.pt", {})
    Path("p.pt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"p\.pt: corrupt checkpoint"):
        load_checkpoint("p.pt", {})
    assert not Path("hostile").exists()


def test_other_files_of_torch_are_told_apart(tmp_path):
    torch.save({"weights": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="not a checkpoint of these systems"):
        load_checkpoint(tmp_path / "w.pt", {})
    torch.save({"format": 99, "arguments": {}, "rng": {}, "state": {}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="format 99, expected 2"):
        load_checkpoint(tmp_path / "w.pt", {})
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume"):
        load_checkpoint(tmp_path / "none.pt", {})


def test_state_that_cannot_be_loaded_again_is_refused_when_saved(tmp_path):
    with pytest.raises(ValueError, match="cannot be resumed"):
        save_checkpoint(tmp_path / "c.pt", {"f": Hostile()}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["mkstemp", "open", "write", "fsync", "chmod", "replace"])
@pytest.mark.parametrize("before", [False, True], ids=["first", "again"])
def test_a_write_that_fails_leaves_the_last_checkpoint(tmp_path, monkeypatch, step, before):
    """Any call on the way to the disk may fail; a failed write has written half of the file."""
    path = tmp_path / "run.pt"
    if before:
        save_checkpoint(path, {"step": 1}, ARGUMENTS)

    def fail(*given, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    def opened(handle, mode):
        if step == "open":
            os.close(handle)
            fail()
        file = os_fdopen(handle, mode, buffering=0)

        class Half:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def write(self, content):
                file.write(content[: len(content) // 2])
                fail()

        return Half()

    os_fdopen = os.fdopen
    with monkeypatch.context() as patched:
        if step in ("open", "write"):
            patched.setattr(os, "fdopen", opened)
        else:
            patched.setattr(tempfile if step == "mkstemp" else os, step, fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(path, {"step": 2}, ARGUMENTS)
    assert [file.name for file in tmp_path.iterdir()] == (["run.pt"] if before else [])
    if before:
        assert load_checkpoint(path, ARGUMENTS) == {"step": 1}
