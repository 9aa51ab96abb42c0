"""``python -m msacore.selection``: a selection from the shell that survives being stopped."""

import argparse
import contextlib
import faulthandler
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from msacore import selection
from msacore.selection import files
from msacore.selection.arguments import Given
from msacore.selection.job import DEFAULTS
from msacore.selection.ranks import Alone, Ranks

_CHECKPOINT_SECONDS = 30.0
_STOPPED, _TERMINATED = 130, 143


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
        "again to go on after an interrupt, or with a larger budget to extend the selection. Inputs are .npy, .npz "
        "(FILE.npz:KEY where it holds several) or .pt files. Under torch.distributed.run the processes share the pool.",
        epilog="Exit status: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM (state saved).",
    )
    parser.add_argument(
        "pool",
        nargs="+",
        help="embeddings [N, d]; several files, or a folder of .npy files, are one pool with consecutive row numbers; "
        ".npy files are read in chunks and may be larger than memory",
    )
    parser.add_argument("--budget", type=int, help="total number of picks")
    parser.add_argument(
        "--radius", type=float, help="kcenter: stop once no sample is farther from its centre than this"
    )
    parser.add_argument("--out", type=Path, required=True, help="result, JSON; written whole or not at all")
    parser.add_argument("--uncertainty", help="uncertainty [N]")
    parser.add_argument("--labeled", help="labelled samples: indices [n] or centres [n, d]")
    parser.add_argument("--candidates", help="samples that may be picked: [N] bool or indices [n]")
    parser.add_argument("--groups", help="group of each sample [N], integers; with --max-per-group")
    parser.add_argument("--max-per-group", type=int, help="maximum picks per group, labelled samples included")
    parser.add_argument("--first", type=int, help="index of the first pick where nothing is labelled")
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


class _Inputs:
    """The files of one command, and the rows of them that this rank holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows = ("uncertainty", "groups", "candidates")
        self.parts = files.pool_files(args.pool)
        self.names = {name: getattr(args, name) for name in (*self.rows, "labeled") if getattr(args, name) is not None}

    def all_files(self) -> list[str]:
        return [*self.parts, *self.names.values()]

    def given(self, ranks: Alone, state: Any) -> Given:
        parts = [files.read(name) for name in self.parts]
        values: dict[str, Any] = {name: files.read(file) for name, file in self.names.items()}
        for name, part in zip(self.parts, parts, strict=True):
            if part.ndim != 2:
                raise ValueError(f"{name}: expected a pool of shape [N, d], got {list(part.shape)}")
        pool: Any = parts[0] if len(parts) == 1 else parts
        if ranks.size > 1:
            pool, values = self._own(parts, values, ranks)
        args = self.args
        return Given(
            embeddings=pool,
            budget=args.budget,
            strategy=args.strategy,
            uncertainty=values.get("uncertainty"),
            labeled=values.get("labeled"),
            candidates=values.get("candidates"),
            groups=values.get("groups"),
            max_per_group=args.max_per_group,
            radius=args.radius,
            first=args.first,
            gamma=args.gamma,
            seed=args.seed,
            distance=args.distance,
            backend=args.backend,
            options=dict(args.option),
            state=state,
        )

    def _own(self, parts: list[Any], values: dict[str, Any], ranks: Alone) -> tuple[list[Any], dict[str, Any]]:
        """An even share of the rows; indices and centres are passed by rank 0 alone."""
        total = sum(len(part) for part in parts)
        begin, end = total * ranks.rank // ranks.size, total * (ranks.rank + 1) // ranks.size
        own: list[Any] = []
        first = 0
        for part in parts:
            low, high = max(begin - first, 0), max(min(end - first, len(part)), 0)
            if low < high or (not own and part is parts[-1]):
                own.append(part[low : max(low, high)])
            first += len(part)
        mine = {}
        for name, value in values.items():
            by_row = name in self.rows and (name != "candidates" or str(value.dtype).endswith("bool"))
            if by_row and len(value) != total:
                raise ValueError(
                    f"{self.names[name]}: expected {total} values, one per row of the pool, got {len(value)}"
                )
            if by_row:
                mine[name] = value[begin:end]
            elif ranks.rank == 0:
                mine[name] = value
        return own, mine

    def named(self, message: str, state: Path) -> str:
        """The message, preceded by the file that it is about."""
        for name, part in re.findall(r"`(\w+)(?:\[(\d+)\])?`", message):
            if name == "embeddings":
                file = self.parts[int(part)] if part and int(part) < len(self.parts) else ", ".join(self.args.pool)
            else:
                file = str(state) if name == "state" else self.names.get(name, "")
            if file:
                return message if file in message else f"{file}: {message}"
        return message


def _result(done: selection.Selection, args: argparse.Namespace) -> bytes:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    result = {
        "pool": args.pool[0] if len(args.pool) == 1 else args.pool,
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
    return (json.dumps(result, indent=1, allow_nan=False) + "\n").encode()


class _Signals:
    """SIGTERM stops a selection as Ctrl-C does; both wait while files are written."""

    def __init__(self) -> None:
        self.status = _STOPPED
        self._active = threading.current_thread() is threading.main_thread()

    def _terminate(self, number: int, frame: Any) -> None:
        self.status = _TERMINATED
        interrupt = signal.getsignal(signal.SIGINT)
        if callable(interrupt):
            interrupt(signal.SIGINT, frame)
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        if not self._active:
            yield
            return
        before = signal.signal(signal.SIGTERM, self._terminate)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        if not self._active:
            yield
            return
        both = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, lambda number, frame: None) for number in both]
        try:
            yield
        finally:
            for number, handler in zip(both, before, strict=True):
                signal.signal(number, handler)


class _Store:
    """OUT and OUT.state, written by rank 0."""

    def __init__(self, out: Path, ranks: Alone) -> None:
        self.out, self.state = out, out.with_name(out.name + ".state")
        self._writes = ranks.rank == 0
        self._saved, self._warned = time.monotonic(), False

    def save(self, state: dict[str, Any]) -> None:
        if self._writes:
            files.write(self.state, files.serialised(state))

    def checkpoint(self, state: Callable[[], dict[str, Any]]) -> None:
        """Save from time to time. A full disk does not end a long run: there may be room again by the end of it."""
        if time.monotonic() - self._saved <= _CHECKPOINT_SECONDS:
            return
        try:
            self.save(state())
        except OSError as error:
            if not self._warned:
                print(f"warning: {self.state} could not be saved ({error.strerror}); going on", file=sys.stderr)
            self._warned = True
        self._saved = time.monotonic()

    def finish(self, done: selection.Selection, args: argparse.Namespace) -> None:
        """Write both files, and the result even where there is no room for the state."""
        if not self._writes:
            return
        try:
            self.save(done.state)
        finally:
            files.write(self.out, _result(done, args))


def _run(args: argparse.Namespace, ranks: Alone, signals: _Signals) -> int:
    store = _Store(args.out, ranks)
    inputs: list[_Inputs] = []

    def complain(message: str, advice: str = "remove it to start afresh") -> int:
        if ranks.rank == 0:
            named = inputs[0].named(message, store.state) if inputs else message
            hint = f" ({store.state} holds the state of an earlier run; {advice})"
            print(f"error: {named}{hint if store.state.exists() else ''}", file=sys.stderr)
        return 1

    def prepare() -> None:
        inputs.append(_Inputs(args))
        if ranks.rank == 0:
            folders = [name for name in args.pool if Path(name).is_dir()]
            files.check_out(args.out, store.state, inputs[0].all_files(), folders)

    given: list[Given] = []
    try:
        ranks.share(prepare)
        state = ranks.from_first(lambda: files.read_state(store.state))
        ranks.share(lambda: given.append(inputs[0].given(ranks, state)))
        done = selection.run(given[0], ranks, not args.quiet, store.checkpoint)
        with signals.held_back():
            store.finish(done, args)
    except selection.SelectionInterrupted as stop:
        with signals.held_back():
            count = len(stop.state["indices"])
            try:
                store.save(stop.state)
            except OSError as error:
                return complain(f"stopped after {count} picks, and {store.state} could not be saved ({error.strerror})")
            if ranks.rank == 0:
                print(f"stopped after {count} picks; the same command goes on from there", file=sys.stderr)
        return signals.status
    except KeyboardInterrupt:
        print("stopped; the same command starts again", file=sys.stderr)
        return signals.status
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return complain(f"{where}{error.strerror or error}", "the same command goes on from there")
    except (ValueError, ImportError, MemoryError) as error:
        return complain(str(error) or type(error).__name__)
    return 0


@contextlib.contextmanager
def _ranks() -> Iterator[Alone]:
    """The processes that torch.distributed.run started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield Alone()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield Ranks(dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, 1 for an error, 130 for Ctrl-C and 143 for SIGTERM (state saved)."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.budget is None and args.radius is None:
        parser.error("expected --budget, or for kcenter --radius")
    signals = _Signals()
    with signals.caught(), _ranks() as ranks:
        return _run(args, ranks, signals)


if __name__ == "__main__":
    faulthandler.enable()  # a pool file that shrinks while it is read ends the process: say where
    raise SystemExit(main())
