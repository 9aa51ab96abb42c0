"""What the public functions accept for each kind of argument, and the words in which they refuse the rest."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import msacore
from msacore.ops import _check
from tests import cases
from tests.opcase import OpCase

CPU = torch.device("cpu")

_NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
_OLD_NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.strided)
_WRONG: list[tuple[Callable[[str, str, Any], Any], Any, str]] = [
    (_check.as_tensor, np.ones((2, 3)), r"to be a tensor, got a NumPy array of dtype float64 and shape \[2, 3\]"),
    (_check.as_tensor, 1.5, "to be a tensor, got 1.5"),
    (_check.as_tensor, None, "to be a tensor, got None"),
    (_check.as_tensor, _NESTED, "to be a strided tensor, got a nested tensor"),
    (_check.as_tensor, _OLD_NESTED, "to be a strided tensor, got a nested tensor"),
    (_check.as_tensor, torch.eye(2).to_sparse(), "to be a strided tensor, got a sparse_coo tensor"),
    (_check.as_tensors, {"text": torch.ones(2)}, "to be a sequence of tensors, got an object of type dict"),
    (
        _check.as_indices,
        torch.tensor([3, 2**63], dtype=torch.uint64),
        r"dtype uint64 below 2\^63, got 9223372036854775808",
    ),
    (_check.as_integer, 2**63, "to be an integer of 64 bits, got 64 bits"),
    (_check.as_integer, np.uint64(2**63), "to be an integer of 64 bits, got 64 bits"),
    (_check.as_number, 10**400, "to be a number that float64 holds"),
    (_check.as_tensors, 3, "to be a sequence of tensors, got 3"),
    (_check.as_tensors, torch.ones(2, 3), "sequence of tensors, got a tensor of dtype float32 and shape"),
    (_check.as_tensors, np.ones(3), "sequence of tensors, got a NumPy array"),
    (_check.as_tensors, "text", "sequence of tensors, got 'text'"),
    (_check.as_tensors, _NESTED, "sequence of tensors, got a nested tensor"),
    (_check.as_indices, torch.ones(2), "`argument` to have dtype int64 or another integer one, got float32"),
    (_check.as_indices, torch.ones(2) > 0, "int64 or another integer one, got bool"),
    (_check.as_indices, [0, 2], "to be a tensor, got a list of 2"),
    (_check.as_number, "0.1", "to be a number, got '0.1'"),
    (_check.as_number, True, "to be a number, got True"),
    (_check.as_number, None, "to be a number, got None"),
    (_check.as_number, 1j, "to be a number, got an object of type complex"),
    (_check.as_number, torch.tensor([1.0, 2.0]), r"to be a number, got a tensor of dtype float32 and shape \[2\]"),
    (_check.as_number, torch.tensor(True), "to be a number, got True"),
    (_check.as_number, torch.tensor(0.1, requires_grad=True), "`argument` is not differentiable"),
    (_check.as_number, torch.tensor(0.1, device="meta"), "on the CPU, got a tensor on meta"),
    (_check.as_numbers, 1.0, "to be a sequence of numbers, got 1.0"),
    (_check.as_numbers, (1.0, None), r"`argument\[1\]` to be a number, got None"),
    (_check.as_numbers, torch.ones(3, requires_grad=True), r"`argument\[0\]` is not differentiable"),
    (_check.as_numbers, torch.ones(3, 1), "sequence of numbers, got a tensor"),
    (_check.as_number_or_tensor, torch.ones(2), "a floating tensor with one element"),
    (_check.as_number_or_tensor, torch.tensor(1), "a floating tensor with one element"),
    (_check.as_number_or_tensor, False, "to be a number, got False"),
    (_check.as_integer, 2.0, "to be an integer, got 2.0"),
    (_check.as_integer, True, "to be an integer, got True"),
    (_check.as_integer, torch.tensor(2.0), "to be an integer, got 2.0"),
    (_check.as_flag, 1, "to be True or False, got 1"),
    (_check.as_flag, 1.0, "to be True or False, got 1.0"),
    (_check.as_flag, None, "to be True or False, got None"),
]


@pytest.mark.parametrize(("check", "value", "words"), _WRONG, ids=[f"{c.__name__}-{w[:40]}" for c, _, w in _WRONG])
def test_wrong_kinds_are_named(check: Callable[[str, str, Any], Any], value: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=f"^msacore::operator: .*`argument.*{words}" if "`" not in words else words):
        check("operator", "argument", value)


@pytest.mark.parametrize("value", ["mean", None, ["relu"], 1])
def test_options_are_listed(value: Any) -> None:
    with pytest.raises(ValueError, match='operator: expected `argument` to be "relu", "gelu" or "identity", got'):
        _check.as_choice("operator", "argument", value, {"relu": 0, "gelu": 1, "identity": 2})


@pytest.mark.parametrize("value", [(1,), (1, 2, 3), 2.0, "12", True, (1, 2.0), None, 2**63])
def test_windows_of_another_form_are_refused(value: Any) -> None:
    with pytest.raises(RuntimeError, match="operator: expected `window"):
        _check.as_window("operator", value)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64, torch.complex128],
)
def test_dtypes_have_the_names_of_torch(dtype: torch.dtype) -> None:
    x = torch.zeros(4, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"got {str(dtype).removeprefix('torch.')}$"):
        msacore.info_nce(x, x)


def test_what_is_accepted() -> None:
    x = torch.ones(2)
    assert _check.as_tensor("operator", "argument", x) is x
    assert _check.as_optional_tensor("operator", "argument", None) is None
    parameters = torch.nn.ParameterList([torch.ones(2), torch.ones(3)])
    for sequence in ((x, x), iter([x, x]), parameters):
        assert len(_check.as_tensors("operator", "argument", sequence)) == 2
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16):
        labels = _check.as_indices("operator", "argument", torch.tensor([0, 3], dtype=dtype))
        assert labels.dtype == torch.int64 and labels.tolist() == [0, 3]
    for number in (2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor([[2]])):
        assert _check.as_number("operator", "argument", number) == 2
    for numbers in ([2, 2.0], np.full(2, 2.0), torch.full((2,), 2.0), (torch.tensor(2), np.int8(2))):
        assert _check.as_numbers("operator", "argument", numbers) == [2, 2]
    for integer in (2, np.int8(2), torch.tensor([2], dtype=torch.uint8)):
        assert _check.as_integer("operator", "argument", integer) == 2
    learned = torch.ones(1, 1, requires_grad=True)
    number, tensor = _check.as_number_or_tensor("operator", "argument", learned)
    assert number == 1 and tensor is not None and tensor.shape == () and tensor.requires_grad
    assert _check.as_number_or_tensor("operator", "argument", 3) == (3, None)
    assert _check.as_flag("operator", "argument", np.bool_(True)) is True
    for window in (2, np.int64(2), (2, 2), [2, torch.tensor(2)], torch.tensor(2)):
        assert _check.as_window("operator", window) == (2, 2)


_NOT_A_NUMBER: tuple[Any, ...] = (True, "0.1", np.ones(2), torch.ones(2))


def _wrong_values(value: Any) -> list[Any]:
    """Values of the wrong kind for an argument that may be ``value``."""
    if isinstance(value, torch.Tensor):
        return [np.ones(tuple(value.shape)), _NESTED, "text", {"x": value}, 1.5, [value]]
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return [3, 1.5, "text", {"x": value[0]}, _NESTED, [np.ones(3)] * len(value)]
    if isinstance(value, bool):
        return [1, 1.0, "yes", torch.ones(2), np.ones(2), None]
    if isinstance(value, str):
        return ["no such word", 1, None, [value], torch.ones(2), np.ones(2)]
    if isinstance(value, tuple):
        return [1.5, "text", None, {"x": 1}, (*value, *value), (None,) * len(value), torch.ones(7, 1)]
    if isinstance(value, int):
        return [*_NOT_A_NUMBER, 1.5, None, torch.ones((), requires_grad=True), torch.ones((), device="meta")]
    return [*_NOT_A_NUMBER, 1j, None]


def _options() -> list[tuple[OpCase, str, dict[str, Any]]]:
    """Every argument of every operator, with the arguments of a call in which it is used."""
    found = []
    for case in cases.ALL:
        samples = [s.arguments for s in case.samples(CPU, torch.float32)]
        for name, parameter in inspect.signature(case.op).parameters.items():
            used = [s for s in samples if s.get(name) is not None]
            used = [s for s in used if name != "labels" or s.get("tier1", "intra_modal") == "intra_modal"]
            if not used and parameter.default is not None:
                used = [{**samples[0], name: parameter.default}]
            assert used or name == "group", f"no sample of {case.name} has {name}"
            found += [(case, name, used[0])] if used else []
    return found


_OPTIONS = _options()
_OPTION_IDS = [f"{case.name}-{name}" for case, name, _ in _OPTIONS]


@pytest.mark.parametrize(("case", "name", "arguments"), _OPTIONS, ids=_OPTION_IDS)
def test_every_operator_names_an_argument_of_a_wrong_kind(case: OpCase, name: str, arguments: dict[str, Any]) -> None:
    for wrong in _wrong_values(0.1 if name == "temperature" else arguments[name]):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            case.op(**{**arguments, name: wrong})
        words = str(raised.value)
        assert f"msacore::{case.name}: " in words and name in words, f"{_check.describe(wrong)}: {words}"


_GRAPH = (torch.tensor([0, 2, 2, 3]), torch.tensor([1, 2, 0]), torch.ones(3))
_INTEGERS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "propagate": lambda x, k: msacore.propagate(x, torch.tensor([0, 2, 3]), window=(k, 1), steps=k),
    "one number for a window": lambda x, k: msacore.window_mean(x, torch.tensor([0, 2, 3]), window=k),
    "graph_propagate": lambda x, k: msacore.graph_propagate(x[:, 0], *_GRAPH, steps=k),
    "alternating": lambda x, k: msacore.alternating_graph_propagate(x[:, 0], _GRAPH, _GRAPH, steps=k),
}


@pytest.mark.parametrize("name", _INTEGERS)
def test_integers_may_be_symbols_of_a_compiler(name: str) -> None:
    call = _INTEGERS[name]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(3, 2, 4)
    for k in (2, 3, 5):
        torch.testing.assert_close(compiled(x, k), call(x, k))
