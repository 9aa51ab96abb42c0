"""The operators' CUDA code, executed on the CPU: the generic tests again, orders of threads and blocks, sanitizers."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from msacore.__main__ import operators
from tests import cases, test_ops
from tests.cuda_on_host.build import ROOT, sanitizer_environment
from tests.cuda_on_host.dispatch import SOURCES, CudaOnHost, operators_of, operators_with_cuda_code
from tests.opcase import OpCase, run
from tests.test_cuda_shim import SCHEDULES

# With the fixture below, these tests run the CUDA code.
from tests.test_ops import (  # noqa: F401
    each_sample,
    test_autocast_policy,
    test_every_output_is_written,
    test_gradcheck,
    test_hidden_inputs_are_never_read,
    test_non_contiguous_inputs_give_the_same_bits,
    test_values_and_gradients_are_as_accurate_as_torch,
)

CPU = torch.device("cpu")


def _bad_inputs(values: bool) -> pytest.MarkDecorator:
    found = [(case, label) for case in cases.ALL for label, bad in case.bad_inputs.items() if bad.values == values]
    return pytest.mark.parametrize(("case", "label"), found, ids=[f"{case.name}-{label}" for case, label in found])


@pytest.fixture
def device() -> Iterator[torch.device]:
    with CudaOnHost():
        yield CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_sample
def test_every_order_of_threads_and_blocks_gives_equal_bits(
    case: OpCase, sample: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = case.arguments(sample, CPU, dtype)
    results = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("CUDA_ON_HOST_SCHEDULE", schedule)
        with CudaOnHost() as on_host:
            outputs, grads = run(case, case.op, arguments)
        assert on_host.calls, "no CUDA code was run"
        results.append([*outputs, *grads])
    for schedule, tensors in zip(SCHEDULES[1:], results[1:], strict=True):
        for ours, ref in zip(tensors, results[0], strict=True):
            assert torch.equal(ours.nan_to_num(), ref.nan_to_num()), f"{schedule} differs from {SCHEDULES[0]}"


@_bad_inputs(values=False)
def test_bad_input_raises_in_cuda_code(case: OpCase, label: str, device: torch.device) -> None:
    test_ops.test_bad_input_raises_alike_on_every_device(case, label, device)


@_bad_inputs(values=True)
def test_wrong_values_in_tensors_raise_nothing(case: OpCase, label: str, device: torch.device) -> None:
    """CUDA code cannot look at values; the sanitized run of this test shows that it stays in bounds."""
    run(case, case.op, case.bad_inputs[label].mutate(dict(case.samples(CPU, torch.float32)[0].arguments)))


def test_every_operator_has_cuda_code_for_every_call() -> None:
    everything = {name.removeprefix("msacore::") for name in operators()}
    assert everything - operators_with_cuda_code() == set()


def _under_sanitizers(source: Path) -> list[str]:
    """Tests of a source's operators. Bounds and alignment do not depend on the order of threads: one run shows them."""
    if source.stem == "kcenter_cuda":
        chosen = "every_order or bad_input or lacks or more_ or scan"
        return [str(ROOT / "tests" / "test_kcenter_cuda.py"), "-k", chosen]
    nodes = []
    for case in cases.ALL:
        if case.name not in operators_of(source):
            continue
        nodes += [
            f"test_values_and_gradients_are_as_accurate_as_torch[{case.name}-{sample.id}-{dtype}]"
            for sample in case.samples(CPU, torch.float32)
            for dtype in (torch.float32, torch.bfloat16)
            if sample.on_host
        ]
        nodes += [
            f"test_wrong_values_in_tensors_raise_nothing[{case.name}-{label}]"
            for label, bad in case.bad_inputs.items()
            if bad.values
        ]
    assert nodes, f"no tests of {source.name}: pytest would run all tests instead"
    nodes = [f"{__file__}::{node}" for node in nodes]
    return [*nodes, str(ROOT / "tests" / "test_info_nce_partial_cuda.py")] if source.stem == "info_nce_cuda" else nodes


@pytest.mark.slow  # sanitized builds and runs take minutes
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_sanitizers_find_nothing(source: Path) -> None:
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*pytest_alone, *_under_sanitizers(source)],
        cwd=ROOT,
        env=sanitizer_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
