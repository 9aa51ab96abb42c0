"""Checkpoints that resume a run bit for bit, or say why they cannot."""

from __future__ import annotations

import io
import json
import pickle
import random
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .files import write_atomic

FORMAT = 2


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices), and ask torch for deterministic algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The fill is for finding reads of unwritten memory; it costs every small operation an extra pass.
    torch.utils.deterministic.fill_uninitialized_memory = False


def derive(seed: int, *what: object) -> int:
    """A separate seed for every purpose, so that a resumed run needs no generator state."""
    return zlib.crc32(repr((seed, *what)).encode())


def rng_state() -> dict[str, Any]:
    """States of the global generators of Python, NumPy and torch, in types that a checkpoint can hold."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_checkpoint(path: str | Path, state: dict[str, Any], arguments: dict[str, Any]) -> Path:
    """Write state, arguments and all random states, atomically.

    Args:
        path: File to write; an older checkpoint there is replaced only by a complete new one.
        state: Tensors, state dicts, numbers, strings and plain containers of them.
        arguments: What the run was started with; paths and the like are stored as text.

    Raises:
        ValueError: The state holds something that would not load again.
    """
    buffer = io.BytesIO()
    payload = {"format": FORMAT, "arguments": _plain(arguments), "rng": rng_state(), "state": state}
    torch.save(payload, buffer)
    try:
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except pickle.UnpicklingError as e:
        raise ValueError(f"{path}: a run with this state cannot be resumed: {e}") from e
    return write_atomic(path, buffer.getvalue())


def load_checkpoint(path: str | Path, arguments: dict[str, Any], may_differ: Collection[str] = ()) -> dict[str, Any]:
    """Read a checkpoint of a run with the same arguments and put the random states back.

    Args:
        path: The file; only tensors and plain containers are unpickled (``weights_only``).
        arguments: What this run was started with.
        may_differ: Names that do not change results, such as the output folder or the progress bar.

    Returns:
        The ``state`` that was saved.

    Raises:
        ValueError: The file is corrupt or of another kind, or the runs' arguments differ; the message names which.
        FileNotFoundError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no checkpoint to resume from")
    payload = _read(path)
    _check_arguments(path, payload["arguments"], _plain(arguments), may_differ)
    set_rng_state(payload["rng"])
    return payload["state"]


def _read(path: Path) -> dict[str, Any]:
    try:
        # torch does not verify the archive's checksums; a flipped bit in the weights would pass unseen.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its part {damaged!r} is damaged")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        # A damaged archive can fail in any layer of zip, pickle or torch: to the caller, all of these mean one thing.
        raise ValueError(f"{path}: corrupt checkpoint, or not one ({type(e).__name__}: {e})") from e
    if not isinstance(payload, dict) or set(payload) != {"format", "arguments", "rng", "state"}:
        raise ValueError(f"{path}: not a checkpoint of these systems")
    if payload["format"] != FORMAT:
        raise ValueError(f"{path}: checkpoint format {payload['format']}, expected {FORMAT}")
    return payload


def _check_arguments(path: Path, stored: dict, current: dict, may_differ: Collection[str]) -> None:
    absent = object()
    differing = [
        f"{name}: {stored.get(name, 'absent')!r} then, {current.get(name, 'absent')!r} now"
        for name in sorted(stored.keys() | current.keys())
        if name not in may_differ and stored.get(name, absent) != current.get(name, absent)
    ]
    if differing:
        raise ValueError(f"{path}: this checkpoint belongs to a run with other arguments ({'; '.join(differing)})")


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(arguments, default=str, sort_keys=True))
