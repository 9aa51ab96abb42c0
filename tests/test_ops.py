"""Generic tests: every operator case under every rule of the contract."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import cases
from tests.opcase import (
    DTYPES,
    FLOAT32,
    FLOAT64,
    OpCase,
    Sample,
    assert_as_accurate_as_torch,
    at,
    cotangents,
    leaves,
    map_tensors,
    non_contiguous,
    outputs_of,
    run,
    tensors_of,
    to_dtype,
)

CPU = torch.device("cpu")
case_parameter = pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)


def _each(condition: Callable[[OpCase, Sample], bool] = lambda case, sample: True) -> Any:
    """Parametrise over case and sample; samples are built again inside the test, on its device and dtype."""
    pairs: list[tuple[OpCase, str]] = []
    for case in cases.ALL:
        found = [(case, sample.id) for sample in case.samples(CPU, FLOAT32) if condition(case, sample)]
        assert found, f"no sample of {case.name} is fit for a generic test"
        pairs += found
    return pytest.mark.parametrize(("case", "sample"), pairs, ids=[f"{case.name}-{name}" for case, name in pairs])


def _hides(case: OpCase, sample: Sample) -> bool:
    return any(mask.any() for _, mask in case.hidden(map_tensors(sample.arguments, torch.clone)))


each_sample = _each()
each_small_sample = _each(lambda case, sample: sample.small)
each_sample_that_hides = _each(_hides)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_sample
def test_values_and_gradients_are_as_accurate_as_torch(
    case: OpCase, sample: str, device: torch.device, dtype: torch.dtype
) -> None:
    arguments = case.arguments(sample, device, dtype)
    outputs, grads = run(case, case.op, arguments)
    for output in outputs:
        assert output.is_contiguous()
        assert output.device.type == device.type
        assert output.dtype == (FLOAT32 if case.loss and dtype.itemsize == 2 else dtype)
    assert all(grad.dtype == dtype for grad in grads)
    _assert_accurate(case, arguments, outputs, grads)


def _assert_accurate(case: OpCase, arguments: dict[str, Any], outputs: list[Tensor], grads: list[Tensor]) -> None:
    expected, expected_grads = run(case, case.reference, to_dtype(arguments, FLOAT64))
    yardstick, yardstick_grads = run(case, case.reference, arguments)
    for i, (ours, ref, same) in enumerate(zip(outputs, expected, yardstick, strict=True)):
        assert_as_accurate_as_torch(ours, ref, same, f"output {i}")
    _, wanted = leaves(case, arguments)
    for (path, _), ours, ref, same in zip(wanted, grads, expected_grads, yardstick_grads, strict=True):
        assert_as_accurate_as_torch(ours, ref, same, f"gradient of {path}")


@each_sample
def test_threads_share_the_work(case: OpCase, sample: str) -> None:
    """Values stay correct and bits repeat with any number of threads."""
    arguments = case.arguments(sample, CPU, FLOAT32)
    before = torch.get_num_threads()
    try:
        for threads in (2, 5):
            torch.set_num_threads(threads)
            outputs, grads = run(case, case.op, arguments)
            again, grads_again = run(case, case.op, arguments)
            _assert_accurate(case, arguments, outputs, grads)
            for a, b in zip([*outputs, *grads], [*again, *grads_again], strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@each_small_sample
def test_gradcheck(case: OpCase, sample: str, device: torch.device) -> None:
    arguments, wanted = leaves(case, case.arguments(sample, device, FLOAT64))

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        replacement = {id(t): value for (_, t), value in zip(wanted, values, strict=True)}
        result = case.op(**map_tensors(arguments, lambda t: replacement.get(id(t), t)))
        return tuple(o for o in outputs_of(result) if o.requires_grad)

    assert function(*[t for _, t in wanted]), "nothing to differentiate"
    assert torch.autograd.gradcheck(function, [t for _, t in wanted], fast_mode=False)


class _Recorder(TorchDispatchMode):
    """Collects the calls of msacore operators, forward and backward, as they reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "msacore":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@each_small_sample
def test_opcheck(case: OpCase, sample: str, device: torch.device, layout: str) -> None:
    arguments = case.arguments(sample, device, FLOAT32)
    if layout == "transposed":
        arguments = map_tensors(arguments, non_contiguous)
    with _Recorder() as recorder:
        run(case, case.op, arguments)
    assert recorder.calls, "the public function reached no operator"
    for func, args, kwargs in recorder.calls:
        args = map_tensors(list(args), torch.Tensor.detach)
        torch.library.opcheck(func, tuple(args), kwargs)
        if not func._schema.name.endswith("_backward"):
            differentiable = map_tensors(args, lambda t: t.requires_grad_() if t.is_floating_point() else t)
            torch.library.opcheck(func, tuple(differentiable), kwargs)


def test_every_operator_is_compiled_with_two_batch_sizes(case_and_pair: tuple[OpCase, Sample, Sample]) -> None:
    case, first, second = case_and_pair
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True, backend="aot_eager")
    for sample in (first, second):
        outputs, grads = run(case, compiled, sample.arguments)
        expected, expected_grads = run(case, case.op, sample.arguments)
        for ours, ref in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
            torch.testing.assert_close(ours, ref)


def two_sizes(case: OpCase) -> tuple[Sample, Sample]:
    """Two samples that differ in sizes only: same arguments given, same options."""
    samples = case.samples(CPU, FLOAT32)
    for i, first in enumerate(samples):
        for second in samples[i + 1 :]:
            same_form = [p for p, _ in tensors_of(first.arguments)] == [p for p, _ in tensors_of(second.arguments)]
            options = [{k: v for k, v in s.arguments.items() if not list(tensors_of(v))} for s in (first, second)]
            shapes = [[t.shape for _, t in tensors_of(s.arguments)] for s in (first, second)]
            sizes = [min((n for shape in group for n in shape), default=0) for group in shapes]
            if same_form and options[0] == options[1] and shapes[0] != shapes[1] and min(sizes) > 1:
                return first, second
    raise AssertionError(f"{case.name} has no two samples that differ in sizes only")


@pytest.fixture(params=cases.ALL, ids=lambda case: case.name)
def case_and_pair(request: pytest.FixtureRequest) -> tuple[OpCase, Sample, Sample]:
    return request.param, *two_sizes(request.param)


def test_inductor_compiles_every_operator(case_and_pair: tuple[OpCase, Sample, Sample]) -> None:
    case, sample, _ = case_and_pair
    torch._dynamo.reset()
    outputs, grads = run(case, torch.compile(case.op, fullgraph=True), sample.arguments)
    expected, expected_grads = run(case, case.op, sample.arguments)
    for ours, ref in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(ours, ref)


_BAD = [(case, label) for case in cases.ALL for label in case.bad_inputs]


@pytest.mark.parametrize(("case", "label"), _BAD, ids=[f"{case.name}-{label}" for case, label in _BAD])
def test_bad_input_raises_alike_on_every_device(case: OpCase, label: str, device: torch.device) -> None:
    bad = case.bad_inputs[label]
    arguments = bad.mutate(dict(case.samples(CPU, FLOAT32)[0].arguments))
    places = [torch.device("cpu")] if bad.values else [device, torch.device("meta")]
    for place in places:
        with pytest.raises((RuntimeError, ValueError)) as raised:
            case.op(**map_tensors(arguments, lambda t, place=place: t.to(place)))
        assert case.name in str(raised.value), f"on {place} the message does not name the operator: {raised.value}"
        for word in bad.words:
            assert word in str(raised.value), f"on {place} the message lacks {word!r}: {raised.value}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_sample_that_hides
def test_hidden_inputs_are_never_read(case: OpCase, sample: str, device: torch.device, dtype: torch.dtype) -> None:
    arguments = case.arguments(sample, device, dtype)
    outputs, grads = run(case, case.op, arguments)
    poisoned = map_tensors(arguments, torch.clone)
    hidden = dict(case.hidden(poisoned))
    for path, mask in hidden.items():
        at(poisoned, path)[mask] = float("nan")
    for ours, ref in zip(run(case, case.op, poisoned)[0], outputs, strict=True):
        if case.hidden_keeps_own_result:
            for mask in hidden.values():
                ours, ref = ours.masked_fill(mask, 0), ref.masked_fill(mask, 0)
        assert torch.equal(ours, ref)
    _, wanted = leaves(case, arguments)
    for (path, _), ours, ref in zip(wanted, run(case, case.op, poisoned)[1], grads, strict=True):
        assert torch.equal(ours, ref), f"gradient of {path} changed"
        if path in hidden and not case.hidden_keeps_own_result:
            assert (ours[hidden[path]] == 0).all(), f"hidden positions of {path} have a gradient"


@each_sample
def test_two_runs_give_equal_bits(case: OpCase, sample: str, device: torch.device) -> None:
    arguments = case.arguments(sample, device, FLOAT32)
    first, second = run(case, case.op, arguments), run(case, case.op, arguments)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


@each_sample
def test_every_output_is_written(case: OpCase, sample: str, device: torch.device) -> None:
    arguments = case.arguments(sample, device, FLOAT32)
    expected = run(case, case.op, arguments)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        outputs, grads = run(case, case.op, arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, ref in zip([*outputs, *grads], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(ours, ref, rtol=0, atol=0, equal_nan=True)


@each_small_sample
def test_non_contiguous_inputs_give_the_same_bits(case: OpCase, sample: str, device: torch.device) -> None:
    arguments = case.arguments(sample, device, FLOAT32)
    outputs, grads = run(case, case.op, arguments)
    wanted_arguments, wanted = leaves(case, arguments)
    strided = map_tensors(wanted_arguments, lambda t: non_contiguous(t) if not t.requires_grad else t)
    strided = {
        name: map_tensors(value, lambda t: _strided_view(t)) if name in case.gradients else value
        for name, value in strided.items()
    }
    ours = outputs_of(case.op(**strided))
    ours_grads = torch.autograd.grad(ours, [t for _, t in wanted], cotangents(ours), allow_unused=True)
    for a, b in zip(ours, outputs, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(ours_grads, grads, strict=True):
        assert torch.equal(torch.zeros_like(b) if a is None else a, b)


def _strided_view(t: Tensor) -> Tensor:
    """A non-contiguous function of the leaf, so that the gradient still arrives at the leaf."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() else t


@case_parameter
def test_double_backward_is_refused(case: OpCase, device: torch.device) -> None:
    arguments, wanted = leaves(case, case.samples(device, FLOAT64)[0].arguments)
    outputs = outputs_of(case.op(**arguments))
    # The gradient of a linear operator depends on the output gradient only.
    grad_outputs = [c.requires_grad_() for c in cotangents(outputs)]
    grads = torch.autograd.grad(outputs, [t for _, t in wanted], grad_outputs, create_graph=True, allow_unused=True)
    grads = [g for g in grads if g is not None and g.requires_grad]
    assert grads, "no gradient to differentiate again"
    with pytest.raises(RuntimeError, match=f"msacore::{case.name}.*second derivative"):
        torch.autograd.grad([g.sum() for g in grads], [*grad_outputs, *(t for _, t in wanted)], allow_unused=True)


@case_parameter
def test_autocast_policy(case: OpCase, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        arguments = case.samples(device, dtype)[0].arguments
        expected = run(case, case.op, arguments)
        with torch.autocast(device.type, torch.bfloat16):
            outputs, grads = run(case, case.op, arguments)
        for ours, ref in zip([*outputs, *grads], [*expected[0], *expected[1]], strict=True):
            assert ours.dtype == ref.dtype
            torch.testing.assert_close(ours, ref)


@case_parameter
def test_operators_run_in_inference_mode(case: OpCase, device: torch.device) -> None:
    arguments = case.samples(device, FLOAT32)[0].arguments
    expected = outputs_of(case.op(**arguments))
    with torch.inference_mode():
        for ours, ref in zip(outputs_of(case.op(**arguments)), expected, strict=True):
            assert torch.equal(ours, ref.detach())
