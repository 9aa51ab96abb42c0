"""The autocast rule of the losses."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("msacore", "FRAGMENT")


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return [_to_float32(item) for item in value] if isinstance(value, (list, tuple)) else value


def compute_in_float32(name: str, keep: Collection[int] = ()) -> None:
    """Make ``msacore::<name>`` cast its 16-bit tensors to float32 inside autocast, except at the positions ``keep``.

    ``torch.library.register_autocast`` would do this, but refuses operators with keyword-only arguments.
    """
    op = getattr(torch.ops.msacore, name).default

    def register(device: str) -> None:
        def kernel(*args: Any, **options: Any) -> Any:
            cast = [a if i in keep else _to_float32(a) for i, a in enumerate(args)]
            with torch.autocast(device, enabled=False):
                return op(*cast, **options)

        _library.impl(name, kernel, f"Autocast{device.upper()}")

    register("cpu")
    register("cuda")
