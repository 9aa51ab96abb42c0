"""What the operator files share: packages that may be missing, and torch.compile of a composition."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from bench.harness import Call, Inputs, Provider, Unavailable


def package(name: str, install: str) -> ModuleType:
    """Imports the module; raises `Unavailable` with the reason where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"needs the package {install} ({error})") from error


def plain(name: str, function: Callable[..., Any], unless: Callable[[Inputs], str] | None = None) -> Provider:
    """A function that takes the inputs as keywords. `unless` says why it must not run on some inputs, or nothing."""

    def bind(inputs: Inputs) -> Call:
        if unless is not None and (reason := unless(inputs)):
            raise Unavailable(reason)
        return lambda: function(**inputs)

    return Provider(name, bind)


def compiled(name: str, function: Callable[..., Any], unless: Callable[[Inputs], str] | None = None) -> Provider:
    """Like `plain`, with the function compiled by torch.compile before the clock starts."""
    fast = torch.compile(function, dynamic=False)

    def attempt(**inputs: Any) -> Any:
        try:
            return fast(**inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise Unavailable(f"torch.compile: {str(error).splitlines()[0]}") from error

    return replace(plain(name, attempt, unless), compiled=True)


def at_most(bytes_: Callable[[Inputs], float], limit: float = 4e9) -> Callable[[Inputs], str]:
    """Keeps a form whose intermediates grow beyond `limit` bytes from running."""

    def unless(inputs: Inputs) -> str:
        need = bytes_(inputs)
        return f"needs {need / 1e9:.1f} GB" if need > limit else ""

    return unless
