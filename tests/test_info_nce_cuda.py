"""Positives with equal labels in the CUDA code of info_nce, executed on the CPU: classes of every size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from msacore import info_nce
from tests.cuda_on_host.dispatch import CudaOnHost, launches
from tests.test_cuda_shim import SCHEDULES

N, M = 45, 70
LARGEST = 2**63 - 1


def _draw(high: int, n: int) -> Tensor:
    return torch.randint(-1, high, (n,), generator=torch.Generator().manual_seed(n + high))


# Classes of more than eight rows are summed in pieces on the host.
LABELS: dict[str, tuple[Tensor, Tensor]] = {
    "one class": (torch.zeros(N).long(), torch.zeros(M).long()),
    "classes of one row": (torch.arange(N), torch.arange(M)),
    "no class on both sides": (torch.arange(N), torch.arange(M) + N),
    "few": (_draw(3, N), _draw(3, M)),
    "many": (_draw(30, N), _draw(30, M)),
    "a class that ends with a piece": (torch.arange(N) // 16, torch.arange(M) // 16),
    "far apart": (LARGEST - _draw(4, N).abs() * 2**61, LARGEST - _draw(4, M).abs() * 2**61),
    "neighbours at the end of the range": (LARGEST - torch.arange(N) % 2, LARGEST - torch.arange(M) % 2),
    "none": (torch.full((N,), -1), torch.full((M,), -LARGEST)),
}


def _results(arguments: dict[str, Any]) -> list[Tensor]:
    leaves = {name: arguments[name].clone().requires_grad_() for name in ("anchors", "candidates", "temperature")}
    loss = info_nce(**{**arguments, **leaves}, symmetric=True)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_sums_over_classes_are_those_of_the_cpu(
    labels: tuple[Tensor, Tensor], exclude_self: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (N, M))
    y[3] = 0
    arguments: dict[str, Any] = dict(
        anchors=x,
        candidates=y,
        temperature=torch.tensor(0.3, dtype=torch.float64),
        labels=labels,
        candidate_mask=torch.arange(M) % 7 != 2,
        exclude_self=exclude_self,
    )
    expected = _results(arguments)
    for schedule in SCHEDULES[:2]:
        monkeypatch.setenv("CUDA_ON_HOST_SCHEDULE", schedule)
        with CudaOnHost() as on_host:
            results = _results(arguments)
        assert on_host.calls
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_the_environment_sets_how_many_labels_are_compared_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (N, M))
    arguments = dict(anchors=x, candidates=y, temperature=torch.tensor(0.3).double(), labels=LABELS["few"])

    def launched(limit: int) -> tuple[int, list[Tensor]]:
        monkeypatch.setenv("MSACORE_CUDA_PAIRWISE_ROWS", str(limit))
        with CudaOnHost():
            before = launches()
            results = _results(arguments)
            return launches() - before, results

    (pairs, one_way), (classes, other_way) = launched(M), launched(M - 1)
    assert pairs < classes
    for ours, theirs in zip(one_way, other_way, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("positives", ["labels", "weights"])
@pytest.mark.parametrize(("n", "m"), [(N, 0), (0, N)])
def test_without_rows_on_one_side_loss_and_gradients_are_zero(n: int, m: int, positives: str) -> None:
    arguments: dict[str, Any] = dict(
        anchors=torch.randn(n, 4), candidates=torch.randn(m, 4), temperature=torch.tensor(0.3)
    )
    labels, weights = (torch.zeros(n).long(), torch.zeros(m).long()), torch.ones(n, m)
    arguments[positives] = labels if positives == "labels" else weights
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        with CudaOnHost() as on_host:
            results = _results(arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert on_host.calls
    assert [result.shape for result in results] == [(), (n, 4), (m, 4), ()]
    assert all((result == 0).all() for result in results)
