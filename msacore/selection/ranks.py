"""Who takes part in a selection: one process, or the ranks of a torch.distributed group that share the pool.

All of them go through the same steps. A step does its own work in the function that makes its message, so that an error
there, or Ctrl-C, is sent in place of the message and is raised by all ranks after the same step.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

Message = TypeVar("Message")
_KINDS: tuple[type[Exception], ...] = (ValueError, TypeError, ImportError, OSError, MemoryError)


class Alone:
    """One process that holds the whole pool."""

    rank, size = 0, 1

    def share(self, message: Callable[[], Message]) -> list[Message]:
        """The messages of all ranks, in rank order."""
        return [message()]

    def from_first(self, message: Callable[[], Message]) -> Message:
        """What rank 0 decides."""
        return message()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context, Ctrl-C is held back until the message that carries it."""
        yield

    def say(self, text: str) -> str:
        """``text`` as an error of this rank."""
        return text


class Ranks(Alone):
    """The ranks of a process group; messages hold tensors, which travel on the CPU."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        from msacore.distributed.sharding import as_sharding

        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "select: `group` needs torch.distributed; call torch.distributed.init_process_group(...) first"
            )
        group = as_sharding("select", group).group
        self._group, self._gather = group, dist.all_gather_object
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._stop, self._exchanges = False, 0

    def say(self, text: str) -> str:
        return f"{text} (on rank {self.rank})"

    def share(self, message: Callable[[], Message]) -> list[Message]:
        mine: Any = None
        error: tuple[int, str] | None = None
        try:
            mine = _on_cpu(message())
        except Exception as caught:
            kind = next((i for i, kind in enumerate(_KINDS) if isinstance(caught, kind)), -1)
            error = kind, self.say(str(caught) or type(caught).__name__)
        everything: list[Any] = [None] * self.size
        self._exchanges += 1
        try:
            self._gather(everything, (self._stop, error, mine), group=self._group)
        except RuntimeError as failed:
            raise RuntimeError(
                f"select: exchange {self._exchanges} failed on rank {self.rank}; the group cannot be used any more"
            ) from failed
        for _, wrong, _ in everything:
            if wrong is not None:
                raise (_KINDS[wrong[0]] if wrong[0] >= 0 else RuntimeError)(wrong[1])
        if any(stop for stop, _, _ in everything):
            raise KeyboardInterrupt
        return [theirs for _, _, theirs in everything]

    def from_first(self, message: Callable[[], Message]) -> Message:
        def only_first() -> Any:
            return message() if self.rank == 0 else None

        return self.share(only_first)[0]

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: Any) -> None:
            if self._stop:  # the second Ctrl-C: perhaps the other ranks are gone
                raise KeyboardInterrupt
            self._stop = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(one) for key, one in value.items()}
    return value


def on_device(value: Any, device: torch.device) -> Any:
    """A message with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: on_device(one, device) for key, one in value.items()}
    return value


def ranks_of(group: Any) -> Alone:
    """Who takes part, for the argument `group`."""
    if group is None:
        return Alone()
    return Ranks(group)
