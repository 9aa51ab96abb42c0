"""Runs the kernels of tests/cuda_on_host/shim_kernels.cpp through the interpreter, and prints what it finds as JSON.

It runs as a process of its own, started with `tests.ptx.build.preloaded`.
"""

import ctypes
import json

import torch
from torch import Tensor

from tests.cuda_on_host.build import HERE
from tests.ptx.build import compilers_alone, host_of, ptx_of
from tests.ptx.machine import Machine

SOURCE = HERE / "shim_kernels.cpp"


def main() -> None:
    machine = Machine()
    with compilers_alone():
        path = host_of(SOURCE)
        machine.load(path, ptx_of(SOURCE))
    library = ctypes.CDLL(str(path))
    said = {}

    def call(name: str, *arguments: Tensor | int) -> None:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        error = function(*values).decode()
        said[" ".join([name, *(str(a) for a in arguments if isinstance(a, int))])] = [error] if error else []
        said[list(said)[-1]] += machine.findings()

    values, numbers = torch.randn(64, 64), torch.zeros(64, dtype=torch.int32)
    for barrier in (1, 0):
        call("transpose", values, out := torch.empty(64, 64), 64, barrier)
        if barrier:
            assert torch.equal(out, values.T)
    a, b = torch.randn(16, 80).half(), torch.randn(80, 8).half()
    for wait in (1, 0):
        call("mma_half", a, b, out := torch.empty(16, 8), 80, wait)
        if wait:
            torch.testing.assert_close(out, (a.double() @ b.double()).float())
    for sync in (1, 0):
        call("neighbour", numbers, sync)
    call("block_reduction", values, out := torch.empty(2), 1001)
    torch.testing.assert_close(out, torch.stack([values.view(-1)[:1001].sum(), values.view(-1)[:1001].max()]))
    for name in ("unwritten", "shared_overrun", "dynamic_overrun", "early_return", "wrong_mask", "stray_lane"):
        call(name, numbers)
    call("global_overrun", numbers[:32].clone(), 32)
    call("misaligned", values, torch.empty(4))
    print(json.dumps(said))


if __name__ == "__main__":
    main()
