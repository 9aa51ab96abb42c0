"""Operators with long loops: on the CPU they run signal handlers and end when one raises, as Ctrl-C's does."""

from collections.abc import Callable
from typing import Any

import torch

from msacore import _C

_C.hear_signals()


def interruptible(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an operator so that it raises what a signal handler raised, and not the error that ended its loop."""

    def call(*arguments: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*arguments, **options)
        try:
            return op(*arguments, **options)
        except RuntimeError:
            if (raised := _C.take_raised()) is not None:
                raise raised from None
            raise

    return call
