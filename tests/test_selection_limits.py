"""What may be picked, and when to stop: candidates, groups, radius, first pick, several files; against plain forms."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msacore import select
from msacore.selection import STRATEGIES, greedy
from msacore.selection import determinant as maxdet
from tests.selection_reference import Plain
from tests.test_selection import PLAIN, arguments, draw, every_strategy, pool_of


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    strategy=st.sampled_from(list(STRATEGIES)),
    labels=st.sampled_from(["none", "indices", "centres"]),
    candidates=st.sampled_from(["none", "mask", "indices"]),
    per_group=st.integers(0, 3),
    first=st.booleans(),
    share=st.floats(0, 1),
    batch=st.sampled_from([2, 4096]),
)
def test_limited_picks_are_those_of_the_plain_form(
    seed: int,
    n: int,
    strategy: str,
    labels: str,
    candidates: str,
    per_group: int,
    first: bool,
    share: float,
    batch: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, u = torch.randn(n, 3, generator=generator), torch.rand(n, generator=generator)
    known = {"none": None, "indices": torch.randint(n, (2,), generator=generator), "centres": draw(2, 3, seed=seed)}
    allowed = torch.rand(n, generator=generator) < 0.7 if candidates != "none" else torch.ones(n, dtype=torch.bool)
    groups = torch.randint(4, (n,), generator=generator).int() if per_group else None
    given_arguments: dict[str, Any] = arguments(strategy) | {"uncertainty": u, "labeled": known[labels], "seed": seed}
    if candidates != "none":
        given_arguments["candidates"] = allowed if candidates == "mask" else allowed.nonzero()[:, 0].tolist()
    if groups is not None:
        given_arguments |= {"groups": groups, "max_per_group": per_group}

    def plain(budget: int, start: int | None = None) -> Plain:
        made = Plain(x, budget, u, known[labels], "euclidean", seed)
        return made.limit(allowed.numpy(), None if groups is None else groups.numpy(), per_group, start)

    left = plain(0).left()
    start = None
    if first and labels == "none" and left and strategy not in ("random", "topk"):
        start = given_arguments["first"] = int(plain(0).open.nonzero()[0][-1])
    budget = round(share * left)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(greedy.Shard, "whole", False)
        patched.setattr(greedy, "_CANDIDATES", batch)
        patched.setattr(maxdet, "_CANDIDATES", batch)
        got = select(x, budget, **given_arguments)
        with pytest.raises(ValueError, match=f"`budget`.*at most the {left} "):
            select(x, left + 1, **given_arguments)
        if strategy not in ("prefilter", "typiclust"):
            part = select(x, budget // 2, **given_arguments)
            again = select(x, budget, state=part.state, **given_arguments)
            assert again.indices.equal(got.indices)
            assert again.scores.equal(got.scores)
            assert again.radius == got.radius
    picks = got.indices.tolist()
    reference = plain(budget, start)
    if strategy in PLAIN:
        assert picks == PLAIN[strategy](reference, **given_arguments["options"] or {})
    else:
        assert all(reference.open[i] for i in picks)
        for pick in picks:
            assert reference.open[pick]
            reference.take(pick)
    if start is not None and budget:
        assert (picks[0], got.scores[0]) == (start, torch.inf)
    assert got.radius == pytest.approx(plain(0).radius(picks), rel=1e-12)
    limited = candidates != "none" or groups is not None
    assert math.isnan(got.lower_bound) if limited else got.lower_bound == got.radius / 2


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 60),
    whole=st.booleans(),
    radius=st.floats(0, 4),
    budget=st.sampled_from([None, 0, 1, 5, 10_000]),
    labels=st.booleans(),
    per_group=st.integers(0, 2),
)
def test_a_radius_stops_kcenter_where_the_plain_form_stops(
    seed: int, n: int, whole: bool, radius: float, budget: int | None, labels: bool, per_group: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(4, (n, 2), generator=generator).float()
    radius = float(round(radius)) if whole else radius
    known = torch.randint(n, (1,), generator=generator) if labels else None
    groups = torch.randint(3, (n,), generator=generator) if per_group else None
    limits: dict[str, Any] = {} if groups is None else {"groups": groups, "max_per_group": per_group}
    common = {"strategy": "kcenter", "labeled": known} | limits
    got = select(x, budget, radius=radius, **common)
    plain = Plain(x, n if budget is None else budget, None, known, "euclidean")
    plain.limit(None, None if groups is None else groups.numpy(), per_group, None, radius)
    assert got.indices.tolist() == plain.kcenter()
    smaller = select(x, budget, radius=radius / 2, state=got.state, **common)
    assert smaller.indices.equal(select(x, budget, radius=radius / 2, **common).indices)
    if budget is None and not per_group:
        assert got.radius <= radius


def test_a_radius_without_a_budget_and_what_needs_one() -> None:
    x = torch.arange(10.0)[:, None]
    got = select(x, radius=2.0, strategy="kcenter", labeled=[0])
    assert got.indices.tolist() == [9, 4, 6] or got.radius <= 2
    assert select(x, radius=0.0, strategy="kcenter").radius == 0
    assert len(select(x, radius=1e9, strategy="kcenter").indices) == 1
    assert len(select(x[:0], radius=1.0, strategy="kcenter").indices) == 0
    assert select(x, 10**9, radius=1.0, strategy="kcenter").radius <= 1
    # Rows that may not be picked count in the radius, but do not keep the selection going.
    far = select(x, radius=1.0, strategy="kcenter", candidates=[0, 1, 2])
    assert far.radius > 1
    assert math.isnan(far.lower_bound)


@every_strategy
def test_several_arrays_are_one_pool(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, u = pool_of("clustered", 300), np.arange(300)
    cuts = (0, 1, 120, 120, 300)
    parts = [x[a:b] for a, b in itertools.pairwise(cuts)]
    for i, part in enumerate(parts):
        np.save(tmp_path / f"{i}.npy", part.numpy())
    paths = [tmp_path / f"{i}.npy" for i in range(4)]
    given_arguments = arguments(strategy) | {"uncertainty": u}
    expected = select(x, 25, **given_arguments)
    monkeypatch.setattr("msacore.selection.pool._CHUNK_BYTES", 37 * 6 * 4)
    forms: dict[str, Any] = {
        "tensors": parts,
        "arrays": tuple(part.numpy() for part in parts),
        "paths": paths,
        "texts": [str(path) for path in paths],
        "maps": [np.load(path, mmap_mode="r") for path in paths],
        "mixed": [paths[0], parts[1], parts[2].numpy(), np.load(paths[3], mmap_mode="r")],
        "one path": [*paths[:1], x[1:]],
    }
    for name, form in forms.items():
        got = select(form, 25, **given_arguments)
        assert got.indices.equal(expected.indices), name
        assert got.scores.equal(expected.scores), name
        assert (got.radius, got.state["identity"]) == (expected.radius, expected.state["identity"]), name
        assert select(form, 25, state=expected.state, **given_arguments).radius == expected.radius


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    x = draw(4, 3)
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    (tmp_path / "text.npy").write_text("1, 2")
    for parts, words in (
        ([x, draw(4, 2)], r"`embeddings\[1\]`.*width of the first part, 3.*\[4, 2\]"),
        ([x, x, x.double()], r"`embeddings\[2\]`.*dtype.*float32.*float64"),
        ([x.numpy().astype("i4"), x.numpy().astype("i8")], r"`embeddings\[1\]`.*int32.*int64"),
        ([x, x[0]], r"`embeddings\[1\]`.*\[N, d\].*\[3\]"),
        ([x, tmp_path / "absent.npy"], r"`embeddings\[1\]`.*absent\.npy"),
        ([x, tmp_path / "text.npy"], r"`embeddings\[1\]`.*text\.npy"),
        ([x, tmp_path / "cube.npy"], r"`embeddings\[1\]`.*\[2, 2, 2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            select(parts, 1, strategy="kcenter")
    assert select([[1.0, 2.0], [3.0, 4.0]], 1, strategy="kcenter").indices.shape == (1,)


def test_a_file_that_shrinks_under_the_selection_is_told_of(tmp_path: Path) -> None:
    np.save(tmp_path / "pool.npy", draw(5000, 4).numpy())
    mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    with (tmp_path / "pool.npy").open("r+b") as file:
        file.truncate(9000)
    with pytest.raises(ValueError, match="`embeddings` has become shorter"):
        select(mapped, 3, strategy="kcenter")


@pytest.mark.parametrize("magnitude", [1e-300, 1e-160, 1e160, 1e280])
@every_strategy
def test_magnitudes_whose_squares_float64_cannot_hold(strategy: str, magnitude: float) -> None:
    x, u = pool_of("gaussian", 80).double(), torch.rand(80, generator=torch.Generator().manual_seed(1)).double()
    scale = 2.0 ** math.frexp(magnitude)[1]  # a power of two: nothing is rounded
    options = {"probcover": {"delta": 2.0}, "maxdet": {"noise": 1e-12}}.get(strategy)
    expected = select(x, 20, strategy=strategy, uncertainty=u, options=options)
    if strategy == "probcover":
        options = {"delta": 2.0 * scale}
    if strategy == "maxdet":
        options = {"noise": min(1e-12 * scale * scale, 1e300) or 1e-300}
        if not 0 < options["noise"] < 1e300 or scale < 1:
            return
    got = select(x * scale, 20, strategy=strategy, uncertainty=u, options=options)
    if strategy != "mmr":  # adds distances to uncertainties
        assert got.indices.equal(expected.indices)
    assert got.radius == pytest.approx(expected.radius * scale, rel=1e-13)


def test_float32_rows_of_any_magnitude() -> None:
    for magnitude in (2.0**-140, 2.0**-66, 2.0**66, 2.0**124):
        x = (pool_of("gaussian", 90) * magnitude).float()
        for distance in ("euclidean", "cosine"):
            got = select(x, 30, strategy="kcenter", distance=distance)
            scaled = x.double() / magnitude
            assert got.indices.tolist() == Plain(scaled, 30, None, None, distance).kcenter()


def test_maxdet_ends_by_index_once_nothing_is_left() -> None:
    """Seventeen columns of three values each, near or far from the origin: in the end every residual is rounding."""
    for offset, dtype in ((1e4, np.float32), (1e6, np.float64), (0.0, np.float64)):
        x = (offset + np.random.default_rng(0).integers(0, 3, (50, 17))).astype(dtype)
        assert sorted(select(x, 50, strategy="maxdet").indices.tolist()) == list(range(50))
        got = select(x, 50, strategy="maxdet", options={"noise": 1e-14})
        assert sorted(got.indices.tolist()) == list(range(50))
        assert got.scores[1:].isfinite().all()
        assert (got.scores[1:] >= 0).all()
        ended = int((got.scores[1:] == 0).nonzero()[0, 0]) + 1
        assert got.scores[ended:].eq(0).all()
        assert got.indices[ended:].diff().gt(0).all()
    flat = np.concatenate([np.full((9, 4), 7.3), np.full((9, 4), 7.3)])
    got = select(flat, 18, strategy="maxdet")
    assert got.indices.tolist() == list(range(18))
    assert got.scores[1:].eq(0).all()


def test_maxdet_is_the_exact_argmax_near_full_rank() -> None:
    """Against a kernel in longdouble, one column for each pick."""
    for seed in range(3):
        x = draw(300, 40, seed=seed).double() * torch.logspace(0, -4, 40, dtype=torch.float64)
        got = select(x, 40, strategy="maxdet", options={"noise": 1e-9}).indices.tolist()
        rows = (x - x.mean(0)).numpy().astype(np.longdouble)
        residual, columns = (rows**2).sum(1), np.empty((0, 300), np.longdouble)
        for pick in got:
            assert residual[pick] >= residual.max() * (1 - 1e-9)
            column = (rows @ rows[pick] - columns.T @ columns[:, pick]) / np.sqrt(residual[pick] + 1e-9)
            columns = np.concatenate([columns, column[None]])
            residual = residual - column**2
            residual[pick] = -1


def test_arguments_of_any_byte_order_and_unsigned_integers() -> None:
    x, u = draw(30, 3), np.arange(30) / 7
    plain: dict[str, Any] = {"uncertainty": u, "labeled": [3], "candidates": np.arange(20), "groups": np.arange(30) % 4}
    expected = select(x, 5, max_per_group=2, **plain).indices
    for dtype in (">i4", "u2", "u4", ">u8", "u1"):
        rows = {name: np.asarray(plain[name]).astype(dtype) for name in ("labeled", "candidates", "groups")}
        assert select(x, 5, max_per_group=2, **rows, uncertainty=u.astype(">f8")).indices.equal(expected), dtype


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "neither budget nor radius": ({"budget": None}, "`budget`.*`radius`.*neither"),
    "radius of another strategy": ({"radius": 1.0, "strategy": "lcmd"}, "`radius`.*kcenter.*'lcmd'"),
    "negative radius": ({"radius": -1.0}, "`radius`.*-1"),
    "infinite radius": ({"radius": float("inf")}, "`radius`.*inf"),
    "radius of text": ({"radius": "1"}, "`radius`.*'1'"),
    "groups alone": ({"groups": torch.zeros(8).long()}, "`groups` and `max_per_group` together"),
    "max_per_group alone": ({"max_per_group": 1}, "`groups` and `max_per_group` together"),
    "no room": ({"groups": torch.zeros(8).long(), "max_per_group": 0}, "`max_per_group`.*at least 1.*0"),
    "groups of another length": ({"groups": [1, 2], "max_per_group": 1}, r"`groups`.*\[8\].*\[2\]"),
    "float groups": ({"groups": torch.zeros(8), "max_per_group": 1}, "`groups`.*integers.*float32"),
    "too few rooms": ({"groups": [0] * 8, "max_per_group": 1}, "`budget`.*at most the 1 .*got 2"),
    "candidate outside": ({"candidates": [8]}, r"`candidates`.*\[0, N = 8\).*8"),
    "float candidates": ({"candidates": [0.5]}, "`candidates`.*float"),
    "short mask": ({"candidates": [True]}, r"`candidates`.*\[8\].*\[1\]"),
    "square candidates": ({"candidates": torch.ones(8, 8).bool()}, r"`candidates`.*\[8, 8\]"),
    "no candidates": ({"candidates": []}, "`budget`.*at most the 0 "),
    "text candidates": ({"candidates": "all"}, "`candidates`.*real numbers"),
    "first outside": ({"first": 8}, r"`first`.*N = 8.*8"),
    "negative first": ({"first": -1}, "`first`.*-1"),
    "first no integer": ({"first": 1.0}, "`first`.*1.0"),
    "first with labels": ({"first": 1, "labeled": [0]}, "`first`.*`labeled`"),
    "first with centres": ({"first": 1, "labeled": torch.ones(1, 3)}, "`first`.*`labeled`"),
    "first of topk": ({"first": 1, "strategy": "topk"}, "`first`.*'topk'"),
    "first of random": ({"first": 1, "strategy": "random"}, "`first`.*'random'"),
    "first no candidate": ({"first": 1, "candidates": [0, 2, 3]}, "`first`.*`candidates`.*1"),
    "dict": ({"embeddings": {"a": 1}}, "`embeddings`.*real numbers"),
    "ragged": ({"embeddings": [[1.0], [2.0, 3.0]]}, "`embeddings`"),
    "text labels": ({"labeled": np.array(["a", "b"])}, "`labeled`.*real numbers.*<U1"),
    "options no dict": ({"options": 3}, "`options`.*dict.*int"),
    "strategy no text": ({"strategy": 3}, "`strategy`.*3"),
    "group no group": ({"group": 3}, "`group`"),
}


@pytest.mark.parametrize("label", list(BAD))
def test_bad_limits_are_named(label: str) -> None:
    change, words = BAD[label]
    good: dict[str, Any] = {"embeddings": draw(8, 3), "budget": 2, "strategy": "kcenter", "uncertainty": torch.rand(8)}
    with pytest.raises(ValueError, match=f"select: .*{words}"):
        select(**(good | change))


def test_resuming_may_change_budget_and_radius_and_nothing_else() -> None:
    x = draw(40, 3)
    base: dict[str, Any] = {
        "strategy": "kcenter",
        "candidates": torch.arange(30),
        "groups": torch.arange(40) % 5,
        "max_per_group": 4,
        "first": 3,
    }
    state = select(x, 5, **base).state
    assert select(x, 12, state=state, **base).indices.equal(select(x, 12, **base).indices)
    for change, word in (
        ({"candidates": torch.arange(29)}, "candidates"),
        ({"candidates": None}, "candidates"),
        ({"groups": torch.arange(40) % 4}, "groups"),
        ({"groups": None, "max_per_group": None}, "groups"),
        ({"max_per_group": 3}, "max_per_group"),
        ({"first": 4}, "first"),
        ({"first": None}, "first"),
    ):
        with pytest.raises(ValueError, match=f"another `{word}`"):
            select(x, 12, state=state, **(base | change))
