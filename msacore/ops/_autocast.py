"""The autocast rule of the losses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("msacore", "FRAGMENT")


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return [_to_float32(item) for item in value] if isinstance(value, (list, tuple)) else value


def compute_in_float32(name: str) -> None:
    """Make ``msacore::<name>`` cast its 16-bit tensors to float32 inside autocast.

    ``torch.library.register_autocast`` would do, but refuses operators with keyword-only arguments.
    """
    op = getattr(torch.ops.msacore, name).default

    def register(key: str) -> None:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any, **options: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*_to_float32(args), **options)

        _library.impl(name, kernel, key)
        python_kernel: Callable[[Callable[..., Any]], Any] = op.py_impl(getattr(torch._C.DispatchKey, key))
        python_kernel(kernel)

    register("AutocastCPU")
    register("AutocastCUDA")
