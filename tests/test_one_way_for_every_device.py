"""A gradient comes from the same operators on every device: those a GPU would call are those that ran."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests import cases
from tests.cuda_on_host.dispatch import CudaOnHost
from tests.opcase import FLOAT32, OpCase, Sample, run

CPU = torch.device("cpu")


def _is_large(sample: Sample) -> bool:
    return sample.id.startswith("large")


# Large samples take seconds on the host.
_CASES = [
    pytest.param(case, large, id=f"{case.name}{', large' if large else ''}", marks=pytest.mark.slow if large else ())
    for case in cases.ALL
    for large in (False, True)
    if case.gradients and any(_is_large(sample) == large for sample in case.samples(CPU, FLOAT32))
]


class _Recorder(TorchDispatchMode):
    """Records the operators of msacore that reach a device, and the shapes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "msacore":
            name = func._schema.name.removeprefix("msacore::")
            self.calls.append((name, [t.shape for t in tree_leaves(result) if isinstance(t, torch.Tensor)]))
        return result


def _calls_of(case: OpCase, arguments: dict[str, Any]) -> list[tuple[str, list[torch.Size]]]:
    with _Recorder() as recorder:
        run(case, case.op, arguments)
    return recorder.calls


@pytest.mark.parametrize(("case", "large"), _CASES)
def test_a_gradient_is_one_call_of_the_backward_operator(case: OpCase, large: bool) -> None:
    """What the operators return also has the same shapes everywhere, because their fake kernels know no device."""
    for sample in case.samples(CPU, FLOAT32):
        if _is_large(sample) != large:
            continue
        calls = _calls_of(case, sample.arguments)
        names = Counter(name for name, _ in calls)
        forward = {name: count for name, count in names.items() if not name.endswith("_backward")}
        backward = {name: count for name, count in names.items() if name.endswith("_backward")}
        assert forward, sample.id
        assert backward == {f"{name}_backward": count for name, count in forward.items()}, sample.id
        if sample.on_host:
            with CudaOnHost():
                assert calls == _calls_of(case, sample.arguments), sample.id
