"""The small shapes of every benchmark through pytest-benchmark: `pytest bench`."""

from typing import Any

import pytest
import torch

from bench.__main__ import benchmarks
from bench.harness import Benchmark, Provider, Shape, Unavailable, with_backward, without_grad

_CASES = [
    pytest.param(benchmark, shape, provider, id=f"{benchmark.name}-{shape.name}-{provider.name}")
    for benchmark in benchmarks().values()
    for shape in benchmark.shapes
    if shape.quick
    for provider in benchmark.providers
    if shape.decisive or not provider.compiled
]


@pytest.mark.parametrize(("measured", "shape", "provider"), _CASES)
def test_speed(benchmark: Any, measured: Benchmark, shape: Shape, provider: Provider) -> None:
    torch.manual_seed(0)
    inputs = measured.inputs(shape.sizes, torch.device("cpu"))
    try:
        call = provider.bind(inputs)
        without_grad(call)()
    except Unavailable as reason:
        pytest.skip(str(reason))
    benchmark.group = f"{measured.name} {shape.name}"
    benchmark(with_backward(call, inputs) if measured.differentiable else without_grad(call))
