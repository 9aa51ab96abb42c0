"""What is special to Rank-N-Contrast: hand-worked values, ties, symmetries, extreme inputs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import msacore
from msacore.reference.rank_n_contrast import rank_n_contrast as reference

F64 = torch.float64


def _loss_and_gradient(embeddings: Tensor, targets: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    leaf = embeddings.detach().clone().requires_grad_()
    loss = msacore.rank_n_contrast(leaf, targets, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _cubic_form(embeddings: Tensor, targets: Tensor, temperature: float) -> float:
    """The definition, sum by sum."""
    n, total = len(targets), 0.0
    s = [[-math.dist(a, b) / temperature for b in embeddings.tolist()] for a in embeddings.tolist()]
    y = targets.tolist()
    for i in range(n):
        for j in range(n):
            if j != i:
                others = [k for k in range(n) if k != i and abs(y[i] - y[k]) >= abs(y[i] - y[j])]
                total += math.log(sum(math.exp(s[i][k]) for k in others)) - s[i][j]
    return total / (n * (n - 1))


@pytest.mark.parametrize("function", [msacore.rank_n_contrast, reference], ids=["operator", "reference"])
def test_three_samples_by_hand(function: object) -> None:
    # Distances 1, 2, 3 and gaps 1, 2, 3 agree: of each anchor only the nearer sample sees a second one.
    embeddings, targets = torch.tensor([[0.0], [1.0], [3.0]], dtype=F64), torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-0.5))) / 6
    assert float(function(embeddings, targets, temperature=2.0)) == pytest.approx(expected, abs=1e-14)


sizes = st.tuples(st.integers(2, 24), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([2, 6, 48, 10**6]))


def _draw(size: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    n, width, seed, levels = size
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(n, width, generator=generator, dtype=F64)
    return embeddings, torch.randint(0, levels + 1, (n,), generator=generator) * (6.0 / levels) - 3


@given(sizes)
def test_agrees_with_the_cubic_form(size: tuple[int, int, int, int]) -> None:
    embeddings, targets = _draw(size)
    targets = targets.double()
    for temperature in (2.0, 0.3):
        ours = float(msacore.rank_n_contrast(embeddings, targets, temperature=temperature))
        assert ours == pytest.approx(_cubic_form(embeddings, targets, temperature), rel=1e-12, abs=1e-13)


@given(sizes)
def test_permuting_the_batch_permutes_the_gradient(size: tuple[int, int, int, int]) -> None:
    embeddings, targets = _draw(size)
    loss, grad = _loss_and_gradient(embeddings, targets)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(size[2]))
    permuted, permuted_grad = _loss_and_gradient(embeddings[order], targets[order])
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(permuted_grad, grad[order])


@given(sizes)
def test_rotating_and_shifting_embeddings_changes_no_loss(size: tuple[int, int, int, int]) -> None:
    embeddings, targets = _draw(size)
    generator = torch.Generator().manual_seed(size[2])
    rotation = torch.linalg.qr(torch.randn(size[1], size[1], generator=generator, dtype=F64))[0]
    loss, grad = _loss_and_gradient(embeddings, targets)
    rotated, rotated_grad = _loss_and_gradient(embeddings @ rotation + 5, targets)
    torch.testing.assert_close(rotated, loss)
    torch.testing.assert_close(rotated_grad, grad @ rotation)


@given(sizes)
def test_mask_equals_leaving_the_rows_out(size: tuple[int, int, int, int]) -> None:
    embeddings, targets = _draw(size)
    mask = torch.rand(len(targets), generator=torch.Generator().manual_seed(size[2])) < 0.6
    loss, grad = _loss_and_gradient(embeddings, targets, mask=mask)
    alone, alone_grad = _loss_and_gradient(embeddings[mask], targets[mask])
    assert torch.equal(loss, alone)
    assert torch.equal(grad[mask], alone_grad)
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gaps_are_compared_in_the_dtype_of_the_targets(dtype: torch.dtype) -> None:
    # Thirds are no binary fractions: rounded gaps tie where exact gaps of the rounded labels do not.
    targets = (torch.arange(-9, 10) / 3).to(dtype)
    rounded, exact = [(t[:, None] - t[None, :]).abs().unique() for t in (targets, targets.double())]
    assert len(rounded) < len(exact)
    embeddings = torch.randn(len(targets), 6, dtype=F64)
    ours = msacore.rank_n_contrast(embeddings, targets)
    torch.testing.assert_close(ours, reference(embeddings, targets), rtol=1e-12, atol=0)
    assert abs(float(ours - reference(embeddings, targets.double()))) > 1e-6


def test_one_label_for_all_makes_every_other_sample_a_candidate() -> None:
    embeddings = torch.randn(9, 4, dtype=F64)
    s = -torch.cdist(embeddings, embeddings) / 2
    s.fill_diagonal_(-math.inf)
    expected = (s.logsumexp(1).sum() * 8 - s[~torch.eye(9, dtype=torch.bool)].sum()) / 72
    torch.testing.assert_close(msacore.rank_n_contrast(embeddings, torch.zeros(9)), expected)


def test_equal_embeddings_have_no_gradient() -> None:
    loss, grad = _loss_and_gradient(torch.full((6, 3), 0.3), torch.randn(6))
    assert loss > 0
    assert (grad == 0).all()


def test_close_pairs_far_from_the_mean_keep_their_gradient() -> None:
    # |a|² + |b|² - 2ab would cancel: pairs 1e-3 apart in clusters 100 apart.
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(8, 5, generator=generator).repeat_interleave(4, 0) * 100
    embeddings = centres + 1e-3 * torch.randn(32, 5, generator=generator)
    targets = torch.randn(32, generator=generator)
    _, grad = _loss_and_gradient(embeddings, targets)
    leaf = embeddings.double().requires_grad_()
    expected = torch.autograd.grad(reference(leaf, targets), leaf)[0]
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1e4])
def test_extreme_temperatures_neither_overflow_nor_underflow(dtype: torch.dtype, temperature: float) -> None:
    embeddings, targets = torch.randn(30, 4, dtype=dtype), torch.randn(30, dtype=dtype)
    loss, grad = _loss_and_gradient(embeddings, targets, temperature=temperature)
    leaf = embeddings.double().requires_grad_()
    expected = reference(leaf, targets, temperature=temperature)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=tolerance, atol=0)
    expected_grad = torch.autograd.grad(expected, leaf)[0]
    scale = float(expected_grad.abs().max())
    # At a temperature of 1e-4 similarities are in the thousands, whose rounding the exponential multiplies.
    slack = 1e3 if temperature < 1e-3 else 1
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=tolerance * slack * scale)


@pytest.mark.parametrize("where", ["embeddings", "targets"])
def test_a_number_missing_among_the_inputs_reaches_the_loss(where: str) -> None:
    inputs = dict(embeddings=torch.randn(12, 4), targets=torch.randn(12))
    inputs[where][5] = math.nan
    assert msacore.rank_n_contrast(**inputs).isnan()


def test_targets_get_no_gradient() -> None:
    embeddings, targets = torch.randn(6, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    msacore.rank_n_contrast(embeddings, targets).backward()
    assert embeddings.grad is not None
    assert targets.grad is None


def test_many_tiles_agree_with_one() -> None:
    # 1,200 anchors take several tiles; the loss over them is the mean of losses that a loop over anchors gives.
    embeddings, targets = torch.randn(1200, 3, dtype=F64), torch.randn(1200, dtype=F64)
    loss, grad = _loss_and_gradient(embeddings, targets)
    direction = torch.randn(1200, 3, dtype=F64)
    step = 1e-6
    up, down = [msacore.rank_n_contrast(embeddings + sign * step * direction, targets) for sign in (1, -1)]
    assert float((up - down) / (2 * step)) == pytest.approx(float((grad * direction).sum()), rel=1e-6)
    s = -torch.cdist(embeddings, embeddings) / 2
    gap = (targets[:, None] - targets[None, :]).abs()
    gap.fill_diagonal_(-1)
    by_gap, order = gap.sort(1, descending=True)  # no two labels tie
    assert (by_gap[:, :-1].diff(dim=1) < 0).all()
    ranked = s.gather(1, order)[:, :-1]
    expected = (ranked.logcumsumexp(1) - ranked).sum() / (1200 * 1199)
    torch.testing.assert_close(loss, expected)
