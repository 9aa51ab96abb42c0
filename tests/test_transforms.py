"""Every operator and module under torch's ways to differentiate, batch, trace and checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import msacore
from tests import cases
from tests.opcase import FLOAT32, OpCase, at, cotangents, leaves, map_tensors, outputs_of, run
from tests.test_ops import each_small_sample

CPU = torch.device("cpu")


@dataclass
class _Call:
    """An operator call as a function of its differentiable tensors, with what it must return."""

    case: OpCase
    leaves: list[Tensor]
    function: Callable[..., tuple[Tensor, ...]]
    outputs: list[Tensor]
    cotangents: list[Tensor]
    gradients: list[Tensor]

    @property
    def values(self) -> tuple[Tensor, ...]:
        return tuple(t.detach() for t in self.leaves)

    def scalar(self, *values: Tensor) -> Tensor:
        return torch.stack([(o * c).sum() for o, c in zip(self.function(*values), self.cotangents, strict=True)]).sum()

    def squares(self, *values: Tensor) -> Tensor:
        """Has a second derivative even if the operator is linear."""
        return torch.stack([o.square().sum() for o in self.function(*values)]).sum()

    def check_backward(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        grads = torch.autograd.grad(outputs, inputs, self.cotangents, allow_unused=True)
        for ours, ref in zip(grads, self.gradients, strict=True):
            torch.testing.assert_close(torch.zeros_like(ref) if ours is None else ours, ref)


def _call(case: OpCase, arguments: dict[str, Any]) -> _Call:
    outputs, gradients = run(case, case.op, arguments)
    with_leaves, wanted = leaves(case, arguments)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        replacement = {id(t): value for (_, t), value in zip(wanted, values, strict=True)}
        return tuple(outputs_of(case.op(**map_tensors(with_leaves, lambda t: replacement.get(id(t), t)))))

    return _Call(case, [t for _, t in wanted], function, outputs, cotangents(outputs), gradients)


@pytest.fixture(params=cases.ALL, ids=lambda case: case.name)
def call(request: pytest.FixtureRequest) -> _Call:
    return _call(request.param, request.param.samples(CPU, FLOAT32)[0].arguments)


def _assert_close(ours: Sequence[Tensor], ref: Sequence[Tensor]) -> None:
    for a, b in zip(ours, ref, strict=True):
        torch.testing.assert_close(a, b)


def test_function_transforms_give_the_gradients_of_backward(call: _Call) -> None:
    outputs, pull = torch.func.vjp(call.function, *call.values)
    _assert_close(outputs, call.outputs)
    _assert_close(pull(tuple(call.cotangents)), call.gradients)
    everything = tuple(range(len(call.values)))
    _assert_close(torch.func.grad(call.scalar, argnums=everything)(*call.values), call.gradients)

    def flat(*values: Tensor) -> Tensor:
        return torch.cat([o.flatten() for o in call.function(*values)])

    weights = torch.cat([c.flatten() for c in call.cotangents])
    jacobians = torch.func.jacrev(flat, argnums=everything)(*call.values)
    _assert_close([torch.tensordot(weights, j, 1) for j in jacobians], call.gradients)


def test_vmap_is_a_loop_forward_and_backward(call: _Call) -> None:
    factors = (1.0, 0.5, 2.0)
    batches = [torch.stack([v * f for f in factors], -1) for v in call.values]
    outputs = torch.vmap(call.function, in_dims=-1)(*batches)
    gradient = torch.func.grad(call.scalar, argnums=tuple(range(len(call.values))))
    gradients = torch.vmap(gradient, in_dims=-1)(*batches)
    for i, factor in enumerate(factors):
        values = [v * factor for v in call.values]
        _assert_close([o[i] for o in outputs], call.function(*values))
        _assert_close([g[i] for g in gradients], gradient(*values))
    empty = torch.vmap(call.function)(*[v.new_empty(0, *v.shape) for v in call.values])
    assert [o.shape for o in empty] == [(0, *o.shape) for o in call.outputs]
    # Autograd outside the batch, and a batch of one argument only.
    first = batches[0].clone().requires_grad_()
    in_dims = (-1, *[None] * (len(call.values) - 1))
    outputs = torch.vmap(call.function, in_dims=in_dims)(first, *call.values[1:])
    cotangents = [torch.stack([c] * len(factors)) for c in call.cotangents]
    (grad,) = torch.autograd.grad(outputs, first, cotangents)
    torch.testing.assert_close(grad[..., 0], call.gradients[0])


def test_forward_mode_is_refused(call: _Call) -> None:
    words = f"msacore::{call.case.name}: forward-mode differentiation is not implemented"
    values = call.values
    for function in (
        lambda: torch.func.jvp(call.function, values, values),
        lambda: torch.func.jacfwd(call.function)(*values),
        lambda: torch.func.hessian(call.scalar)(*values),
        lambda: torch.func.jvp(torch.func.grad(call.scalar), values, values),
        lambda: torch.func.jvp(torch.vmap(call.function), *[tuple(v[None] for v in values)] * 2),
        lambda: torch.func.linearize(call.function, *values),
    ):
        with pytest.raises(RuntimeError, match=words):
            function()
    for tangent_of in range(len(values)):
        for gradients in (True, False):
            with forward_ad.dual_level(), torch.set_grad_enabled(gradients):
                dual = [forward_ad.make_dual(v, v) if i == tangent_of else v for i, v in enumerate(values)]
                with pytest.raises(RuntimeError, match=words):
                    call.function(*dual)
    outputs = call.function(*call.leaves)
    with forward_ad.dual_level():
        _assert_close(call.function(*values), call.outputs)
        grad_outputs = [forward_ad.make_dual(c, c) for c in call.cotangents]
        with pytest.raises(RuntimeError, match=words):
            torch.autograd.grad(outputs, call.leaves, grad_outputs, allow_unused=True)


def test_second_derivatives_are_refused_in_transforms(call: _Call) -> None:
    words = f"msacore::{call.case.name}: second derivatives are not implemented"
    for outer in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=words):
            outer(lambda *values: torch.func.grad(call.squares)(*values).square().sum())(*call.values)
    with pytest.raises(RuntimeError, match=words):
        torch.func.jacrev(torch.func.jacrev(call.squares))(*call.values)


@each_small_sample
def test_checkpoints_and_hooks_see_each_saved_tensor_once(case: OpCase, sample: str) -> None:
    call = _call(case, case.arguments(sample, CPU, FLOAT32))
    call.check_backward(checkpoint(call.function, *call.leaves, use_reentrant=False), call.leaves)

    inputs = [t.detach().clone().requires_grad_() for t in call.leaves]
    if outputs := [
        (o, c)
        for o, c in zip(checkpoint(call.function, *inputs, use_reentrant=True), call.cotangents, strict=True)
        if o.requires_grad
    ]:
        torch.autograd.backward(*zip(*outputs, strict=True))
        for t, ref in zip(inputs, call.gradients, strict=True):
            torch.testing.assert_close(torch.zeros_like(ref) if t.grad is None else t.grad, ref)

    packed, unpacked = [], []

    def pack(t: Tensor) -> int:
        packed.append(t.clone())
        return len(packed) - 1

    def unpack(index: int) -> Tensor:
        unpacked.append(index)
        return packed[index]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outputs = call.function(*call.leaves)
    call.check_backward(outputs, call.leaves)
    assert sorted(unpacked) == list(range(len(packed)))


@each_small_sample
def test_fake_tensors_go_forward_and_backward(case: OpCase, sample: str) -> None:
    arguments = case.arguments(sample, CPU, FLOAT32)
    expected, expected_grads = run(case, case.op, arguments)
    with_leaves, wanted = leaves(case, arguments)
    with FakeTensorMode() as mode:
        fake = map_tensors(with_leaves, mode.from_tensor)
        outputs = outputs_of(case.op(**fake))
        inputs = [at(fake, path) for path, _ in wanted]
        grads = torch.autograd.grad(outputs, inputs, [torch.empty_like(o) for o in outputs], allow_unused=True)
    for ours, ref in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        assert ours is None or (ours.shape, ours.dtype, ours.stride()) == (ref.shape, ref.dtype, ref.stride())


@pytest.mark.skipif(not hasattr(torch.jit, "trace"), reason="torch.jit.trace is gone from this torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_have_gradients(call: _Call) -> None:
    traced = torch.jit.trace(call.function, tuple(call.leaves))
    for _ in range(3):  # the first runs are profiled, later ones optimised
        call.check_backward(traced(*call.leaves), call.leaves)


def test_profilers_and_anomaly_mode_name_the_operator(call: _Call) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = call.function(*call.leaves)
        call.check_backward(outputs, call.leaves)
    names = {event.name for event in profile.events()}
    for name in (f"msacore::{call.case.name}", f"msacore::{call.case.name}Backward"):
        assert name in names, f"{name} is not among {names}"
    with (
        pytest.raises(RuntimeError, match=f"'msacore::{call.case.name}Backward' returned nan"),
        pytest.warns(UserWarning, match=f"msacore::{call.case.name}Backward"),
        torch.autograd.detect_anomaly(),
    ):
        first = call.function(*call.leaves)[0]
        torch.autograd.grad(first, call.leaves, torch.full_like(first, torch.nan), allow_unused=True)


def test_operators_are_compiled_without_gradients(call: _Call) -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager")
        _assert_close(compiled(*call.values), call.outputs)


def _modules() -> list[tuple[torch.nn.Module, tuple[Any, ...]]]:
    def rows(n: int, width: int) -> Tensor:
        return torch.randn(n, width, requires_grad=True)

    states, offsets = torch.randn(6, 3, 8, requires_grad=True), torch.tensor([0, 2, 6])
    nn = msacore.nn
    found: list[tuple[torch.nn.Module, tuple[Any, ...]]] = [
        (nn.MatrixFusion(8, 5), ([rows(4, 8) for _ in range(3)],)),
        (nn.LowRankFusion((8, 4, 6), 5), ([rows(4, 8), rows(4, 4), rows(4, 6)],)),
        (
            nn.HierarchicalContrastiveLoss(8, 4, projection=16),
            ([rows(6, 8) for _ in range(3)], rows(6, 8), [rows(6, 4) for _ in range(3)]),
        ),
    ]
    for variant in ("linear", "gcnii", "gated"):
        found.append((nn.AlternatingPropagation(8, 2, variant), (states, offsets)))
    if hasattr(nn, "InfoNCE"):
        found.append((nn.InfoNCE(learn_temperature=True), (rows(6, 8), rows(6, 8))))
    if hasattr(nn, "RankNContrast"):
        found.append((nn.RankNContrast(learn_temperature=True), (rows(6, 8), torch.randn(6))))
    return found


_MODULES = range(len(_modules()))


@pytest.mark.parametrize("index", _MODULES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_modules_are_checkpointed(index: int, reentrant: bool) -> None:
    module, inputs = _modules()[index]

    def gradients(call: Callable[..., Any]) -> list[Tensor]:
        flat = [*module.parameters(), *(t for t in outputs_of(inputs) if t.is_floating_point())]
        for t in flat:
            t.grad = None
        torch.stack([o.sum() for o in outputs_of(call(*inputs))]).sum().backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in flat]

    # The reentrant form looks for tensors that require grad among the arguments only, and not inside lists.
    def flat_call(*flat: Any) -> Any:
        items = iter(flat[1:])
        return module(*map_tensors(inputs, lambda _: next(items)))

    def checkpointed(*given: Any) -> Any:
        needs_grad = torch.zeros(1, requires_grad=True)
        return checkpoint(flat_call, needs_grad, *outputs_of(given), use_reentrant=reentrant)

    _assert_close(gradients(checkpointed), gradients(module))
