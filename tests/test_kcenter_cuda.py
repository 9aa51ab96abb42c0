"""The CUDA code of selection, executed on the CPU: the tests of the kernels again, and whole selections."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import msacore
from msacore.ops import kcenter
from msacore.selection import greedy
from tests.cases.kcenter import CASES, KernelCase, draw
from tests.cuda_on_host.dispatch import CudaOnHost
from tests.opcase import DTYPES, map_tensors, non_contiguous
from tests.test_cuda_shim import SCHEDULES

# With the fixture below, these tests run the CUDA code.
from tests.test_kcenter import (  # noqa: F401
    test_count_equals_the_plain_count,
    test_distances_closer_than_the_filter_can_tell_are_told_apart,
    test_distances_of_rows_whose_squares_overflow_or_vanish,
    test_fold_finds_the_nearest_centre,
    test_fold_is_exact_for_any_magnitude_and_offset,
    test_fold_takes_the_centres_a_row_lacks,
    test_fold_ties_go_to_the_first_centre_and_old_centres_stay,
    test_greedy_leaves_a_group_that_is_full,
    test_greedy_stops_where_an_outsider_would_come_first,
    test_products_are_those_of_moved_rows_whatever_comes_with_them,
    test_rank_orders_by_score_then_index,
    test_scan_sums_along_a_tree_over_row_numbers,
    test_scan_sums_hashes_and_finds_the_first_bad_row,
)

CPU = torch.device("cpu")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def on_host() -> Iterator[CudaOnHost]:
    with CudaOnHost() as mode:
        yield mode
    assert mode.calls, "no CUDA code was run"


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [lambda t: t, non_contiguous], ids=["contiguous", "strided"])
def test_every_order_of_threads_and_blocks_gives_equal_bits(
    case: KernelCase, dtype: torch.dtype, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for schedule in SCHEDULES:
        monkeypatch.setenv("CUDA_ON_HOST_SCHEDULE", schedule)
        results.append(case.run(map_tensors(case.arguments(CPU, dtype), change)))
    for schedule, tensors in zip(SCHEDULES[1:], results[1:], strict=True):
        for ours, ref in zip(tensors, results[0], strict=True):
            assert torch.equal(ours, ref), f"{schedule} differs from {SCHEDULES[0]}"


_BAD = [(case, label) for case in CASES for label in case.bad_inputs]


@pytest.mark.parametrize(("case", "label"), _BAD, ids=[f"{case.name}-{label}" for case, label in _BAD])
def test_bad_input_raises_and_wrong_values_raise_nothing(case: KernelCase, label: str) -> None:
    """CUDA code cannot look at values; the sanitized run of this test shows that it stays in bounds."""
    bad = case.bad_inputs[label]
    arguments = bad.mutate(case.arguments(CPU, torch.float32))
    if bad.values:
        case.run(arguments)
        return
    with pytest.raises(RuntimeError) as caught:
        case.run(arguments)
    for word in (case.name, *bad.words):
        assert word in str(caught.value)


def test_rank_takes_any_double() -> None:
    nan, inf = float("nan"), float("inf")
    score = torch.tensor(
        [0.0, -0.0, nan, 5e-324, -5e-324, inf, -inf, 1.0, nan, -1.0, 1e300, -1e300], dtype=torch.float64
    )
    assert kcenter.rank(score, count=99).tolist() == [5, 10, 7, 3, 0, 1, 4, 9, 11, 2, 6, 8]


def test_fold_takes_more_rows_than_are_packed_in_one_go() -> None:
    x = draw(1_030, 1)
    rows, none = torch.arange(len(x)).flip(0), torch.full((len(x),), -1)
    infinite = torch.full((len(x),), torch.inf, dtype=torch.float64)
    delta, owner = kcenter.fold(
        x, rows, torch.zeros_like(rows), x[:3], x.mean(0), infinite, none, scale=0.125, metric=0
    )
    nearest = (x - x[:3, 0]).abs().min(1)
    assert torch.equal(delta.flip(0), nearest.values)
    assert torch.equal(owner.flip(0), nearest.indices)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_greedy_among_more_candidates_than_have_a_matrix_of_distances(metric: str) -> None:
    x = draw(16_400, 3)
    one, far = torch.ones(16_400, dtype=torch.float64), torch.tensor([-torch.inf], dtype=torch.float64)
    none = torch.arange(0)
    arguments = (x, one, one * 9, torch.arange(16_400), none, none, far, torch.tensor([16_400]))
    options = {"limit": 3, "metric": kcenter.METRICS[metric]}
    picks, scores = kcenter.greedy(*arguments, **options)
    with _disable_current_modes():
        expected, expected_scores = kcenter.greedy(*arguments, **options)
    assert torch.equal(picks, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-13, atol=0)


SELECTIONS = {
    "labelled": {"strategy": "kcenter", "labeled": [3, 77]},
    "no labels": {"strategy": "kcenter"},
    "cosine": {"strategy": "kcenter", "distance": "cosine", "labeled": torch.ones(2, 5)},
    "uncertain": {"strategy": "uncertainty_kcenter"},
    "prefilter": {"strategy": "prefilter", "options": {"factor": 8}},
    "probcover": {"strategy": "probcover", "options": {"delta": 1.0}},
    "lcmd": {"strategy": "lcmd"},
}


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
def test_whole_selections_are_those_of_the_cpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, on_host: CudaOnHost
) -> None:
    monkeypatch.setattr(greedy.Shard, "whole", False)
    monkeypatch.setattr(greedy, "_CANDIDATES", 16)  # several rounds, in a small pool
    pool = draw(700, 5).mul(3).round().div(3).float()
    arguments = dict(options, uncertainty=torch.rand(700, generator=torch.Generator().manual_seed(1)))
    ours = msacore.select(pool, 40, **arguments)
    assert on_host.calls
    with _disable_current_modes():
        expected = msacore.select(pool, 40, **arguments)
    assert torch.equal(ours.indices, expected.indices)
    torch.testing.assert_close(ours.scores, expected.scores, rtol=1e-12, atol=1e-12)
    assert ours.radius == pytest.approx(expected.radius, rel=1e-12)
