"""Selection over ranks: picks, scores, radius and state are those of one process; errors are raised on all ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import shards
from msacore import select
from msacore.selection import STRATEGIES, SelectionInterrupted, gradient_embeddings, greedy
from msacore.selection import determinant as maxdet
from msacore.selection.gradients import GradientEmbeddings
from tests.selection_ranks import split, together
from tests.test_selection import draw

SHARED = [strategy for strategy in STRATEGIES if strategy not in ("typiclust", "probcover")]


def same(results: list[Any], expected: Any) -> None:
    for one in results:
        if isinstance(one, BaseException):
            raise one
        assert one.indices.tolist() == expected.indices.tolist()
        assert torch.equal(one.scores, expected.scores)
        assert one.radius == expected.radius
        assert one.state["identity"] == expected.state["identity"]
        assert one.state["checksum"] == expected.state["checksum"]


def drawn_case(
    seed: int, n: int, d: int, kind: str, strategy: str, extras: set[str], dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of a selection in one process, with ties if ``kind`` says so."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    if kind == "ties":
        x = torch.randint(0, 3, (n, d), generator=generator).float()
    if kind == "far":
        x = x + 1e4
    u = torch.rand(n, generator=generator)
    arguments: dict[str, Any] = {
        "embeddings": x.to(dtype),
        "strategy": strategy,
        "uncertainty": (u * 3).round() / 3 if kind == "ties" else u,
        "seed": seed % 1000,
        "distance": "cosine" if "cosine" in extras else "euclidean",
    }
    open_rows = torch.ones(n, dtype=torch.bool)
    if "labeled" in extras:
        arguments["labeled"] = torch.randint(n, (3,), generator=generator)
        open_rows[arguments["labeled"]] = False
    elif "centres" in extras:
        arguments["labeled"] = torch.randn(4, d, generator=generator, dtype=torch.float64)
    if "mask" in extras or "indices" in extras:
        mask = torch.rand(n, generator=generator) < 0.6
        arguments["candidates"] = mask if "mask" in extras else mask.nonzero()[:, 0]
        open_rows &= mask
    left = int(open_rows.sum())
    if "groups" in extras:
        names = torch.randint(-2, 4, (n,), generator=generator) * 10**9
        arguments |= {"groups": names, "max_per_group": 1 + seed % 4}
        known = torch.zeros(n, dtype=torch.bool)
        if "labeled" in extras:
            known[arguments["labeled"]] = True
        left = sum(
            min(int((open_rows & (names == g)).sum()), max(0, 1 + seed % 4 - int((known & (names == g)).sum())))
            for g in names.unique()
        )
    if "first" in extras and strategy not in ("random", "topk") and "labeled" not in arguments and left:
        arguments["first"] = int(open_rows.nonzero()[-1, 0])
    if "radius" in extras and strategy == "kcenter":
        return arguments | {"radius": float(torch.rand(1, generator=generator)) * 3}
    return arguments | {"budget": round(left * [0.2, 0.5, 1.0][seed % 3])}


EXTRAS = ("cosine", "labeled", "centres", "mask", "indices", "groups", "first", "radius")


@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 90),
    d=st.sampled_from([1, 2, 5, 17]),
    kind=st.sampled_from(["gaussian", "ties", "far"]),
    strategy=st.sampled_from(SHARED),
    extras=st.sets(st.sampled_from(EXTRAS), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16]),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    candidates=st.sampled_from([2, 7, 4096]),
)
def test_any_split_gives_the_bits_of_one_process(
    seed: int,
    n: int,
    d: int,
    kind: str,
    strategy: str,
    extras: set[str],
    dtype: torch.dtype,
    cuts: list[float],
    candidates: int,
) -> None:
    arguments = drawn_case(seed, n, d, kind, strategy, extras, dtype)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(greedy.Shard, "whole", False)
        patched.setattr(greedy, "_CANDIDATES", candidates)
        patched.setattr(maxdet, "_CANDIDATES", candidates)
        expected = select(**arguments)
        same(together(split([round(cut * n) for cut in cuts], arguments)), expected)


@pytest.mark.parametrize("strategy", SHARED)
def test_sums_over_many_blocks_do_not_depend_on_the_split(strategy: str) -> None:
    n = 9_000
    arguments = {
        "embeddings": draw(n, 3) + 3,
        "budget": 12,
        "strategy": strategy,
        "uncertainty": torch.rand(n, generator=torch.Generator().manual_seed(1)),
    }
    expected = select(**arguments)
    for cuts in ([4096], [1], [4095, 4097, 8999], [3000, 3000, 6001]):
        same(together(split(cuts, arguments)), expected)


@pytest.mark.parametrize("strategy", SHARED)
def test_a_state_moves_between_numbers_of_ranks(strategy: str) -> None:
    arguments = drawn_case(5, 80, 4, "gaussian", strategy, {"groups"}, torch.float32)
    whole = select(**arguments | {"budget": 12})
    if strategy == "prefilter":
        same(together(split([30], arguments | {"budget": 12, "state": whole.state})), whole)
        return
    state = select(**arguments | {"budget": 3}).state
    three = together(split([20, 50], arguments | {"budget": 7, "state": state}))
    two = together(split([64], arguments | {"budget": 9, "state": three[1].state}))
    same([select(**arguments | {"budget": 12, "state": two[1].state})], whole)


@pytest.mark.parametrize("strategy", ["kmeans++", "lcmd"])
def test_gradient_embeddings_are_shared_too(strategy: str) -> None:
    x, p = draw(200, 5).double(), draw(200, 3, seed=1).double().softmax(1)
    whole = gradient_embeddings(x, p)
    expected = select(whole, 30, strategy=strategy, seed=4)
    parts = [
        {"embeddings": GradientEmbeddings(whole.scale[a:b], whole.features[a:b]), "budget": 30, "strategy": strategy}
        for a, b in ((0, 70), (70, 70), (70, 200))
    ]
    same(together([part | {"seed": 4} for part in parts]), expected)


def test_files_and_ranks_together(tmp_path: Any) -> None:
    x = draw(300, 6)
    for i, part in enumerate(x.split([100, 1, 199])):
        np.save(tmp_path / f"{i}.npy", part.numpy())
    files = [tmp_path / f"{i}.npy" for i in range(3)]
    expected = select(x, 40, strategy="kcenter")
    same([select(files, 40, strategy="kcenter")], expected)
    ranks = [{"embeddings": files[:2], "budget": 40}, {"embeddings": files[2:], "budget": 40}]
    same(together([one | {"strategy": "kcenter"} for one in ranks]), expected)


GOOD: dict[str, Any] = {"embeddings": draw(8, 3), "budget": 2, "uncertainty": torch.rand(8), "seed": 1}
BAD = {
    "nan": ({"embeddings": torch.full((8, 3), float("nan"))}, "`embeddings`.*first in row 8.*rank 1"),
    "width": ({"embeddings": draw(8, 4)}, "`width of embeddings`.*rank 1"),
    "dtype": ({"embeddings": draw(8, 3).double()}, "`dtype of embeddings`.*rank 1"),
    "strategy": ({"strategy": "mmr"}, "`strategy`.*rank 1"),
    "unknown strategy": ({"strategy": "best"}, "`strategy`.*'best'.*rank 1"),
    "budget": ({"budget": 3}, "`budget`.*rank 1"),
    "seed": ({"seed": 2**60 + 1}, "`seed`.*rank 1"),
    "uncertainty": ({"uncertainty": torch.rand(7)}, r"`uncertainty`.*\[8\].*rank 1"),
    "labeled": ({"labeled": [24]}, r"`labeled`.*N = 24\).*24"),
    "state": ({"state": {"checksum": "x"}}, "`state`.*rank 1"),
    "mask on one rank": ({"candidates": torch.ones(8).bool()}, "`candidates` on all ranks"),
    "another kind": ({"embeddings": {"a": 1}}, "`embeddings`.*rank 1"),
}


@pytest.mark.parametrize("label", list(BAD))
def test_one_bad_argument_on_one_rank_is_the_same_error_on_all(label: str) -> None:
    change, words = BAD[label]
    results = together([dict(GOOD), GOOD | change, dict(GOOD)])
    assert all(isinstance(one, ValueError) for one in results), results
    assert len({str(one) for one in results}) == 1
    with pytest.raises(ValueError, match=f"select: .*{words}"):
        raise results[0]


@pytest.mark.parametrize("pool", ["normal", "clusters", "line"])
def test_every_exchange_makes_a_pick_and_most_make_many(pool: str) -> None:
    n, generator = 40_000, torch.Generator().manual_seed(0)
    noise = torch.randn(n, 16, generator=generator)
    centres = 50 * torch.randn(50, 16, generator=generator)[torch.randint(0, 50, (n,), generator=generator)]
    embeddings = {"normal": noise, "clusters": centres + noise, "line": torch.arange(float(n))[:, None]}[pool]

    def exchanges(budget: int) -> int:
        arguments = {"embeddings": embeddings, "budget": budget, "strategy": "kcenter"}
        shared = shards.together(split([n // 4, n // 2, 3 * n // 4], arguments))
        assert all(len(result.indices) == budget for result in shared.results)
        return shared.exchanges

    first = exchanges(1)
    assert exchanges(5) <= first + 5
    assert exchanges(400) <= first + 40


def test_what_cannot_be_shared_says_so() -> None:
    for strategy in ("typiclust", "probcover"):
        options = {"delta": 1.0} if strategy == "probcover" else None
        results = together([GOOD | {"strategy": strategy, "options": options}] * 2)
        for one in results:
            assert isinstance(one, ValueError)
            assert f"`{strategy}` needs the whole pool in one process" in str(one)


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step() -> None:
    arguments = drawn_case(3, 60, 4, "gaussian", "lcmd", set(), torch.float32) | {"budget": 30}
    whole = select(**arguments)

    def press(ranks: Any) -> None:
        if ranks.rank != 1:
            return
        original, calls = ranks._gather, 0

        def exchange(*given: Any, **named: Any) -> None:
            nonlocal calls
            calls += 1
            ranks._stop = ranks._stop or calls == 40
            original(*given, **named)

        ranks._gather = exchange

    results = together(split([20, 41], arguments), press)
    assert all(isinstance(one, SelectionInterrupted) for one in results), results
    states = [one.state for one in results]
    assert 0 < len(states[0]["indices"]) < 30
    assert len({state["checksum"] for state in states}) == 1
    same([select(**arguments | {"state": states[2]})], whole)
