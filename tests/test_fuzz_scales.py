"""Losses of rows of extreme scale against float64 formulas of our own, with fixed seeds.

Second tier (`make test-all`): many cases, each through a formula of Python loops five times.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import msacore
from tests.fuzz import draws
from tests.fuzz.draws import Drawn, Source
from tests.opcase import FLOAT32, FLOAT64
from tests.test_fuzz_operators import _CASES, _LOSSES, _evaluate, _nudged

pytestmark = pytest.mark.slow

# All rows at one scale, or each at its own. Losses of unit rows do not depend on the scale, so any scales may mix.
_SCALES = {
    torch.float32: (1e20, 1e-30, 1e-40, 1e36, 1.0),
    torch.float64: (1e150, 1e-150, 1.0),
    torch.float16: (1e4, 1e-6, 1.0),
    torch.bfloat16: (1e20, 1e-30, 1e-38, 1e36, 1.0),
}
# Distances depend on it: seen from a row of 1e36, two rows of 1 are equally far away in float64, yet the true
# difference of their distances, about 1, decides the softmax. The rows of rank_n_contrast are therefore of one scale,
# times factors that float64 resolves.
_FACTORS = (1.0, 1.0, 1e3, 1e5)


def _scales(name: str, source: Source) -> Callable[[int], float]:
    mixed, one = source.often(0.5), source.random.choice(_SCALES[source.dtype])
    if not mixed:
        return lambda _: one
    if name != "rank_n_contrast":
        return lambda _: source.random.choice(_SCALES[source.dtype])
    # The largest factor times the largest scale is in range.
    top = 1e-6 * torch.finfo(source.dtype).max
    return lambda _: min(one, top) * source.random.choice(_FACTORS)


def _norm(row: Tensor) -> float:
    row = row.detach().double()
    largest = float(row.abs().max()) if len(row) else 0.0
    return 0.0 if largest == 0 else float((row / largest).norm()) * largest


def _natural(name: str, drawn: Drawn, path: tuple[Any, ...], row: Any, anchors: int) -> float:
    """The size of one term of a gradient; in the sum the terms may cancel, down to nothing.

    A softmax weight minus 1 is known only to the rounding error of 1, however small the difference is.
    """
    given = drawn.arguments.get("temperatures", [drawn.arguments.get("temperature", 2.0)])
    temperatures = [float(t) for t in (given if isinstance(given, (list, tuple)) else [given])]
    steepest = anchors / min(temperatures)
    if path[0] in ("temperature", "temperatures"):
        rows = drawn.arguments.get("embeddings", [])
        farthest = 2 * max((_norm(row) for row in rows), default=0.0) if name == "rank_n_contrast" else 1.0
        return steepest * farthest / min(temperatures)
    if path[0] == "weights":
        weights = drawn.arguments["weights"].double()[row]
        total = float(weights[weights > 0].sum())
        return steepest / total if total else steepest
    if name == "rank_n_contrast":
        return steepest
    tensor: Any = drawn.arguments
    for key in path:
        tensor = tensor[key]
    norm = _norm(tensor[row])
    return steepest / norm if norm else 0.0


def _survives(name: str, drawn: Drawn, dtype: torch.dtype, formula: Callable[..., Any]) -> None:
    """Extreme scales, row by row: finite where representable, never NaN, and near the formula in float64.

    The yardsticks are the formula in float64 at inputs that are a rounding error off, and in the dtype of accumulation.
    """
    accumulate = FLOAT64 if dtype == FLOAT64 else FLOAT32
    ours = _evaluate(getattr(msacore, name), drawn, torch.clone, lambda o: o)
    wanted = _evaluate(formula, drawn, torch.Tensor.double, lambda o: o)
    nudges = [partial(_nudged, accumulate=accumulate, compute=FLOAT64, turn=turn) for turn in (0, 2, 4)]
    others = [_evaluate(formula, drawn, p, lambda o: o) for p in (*nudges, lambda t: t.to(accumulate))]
    tensors = [("output", (i,), m, wanted[0][i], [o[0][i] for o in others]) for i, m in enumerate(ours[0])]
    tensors += [("gradient", p, m, wanted[1][p], [o[1][p] for o in others]) for p, m in ours[1].items()]
    anchors = max((len(m) for m in ours[1].values() if m.dim() > 1), default=1)
    for kind, where, mine, exact, yardsticks in tensors:
        limits = torch.finfo(mine.dtype)
        rows: Any = range(len(mine)) if mine.dim() > 1 else [...]
        for row in rows:
            got, right = mine[row].double(), exact[row]
            what = f"{name}: {kind} {where}, row {row}"
            assert not got.isnan().any(), f"{what} is NaN"
            inside = right.abs() < limits.max / 2
            assert got[inside].isfinite().all(), f"{what} is not finite"
            if not inside.any():
                continue
            error = (got - right)[inside].abs().max()
            # Where the formula itself overflows, it says nothing.
            spread = max(float((y[row] - right)[inside].nan_to_num(0, 0, 0).abs().max()) for y in yardsticks)
            floor = (1e-5 if dtype != FLOAT64 else 1e-12) + (limits.eps if mine.dtype != accumulate else 0)
            floor = floor * float(right[inside].abs().max()) + 4 * limits.smallest_normal * limits.eps
            if kind == "gradient":
                floor += 8 * torch.finfo(accumulate).eps * _natural(name, drawn, where, row, anchors)
            assert error <= 8 * spread + floor, (
                f"{what}: error {float(error):.3e} of {float(right[inside].abs().max()):.3e}, "
                f"floor {floor:.1e}, spread {spread:.1e}"
            )


@pytest.mark.parametrize("name", _LOSSES)
def test_rows_of_extreme_scale(name: str) -> None:
    """All rows at one scale, or each at its own; denormal rows and rows near the largest number among them."""
    formula, count = _CASES[name]
    checked = 0
    for seed in range(10_000, 10_000 + count // 4):
        source = Source(seed)
        drawn = getattr(draws, name)(source, _scales(name, source))
        try:
            _survives(name, drawn, source.dtype, formula)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {source.dtype}") from error
        checked += 1
    print(f"{name}: {checked} cases of extreme scale")
    assert checked == count // 4 > 0
