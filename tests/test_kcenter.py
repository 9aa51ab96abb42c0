"""The selection kernels against the plain formulas, in every dtype, at ties, and on bad input."""

import math

import pytest
import torch

from msacore.ops import kcenter
from msacore.reference import kcenter as reference
from tests.cases.kcenter import CASES, KernelCase, draw
from tests.opcase import DTYPES, map_tensors, non_contiguous

CPU = torch.device("cpu")
METRICS = pytest.mark.parametrize("metric", ["euclidean", "cosine"])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _fold(x: torch.Tensor, centers: torch.Tensor, metric: str, delta: torch.Tensor | None = None):
    n = len(x)
    delta = torch.full((n,), torch.inf, dtype=torch.float64) if delta is None else delta
    scale = 2.0 ** -int(x.double().abs().max().clamp_min(1e-300).log2())
    rows, zeros = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    return kcenter.fold(
        x, rows, zeros, centers, x.double().mean(0), delta, zeros - 1, scale=scale, metric=kcenter.METRICS[metric]
    )


@METRICS
@every_dtype
@pytest.mark.parametrize("width", [1, 7, 64, 130])
@pytest.mark.parametrize("count", [0, 1, 2, 150, 300])
def test_fold_finds_the_nearest_centre(metric: str, dtype: torch.dtype, width: int, count: int) -> None:
    x = draw(517, width, seed=width).to(dtype)
    x[5] = 0
    centers = draw(count, width, seed=1).to(dtype).double()
    delta, owner = _fold(x, centers, metric)
    if count == 0:
        assert delta.isinf().all()
        assert owner.eq(-1).all()
        return
    distances = reference.distances(x, centers, metric)
    torch.testing.assert_close(delta, distances.amin(1), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(distances.gather(1, owner[:, None])[:, 0], delta, rtol=1e-13, atol=1e-14)


@METRICS
def test_fold_ties_go_to_the_first_centre_and_old_centres_stay(metric: str) -> None:
    x = draw(300, 4).mul(2).round()
    centers = torch.cat([x[:40], x[:40]])
    delta, owner = _fold(x, centers, metric)
    assert owner.max() < 40
    again, kept = _fold(x, centers, metric, delta)
    assert torch.equal(again, delta)
    assert (_fold(x[:40], x[:40], "euclidean")[0] == 0).all()
    assert kept.min() >= -1


@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_fold_is_exact_for_any_magnitude_and_offset(magnitude: float, offset: float) -> None:
    x = ((draw(400, 33) + offset) * magnitude).float()
    centers = x[:90].double()
    delta, owner = _fold(x, centers, "euclidean")
    distances = reference.distances(x, centers)
    torch.testing.assert_close(delta, distances.amin(1), rtol=1e-13, atol=0)
    assert torch.equal(owner, distances.argmin(1))


def _alike(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and centres whose distances differ by less than a filter in any 16- or 32-bit type can resolve."""
    x = draw(130, 24).float()
    if case == "one centre, shaken":
        x[:] += 40
        return x, x[0].double() + draw(100, 24, seed=1) * 1e-6
    if case == "equal up to the order of components":
        x[:] = x[:, :1]  # rows on the diagonal, so that a permuted centre is equally far away
        return x, torch.stack([draw(24, seed=1).roll(i) for i in range(100)])
    if case == "a few huge rows":
        x[3::7] *= 3e9
        x[5] = 0
    if case == "rows below any 16-bit number":
        x[1:] *= 1e-12
    return x, x[:100].double() + x[:100].double().abs() * draw(100, 24, seed=1) * 1e-5


_ALIKE = [
    "one centre, shaken",
    "equal up to the order of components",
    "a few huge rows",
    "rows below any 16-bit number",
    "centres beside rows",
]


@METRICS
@pytest.mark.parametrize("case", _ALIKE)
def test_distances_closer_than_the_filter_can_tell_are_told_apart(case: str, metric: str) -> None:
    x, centers = _alike(case)
    infinite = torch.full((len(x),), torch.inf, dtype=torch.float64)
    rows, number = torch.arange(len(x)), kcenter.METRICS[metric]

    def fold(some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = 2.0 ** -math.frexp(float(x.abs().max()))[1]
        return kcenter.fold(
            x, rows, rows * 0, some, x.double().mean(0), infinite, rows * 0 - 1, scale=scale, metric=number
        )

    # A single centre leaves nothing to filter: the distances one by one give the least, the owner and the counts.
    each = torch.stack([fold(centers[j : j + 1])[0] for j in range(len(centers))], 1)
    delta, owner = fold(centers)
    assert torch.equal(delta, each.amin(1))
    assert torch.equal(owner, each.argmin(1))
    for radius in (float(each[7, 9]), float(each[0].median()), float(each.max())):
        counts = kcenter.count(x, rows, centers, x.double().mean(0), radius=radius, scale=2.0**-3, metric=number)
        assert torch.equal(counts, (each <= radius).sum(1))


def test_fold_takes_the_centres_a_row_lacks() -> None:
    x, centers = draw(600, 9), draw(70, 9, seed=3)
    start = torch.arange(600) % 71
    distances = reference.distances(x, centers)
    hidden = distances.masked_fill(torch.arange(70)[None, :] < start[:, None], torch.inf)
    infinite = torch.full((600,), torch.inf, dtype=torch.float64)
    rows = torch.arange(600).flip(0)
    delta, owner = kcenter.fold(
        x, rows, start.flip(0), centers, x.mean(0), infinite, start.mul(0) - 1, scale=0.25, metric=0
    )
    torch.testing.assert_close(delta.flip(0), hidden.amin(1), rtol=1e-13, atol=0)
    assert torch.equal(owner.flip(0), hidden.argmin(1).where(start < 70, -1))


@METRICS
@every_dtype
def test_count_equals_the_plain_count(metric: str, dtype: torch.dtype) -> None:
    x = draw(520, 11).mul(2).round().to(dtype)
    centers = x[:333].double()
    # Squared Euclidean distances are whole numbers: a radius between two of them leaves nothing to rounding, with many
    # ties on either side.
    for radius in (0.0, 26.5**0.5, 60.5**0.5, 1e3) if metric == "euclidean" else (0.0, 0.51234, 3.0):
        got = kcenter.count(
            x,
            torch.arange(520),
            centers,
            x.double().mean(0),
            radius=radius,
            scale=0.125,
            metric=kcenter.METRICS[metric],
        )
        assert torch.equal(got, reference.count(x, centers, radius, metric)), radius


@pytest.mark.parametrize("count", [0, 1, 5, 100, 4999, 5000, 6000])
@pytest.mark.parametrize("values", [1, 3, 10**6])
def test_rank_orders_by_score_then_index(count: int, values: int) -> None:
    score = torch.randint(values, (5000,), generator=torch.Generator().manual_seed(values)).double()
    assert torch.equal(kcenter.rank(score, count=count), reference.rank(score, count))


def test_rank_survives_a_sample_that_misleads() -> None:
    score = torch.zeros(40_000, dtype=torch.float64)
    score[::9] = 1
    score[4] = 2
    assert torch.equal(kcenter.rank(score, count=3000), reference.rank(score, 3000))
    score[:20_000] = -torch.inf
    assert torch.equal(kcenter.rank(score, count=3000), reference.rank(score, 3000))


@every_dtype
def test_greedy_stops_where_an_outsider_would_come_first(dtype: torch.dtype) -> None:
    x = draw(60, 5).mul(2).round().to(dtype)
    weight, delta = torch.rand(60, generator=torch.Generator().manual_seed(0)).double(), torch.full((60,), 9.0).double()
    index, far, none = torch.arange(60) * 2, torch.tensor([-torch.inf]).double(), torch.arange(0)
    picks, scores = kcenter.greedy(x, weight, delta, index, none, none, far, torch.tensor([999]), limit=60, metric=0)
    expected, expected_scores = reference.greedy(x, weight, delta, 60)
    assert torch.equal(picks, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-13, atol=0)
    stop = scores[20:21]
    for outsider in (-1, 999):
        bound = (stop, torch.tensor([outsider]))
        made, _ = kcenter.greedy(x, weight, delta, index, none, none, *bound, limit=60, metric=0)
        count = int((scores > stop).sum() if outsider < 0 else (scores >= stop).sum())
        assert torch.equal(made[:count], expected[:count])
        assert made[count:].eq(-1).all()


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("kind", ["scattered", "grid", "copies", "far apart", "huge", "tiny"])
def test_greedy_in_few_dimensions_decides_on_the_bits_of_the_distances(width: int, kind: str) -> None:
    """Up to eight dimensions neighbours are examined together, beyond that one by one; scores are equal to the bit."""
    x = draw(700, width)
    if kind == "grid":
        x = x.mul(2).round()
    elif kind == "copies":
        x = x[torch.arange(700) * 7 % 90]
    elif kind == "far apart":  # cuts at the mean are uneven
        x = torch.exp2(torch.arange(700).double()[:, None] - 350) * (1 + 0 * x)
    x = x * {"huge": 2.0**700, "tiny": 2.0**-700}.get(kind, 1.0)
    weight = torch.rand(700, generator=torch.Generator().manual_seed(2)).double()
    delta = torch.full((700,), torch.inf, dtype=torch.float64)
    index, none, far = torch.arange(700), torch.arange(0), torch.tensor([-torch.inf]).double()
    picks, scores = kcenter.greedy(x, weight, delta, index, none, none, far, torch.tensor([700]), limit=80, metric=0)
    for pick, score in zip(picks.tolist(), scores.tolist(), strict=True):
        assert score == float((weight * delta).max())
        assert pick == int((weight * delta).argmax())
        delta = _fold(x, x[pick : pick + 1], "euclidean", delta)[0]
        delta[pick] = -torch.inf


@METRICS
@pytest.mark.parametrize("room", [[1] * 9, [3, 0, 5, 2, 0, 0, 9, 1, 1], [99] * 9])
def test_greedy_leaves_a_group_that_is_full(metric: str, room: list[int]) -> None:
    x = draw(80, 4).mul(2).round()
    weight, delta = torch.rand(80, generator=torch.Generator().manual_seed(1)).double(), torch.full((80,), 9.0).double()
    group, left = torch.arange(80) * 5 % 9, torch.tensor(room)
    far = (torch.tensor([-torch.inf]).double(), torch.tensor([80]))
    arguments = (x, weight, delta, torch.arange(80), group, left, *far)
    picks, scores = kcenter.greedy(*arguments, limit=80, metric=kcenter.METRICS[metric])
    expected, expected_scores = reference.greedy(x, weight, delta, 80, metric, group, left)
    assert torch.equal(picks[: len(expected)], expected)
    assert picks[len(expected) :].eq(-1).all()
    torch.testing.assert_close(scores[: len(expected)], expected_scores, rtol=1e-13, atol=1e-15)
    assert left.tolist() == room


@METRICS
@pytest.mark.parametrize("exponent", [-1060, -1000, -520, 520, 900])
def test_distances_of_rows_whose_squares_overflow_or_vanish(metric: str, exponent: int) -> None:
    """The numbers are whole multiples of a power of two, so that the scaled rows are exact."""
    x = draw(90, 9).mul(64).round()
    x[7] = 0
    centers = x[:30]
    delta, owner = _fold(x, centers, metric)
    huge, known = x * 2.0**exponent, (torch.arange(90) * 7 % 31)
    scale = 2.0 ** -max(-1000, min(1000, exponent + 8))
    nothing = (torch.full((90,), torch.inf, dtype=torch.float64), torch.full((90,), -1))
    for start, expected in ((known * 0, owner), (known, None)):
        got, found = kcenter.fold(
            huge,
            torch.arange(90),
            start,
            huge[:30],
            huge.mean(0),
            *nothing,
            scale=scale,
            metric=kcenter.METRICS[metric],
        )
        if expected is None:
            hidden = reference.distances(x, centers, metric).masked_fill(torch.arange(30) < start[:, None], torch.inf)
            delta, expected = hidden.amin(1), hidden.argmin(1).where(start < 30, -1)
        unit = 2.0**exponent if metric == "euclidean" else 1.0
        spacing = max(1e-14, 2.0**-1074 / unit)  # that of the smallest numbers of float64
        torch.testing.assert_close(got / unit, delta, rtol=1e-13, atol=spacing)
        if metric == "euclidean" and exponent > -1060:
            assert torch.equal(found, expected)
    far = (torch.tensor([-torch.inf]).double(), torch.tensor([90]))
    one, none = torch.ones(90, dtype=torch.float64), torch.arange(0)
    pick = (one, nothing[0], torch.arange(90), none, none, *far)
    if exponent == -1060:
        return
    picks = kcenter.greedy(huge, *pick, limit=30, metric=kcenter.METRICS[metric])[0]
    assert torch.equal(picks, kcenter.greedy(x, *pick, limit=30, metric=kcenter.METRICS[metric])[0])


@every_dtype
@pytest.mark.parametrize("width", [1, 9, 40])
def test_products_are_those_of_moved_rows_whatever_comes_with_them(dtype: torch.dtype, width: int) -> None:
    x, centers, shift = draw(70, width).to(dtype), draw(13, width, seed=1), draw(width, seed=2)
    rows = torch.arange(69, -1, -1)
    got = kcenter.products(x, rows, centers, shift)
    torch.testing.assert_close(got, (x.double().flip(0) - shift) @ centers.T, rtol=1e-12, atol=1e-12)
    for i, j in ((0, 0), (33, 12), (69, 5)):
        alone = kcenter.products(x[69 - i :][:1], torch.zeros(1, dtype=torch.int64), centers[j : j + 1], shift)
        assert torch.equal(alone, got[i : i + 1, j : j + 1])
    assert kcenter.products(x, rows[:0], centers, shift).shape == (0, 13)
    assert kcenter.products(x, rows, centers[:0], shift).shape == (70, 0)


@every_dtype
@pytest.mark.parametrize("n", [1, 3, 6, 4095, 4096, 4097, 9001])
def test_scan_sums_along_a_tree_over_row_numbers(dtype: torch.dtype, n: int) -> None:
    x = draw(n, 3).to(dtype)
    sums = kcenter.scan(x)[0]
    assert sums.shape == (-(-n // kcenter.SCAN_BLOCK), 3)
    for block, rows in zip(sums, x.split(kcenter.SCAN_BLOCK), strict=True):
        assert torch.equal(block, reference.tree_sum(rows))
    assert torch.equal(reference.tree_sum(sums), reference.tree_sum(x))


@every_dtype
def test_scan_sums_hashes_and_finds_the_first_bad_row(dtype: torch.dtype) -> None:
    x = draw(9000, 5).to(dtype)
    sums, checksum, largest, bad = kcenter.scan(x)
    torch.testing.assert_close(sums.sum(0), x.double().sum(0), rtol=1e-12, atol=1e-9)
    assert largest.item() == x.double().abs().max()
    assert bad.item() == 9000
    moved = x.clone()
    moved[17, 2], moved[17, 3] = x[17, 3], x[17, 2]
    assert (kcenter.scan(moved)[1] != checksum).nonzero().flatten().tolist() == [17]
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[8000, 1] = broken[5001, 4] = value
        assert kcenter.scan(broken)[3].item() == 5001
    assert kcenter.scan(x[:0])[3].item() == 0


@every_case
@pytest.mark.parametrize("change", [lambda t: t, non_contiguous], ids=["contiguous", "strided"])
def test_opcheck(case: KernelCase, change) -> None:
    torch.library.opcheck(case.op, *case.split(map_tensors(case.arguments(CPU, torch.float32), change)))


# Values are read on the CPU only.
_BAD = [
    (c, n, d) for c in CASES for n, bad in c.bad_inputs.items() for d in ("cpu", "meta") if d == "cpu" or not bad.values
]


@pytest.mark.parametrize(("case", "label", "device"), _BAD, ids=lambda v: getattr(v, "name", v))
def test_bad_inputs_raise_and_name_the_argument(case: KernelCase, label: str, device: str) -> None:
    bad = case.bad_inputs[label]
    arguments = map_tensors(bad.mutate(case.arguments(CPU, torch.float32)), lambda t: t.to(device))
    with pytest.raises(RuntimeError) as caught:
        case.run(arguments)
    for word in (case.name, *bad.words):
        assert word in str(caught.value)


@every_case
@every_dtype
def test_equal_bits_twice(case: KernelCase, dtype: torch.dtype) -> None:
    results = [case.run(case.arguments(CPU, dtype)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
