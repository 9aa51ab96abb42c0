"""What the command line reads and writes: inputs recognised by their content, results whole or not at all."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Values = np.ndarray | torch.Tensor
_TEXT = (".csv", ".tsv", ".txt", ".json")


def _refuse(path: Path | str, why: str) -> ValueError:
    return ValueError(f"{path}: {why}")


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def named_file(text: str) -> tuple[Path, str | None]:
    """The file that ``FILE`` or ``FILE.npz:key`` names, and the key."""
    stem, colon, key = text.rpartition(":")
    if colon and key and not Path(text).exists() and stem.endswith(".npz"):
        return Path(stem), key
    return Path(text), None


def read(text: str) -> Values:
    """The array in an ``.npy`` (mapped), ``.npz`` (``FILE.npz:key`` where it holds several) or ``.pt`` file.

    Raises:
        ValueError: The file cannot be read, or is something else, which the message names.
    """
    path, key = named_file(text)
    if path.is_dir():
        raise _refuse(path, "is a folder; expected a file")
    try:
        head = _head(path)
    except OSError as error:
        raise _refuse(path, f"cannot be read ({error.strerror or error})") from error
    if not head:
        raise _refuse(path, "is empty")
    if head.startswith(b"version https://git-lfs"):
        raise _refuse(path, "is a Git-LFS pointer, not the data; fetch it with: git lfs pull")
    try:
        if head.startswith(b"\x93NUMPY"):
            return _array(path, np.load(path, mmap_mode="r", allow_pickle=False))
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            return _from_npz(path, key) if any(name.endswith(".npy") for name in names) else _from_pt(path)
        if path.suffix in (".pt", ".pth"):
            return _from_pt(path)
    except Exception as error:  # what a damaged file raises is not documented
        if str(error).startswith(str(path)):
            raise
        raise _refuse(path, f"cannot be read ({_line(error)})") from error
    if path.suffix in _TEXT:
        raise _refuse(
            path, f"is text ({path.suffix}); expected .npy, .npz or .pt: numpy.save(…, numpy.loadtxt(…)) makes one"
        )
    raise _refuse(path, "is neither .npy nor .npz nor .pt, whatever its name says")


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _array(path: Path, value: Any) -> np.ndarray:
    if value.dtype.kind not in "fiub":
        raise _refuse(path, f"expected real numbers, got dtype {value.dtype}")
    return np.asanyarray(value)


def _from_npz(path: Path, key: str | None) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        keys = list(archive.files)
        if key is None and len(keys) == 1:
            key = keys[0]
        if key is None or key not in keys:
            raise _refuse(path, f"expected {path}:KEY with one of {', '.join(keys)}, got {key or 'no key'}")
        return _array(path, archive[key])


def _from_pt(path: Path) -> torch.Tensor:
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # what a damaged file raises is not documented
        raise _refuse(path, f"cannot be read as a tensor ({_line(error)})") from error
    if not isinstance(value, torch.Tensor):
        inside = f" with {', '.join(map(str, list(value)[:8]))}" if isinstance(value, dict) else ""
        raise _refuse(path, f"expected one tensor, got {type(value).__name__}{inside}")
    return value


def pool_files(names: list[str]) -> list[str]:
    """The files of a pool: files as named, and in place of a folder its ``.npy`` files in order of name."""
    found: list[str] = []
    for name in names:
        if not Path(name).is_dir():
            found.append(name)
            continue
        inside = sorted(str(path) for path in Path(name).glob("*.npy"))
        if not inside:
            raise _refuse(name, "is a folder without .npy files")
        found += inside
    return found


def check_out(out: Path, state: Path, inputs: list[str], folders: list[str]) -> None:
    """Refuse an output that could not be written, or would replace an input.

    Raises:
        ValueError: The output is refused; the message says why.
    """
    for path in (out, state):
        if path.is_dir():
            raise ValueError(f"--out: {path} is a folder; expected a file")
        if path.exists() and not path.is_file():
            raise ValueError(f"--out: {path} is not a regular file")
        for text in inputs:
            file = named_file(text)[0]
            same = file.exists() and path.exists() and os.path.samefile(path, file)
            if same or os.path.realpath(path) == os.path.realpath(file):
                raise ValueError(f"--out: {path} is the input {file}, which would be lost")
        for pool in folders:
            if path.suffix == ".npy" and os.path.realpath(path.parent) == os.path.realpath(pool):
                raise ValueError(f"--out: {path} would be a part of the pool {pool}")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--out: there is no folder {folder}")
    clear_parts(out, state)
    trial = _part(out)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be written to ({error.strerror or error})") from error


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def clear_parts(*paths: Path) -> None:
    """Remove the part files that were left behind by runs killed while they wrote one of ``paths``."""
    for path in paths:
        for part in path.absolute().parent.iterdir():
            number = part.name.removeprefix(f".{path.name}.").removesuffix(".part")
            if part.name == f".{path.name}.{number}.part" and number.isdigit() and not _is_running(int(number)):
                part.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: The file, which the error names, could not be written; its earlier content is kept.
    """
    part = _part(path)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # the name must not reach the disk before the content
        os.replace(part, path)
    except OSError as error:  # the error of a full disk names no file
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def serialised(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def read_state(path: Path) -> dict[str, Any] | None:
    """The state in a file, or None without one.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not content:
        raise ValueError(f"{path} cannot be read: it is empty")
    load: Callable[..., Any] = torch.load
    try:
        state = load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # what a damaged file raises is not documented
        raise ValueError(f"{path} cannot be read: {_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} cannot be read: it holds no state, but an object of type {type(state).__name__}")
    return state
