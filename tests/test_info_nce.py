"""What is special to the contrastive losses: identities of the papers, invariances, and the documented edge cases."""

import math
from itertools import combinations
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from msacore import hierarchical_contrastive_loss, info_nce
from msacore.nn import HierarchicalContrastiveLoss

DOUBLE = torch.float64
shapes = st.tuples(st.integers(2, 40), st.integers(1, 20), st.integers(0, 2**31))


def draw(n: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors, candidates and labels, some of them negative."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=generator, dtype=DOUBLE) for _ in range(2))
    return x, y, torch.randint(-1, 4, (n,), generator=generator)


def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@given(shapes)
def test_the_order_of_the_batch_does_not_matter(shape: tuple[int, int, int]) -> None:
    x, y, labels = draw(*shape)
    p = permutation(shape[0], shape[2])
    close(info_nce(x[p], y[p], symmetric=True), info_nce(x, y, symmetric=True))
    z, both = x[p], (labels[p], labels[p])
    ours = info_nce(z, z, labels=both, exclude_self=True, reduction="none")
    close(ours, info_nce(x, x, labels=(labels, labels), exclude_self=True, reduction="none")[p])


@given(shapes)
def test_the_names_of_the_classes_do_not_matter(shape: tuple[int, int, int]) -> None:
    x, y, labels = draw(*shape)
    renamed = torch.where(labels < 0, -7, torch.tensor([900, 2, 31, 4])[labels])
    close(info_nce(x, y, labels=(renamed, renamed)), info_nce(x, y, labels=(labels, labels)))


@given(shapes)
def test_rotation_and_length_of_the_embeddings_do_not_matter(shape: tuple[int, int, int]) -> None:
    x, y, labels = draw(*shape)
    n, d, seed = shape
    generator = torch.Generator().manual_seed(seed + 2)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=DOUBLE)).Q
    length = 0.1 + torch.rand(n, 1, generator=generator, dtype=DOUBLE)
    options: dict[str, Any] = dict(labels=(labels, labels), symmetric=True, temperature=0.3)
    close(info_nce(length * x @ rotation, y @ rotation, **options), info_nce(x, y, **options))


@given(shapes)
def test_symmetric_is_the_mean_of_both_directions(shape: tuple[int, int, int]) -> None:
    x, y, labels = draw(*shape)
    other = labels.flip(0)
    for reduction in ("mean", "sum", "none"):
        one = info_nce(x, y, labels=(labels, other), reduction=reduction)
        two = info_nce(y, x, labels=(other, labels), reduction=reduction)
        close(info_nce(x, y, labels=(labels, other), reduction=reduction, symmetric=True), (one + two) / 2)


@given(shapes)
def test_labels_are_weights_of_one_per_equal_pair(shape: tuple[int, int, int]) -> None:
    x, y, labels = draw(*shape)
    weights = (labels[:, None] == labels[None, :]).to(DOUBLE)
    masks = dict(anchor_mask=labels >= 0, candidate_mask=labels >= 0)
    for options in (dict(exclude_self=True), dict(symmetric=True)):
        close(
            info_nce(x, y, labels=(labels, labels), **options),
            info_nce(x, y, weights=weights, **masks, **options),
        )


@given(shapes)
def test_an_embedding_with_itself_equals_a_copy_of_it(shape: tuple[int, int, int]) -> None:
    """Compares the form that uses the symmetry of the similarities with the one that does not."""
    x, _, labels = draw(*shape)
    for options in (dict(exclude_self=True, labels=(labels, labels)), dict(symmetric=True), dict(temperature=0.004)):
        x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
        once, twice = info_nce(x1, x1, **options), info_nce(x2, x2.clone(), **options)
        close(once, twice)
        close(torch.autograd.grad(once, x1)[0], torch.autograd.grad(twice, x2)[0])


def test_supervised_contrast_is_the_published_sum() -> None:
    x, _, _ = draw(7, 4, 0)
    labels = torch.tensor([0, 0, 1, 1, 1, 2, 0])
    z = x / x.norm(dim=1, keepdim=True)
    terms = []
    for i in range(7):
        logits = {j: (z[i] @ z[j] / 0.1).item() for j in range(7) if j != i}
        denominator = math.log(sum(math.exp(v) for v in logits.values()))
        positives = [j for j in logits if labels[j] == labels[i]]
        if positives:
            terms.append(-sum(logits[j] - denominator for j in positives) / len(positives))
    assert len(terms) == 6
    ours = info_nce(x, x, labels=(labels, labels), exclude_self=True)
    assert ours.item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_worked_example() -> None:
    z = torch.eye(2, dtype=DOUBLE)
    assert info_nce(z, z, temperature=1.0).item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-14)
    ones = torch.ones(5, 3)
    assert info_nce(ones, ones).item() == pytest.approx(math.log(5), rel=1e-6)


def test_temperature_gradient_is_the_difference_quotient() -> None:
    x, y, labels = draw(20, 6, 3)
    for options in (dict(), dict(labels=(labels, labels), symmetric=True), dict(reduction="sum")):
        for other in (x, y):
            temperature = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
            info_nce(x, other, temperature=temperature, **options).backward()
            above, below = (info_nce(x, other, temperature=0.2 + h, **options) for h in (1e-6, -1e-6))
            assert temperature.grad is not None
            assert temperature.grad.item() == pytest.approx(((above - below) / 2e-6).item(), rel=1e-6)


def test_a_temperature_of_float32_serves_embeddings_of_16_bits() -> None:
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = info_nce(torch.randn(6, 4).bfloat16(), torch.randn(6, 4).bfloat16(), temperature=temperature)
    loss.backward()
    assert loss.dtype == torch.float32
    assert temperature.grad is not None
    assert temperature.grad.isfinite()


@pytest.mark.parametrize("temperature", [1e-3, 0.01, 0.0241, 0.07, 1.0, 1e3])
def test_any_temperature_is_exact(temperature: float) -> None:
    """Includes rows far from every candidate, whose terms would underflow after a shift by the largest cosine."""
    x, _, _ = draw(30, 5, 1)
    y = torch.cat([-x[:10], x[10:]])
    ours = info_nce(x.float(), y.float(), temperature=temperature, symmetric=True)
    exact = info_nce(x, y, temperature=temperature, symmetric=True)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=1e-6)


LEFT_OUT = {
    "default positives without self": dict(exclude_self=True),
    "every anchor masked": dict(anchor_mask=torch.zeros(6, dtype=torch.bool)),
    "every candidate masked": dict(candidate_mask=torch.zeros(6, dtype=torch.bool)),
    "no equal label": dict(labels=(torch.arange(6), torch.arange(6) + 10)),
    "nothing labelled": dict(labels=(torch.full((6,), -1), torch.full((6,), -1))),
    "no weight": dict(weights=torch.zeros(6, 6)),
}


@pytest.mark.parametrize("options", LEFT_OUT.values(), ids=LEFT_OUT.keys())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_with_no_positive_left_loss_and_gradients_are_zero(
    options: dict[str, Any], reduction: str, symmetric: bool
) -> None:
    x, y = (torch.randn(6, 3, requires_grad=True) for _ in range(2))
    loss = info_nce(x, y, **options, reduction=reduction, symmetric=symmetric)
    assert (loss == 0).all()
    loss.sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert (x.grad == 0).all()
    assert (y.grad == 0).all()


def test_dropped_anchors_count_neither_in_the_mean_nor_per_anchor() -> None:
    x, y, _ = draw(6, 4, 5)
    labels = torch.tensor([0, 0, 1, 2, -1, 1]), torch.tensor([0, 1, 5, 0, 0, -3])
    each = info_nce(x, y, labels=labels, reduction="none")
    assert (each != 0).tolist() == [True, True, True, False, False, True]
    close(info_nce(x, y, labels=labels), each.sum() / 4)
    close(info_nce(x, y, labels=labels, reduction="sum"), each.sum())


def test_zero_rows_have_cosine_zero_and_no_gradient() -> None:
    x, y = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    with torch.no_grad():
        x[2] = 0
    loss = info_nce(x, y, temperature=1.0, reduction="none")
    assert loss[2].item() == pytest.approx(math.log(5), rel=1e-6)
    loss.sum().backward()
    assert x.grad is not None
    assert (x.grad[2] == 0).all()
    assert (x.grad[[0, 1, 3, 4]] != 0).any(1).all()


def test_a_nan_sample_reaches_the_loss() -> None:
    x = torch.randn(5, 3)
    x[1, 0] = float("nan")
    assert info_nce(x, x).isnan()
    each = info_nce(x, torch.randn(5, 3), reduction="none")
    assert each.isnan().tolist() == [False, True, False, False, False]


def test_weights_gradient_vanishes_for_pairs_that_take_no_part() -> None:
    x, y, _ = draw(6, 3, 2)
    weights = torch.rand(6, 6, dtype=DOUBLE, requires_grad=True)
    mask = torch.tensor([True, True, False, True, True, True])
    info_nce(x, y, weights=weights, candidate_mask=mask, exclude_self=True).backward()
    assert weights.grad is not None
    assert (weights.grad[:, 2] == 0).all()
    assert (weights.grad.diagonal() == 0).all()
    close((weights.grad * weights).sum(1), torch.zeros(6, dtype=DOUBLE))


def embeddings(n: int, modalities: int = 3, d: int = 6, d3: int = 4) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    pairs = modalities * (modalities - 1) // 2
    unimodal = [torch.randn(n, d, dtype=DOUBLE) for _ in range(modalities)]
    return unimodal, torch.randn(n, d, dtype=DOUBLE), [torch.randn(n, d3, dtype=DOUBLE) for _ in range(pairs)]


def test_tiers_are_sums_of_info_nce_terms() -> None:
    unimodal, fused, high = embeddings(12)

    def term(a: Tensor, b: Tensor, temperature: float) -> Tensor:
        return info_nce(a, b, temperature=temperature, symmetric=True)

    loss, tiers = hierarchical_contrastive_loss(unimodal, fused, high, return_tiers=True)
    close(tiers[0], sum(term(a, b, 0.1) for a, b in combinations(unimodal, 2)))
    close(tiers[1], sum(term(fused, a, 0.1) for a in unimodal))
    close(tiers[2], sum(term(a, b, 0.5) for a, b in combinations(high, 2)))
    close(loss, (tiers * torch.tensor([0.2, 0.3, 0.5], dtype=DOUBLE)).sum())
    assert hierarchical_contrastive_loss(unimodal, fused, high) == loss


def test_a_missing_modality_leaves_its_terms_on_both_sides() -> None:
    """In these terms its sample counts as absent from the batch; in tier 2 this includes the fused row of the term."""
    unimodal, fused, high = embeddings(10)
    available = torch.ones(10, 3, dtype=torch.bool)
    available[3, 1] = False
    _, tiers = hierarchical_contrastive_loss(unimodal, fused, high, available=available, return_tiers=True)
    rest = torch.arange(10) != 3

    def term(a: Tensor, b: Tensor, rows: Tensor | slice, temperature: float) -> Tensor:
        return info_nce(a[rows], b[rows], temperature=temperature, symmetric=True)

    everyone = slice(None)
    t, a, v = unimodal
    close(tiers[0], term(t, a, rest, 0.1) + term(t, v, everyone, 0.1) + term(a, v, rest, 0.1))
    close(tiers[1], term(fused, t, everyone, 0.1) + term(fused, a, rest, 0.1) + term(fused, v, everyone, 0.1))
    close(tiers[2], sum(term(x, y, rest, 0.5) for x, y in combinations(high, 2)))


def test_intra_modal_tier_is_supervised_contrast_per_modality() -> None:
    unimodal, fused, high = embeddings(12)
    labels = torch.randint(-1, 3, (12,))
    options: dict[str, Any] = dict(labels=labels, return_tiers=True)
    _, tiers = hierarchical_contrastive_loss(unimodal, fused, high, tier1="intra_modal", **options)
    close(tiers[0], sum(info_nce(x, x, labels=(labels, labels), exclude_self=True) for x in unimodal))
    ignored = hierarchical_contrastive_loss(unimodal, fused, high, labels=labels)
    assert ignored == hierarchical_contrastive_loss(unimodal, fused, high)


@given(st.integers(1, 30), st.integers(0, 2**31))
def test_the_order_of_samples_does_not_matter_to_the_hierarchy(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    unimodal, fused, high = embeddings(n)
    available = torch.rand(n, 3) < 0.7
    p = permutation(n, seed)
    moved = hierarchical_contrastive_loss(
        [x[p] for x in unimodal], fused[p], [x[p] for x in high], available=available[p]
    )
    close(moved, hierarchical_contrastive_loss(unimodal, fused, high, available=available))


def test_either_output_alone_can_be_differentiated() -> None:
    unimodal, fused, high = embeddings(8)
    fused.requires_grad_()
    loss, tiers = hierarchical_contrastive_loss(unimodal, fused, high, return_tiers=True)
    (from_loss,) = torch.autograd.grad(loss, fused, retain_graph=True)
    (from_tier,) = torch.autograd.grad(tiers[1], fused)
    close(from_loss, 0.3 * from_tier)


@pytest.mark.parametrize("n", [1, 40, 128, 129])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_gradients_taken_along_with_the_loss_are_those_of_the_backward_pass(n: int, dtype: torch.dtype) -> None:
    """Small batches take a path of their own on the CPU, which a request for the tiers avoids."""
    unimodal, fused, high = embeddings(n, d=17, d3=33)
    available = torch.rand(n, 3) < 0.7
    grads, losses = [], []
    for return_tiers in (False, True):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (*unimodal, fused, *high)]
        result = hierarchical_contrastive_loss(
            leaves[:3], leaves[3], leaves[4:], available=available, return_tiers=return_tiers
        )
        losses.append(result[0] if return_tiers else result)
        grads.append(torch.autograd.grad(losses[-1], leaves, torch.tensor(0.7, dtype=dtype)))
    assert losses[0] == losses[1]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15 if dtype == DOUBLE else 1e-7)


@pytest.mark.parametrize("return_tiers", [False, True])
def test_the_loss_refuses_a_second_derivative(return_tiers: bool) -> None:
    unimodal, fused, high = embeddings(5)
    fused.requires_grad_()
    result = hierarchical_contrastive_loss(unimodal, fused, high, return_tiers=return_tiers)
    loss = result[0] if return_tiers else result
    (grad,) = torch.autograd.grad(loss, fused, create_graph=True)
    with pytest.raises(RuntimeError, match=r"msacore::hierarchical_contrastive_loss: second derivatives"):
        torch.autograd.grad(grad.sum(), fused)


def test_no_sample_with_two_modalities_leaves_a_zero_first_tier() -> None:
    unimodal, fused, high = embeddings(3)
    fused.requires_grad_()
    available = torch.eye(3, dtype=torch.bool)
    loss, tiers = hierarchical_contrastive_loss(unimodal, fused, high, available=available, return_tiers=True)
    assert tiers.tolist() == [0, 0, 0]
    loss.backward()
    assert fused.grad is not None
    assert (fused.grad == 0).all()


def test_the_module_projects_and_never_reads_what_is_missing() -> None:
    module = HierarchicalContrastiveLoss(6, 4, projection=5, dtype=DOUBLE)
    unimodal, fused, high = embeddings(8)
    available = torch.rand(8, 3) < 0.6
    loss = module(unimodal, fused, high, available)
    expected = hierarchical_contrastive_loss(
        [project(x) for project, x in zip(module.unimodal, unimodal, strict=True)],
        module.fused(fused),
        [project(x) for project, x in zip(module.high_level, high, strict=True)],
        available=available,
    )
    close(loss, expected)
    parameters = list(module.parameters())
    grads = torch.autograd.grad(loss, parameters)
    assert len(grads) == 14
    assert all(g.abs().sum() > 0 for g in grads[:6:2])
    for m in range(3):
        unimodal[m][~available[:, m]] = float("nan")
    for p, (m, n) in enumerate(combinations(range(3), 2)):
        high[p][~(available[:, m] & available[:, n])] = float("nan")
    poisoned = torch.autograd.grad(module(unimodal, fused, high, available), parameters)
    for a, b in zip(grads, poisoned, strict=True):
        assert torch.equal(a, b)


def test_the_module_shows_its_sizes_and_refuses_other_counts() -> None:
    module = HierarchicalContrastiveLoss(6, 4, modalities=2)
    assert "in_features=6, high_level_features=4, projection=128, modalities=2" in repr(module)
    unimodal, fused, high = (t.float() if isinstance(t, Tensor) else [x.float() for x in t] for t in embeddings(5))
    with pytest.raises(ValueError, match="expected 2 tensors in `unimodal` and 1 in `high_level`, got 3 and 3"):
        module(unimodal, fused, high)
    with pytest.raises(ValueError, match="`modalities`"):
        HierarchicalContrastiveLoss(6, 4, modalities=0)
