"""The first tier holds every operator in every dtype, on the CPU and as CUDA code on the host."""

import pytest
import torch

from tests import cases, tiers
from tests.opcase import OpCase


@pytest.mark.parametrize("on_host", [False, True], ids=["cpu", "cuda on host"])
@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
def test_the_first_tier_runs_every_operator_in_every_dtype(case: OpCase, on_host: bool) -> None:
    samples = case.samples(torch.device("cpu"), torch.float32)
    values = "test_values_and_gradients_are_as_accurate_as_torch"
    run = {
        dtype
        for number, sample in enumerate(samples)
        for dtype in tiers.FLOATS
        if (sample.on_host or not on_host) and not tiers.waits(on_host, values, number, {"dtype": dtype})
    }
    assert run == set(tiers.FLOATS)


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.name)
def test_the_first_tier_runs_every_generic_test_of_every_operator(case: OpCase) -> None:
    samples = case.samples(torch.device("cpu"), torch.float32)
    for on_host, rules in ((False, tiers.EVERY_NTH), (True, tiers.ON_HOST)):
        for test in rules:
            assert any(
                not tiers.waits(on_host, test, number, {"sample": sample.id})
                for number, sample in enumerate(samples)
                if sample.on_host or not on_host
            )
