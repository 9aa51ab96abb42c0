"""A gradient comes from the same operators on every device: those a GPU would call are those that ran."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import cases
from tests.cuda_on_host.dispatch import CudaOnHost
from tests.opcase import FLOAT32, OpCase, run

CPU = torch.device("cpu")
_CASES = [case for case in cases.ALL if case.gradients]


class _Counter(TorchDispatchMode):
    """Counts the operators of msacore that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "msacore":
            self.names[func._schema.name.removeprefix("msacore::")] += 1
        return func(*args, **(kwargs or {}))


def _operators_of(case: OpCase, arguments: dict[str, Any]) -> Counter[str]:
    with _Counter() as counter:
        run(case, case.op, arguments)
    return counter.names


@pytest.mark.parametrize("key", ["cpu", "cuda on the host"])
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.name)
def test_a_gradient_is_one_call_of_the_backward_operator(case: OpCase, key: str) -> None:
    for sample in case.samples(CPU, FLOAT32):
        if key == "cpu":
            names = _operators_of(case, sample.arguments)
        elif sample.on_host:
            with CudaOnHost():
                names = _operators_of(case, sample.arguments)
        else:
            continue
        forward = {name: count for name, count in names.items() if not name.endswith("_backward")}
        backward = {name: count for name, count in names.items() if name.endswith("_backward")}
        assert forward, sample.id
        assert backward == {f"{name}_backward": count for name, count in forward.items()}, sample.id
