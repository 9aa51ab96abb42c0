"""Random arguments of every operator against float64 formulas of our own, with fixed seeds.

Second tier (`make test-all`): hundreds of cases, each through a formula of Python loops five times.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import msacore
from tests.fuzz import draws, losses, messages
from tests.fuzz.draws import Drawn, Source
from tests.opcase import (
    FLOAT32,
    FLOAT64,
    Arguments,
    assert_as_accurate_as_torch,
    at,
    cotangents,
    map_tensors,
    outputs_of,
    tensors_of,
)

pytestmark = pytest.mark.slow

_CASES = {
    "info_nce": (losses.info_nce, 320),
    "hierarchical_contrastive_loss": (losses.hierarchical_contrastive_loss, 90),
    "rank_n_contrast": (losses.rank_n_contrast, 150),
    "matrix_fusion": (messages.matrix_fusion, 240),
    "low_rank_fusion": (messages.low_rank_fusion, 300),
    "propagate": (messages.propagate, 700),
    "window_mean": (messages.window_mean, 600),
    "modality_mean": (messages.modality_mean, 200),
    "graph_propagate": (messages.graph_propagate, 700),
    "alternating_graph_propagate": (messages.alternating_graph_propagate, 300),
}
_LOSSES = ("info_nce", "hierarchical_contrastive_loss", "rank_n_contrast")
Result = tuple[list[Tensor], dict[tuple[Any, ...], Tensor]]


def _evaluate(function: Callable[..., Any], drawn: Drawn, prepare: Callable[[Tensor], Tensor], after: Any) -> Result:
    """Outputs, and the gradients by path; `prepare` turns a leaf into what the function sees."""
    leaves: dict[tuple[Any, ...], Tensor] = {}
    arguments: Arguments = {}

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_() if t.is_floating_point() else t

    for name, value in drawn.arguments.items():
        if name in drawn.gradients:
            value = map_tensors(value, leaf)
            leaves |= {path: t for path, t in tensors_of(value, (name,)) if t.is_floating_point()}
            value = map_tensors(value, lambda t: prepare(t) if t.is_floating_point() else t)
        arguments[name] = value
    outputs = [after(o) for o in outputs_of(function(**arguments))]
    # A formula in which no term is left is a constant.
    some = [(o, c) for o, c in zip(outputs, cotangents(outputs), strict=True) if o.requires_grad]
    roots, cotangent = [o for o, _ in some], [c for _, c in some]
    grads = (
        torch.autograd.grad(roots, list(leaves.values()), cotangent, allow_unused=True)
        if some
        else [None] * len(leaves)
    )
    found = {p: torch.zeros_like(t) if g is None else g for g, (p, t) in zip(grads, leaves.items(), strict=True)}
    return [o.detach() for o in outputs], found


def _strided(t: Tensor) -> Tensor:
    """The same values with strides other than those of a fresh tensor."""
    if t.dim() < 2:
        return torch.stack([t, t], -1)[..., 0]
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def _nudged(t: Tensor, accumulate: torch.dtype, compute: torch.dtype, turn: float) -> Tensor:
    """Entries off by about a rounding error, the same error for the same value."""
    wide = t.to(compute)
    return wide * (1 + torch.finfo(accumulate).eps * (wide.detach() * 12345.678 + turn).cos())


def _assert_accurate(mine: Tensor, exact: Tensor, yardsticks: list[Tensor], what: str) -> None:
    """The error rule against the worst of the yardsticks: a single one may by luck have no error."""
    assert mine.isfinite().all(), f"{what} is not finite"
    if exact.numel() and (exact == 0).all():  # as for gradients of cosines in one dimension: rounding may be left
        assert mine.abs().max() <= 1000 * torch.finfo(mine.dtype).eps, f"{what} is not zero"
    elif exact.numel():
        worst = max(yardsticks, key=lambda y: float((y.double() - exact).abs().max()))
        assert_as_accurate_as_torch(mine, exact.double(), worst, what)


def _together(grads: dict[tuple[Any, ...], Tensor]) -> dict[Any, Tensor]:
    """Gradients by argument; the members of a sequence are joined, except temperatures, whose scales differ."""
    found: dict[Any, list[Tensor]] = {}
    for path, grad in grads.items():
        found.setdefault(path if path[0] == "temperatures" else path[0], []).append(grad.flatten())
    return {key: torch.cat(parts) for key, parts in found.items()}


def _agrees(name: str, drawn: Drawn, dtype: torch.dtype, formula: Callable[..., Any]) -> None:
    """At most twice the error of the formula in the dtype of accumulation, at these inputs or a rounding off them."""
    accumulate = FLOAT64 if dtype == FLOAT64 else FLOAT32
    result = accumulate if name in _LOSSES else dtype

    def cast(output: Tensor) -> Tensor:
        return output.to(result)

    strided = len(drawn.arguments) % 2 == 1
    ours = _evaluate(getattr(msacore, name), drawn, _strided if strided else torch.clone, lambda o: o)
    wanted = _evaluate(formula, drawn, torch.Tensor.double, lambda o: o)
    nudges = [partial(_nudged, accumulate=accumulate, compute=accumulate, turn=turn) for turn in (0, 2, 4)]
    others = [_evaluate(formula, drawn, p, cast) for p in (*nudges, lambda t: t.to(accumulate))]
    for index, mine in enumerate(ours[0]):
        assert mine.dtype == result
        assert mine.shape == wanted[0][index].shape
        _assert_accurate(mine, wanted[0][index], [o[0][index] for o in others], f"{name}: output {index}")
    exact, yardsticks = _together(wanted[1]), [_together(o[1]) for o in others]
    for key, mine in _together(ours[1]).items():
        _assert_accurate(mine, exact[key], [y[key] for y in yardsticks], f"{name}: gradient of {key}")


def _leaves_unread(name: str, drawn: Drawn) -> bool:
    """NaN in what must stay unread changes no bit elsewhere; returns whether anything must stay unread."""
    if not any(mask.any() for _, mask in drawn.hidden):
        return False
    function = getattr(msacore, name)
    before = _evaluate(function, drawn, torch.clone, lambda o: o)
    spoilt = map_tensors(drawn.arguments, torch.clone)
    for path, mask in drawn.hidden:
        at(spoilt, path)[mask] = torch.nan
    after = _evaluate(function, Drawn(spoilt, drawn.gradients), torch.clone, lambda o: o)
    masks = dict(drawn.hidden)
    for mine, then in zip(before[0], after[0], strict=True):
        seen = ~masks[("x",)] if drawn.own_result else torch.ones_like(mine, dtype=torch.bool)
        assert torch.equal(mine[seen], then[seen]), f"{name}: an output changes with what is unread"
    for path, grad in before[1].items():
        assert torch.equal(grad, after[1][path]), f"{name}: gradient of {path} changes with what is unread"
        if path in masks and not drawn.own_result:
            assert (grad[masks[path]] == 0).all(), f"{name}: gradient of {path} where it is unread"
    return True


@pytest.mark.parametrize("name", _CASES)
def test_operator_agrees_with_its_formula(name: str) -> None:
    formula, count = _CASES[name]
    checked = spoilt = 0
    for seed in range(count):
        source = Source(seed)
        drawn = getattr(draws, name)(source)
        try:
            _agrees(name, drawn, source.dtype, formula)
            spoilt += _leaves_unread(name, drawn)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {source.dtype}") from error
        checked += 1
    print(f"{name}: {checked} cases, {spoilt} of them with NaN in what is unread")
    assert checked == count
    assert spoilt > count / 8 or name == "alternating_graph_propagate"
