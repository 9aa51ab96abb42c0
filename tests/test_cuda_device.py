"""What only a device can show: graphs, other streams, a second device, errors left by others, picks of k-centre."""

import contextlib
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import msacore
from tests import cases
from tests.cases.kcenter import CASES, KernelCase, draw
from tests.opcase import DTYPES, OpCase, Sample, cotangents, leaves, map_tensors, outputs_of, run
from tests.test_kcenter_cuda import SELECTIONS

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("MSACORE_REQUIRE_CUDA") != "1",
    reason="no CUDA device (MSACORE_REQUIRE_CUDA=1 makes this a failure)",
)

DEVICE = torch.device("cuda")
each_case = pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)


def _largest(case: OpCase, dtype: torch.dtype = torch.float32) -> Sample:
    """The sample with the most elements that also runs on the host: it has several tiles and blocks."""

    def size(sample: Sample) -> int:
        elements: list[int] = []
        map_tensors(sample.arguments, lambda t: elements.append(t.numel()))
        return sum(elements)

    return max((s for s in case.samples(DEVICE, dtype) if s.on_host), key=size)


def _equal(ours: tuple[list[Tensor], list[Tensor]], theirs: tuple[list[Tensor], list[Tensor]]) -> bool:
    pairs = zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True)
    return all(torch.equal(a.nan_to_num(), b.to(a.device).nan_to_num()) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_case
def test_one_sample_of_every_operator(case: OpCase, dtype: torch.dtype) -> None:
    """The test to run under the device's sanitizers."""
    outputs, grads = run(case, case.op, _largest(case, dtype).arguments)
    torch.cuda.synchronize()
    assert all(t.isfinite().all() for t in [*outputs, *grads])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_of_kcenter_give_the_bits_of_the_cpu(case: KernelCase, dtype: torch.dtype) -> None:
    ours = case.run(case.arguments(DEVICE, dtype))
    expected = case.run(case.arguments(torch.device("cpu"), dtype))
    for a, b in zip(ours, expected, strict=True):
        assert a.device.type == DEVICE.type
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
def test_selections_from_a_pool_on_the_device_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    pool = draw(3000, 5).mul(3).round().div(3).float()
    arguments = dict(options, uncertainty=torch.rand(3000, generator=torch.Generator().manual_seed(1)))
    ours, expected = msacore.select(pool.to(DEVICE), 60, **arguments), msacore.select(pool, 60, **arguments)
    assert torch.equal(ours.indices.cpu(), expected.indices)
    torch.testing.assert_close(ours.scores.cpu(), expected.scores.cpu(), rtol=1e-12, atol=1e-12)


@each_case
def test_a_captured_graph_replays_on_other_values(case: OpCase) -> None:
    arguments, wanted = leaves(case, _largest(case).arguments)
    inputs = [t for _, t in wanted]
    weights = cotangents(outputs_of(case.op(**arguments)))

    def step() -> tuple[list[Tensor], list[Tensor]]:
        outputs = outputs_of(case.op(**arguments))
        grads = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
        return outputs, [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries and the allocator initialise outside the capture
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for factor in (0.75, 0.5):  # no weight becomes negative, no temperature zero
        with torch.no_grad():
            for t in inputs:
                t.mul_(factor)
        graph.replay()
        assert _equal(captured, step())


@each_case
def test_work_is_queued_on_the_current_stream(case: OpCase) -> None:
    """Arguments arrive late on a stream of their own: kernels on any other stream would read NaN."""
    arguments = _largest(case).arguments
    expected = run(case, case.op, arguments)
    late = map_tensors(arguments, lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t.clone())
    originals: list[Tensor] = []
    map_tensors(arguments, originals.append)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about ten milliseconds
        arrived = iter(originals)
        map_tensors(late, lambda t: t.copy_(next(arrived)))
        ours = run(case, case.op, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert _equal(ours, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device: the second is not tested")
@each_case
def test_a_second_device_gives_the_bits_of_the_first(case: OpCase) -> None:
    arguments = _largest(case).arguments
    expected = run(case, case.op, arguments)
    ours = run(case, case.op, map_tensors(arguments, lambda t: t.detach().to("cuda:1")))
    assert all(t.device == torch.device("cuda:1") for t in [*ours[0], *ours[1]])
    assert torch.cuda.current_device() == 0
    assert _equal(ours, expected)


def test_an_error_that_somebody_else_left_is_not_ours() -> None:
    x, offsets = torch.randn(6, 2, 4, device=DEVICE), torch.tensor([0, 6], device=DEVICE)
    expected = msacore.window_mean(x, offsets, window=(1, 1))
    torch.cuda.synchronize()
    assert int(torch.cuda.cudart().cudaHostUnregister(0)) != 0, "the call that must fail did not"
    with torch.no_grad():
        ours = msacore.window_mean(x, offsets, window=(1, 1))
    with contextlib.suppress(RuntimeError):  # torch's own check of a launch raises the error that is still pending
        torch.zeros(1, device=DEVICE).add_(1)
    assert torch.equal(ours, expected)
