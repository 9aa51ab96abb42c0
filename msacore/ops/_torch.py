"""The names of torch that are not public, all in one place.

A later torch may lack any of them. Then the short way of `_autograd.py` is closed and every call takes the formula that
torch has registered: slower, with the same results.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad


def _find(*path: str) -> Any:
    """The object at ``torch.<path>``, or None."""
    found: Any = torch
    for name in path:
        found = getattr(found, name, None)
    return found


def _apply_of(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without its detour for function transforms, which the dispatcher handles here."""
    return getattr(super(torch.autograd.Function, function), "apply", None)


below_autograd: Any = _find("_C", "_AutoDispatchBelowAutograd")
_autocast_is_active: Any = _find("_C", "_is_any_autocast_enabled")
_transforms_are_active: Any = _find("_C", "_are_functorch_transforms_active")
_is_tracing: Any = _find("_C", "_is_tracing") or _find("jit", "is_tracing") or (lambda: False)
_allow_function_in_transform: Any = _find("_C", "_functorch", "set_single_level_autograd_function_allowed")
_function_is_allowed: Any = _find("_C", "_functorch", "get_single_level_autograd_function_allowed")
_set_forward_mode: Any = _find("autograd", "forward_ad", "_set_fwd_grad_enabled")


class _Probe(torch.autograd.Function):
    """Tells whether functions have the ``apply`` that the short way needs."""


HAS_SHORT_WAY = None not in (below_autograd, _autocast_is_active, _transforms_are_active, _apply_of(_Probe))
_HAS_TRANSFORMS = None not in (_allow_function_in_transform, _function_is_allowed, _set_forward_mode)


def forward_mode_may_be_active() -> bool:
    """False where no tensor can carry a tangent."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` records the call."""
    return not torch.compiler.is_compiling() and _is_tracing()


def is_plain_eager() -> bool:
    """Whether no compiler, tracer, autocast, function transform or forward mode needs the registered operator."""
    return not (
        torch.compiler.is_compiling()
        or not HAS_SHORT_WAY
        or _autocast_is_active()
        or _transforms_are_active()
        or _is_tracing()
        or forward_mode_may_be_active()
    )


def is_in_transform() -> bool:
    """Whether a function transform (``torch.func.grad``, …) is on and a function can be applied at its level."""
    return HAS_SHORT_WAY and _HAS_TRANSFORMS and _transforms_are_active()


def short_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for callers that are in no function transform."""
    return _apply_of(function)


def apply_in_transform(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Apply a function at the level of the innermost function transform; the operator inside goes to the next."""
    before = _function_is_allowed()
    _allow_function_in_transform(True)
    try:
        return _apply_of(function)(*inputs)
    finally:
        _allow_function_in_transform(before)


@contextmanager
def outer_transforms() -> Iterator[None]:
    """Inside a function's forward, let the transforms around the innermost one differentiate what is called."""
    with torch.enable_grad(), _set_forward_mode(True):
        yield
