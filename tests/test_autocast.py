"""Mixed dtypes: refused outside autocast, and cast inside it as the contract says for each operator."""

from typing import Any

import pytest
import torch
from torch import Tensor

import msacore
from tests import cases
from tests.opcase import Arguments, OpCase, at, map_tensors, outputs_of, run, tensors_of

NARROW, WIDE = torch.bfloat16, torch.float32
# The order of targets decides, to the last bit of the dtype in which they are given.
NEVER_CAST = "targets"


def _floating(arguments: Arguments) -> list[tuple[Any, ...]]:
    return [path for path, t in tensors_of(arguments) if t.is_floating_point() and path[0] != NEVER_CAST]


def _cast(arguments: Arguments, dtypes: dict[tuple[Any, ...], torch.dtype]) -> Arguments:
    """The same arguments with some tensors in another dtype, which holds their values exactly."""

    def change(value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtypes[path]) if path in dtypes else value
        if isinstance(value, (list, tuple)):
            return type(value)(change(item, (*path, i)) for i, item in enumerate(value))
        return value

    return {name: change(value, (name,)) for name, value in arguments.items()}


def _samples(case: OpCase, device: torch.device) -> list[Arguments]:
    """Small samples with at least two floating tensors, in bfloat16; targets differ by far less than its resolution."""
    found = []
    for sample in case.samples(device, NARROW):
        arguments = map_tensors(sample.arguments, lambda t: t)
        if NEVER_CAST in arguments and arguments[NEVER_CAST].is_floating_point():
            places = torch.arange(arguments[NEVER_CAST].numel(), device=device).reshape(arguments[NEVER_CAST].shape)
            arguments[NEVER_CAST] = 1 + places.double() % 7 * 1e-9
        if sample.small and len(_floating(arguments)) > (0 if NEVER_CAST in arguments else 1):
            found.append(arguments)
    return found


def _features(case: OpCase, arguments: Arguments) -> list[tuple[Any, ...]]:
    """The arguments whose dtype fusion and propagation keep."""
    return [path for path in _floating(arguments) if path[0] in ("features", "x", "h")]


@pytest.mark.parametrize("narrow_first", [True, False], ids=["narrow first", "wide first"])
@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
def test_mixed_dtypes_become_one_inside_autocast(case: OpCase, narrow_first: bool, device: torch.device) -> None:
    samples = _samples(case, device)
    assert samples or case.name in ("propagate", "window_mean", "modality_mean")  # a single floating argument
    for arguments in samples:
        paths = _floating(arguments)
        mixed = _cast(arguments, {p: NARROW if i % 2 != narrow_first else WIDE for i, p in enumerate(paths)})
        features = {at(mixed, path).dtype for path in _features(case, mixed)}
        together = WIDE if case.loss or WIDE in features else NARROW
        outputs, grads = run(case, case.op, _cast(arguments, dict.fromkeys(paths, together)))
        with torch.autocast(device.type, NARROW):
            ours, our_grads = run(case, case.op, mixed)
        for mine, expected in zip(ours, outputs, strict=True):
            assert mine.dtype == together
            assert torch.equal(mine, expected)
        leaves = [t for name in mixed if name in case.gradients for _, t in tensors_of(mixed[name], (name,))]
        leaves = [t for t in leaves if t.is_floating_point()]
        for leaf, mine, expected in zip(leaves, our_grads, grads, strict=True):
            assert mine.dtype == leaf.dtype
            assert torch.equal(mine, expected.to(leaf.dtype))


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
def test_mixed_dtypes_raise_outside_autocast(case: OpCase, device: torch.device) -> None:
    for arguments in _samples(case, device):
        paths = [p for p in _floating(arguments) if p[0] not in ("temperature", "temperatures")]
        if len(paths) < 2:
            continue
        mixed = _cast(arguments, {p: (NARROW, WIDE)[i % 2] for i, p in enumerate(paths)})
        with pytest.raises((RuntimeError, ValueError), match=case.name) as raised:
            case.op(**mixed)
        assert "bfloat16" in str(raised.value)
        assert "float32" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, NARROW, WIDE], ids=str)
def test_rank_targets_are_compared_in_their_own_dtype_inside_autocast(dtype: torch.dtype, device: torch.device) -> None:
    embeddings = torch.randn(9, 4, device=device).to(dtype)
    ranks = torch.randperm(9, device=device)
    targets = 1 + ranks.double() * 2.0**-30  # exact, so that gaps tie where those of the ranks do
    expected = msacore.rank_n_contrast(embeddings.float(), ranks)
    with torch.autocast(device.type, NARROW):
        (ours,) = outputs_of(msacore.rank_n_contrast(embeddings, targets))
    assert torch.equal(ours, expected)
