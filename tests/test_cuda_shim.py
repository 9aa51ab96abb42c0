"""The shim that executes kernels on the host: correct kernels pass in every order, faulty ones are caught."""

import ctypes
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda_on_host.build import HERE, ROOT, build, sanitizer_environment

SCHEDULES = ["forward", "reverse", "interleaved", "random:1", "random:2"]


def kernels(*options: str) -> Callable[..., str]:
    """A function that calls an exported launcher of shim_kernels.cpp by name and returns its error or an empty text."""
    library = ctypes.CDLL(str(build(HERE / "shim_kernels.cpp", *options)))

    def call(name: str, *arguments: Any) -> str:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        values = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        return function(*values).decode()

    return call


@pytest.fixture(params=["own switch", "ucontext"])
def call(request: pytest.FixtureRequest) -> Callable[..., str]:
    return kernels() if request.param == "own switch" else kernels("-DCUDA_ON_HOST_UCONTEXT")


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CUDA_ON_HOST_SCHEDULE", request.param)
    return request.param


def test_block_reduction(call: Callable[..., str], schedule: str) -> None:
    values, out = torch.randn(1001), torch.empty(2)
    assert call("block_reduction", values, out, 1001) == ""
    torch.testing.assert_close(out, torch.stack([values.sum(), values.max()]))


def test_block_scan(call: Callable[..., str], schedule: str) -> None:
    values = torch.randint(-9, 9, (1024,), dtype=torch.int32)
    out, total = torch.empty_like(values), torch.empty(1, dtype=torch.int32)
    assert call("scan", values, out, total, 1024) == ""
    assert torch.equal(out, (values.cumsum(0) - values).int())
    assert total == values.sum()


def test_transposed_tile(call: Callable[..., str], schedule: str) -> None:
    values, out = torch.randn(70, 70), torch.full((70, 70), float("nan"))
    assert call("transpose", values, out, 70, 1) == ""
    assert torch.equal(out, values.T)


def test_a_missing_barrier_shows_in_every_order(call: Callable[..., str], schedule: str) -> None:
    values, out = torch.randn(64, 64), torch.empty(64, 64)
    assert call("transpose", values, out, 64, 0) == ""
    assert not torch.equal(out, values.T)


@pytest.mark.parametrize(("name", "dtype"), [("mma_half", torch.float16), ("mma_bfloat16", torch.bfloat16)])
def test_tensor_core_product(call: Callable[..., str], schedule: str, name: str, dtype: torch.dtype) -> None:
    a, b, out = torch.randn(16, 80).to(dtype), torch.randn(80, 8).to(dtype), torch.empty(16, 8)
    assert call(name, a, b, out, 80, 1) == ""
    torch.testing.assert_close(out, (a.double() @ b.double()).float())


def test_copies_that_are_not_waited_for_are_missing(call: Callable[..., str], schedule: str) -> None:
    a, b, out = torch.randn(16, 32).half(), torch.randn(32, 8).half(), torch.empty(16, 8)
    assert call("mma_half", a, b, out, 32, 0) == ""
    assert out.isnan().all()


def test_float32_product_of_three_tf32_products(call: Callable[..., str], schedule: str) -> None:
    a, b, out = torch.randn(16, 64), torch.randn(64, 8), torch.empty(16, 8)
    assert call("mma_float32", a, b, out, 64) == ""
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() <= 3e-6 * exact.abs().max()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_tensor_cores_cut_low_bits_off(call: Callable[..., str], sign: float) -> None:
    """1 ± 15 · 2⁻²⁵ is several units in the last place away from 1, but each product is below the last bit kept."""
    a, b, out = torch.full((16, 16), sign * 2.0**-13).half(), torch.full((16, 8), 2.0**-12).half(), torch.empty(16, 8)
    a[:, 0], b[0] = 1, 1
    assert call("mma_half", a, b, out, 16, 1) == ""
    assert (out == 1).all()


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("half", torch.float16)])
def test_long_sums_do_not_drift(call: Callable[..., str], name: str, dtype: torch.dtype) -> None:
    """Sums of terms of one sign, in which what tensor cores cut off accumulates."""
    a, b = (torch.rand(64, 4000, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    out = torch.empty(64, 64)
    assert call(f"tile_product_{name}", a, b, out, 4000) == ""
    exact = a.double() @ b.double().T
    plain = (a.float() @ b.float().T).double()
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6 * exact.max()


def test_votes_and_atomics(call: Callable[..., str], schedule: str) -> None:
    out = torch.zeros(3, dtype=torch.int32)
    assert call("votes_and_atomics", out, 96) == ""
    assert out.tolist() == [48, 95, 96]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("divergent_barrier", ("divergent barrier", "threads 0-31 wait at __syncthreads (shim_kernels.cpp", "32-63")),
        ("early_return", ("wait for ever", "threads 0-31 wait at __syncthreads", "threads 32-63 have returned")),
        ("wrong_mask", ("wait for ever", "__shfl_xor_sync with mask 0xffffffff", "threads 16-31 have returned")),
        ("stray_lane", ("__shfl_sync", "reads a lane outside its mask")),
        ("too_much_shared", ("204800 bytes of shared memory", "this GPU has 101376")),
        ("too_many_threads", ("cannot launch", "1056 threads")),
    ],
)
def test_faults_are_errors_that_say_where(
    call: Callable[..., str], schedule: str, name: str, words: tuple[str, ...]
) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    error = call(name, *([] if name == "divergent_barrier" else [out]))
    for word in words:
        assert word in error
    assert call("votes_and_atomics", torch.zeros(3, dtype=torch.int32), 32) == "", "the next launch must work"


def _sanitized(program: str) -> subprocess.CompletedProcess[str]:
    preamble = "import torch; from tests.test_cuda_shim import kernels; call = kernels()\n"
    command = [sys.executable, "-c", preamble + program]
    return subprocess.run(command, cwd=ROOT, env=sanitizer_environment(), capture_output=True, text=True)


@pytest.mark.slow  # needs the sanitized build
@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("shared_overrun", "out", ("heap-buffer-overflow", "shared_overrun_kernel")),
        ("dynamic_overrun", "out", ("heap-buffer-overflow", "dynamic_overrun_kernel")),
        ("global_overrun", "out, 64", ("heap-buffer-overflow", "global_overrun_kernel")),
        ("misaligned", "out, torch.zeros(8)", ("misaligned address", "device.cuh")),
    ],
)
def test_sanitizers_name_the_faulty_kernel(name: str, arguments: str, words: tuple[str, ...]) -> None:
    done = _sanitized(f"out = torch.zeros(64); call('{name}', {arguments})")
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr


@pytest.mark.slow  # needs the sanitized build
def test_sanitizers_accept_right_kernels() -> None:
    done = _sanitized(
        "a, b, out = torch.randn(16, 80).half(), torch.randn(80, 8).half(), torch.empty(16, 8)\n"
        "assert call('mma_half', a, b, out, 80, 1) == ''\n"
        "assert call('transpose', torch.randn(70, 70), torch.empty(70, 70), 70, 1) == ''\n"
        "assert 'have returned' in call('early_return', out)\n"
        "assert call('block_reduction', torch.randn(99), torch.empty(2), 99) == ''\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]
