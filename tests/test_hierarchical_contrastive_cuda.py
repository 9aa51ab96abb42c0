"""How many kernels the CUDA code of the hierarchical contrastive loss launches, counted on the host."""

import pytest
import torch
from torch import Tensor

from msacore import hierarchical_contrastive_loss
from tests.cuda_on_host.dispatch import CudaOnHost, launches


def _loss(n: int, d: int = 4, **options: bool) -> Tensor:
    """Loss of three modalities that require gradients."""
    *unimodal, fused = torch.randn(4, n, d).requires_grad_()
    loss = hierarchical_contrastive_loss(unimodal, fused, list(torch.randn(3, n, 3)), **options)
    return loss[0] if isinstance(loss, tuple) else loss


@pytest.mark.parametrize("n", [1, 32, 128])
def test_few_samples_are_one_launch_forward_and_one_backward(n: int) -> None:
    with CudaOnHost():
        before = launches()
        loss = _loss(n, return_tiers=True)
        forward = launches()
        loss.backward()
        assert (forward - before, launches() - forward) == (1, 1)


def test_loss_and_gradients_together_are_two_launches() -> None:
    with CudaOnHost():
        before = launches()
        _loss(32).backward()
        assert launches() - before == 2


@pytest.mark.parametrize(("n", "d"), [(150, 4), (5, 1900)])
def test_many_samples_and_wide_rows_are_more(n: int, d: int) -> None:
    with CudaOnHost():
        before = launches()
        _loss(n, d, return_tiers=True).backward()
        assert launches() - before > 2


def test_the_environment_sets_which_samples_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(limit: str) -> tuple[int, Tensor]:
        monkeypatch.setenv("MSACORE_CUDA_FEW_SAMPLES", limit)
        torch.manual_seed(0)
        with CudaOnHost():
            before = launches()
            loss = _loss(20)
            loss.backward()
            return launches() - before, loss.detach()

    (few, one_way), (many, other_way), (usual, _) = launched("20"), launched("19"), launched("")
    assert few == usual == 2 < many
    torch.testing.assert_close(one_way, other_way)
    for wrong in ("many", "-1", "3 samples"):
        with pytest.raises(RuntimeError, match="MSACORE_CUDA_FEW_SAMPLES must be a number of at least 0, got " + wrong):
            launched(wrong)
