"""``python -m msacore.selection``: a selection from the shell that survives being stopped."""

import argparse
import json
import os
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from msacore import selection
from msacore.selection.job import DEFAULTS

_CHECKPOINT_SECONDS = 30.0


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb") as written:
            os.fsync(written.fileno())  # the name must not reach the disk before the content
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _option(text: str) -> tuple[str, float]:
    key, _, value = text.partition("=")
    try:
        return key, int(value) if value.isdigit() else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected KEY=NUMBER, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m msacore.selection",
        description="Select samples of a pool to be labelled. The state is kept in OUT.state: run the same command "
        "again to go on after an interrupt, or with a larger budget to extend the selection.",
    )
    parser.add_argument("pool", type=Path, help="embeddings [N, d], .npy; read in chunks, may be larger than memory")
    parser.add_argument("--budget", type=int, required=True, help="total number of picks")
    parser.add_argument("--out", type=Path, required=True, help="result, JSON; written whole or not at all")
    parser.add_argument("--uncertainty", type=Path, help="uncertainty [N], .npy")
    parser.add_argument("--labeled", type=Path, help="labelled samples, .npy: indices [n] or centres [n, d]")
    parser.add_argument("--strategy", default="uncertainty_kcenter", choices=list(selection.STRATEGIES))
    parser.add_argument("--distance", default="euclidean", choices=["euclidean", "cosine"])
    parser.add_argument("--backend", default="auto", choices=["auto", "native", "faiss"])
    parser.add_argument("--gamma", type=float, default=1.0, help="power of the uncertainty (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--option",
        type=_option,
        action="append",
        default=[],
        metavar="KEY=NUMBER",
        help=f"one of {', '.join(DEFAULTS)}; may be repeated",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _state(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return cast(dict[str, Any], torch.load(path, weights_only=True))
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _result(done: selection.Selection, args: argparse.Namespace) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if np.isfinite(value) else None

    return {
        "pool": str(args.pool),
        "strategy": args.strategy,
        "budget": args.budget,
        "seed": args.seed,
        "distance": args.distance,
        "indices": done.indices.tolist(),
        "scores": [finite(score) for score in done.scores.tolist()],
        "radius": finite(done.radius),
        "lower_bound": finite(done.lower_bound),
        "backend": done.backend,
        "pool_reads": done.pool_reads,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for an error, 130 for Ctrl-C (the state is saved)."""
    args = _parser().parse_args(argv)
    state_file = args.out.with_name(args.out.name + ".state")
    saved = time.monotonic()

    def save(state: dict[str, Any]) -> None:
        _write(state_file, lambda part: torch.save(state, part))

    def checkpoint(state: Callable[[], dict[str, Any]]) -> None:
        nonlocal saved
        if time.monotonic() - saved > _CHECKPOINT_SECONDS:
            save(state())
            saved = time.monotonic()

    def load(path: Path | None) -> np.ndarray | None:
        return None if path is None else np.load(path, mmap_mode="r", allow_pickle=False)

    try:
        if not args.out.absolute().parent.is_dir():
            raise ValueError(f"--out: there is no folder {args.out.absolute().parent}")
        state = _state(state_file)
        done = selection.run(
            load(args.pool),
            args.budget,
            strategy=args.strategy,
            uncertainty=load(args.uncertainty),
            labeled=load(args.labeled),
            gamma=args.gamma,
            seed=args.seed,
            distance=args.distance,
            backend=args.backend,
            options=dict(args.option),
            progress=not args.quiet,
            state=state,
            checkpoint=checkpoint,
        )
        save(done.state)
        _write(args.out, lambda part: part.write_text(json.dumps(_result(done, args), indent=1) + "\n"))
    except selection.SelectionInterrupted as stop:
        save(stop.state)
        print(f"stopped after {len(stop.state['indices'])} picks; the same command goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped; the same command starts again", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        hint = (
            f" ({state_file} holds the state of an earlier run; remove it to start afresh)"
            if state_file.exists()
            else ""
        )
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
