"""Selection: every strategy equals its plain form, goes on from its state, and picks the same with FAISS."""

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msacore import select
from msacore.selection import (
    STRATEGIES,
    SelectionInterrupted,
    clusters,
    determinant,
    gradient_embeddings,
    greedy,
)
from tests.selection_reference import Plain

ROOT = Path(__file__).resolve().parent.parent
DISTANCES = ("euclidean", "cosine")
PLAIN = {
    "topk": Plain.topk,
    "kcenter": Plain.kcenter,
    "uncertainty_kcenter": Plain.uncertainty_kcenter,
    "prefilter": Plain.prefilter,
    "kmeans++": Plain.kmeans_plus_plus,
    "lcmd": Plain.lcmd,
    "mmr": Plain.mmr,
    "maxdet": Plain.maxdet,
    "probcover": Plain.probcover,
}
NOISE = 0.05  # of maxdet: a small one makes the kernel ill-conditioned
TO_ORIGINAL_BUDGET = ("prefilter", "typiclust")
every_strategy = pytest.mark.parametrize("strategy", list(STRATEGIES))
every_distance = pytest.mark.parametrize("distance", DISTANCES)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pool_of(kind: str, n: int = 160, d: int = 6, seed: int = 0) -> torch.Tensor:
    if kind == "gaussian":
        return draw(n, d, seed=seed)
    if kind == "clustered":
        return draw(9, d, seed=seed)[torch.arange(n) * 7 % 9] * 4 + draw(n, d, seed=seed + 1)
    if kind == "duplicated":
        return draw(n // 4, d, seed=seed).repeat(4, 1)
    if kind == "whole numbers":
        return draw(n, d, seed=seed).mul(1.5).round()
    assert kind == "equal"
    return torch.ones(n, d)


def labeled_of(kind: str, n: int, d: int) -> Any:
    return {"none": None, "indices": [3, n - 1, 11, 3], "centres": draw(4, d, seed=9)}[kind]


def arguments(strategy: str, distance: str = "euclidean") -> dict[str, Any]:
    """What a strategy needs besides pool, budget and uncertainty."""
    radius = {"euclidean": 2.0312, "cosine": 0.4987}[distance]
    options = {"probcover": {"delta": radius}, "maxdet": {"noise": NOISE}}.get(strategy)
    return {"strategy": strategy, "distance": distance, "options": options}


@pytest.mark.parametrize("labeled", ["none", "indices", "centres"])
@pytest.mark.parametrize("kind", ["gaussian", "clustered", "duplicated"])
@every_distance
@pytest.mark.parametrize("strategy", list(PLAIN))
def test_picks_are_those_of_the_plain_form(strategy: str, distance: str, kind: str, labeled: str) -> None:
    x, budget = pool_of(kind), 36
    u, known = torch.rand(len(x), generator=torch.Generator().manual_seed(4)), labeled_of(labeled, *x.shape)
    given_arguments = arguments(strategy, distance)
    got = select(x, budget, uncertainty=u, labeled=known, **given_arguments)
    plain = Plain(x, budget, u, known, distance)
    picks = PLAIN[strategy](plain, **given_arguments["options"] or {})
    if kind == "duplicated" and (distance == "cosine" or strategy == "maxdet"):
        # The last bits of NumPy's cosines and products differ between equal rows: compare picks up to equal rows.
        assert torch.equal(x[got.indices], x[picks])
    else:
        assert got.indices.tolist() == picks
    assert got.radius == pytest.approx(Plain(x, budget, u, known, distance).radius(picks), rel=1e-12)
    assert got.backend == "native"


@pytest.mark.parametrize("kind", ["gaussian", "clustered", "duplicated", "whole numbers", "equal"])
@pytest.mark.parametrize("strategy", ["kcenter", "uncertainty_kcenter", "prefilter"])
@pytest.mark.parametrize("candidates", [1, 2, 7, 512])
def test_lazy_batches_of_any_size_give_the_plain_picks(
    strategy: str, kind: str, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy.Shard, "whole", False)
    monkeypatch.setattr(greedy, "_CANDIDATES", candidates)
    monkeypatch.setattr(greedy, "_SAMPLE", 5)  # so small a sample gives poor floors
    monkeypatch.setattr(greedy, "_STAGE", 2)
    monkeypatch.setattr(greedy, "_ROUND", 8 * candidates)
    x = pool_of(kind, n=400, d=4)
    u = torch.randint(5, (400,), generator=torch.Generator().manual_seed(2)).float()
    got = select(x, 90, uncertainty=u, strategy=strategy)
    assert got.indices.tolist() == PLAIN[strategy](Plain(x, 90, u, None, "euclidean"))


def test_first_batches_of_centres_are_only_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greedy.Shard, "whole", False)
    monkeypatch.setattr(greedy, "_CANDIDATES", 4)
    monkeypatch.setattr(greedy, "_PRIMING", 3)
    x, known = pool_of("gaussian", n=500), draw(60, 6, seed=5)
    got = select(x, 50, strategy="kcenter", labeled=known)
    plain = Plain(x, 50, None, known, "euclidean")
    assert got.indices.tolist() == plain.kcenter()
    assert got.radius == pytest.approx(plain.radius(plain.picks), rel=1e-12)


def test_picks_at_full_size_equal_one_pass_per_pick() -> None:
    x = torch.cat([draw(6000, 24), draw(30, 24, seed=1)[torch.arange(6000) % 30] + 0.05 * draw(6000, 24, seed=2)])
    from msacore.reference import kcenter as reference

    u = torch.rand(12000, generator=torch.Generator().manual_seed(1)).double()
    got = select(x, 60, strategy="kcenter")
    assert torch.equal(got.indices, reference.kcenter(x, 60)[0])
    assert got.pool_reads <= 15
    weight = 1e-3 + (1 - 1e-3) * (u - u.min()) / (u.max() - u.min())
    got = select(x, 60, uncertainty=u)
    indices, scores = reference.kcenter(x, 60, weight, first=int(u.argmax()))
    assert torch.equal(got.indices, indices)
    torch.testing.assert_close(got.scores, scores, rtol=1e-12, atol=0)


@given(
    n=st.integers(1, 60),
    d=st.integers(1, 5),
    values=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    share=st.floats(0, 1),
    strategy=st.sampled_from(list(STRATEGIES)),
    labels=st.integers(0, 3),
)
def test_properties(n: int, d: int, values: int, seed: int, share: float, strategy: str, labels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(values + 1, (n, d), generator=generator).float()
    u = torch.randint(4, (n,), generator=generator).float()
    known = torch.randperm(n, generator=generator)[: min(labels, n)]
    budget = round(share * (n - len(known)))
    given_arguments = arguments(strategy) | {"uncertainty": u, "labeled": known, "seed": seed}
    whole = select(x, budget, **given_arguments)
    picks = whole.indices.tolist()
    assert len(set(picks)) == budget == len(whole.scores)
    assert not set(picks) & set(known.tolist())
    assert all(0 <= i < n for i in picks)
    if strategy in ("kcenter", "uncertainty_kcenter", "prefilter", "topk"):
        assert picks == PLAIN[strategy](Plain(x, budget, u, known, "euclidean"))
    assert whole.radius == pytest.approx(Plain(x, budget, u, known, "euclidean").radius(picks), rel=1e-12)
    if strategy not in TO_ORIGINAL_BUDGET:
        part = select(x, budget // 2, **given_arguments)
        again = select(x, budget, state=part.state, **given_arguments)
        assert again.indices.tolist() == picks
        assert again.radius == whole.radius


@every_strategy
@every_distance
def test_a_saved_state_goes_on_to_the_same_picks(strategy: str, distance: str, tmp_path: Path) -> None:
    x, u = pool_of("clustered", 300), torch.rand(300, generator=torch.Generator().manual_seed(1))
    given_arguments = arguments(strategy, distance) | {"uncertainty": u, "labeled": [1, 2], "seed": 5}
    whole = select(x, 60, **given_arguments)
    if strategy in TO_ORIGINAL_BUDGET:
        assert select(x, 60, state=whole.state, **given_arguments).indices.equal(whole.indices)
        with pytest.raises(ValueError, match=f"{strategy}.*original.*60.*61"):
            select(x, 61, state=whole.state, **given_arguments)
        return
    state = None
    for budget in (0, 1, 17, 17, 60):
        part = select(x, budget, state=state, **given_arguments)
        torch.save(part.state, tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
    assert part.indices.equal(whole.indices)
    torch.testing.assert_close(part.scores, whole.scores, rtol=1e-9, atol=0)
    assert part.radius == whole.radius


@every_strategy
def test_an_interrupt_leaves_a_state_to_go_on_from(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, u = pool_of("clustered", 300), torch.rand(300, generator=torch.Generator().manual_seed(1))
    given_arguments = arguments(strategy) | {"uncertainty": u}
    whole = select(x, 60, **given_arguments)
    from msacore.selection.pool import Pool

    monkeypatch.setattr(greedy.Shard, "whole", False)
    for module in (greedy, determinant):
        monkeypatch.setattr(module, "_CANDIDATES", 8)
    original = Pool.gather
    calls = 0

    def interrupted(self: Pool, rows: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(self, rows)

    monkeypatch.setattr(Pool, "gather", interrupted)
    try:
        select(x, 60, **given_arguments)
    except SelectionInterrupted as stop:
        state = stop.state
        assert "interrupted after" in str(stop)
    else:
        assert strategy in ("random", "topk")  # done in one step
        return
    assert len(state["indices"]) < 60
    assert select(x, 60, state=state, **given_arguments).indices.equal(whole.indices)


def test_a_state_of_another_selection_raises() -> None:
    x, u = pool_of("gaussian"), torch.rand(160)
    base: dict[str, Any] = {"uncertainty": u, "labeled": [1], "options": {"factor": 5}}
    state = select(x, 9, **base).state
    moved = x.clone()
    moved[77, 2] += 1e-6
    for change, word in (
        ({"embeddings": moved}, "embeddings"),
        ({"embeddings": x.double()}, "embeddings"),
        ({"embeddings": x.flip(0)}, "embeddings"),
        ({"strategy": "kcenter"}, "strategy"),
        ({"seed": 1}, "seed"),
        ({"labeled": [2]}, "labeled"),
        ({"labeled": None}, "labeled"),
        ({"options": {"factor": 4}}, "options"),
        ({"gamma": 2.0}, "gamma"),
        ({"distance": "cosine"}, "distance"),
        ({"uncertainty": u.flip(0)}, "uncertainty"),
    ):
        with pytest.raises(ValueError, match=f"another `{word}`"):
            select(**({"embeddings": x, "budget": 12, "state": state} | base | change))
    with pytest.raises(ValueError, match="already holds 9 picks"):
        select(x, 5, state=state, **base)
    for nonsense in ({}, {"format": 1}, 3):
        with pytest.raises(ValueError, match=r"`\.state` of an earlier Selection"):
            select(x, 12, state=nonsense, **base)


def clusters_of(x: torch.Tensor, budget: int, known: Any) -> torch.Tensor:
    """The clusters that "typiclust" finds in ``x``."""
    found: list[torch.Tensor] = []
    original = clusters._typicality

    def kept(job: Any, cluster: torch.Tensor) -> torch.Tensor:
        found.append(cluster)
        return original(job, cluster)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(clusters, "_typicality", kept)
        select(x, budget, strategy="typiclust", labeled=known, options={"neighbours": 7})
    return found[0]


def test_typiclust_picks_typical_samples_of_its_clusters() -> None:
    x = pool_of("clustered", 300)
    for known in (None, [4, 8, 90], draw(5, 6, seed=8)):
        got = select(x, 25, strategy="typiclust", labeled=known, options={"neighbours": 7})
        cluster = clusters_of(x, 25, known)
        plain = Plain(x, 25, None, known, "euclidean")
        centroids = np.stack([x.double().numpy()[cluster == c].mean(0) for c in range(int(cluster.max()) + 1)])
        assert (
            np.linalg.norm(x.double().numpy()[:, None] - centroids[None], axis=2).argmin(1).tolist() == cluster.tolist()
        )
        of_labeled = np.linalg.norm(plain.centers[:, None] - centroids[None], axis=2).argmin(1)
        assert got.indices.tolist() == plain.typiclust(cluster.tolist(), of_labeled.tolist(), 7)


@pytest.mark.skipif(importlib.util.find_spec("faiss") is None, reason="faiss is not installed")
@pytest.mark.parametrize("kind", ["gaussian", "duplicated", "whole numbers"])
@every_distance
@every_strategy
def test_faiss_and_the_kernels_pick_the_same(strategy: str, distance: str, kind: str) -> None:
    x, u = pool_of(kind, 300), torch.rand(300, generator=torch.Generator().manual_seed(2))
    x[7] = x[90] = 0
    import faiss

    expected = "faiss-gpu" if faiss.get_num_gpus() > 0 and strategy != "probcover" else "faiss-cpu"
    for known in (None, [3, 7], draw(60, 6, seed=3)):
        given_arguments = arguments(strategy, distance) | {"uncertainty": u, "labeled": known}
        native = select(x, 30, backend="native", **given_arguments)
        other = select(x, 30, backend="faiss", **given_arguments)
        assert other.indices.equal(native.indices)
        assert other.radius == native.radius
        assert (native.backend, other.backend) == ("native", expected)
        continued = select(x, 30, backend="faiss", state=native.state, **given_arguments)
        assert continued.indices.equal(native.indices)


def test_faiss_that_does_not_load_is_an_error_that_names_it(tmp_path: Path) -> None:
    for error in ("ImportError('absent')", "RuntimeError('no CUDA runtime')"):
        (tmp_path / "faiss.py").write_text(f"raise {error}")
        code = """
            import torch, msacore
            x = torch.eye(4)
            assert msacore.select(x, 2, strategy="typiclust").backend == "native"
            try:
                msacore.select(x, 2, strategy="kcenter", backend="faiss")
            except ImportError as error:
                print(error)
        """
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        assert "faiss" in done.stdout
        assert "pip install" in done.stdout


@pytest.mark.parametrize("strategy", ["kmeans++", "lcmd"])
def test_gradient_embeddings_select_like_the_products_they_stand_for(strategy: str) -> None:
    x, p = draw(250, 7).double(), draw(250, 4, seed=1).double().softmax(1)
    u = torch.rand(250, generator=torch.Generator().manual_seed(2)).double()
    x[100:120], p[100:120] = x[:20], p[:20]
    likely = torch.nn.functional.one_hot(p.argmax(1), 4)
    whole = {
        "classes": (gradient_embeddings(x, p), (p - likely)[:, :, None] * x[:, None, :]),
        "regression": (gradient_embeddings(x, uncertainty=u), u.sqrt()[:, None] * x),
        "bias": (gradient_embeddings(x, bias=True), torch.cat([x, torch.ones(250, 1)], 1)),
    }
    for factors, products in whole.values():
        got = select(factors, 40, strategy=strategy, seed=3)
        expected = select(products.flatten(1), 40, strategy=strategy, seed=3)
        assert got.indices.equal(expected.indices)
        assert got.radius == pytest.approx(expected.radius, rel=1e-9)
        assert select(factors, 40, strategy=strategy, seed=3, state=got.state).indices.equal(got.indices)
    with pytest.raises(ValueError, match=r"gradient embeddings are for kmeans\+\+.*'maxdet'"):
        select(gradient_embeddings(x, p), 3, strategy="maxdet")
    for bad, words in (
        ({"features": x[0]}, r"`features` \[N, d\]"),
        ({"features": x, "probabilities": p[:5]}, "`probabilities`"),
        ({"features": x, "probabilities": p, "uncertainty": u}, "`uncertainty`"),
        ({"features": x, "uncertainty": -u}, "`uncertainty`"),
    ):
        with pytest.raises(ValueError, match=f"gradient_embeddings: .*{words}"):
            gradient_embeddings(**bad)
