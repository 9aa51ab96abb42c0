"""Peers compute what msacore does: picks of selection and, where the harness compares only outputs, gradients."""

import importlib.util

import pytest
import torch

from bench import info_nce, kcenter
from bench.__main__ import benchmarks
from bench.harness import Provider, Shape
from msacore.reference import kcenter as reference
from tests.real_data import MOSI, needs_real_data

_FOR_POINTS = ("fpsample", "torch_quickfps")  # packages without wheels for some Pythons and systems


def _package(provider: Provider) -> str:
    return provider.name.split(",")[0]


def _is_here(provider: Provider) -> bool:
    return _package(provider) not in _FOR_POINTS or importlib.util.find_spec(_package(provider)) is not None


@pytest.mark.parametrize("both", [False, True])
def test_flash_attention_has_the_gradients_of_cross_entropies(both: bool) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(40, 16, requires_grad=True) for _ in range(2)]
    found, expected = (
        torch.autograd.grad(loss(*rows, both), rows)
        for loss in (info_nce.flash_cross_entropies, info_nce.cross_entropies)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", range(3))
def test_every_loop_of_selection_picks_the_same_samples(kind: int) -> None:
    benchmark = benchmarks()["kcenter"]
    torch.manual_seed(kind)
    shape = Shape("small", {"N": 6000, "d": 64, "budget": 60, "kind": kind})
    inputs = benchmark.inputs(shape.sizes, torch.device("cpu"))
    pool = inputs["pool"]
    expected, _ = reference.kcenter(pool, 60, centers=pool[:1], excluded=torch.arange(6000) == 0)
    for provider in benchmark.providers:
        if not _is_here(provider):
            continue
        picks = provider.bind(inputs)()
        if kind == 2 and _package(provider) in _FOR_POINTS:  # they may pick any copy of a row
            picks, wanted = pool[picks], pool[expected]
        else:
            wanted = expected
        assert torch.equal(picks, wanted), provider.name


@needs_real_data
@pytest.mark.parametrize("block", ["text_minilm", "audio"])
def test_every_loop_of_selection_picks_the_same_samples_of_a_real_corpus(
    block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSACORE_BENCH_POOL", f"{MOSI}:{block}")
    inputs = kcenter.BENCHMARKS[0].inputs(kcenter.shapes()[-1].sizes, torch.device("cpu"))
    pool, budget = inputs["pool"], inputs["budget"]
    expected, _ = reference.kcenter(pool, budget, centers=pool[:1], excluded=torch.arange(len(pool)) == 0)
    # The loops decide in float32, which is too coarse for the unnormalised audio features.
    for provider in filter(_is_here, kcenter.BENCHMARKS[0].providers[: None if block == "text_minilm" else 1]):
        assert torch.equal(provider.bind(inputs)(), expected), provider.name
