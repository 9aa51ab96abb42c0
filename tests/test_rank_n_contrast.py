"""What is special to Rank-N-Contrast: hand-worked values, ties, symmetries, extreme inputs."""

import contextlib
import math
from collections.abc import Iterator
from decimal import Decimal, localcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import msacore
from msacore.reference.rank_n_contrast import rank_n_contrast as reference
from tests.cuda_on_host.dispatch import CudaOnHost

F64 = torch.float64


@pytest.fixture(params=["cpu", "cuda on host"])
def on_each_device(request: pytest.FixtureRequest) -> Iterator[None]:
    with CudaOnHost() if request.param != "cpu" else contextlib.nullcontext():
        yield


def _loss_and_gradient(embeddings: Tensor, targets: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    leaf = embeddings.detach().clone().requires_grad_()
    loss = msacore.rank_n_contrast(leaf, targets, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _cubic_form(embeddings: Tensor, targets: Tensor, temperature: float) -> float:
    """The definition, sum by sum."""
    n, total = len(targets), 0.0
    s = [[-math.dist(a, b) / temperature for b in embeddings.tolist()] for a in embeddings.tolist()]
    y = targets.reshape(n, -1).tolist()
    gap = [[sum(abs(a - b) for a, b in zip(x, z, strict=True)) for z in y] for x in y]
    for i in range(n):
        for j in range(n):
            if j != i:
                others = [k for k in range(n) if k != i and gap[i][k] >= gap[i][j]]
                total += math.log(sum(math.exp(s[i][k]) for k in others)) - s[i][j]
    return total / (n * (n - 1))


@pytest.mark.parametrize("function", [msacore.rank_n_contrast, reference], ids=["operator", "reference"])
def test_three_samples_by_hand(function: object) -> None:
    # Distances 1, 2, 3 and gaps 1, 2, 3 agree: for each anchor, only the nearer sample is compared with a second one.
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
    # Thirds are not binary fractions: rounded gaps tie where exact gaps of the rounded labels do not.
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
    # At a temperature of 1e-4 similarities are in the thousands, and the exponential multiplies their rounding errors.
    slack = 1e3 if temperature < 1e-3 else 1
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=tolerance * slack * scale)


@pytest.mark.parametrize("where", ["embeddings", "targets"])
def test_a_number_missing_among_the_inputs_reaches_the_loss(where: str) -> None:
    inputs = dict(embeddings=torch.randn(12, 4), targets=torch.randn(12))
    inputs[where][5] = math.nan
    assert msacore.rank_n_contrast(**inputs).isnan()


def test_many_tiles_agree_with_one() -> None:
    # 1,200 anchors take several tiles. Finite differences check the gradient, the formula on whole matrices the loss.
    embeddings, targets = torch.randn(1200, 3, dtype=F64), torch.randn(1200, dtype=F64)
    loss, grad = _loss_and_gradient(embeddings, targets)
    direction = torch.randn(1200, 3, dtype=F64)
    step = 1e-6
    up, down = [msacore.rank_n_contrast(embeddings + sign * step * direction, targets) for sign in (1, -1)]
    assert float((up - down) / (2 * step)) == pytest.approx(float((grad * direction).sum()), rel=1e-6)
    s = -torch.cdist(embeddings, embeddings) / 2
    gap = (targets[:, None] - targets[None, :]).abs()
    gap.fill_diagonal_(-1)
    by_gap, order = gap.sort(1, descending=True)  # no two gaps of an anchor tie
    assert (by_gap[:, :-1].diff(dim=1) < 0).all()
    ranked = s.gather(1, order)[:, :-1]
    expected = (ranked.logcumsumexp(1) - ranked).sum() / (1200 * 1199)
    torch.testing.assert_close(loss, expected)


def _exact(embeddings: Tensor, targets: Tensor, temperature: float) -> tuple[float, Tensor, float]:
    """Loss and its gradients for embeddings and temperature, from the formula in 150 digits."""
    n, d = embeddings.shape
    with localcontext() as context:
        context.prec = 150
        e = [[Decimal(x) for x in row] for row in embeddings.tolist()]
        y, t = targets.reshape(n, -1).tolist(), Decimal(temperature)
        gap = [[sum(abs(a - b) for a, b in zip(x, z, strict=True)) for z in y] for x in y]
        apart = [[sum((a - b) ** 2 for a, b in zip(x, z, strict=True)).sqrt() for z in e] for x in e]
        context.prec = 60
        loss, slope_of_temperature = Decimal(0), Decimal(0)
        grad = [[Decimal(0)] * d for _ in range(n)]
        for i in range(n):
            others = [j for j in range(n) if j != i]
            context.prec = 150
            nearest = min(apart[i][j] for j in others)
            beyond = {j: apart[i][j] - nearest for j in others}
            context.prec = 60
            slope = dict.fromkeys(others, Decimal(-1))
            for j in others:
                as_far = [k for k in others if gap[i][k] >= gap[i][j]]
                top = min(beyond[k] for k in as_far)
                weight = {k: ((top - beyond[k]) / t).exp() for k in as_far}
                total = sum(weight.values())
                loss += total.ln() + (beyond[j] - top) / t
                for k in as_far:
                    slope[k] += weight[k] / total
            slope_of_temperature += sum(slope[j] * beyond[j] for j in others) / t**2
            for j in others:
                for c in range(d if apart[i][j] else 0):
                    term = -slope[j] / t * (e[i][c] - e[j][c]) / apart[i][j]
                    grad[i][c] += term
                    grad[j][c] -= term
        pairs = n * (n - 1)
        exact = [[float(g / pairs) for g in row] for row in grad]
        return float(loss / pairs), torch.tensor(exact, dtype=F64), float(slope_of_temperature / pairs)


def _extreme(kind: str, dtype: torch.dtype) -> Tensor:
    embeddings = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=F64)
    if kind.startswith("one row"):
        embeddings[5] *= float(kind.removeprefix("one row x "))
    elif kind == "two far rows":
        embeddings[0] *= 1e9
        embeddings[7] *= -1e6
    elif kind == "equal rows and a far one":
        embeddings[:8] = embeddings[0]
        embeddings[11] *= 1e7
    else:
        embeddings *= float(kind.removeprefix("all rows x "))
    return embeddings.to(dtype)


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("one row x 1e3", 0.7),
        ("one row x 1e6", 0.7),
        ("one row x 1e9", 2.0),
        ("one row x 1e20", 0.7),
        ("two far rows", 1.0),
        ("equal rows and a far one", 0.5),
        ("all rows x 1e20", 1e20),
        ("all rows x 1e20", 2.0),
        ("all rows x 1e-40", 1e-38),
        ("all rows x 1e-30", 2.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_far_and_tiny_rows_cost_no_accuracy(
    kind: str, temperature: float, dtype: torch.dtype, on_each_device: None
) -> None:
    embeddings = _extreme(kind, dtype)
    targets = torch.randint(0, 5, (12, 1 if dtype == F64 else 2), generator=torch.Generator().manual_seed(2))
    leaf, t = embeddings.clone().requires_grad_(), torch.tensor(temperature, dtype=F64, requires_grad=True)
    loss = msacore.rank_n_contrast(leaf, targets, temperature=t)
    loss.backward()
    expected, grad, of_temperature = _exact(embeddings, targets, temperature)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    assert float(loss.detach()) == pytest.approx(expected, rel=tolerance)
    largest = float(grad.abs().max())
    torch.testing.assert_close(leaf.grad.double(), grad, rtol=0, atol=tolerance * largest)
    assert float(t.grad) == pytest.approx(of_temperature, rel=tolerance, abs=1e-300)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_samples_that_tie_far_below_the_nearest_share_their_gradient(dtype: torch.dtype) -> None:
    """Beside similarities of 1e21 the logarithm of the number of ties is lost: it must not be added to them."""
    embeddings = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=F64).to(dtype) * 1e20
    embeddings[3:6] = embeddings[3]
    targets = torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(2))
    leaf, t = embeddings.clone().requires_grad_(), torch.tensor(0.1, dtype=F64, requires_grad=True)
    msacore.rank_n_contrast(leaf, targets, temperature=t).backward()
    _, grad, of_temperature = _exact(embeddings, targets[:, None], 0.1)
    torch.testing.assert_close(leaf.grad.double(), grad, rtol=0, atol=2e-6 * float(grad.abs().max()))
    assert float(t.grad) == pytest.approx(of_temperature, rel=2e-6)


LEAST, MOST = -(2**63), 2**63 - 1


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([LEAST, MOST, 0, -1, MOST - 1, LEAST + 1, 2**62]),
        torch.tensor([[LEAST, MOST], [MOST, LEAST], [0, 0], [MOST, MOST], [LEAST, LEAST], [MOST - 1, 1], [5, -7]]),
        torch.tensor([2**53, 2**53 + 1, 2**53 + 2, 0, 1, 2, 3]),
        torch.tensor([0, 2**64 - 1, 2**63, 2**63 - 1, 1, 5, 2**63 + 1], dtype=torch.uint64),
        torch.tensor([0, 255, 3, 3, 7, 200, 1], dtype=torch.uint8),
        torch.tensor([-128, 127, 3, 3, -7, 100, 1], dtype=torch.int8),
    ],
    ids=["int64", "pairs of int64", "beyond float64", "uint64", "uint8", "int8"],
)
def test_gaps_of_integers_are_exact(targets: Tensor, on_each_device: None) -> None:
    embeddings = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    ours = float(msacore.rank_n_contrast(embeddings, targets, temperature=0.3))
    assert ours == pytest.approx(_cubic_form(embeddings, targets, 0.3), rel=1e-12)


def test_mosei_labels_tie_as_integers_only() -> None:
    thirds = torch.arange(-9, 10) / 3
    embeddings = torch.randn(19, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    exact = msacore.rank_n_contrast(embeddings, (3 * thirds).round().long())
    torch.testing.assert_close(exact, reference(embeddings, torch.arange(-9, 10)))
    assert abs(float(exact - msacore.rank_n_contrast(embeddings, thirds))) > 1e-6


@given(sizes, st.integers(2, 4))
def test_several_labels_agree_with_the_cubic_form(size: tuple[int, int, int, int], labels: int) -> None:
    embeddings, _ = _draw(size)
    generator = torch.Generator().manual_seed(size[2])
    targets = torch.randint(0, min(size[3], 50) + 1, (size[0], labels), generator=generator)
    for dtype in (torch.int64, F64):
        ours = float(msacore.rank_n_contrast(embeddings, targets.to(dtype), temperature=0.3))
        assert ours == pytest.approx(_cubic_form(embeddings, targets, 0.3), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_one_label_may_have_a_dimension_of_its_own(dtype: torch.dtype) -> None:
    embeddings, targets = torch.randn(12, 4), (4 * torch.randn(12)).to(dtype)
    for ours, ref in zip(
        _loss_and_gradient(embeddings, targets[:, None]), _loss_and_gradient(embeddings, targets), strict=True
    ):
        assert torch.equal(ours, ref)


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("cuts", [(0, 1, 64, 150), (0, 70, 70, 400)], ids=str)
def test_anchors_may_be_shared_out(labels: int, cuts: tuple[int, ...], on_each_device: None) -> None:
    """The operator's internal form: losses and gradients over parts of the anchors add up to those over all."""
    generator = torch.Generator().manual_seed(labels)
    embeddings = torch.randn(150, 5, generator=generator, dtype=F64)
    targets = torch.randint(0, 9, (150, labels), generator=generator)
    mask = torch.rand(150, generator=generator) < 0.9
    temperature, grad_out = torch.tensor(0.5, dtype=F64), torch.tensor(1.5, dtype=F64)

    def all_of(begin: int, count: int) -> list[Tensor]:
        inputs = (embeddings, targets, temperature, mask)
        options = dict(temperature=1.0, anchor_begin=begin, anchor_count=count)
        loss = torch.ops.msacore.rank_n_contrast(*inputs, **options)
        return [loss, *torch.ops.msacore.rank_n_contrast_backward(grad_out, *inputs, **options)]

    parts = [all_of(begin, end - begin) for begin, end in pairwise(cuts)]
    for whole, *shares in zip(all_of(0, -1), *parts, strict=True):
        torch.testing.assert_close(torch.stack(shares).sum(0), whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [torch.tensor([0.5]), torch.tensor([[0.5]], dtype=F64)], ids=["1-d", "2-d"])
def test_a_temperature_of_one_element_is_differentiable(temperature: Tensor) -> None:
    embeddings, targets = torch.randn(9, 4), torch.randn(9)
    leaf = temperature.requires_grad_()
    loss = msacore.rank_n_contrast(embeddings, targets, temperature=leaf)
    assert torch.equal(loss.detach(), msacore.rank_n_contrast(embeddings, targets, temperature=0.5))
    assert torch.autograd.grad(loss, leaf)[0].shape == temperature.shape


def test_autocast_leaves_targets_alone() -> None:
    embeddings, targets = torch.randn(40, 4), torch.rand(40)  # bfloat16 would make many of them equal
    expected = msacore.rank_n_contrast(embeddings, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(msacore.rank_n_contrast(embeddings, targets), expected)
