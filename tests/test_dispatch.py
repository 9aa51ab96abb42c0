"""Which operators a call reaches: the same ones on every device, so that what is tested here is what a GPU runs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.cuda_on_host.dispatch import CudaOnHost
from tests.opcase import DTYPES, OpCase, run
from tests.test_ops import CPU, each_small_sample


class _Names(TorchDispatchMode):
    """Collects the names of the msacore operators that reach the dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "msacore":
            self.calls += 1
            self.names.append(func._schema.name.removeprefix("msacore::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["cpu", "cuda on the host"])
def names(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The operators that are called while the test runs; with CUDA code the inner mode passes on every one of them."""
    if request.param == "cpu":
        with _Names() as mode:
            yield mode.names
    else:
        with CudaOnHost() as on_host, _Names() as mode:
            yield mode.names
        assert on_host.calls == mode.calls > 0


@each_small_sample
def test_a_call_reaches_its_operator_and_its_gradient_and_nothing_else(
    case: OpCase, sample: str, names: list[str]
) -> None:
    arguments = case.arguments(sample, CPU, torch.float32)
    for gradients in (False, True):
        names.clear()
        with torch.set_grad_enabled(gradients):
            case.op(**arguments)
        assert names == [case.name]
    for dtype in DTYPES:
        names.clear()
        run(case, case.op, case.arguments(sample, CPU, dtype))
        assert names == [case.name, f"{case.name}_backward"], f"in {dtype}"
