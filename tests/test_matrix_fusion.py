"""What is special about the fusion operators: identities, symmetries, masks and missing modalities."""

from contextlib import nullcontext
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import msacore
from tests.cases.low_rank_fusion import low_rank_arguments
from tests.cases.matrix_fusion import fusion_arguments
from tests.cuda_on_host.dispatch import CudaOnHost
from tests.opcase import outputs_of

CPU, FLOAT64 = torch.device("cpu"), torch.float64
small = st.integers(1, 5)
modalities = st.integers(2, 4)


def _sizes(batch=small, length=small, width=small, count=modalities, rows=small, channels=small):
    return st.tuples(batch, length, width, count, rows, channels)


def test_two_tokens_by_hand() -> None:
    """G = [[13, 3], [8, 2]] / 2; the row weight (1, 1) and the bias -10 leave R = (0.5, 0), and S = (2, 1)."""
    text, audio = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0], [5.0]]])
    weights = torch.ones(1, 2), torch.tensor([-10.0]), torch.tensor([[2.0]]), torch.tensor([1.0])
    fused, pairs = msacore.matrix_fusion([text, audio], *weights)
    assert pairs.item() == 0.25
    assert fused.item() == 1.5


@given(_sizes(), st.permutations(range(4)))
def test_permuting_modalities_with_their_pair_weights_permutes_the_pairs(sizes, order) -> None:
    """G_(n, m) is G_(m, n) transposed; with scaled copies of one modality they are equal, so that any order will do."""
    arguments = fusion_arguments(CPU, FLOAT64, sizes, masked=True, missing=True, augment=False)
    order = [i for i in order if i < sizes[3]]
    arguments["features"] = [(m + 1) * arguments["features"][0] for m in range(sizes[3])]
    pairs = list(combinations(range(sizes[3]), 2))
    source = [pairs.index(tuple(sorted((order[m], order[n])))) for m, n in pairs]
    permuted = dict(
        arguments,
        features=[arguments["features"][i] for i in order],
        available=arguments["available"][:, order],
        pair_weight=arguments["pair_weight"][:, source],
    )
    fused, rows = msacore.matrix_fusion(**arguments)
    fused_permuted, rows_permuted = msacore.matrix_fusion(**permuted)
    torch.testing.assert_close(fused_permuted, fused)
    torch.testing.assert_close(rows_permuted, rows[:, source])


@given(_sizes(), st.data())
def test_a_pair_does_not_depend_on_the_other_modalities(sizes, data) -> None:
    arguments = fusion_arguments(CPU, FLOAT64, sizes, masked=True, missing=True)
    pairs = list(combinations(range(sizes[3]), 2))
    p = data.draw(st.integers(0, len(pairs) - 1))
    alone = dict(
        arguments,
        features=[arguments["features"][m] for m in pairs[p]],
        available=arguments["available"][:, list(pairs[p])],
        pair_weight=arguments["pair_weight"][:, p : p + 1],
    )
    expected = msacore.matrix_fusion(**arguments)[1][:, p]
    torch.testing.assert_close(msacore.matrix_fusion(**alone)[1][:, 0], expected)


@given(_sizes(), st.floats(-3, 3))
def test_without_activation_and_bias_the_pairs_are_linear_in_each_modality(sizes, factor) -> None:
    arguments = fusion_arguments(CPU, FLOAT64, sizes, masked=True, augment=False, activation="identity")
    arguments["row_bias"] = torch.zeros_like(arguments["row_bias"])
    first, *others = arguments["features"]
    other = torch.randn_like(first)

    def pairs(x):
        return msacore.matrix_fusion(**{**arguments, "features": [x, *others]})[1][:, : sizes[3] - 1]

    torch.testing.assert_close(pairs(first + factor * other), pairs(first) + factor * pairs(other))


@given(_sizes(length=st.just(1)), st.booleans(), st.sampled_from(["relu", "gelu", "identity"]))
def test_pooled_features_are_sequences_of_one_token(sizes, augment, activation) -> None:
    options = dict(masked=True, missing=True, augment=augment, activation=activation)
    pooled = fusion_arguments(CPU, FLOAT64, sizes, pooled=True, **options)
    sequence = {**pooled, "features": [x[:, None] for x in pooled["features"]]}
    for a, b in zip(msacore.matrix_fusion(**pooled), msacore.matrix_fusion(**sequence), strict=True):
        assert torch.equal(a, b)


@given(_sizes())
def test_one_token_beside_masked_ones_is_the_pooled_form(sizes) -> None:
    """Compares the products of a sequence with the outer products of a single token."""
    arguments = fusion_arguments(CPU, FLOAT64, sizes, missing=True)
    pooled = {**arguments, "features": [x[:, 0] for x in arguments["features"]]}
    padded = [torch.cat([x[:, :1], torch.full_like(x, float("nan"))], 1) for x in arguments["features"]]
    mask = torch.zeros(padded[0].shape[:2], dtype=torch.bool)
    mask[:, 0] = True
    for a, b in zip(
        msacore.matrix_fusion(**{**arguments, "features": padded, "mask": mask}),
        msacore.matrix_fusion(**pooled),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@given(_sizes(), st.integers(1, 4))
def test_padding_changes_nothing(sizes, extra) -> None:
    arguments = fusion_arguments(CPU, FLOAT64, sizes, masked=True, missing=True)
    longer = [torch.nn.functional.pad(x, (0, 0, 0, extra), value=float("nan")) for x in arguments["features"]]
    mask = torch.nn.functional.pad(arguments["mask"], (0, extra))
    for a, b in zip(
        msacore.matrix_fusion(**{**arguments, "features": longer, "mask": mask}),
        msacore.matrix_fusion(**arguments),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_missing_modality_keeps_its_1() -> None:
    """The Gram matrix is then 0 except for its last row: the mean of the other member, and the 1 in the corner."""
    arguments = fusion_arguments(CPU, FLOAT64, (2, 3, 4, 2, 5, 1), activation="identity")
    available = torch.tensor([[False, True], [True, True]])
    _, pairs = msacore.matrix_fusion(**arguments, available=available)
    last = arguments["row_weight"][:, -1]
    mean = torch.cat([arguments["features"][1][0].mean(0), torch.ones(1, dtype=FLOAT64)])
    torch.testing.assert_close(pairs[0, 0], last * mean.mean() + arguments["row_bias"])


def test_without_the_1_the_pairs_of_a_missing_modality_drop_out() -> None:
    arguments = fusion_arguments(CPU, FLOAT64, (1, 3, 4, 3, 5, 2), augment=False, activation="gelu")
    _, pairs = msacore.matrix_fusion(**arguments, available=torch.tensor([[True, False, True]]))
    assert (pairs[0, [0, 2]] == 0).all()
    torch.testing.assert_close(pairs[0, 1], msacore.matrix_fusion(**arguments)[1][0, 1])


@pytest.mark.parametrize("augment", [True, False])
def test_a_fully_masked_sample_is_made_of_biases(augment: bool) -> None:
    arguments = fusion_arguments(CPU, FLOAT64, (2, 3, 4, 3, 5, 2), augment=augment)
    features = [torch.full_like(x, float("nan")) for x in arguments["features"]]
    mask = torch.zeros(2, 3, dtype=torch.bool)
    fused, pairs = msacore.matrix_fusion(**{**arguments, "features": features}, mask=mask)
    rows = arguments["row_bias"].relu()
    torch.testing.assert_close(pairs, rows.expand(2, 3, 5))
    mixed = arguments["pair_weight"].sum(1)[:, None] * rows + arguments["pair_bias"][:, None]
    torch.testing.assert_close(fused, mixed.relu().expand(2, 2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_code_takes_features_at_any_address(dtype: torch.dtype) -> None:
    """Whole pieces of 16 bytes and single elements are copied to the same places."""
    fusion = fusion_arguments(CPU, dtype, (2, 3, 16, 3, 5, 2), masked=True, missing=True)
    low_rank = low_rank_arguments(CPU, dtype, 3, 2, 8, (16, 8), missing=True)
    for function, arguments in (msacore.matrix_fusion, fusion), (msacore.low_rank_fusion, low_rank):
        moved = dict(arguments)
        for name in ("features", "factors"):
            if name in moved:
                moved[name] = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in moved[name]]
        with CudaOnHost():
            for a, b in zip(outputs_of(function(**moved)), outputs_of(function(**arguments)), strict=True):
                assert torch.equal(a, b)


def test_non_finite_features_reach_only_their_own_sample() -> None:
    arguments = fusion_arguments(CPU, torch.float32, (4, 3, 5, 3, 2, 2))
    clean = msacore.matrix_fusion(**arguments)
    arguments["features"][1][2, 1, 3] = float("nan")
    for ours, ref in zip(msacore.matrix_fusion(**arguments), clean, strict=True):
        assert ours[2].isnan().any()
        others = [0, 1, 3]
        assert torch.equal(ours[others], ref[others])


def test_autocast_casts_mixed_dtypes_to_those_of_the_features() -> None:
    arguments = fusion_arguments(CPU, torch.float32, (3, 4, 5, 3, 2, 2))
    low = {k: [x.bfloat16() for x in v] if k == "features" else v for k, v in arguments.items()}
    with pytest.raises(RuntimeError, match="msacore::matrix_fusion: expected `row_weight` to have dtype bfloat16"):
        msacore.matrix_fusion(**low)
    low["row_weight"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        fused, _ = msacore.matrix_fusion(**low)
    assert fused.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(fused.float().sum(), low["row_weight"])
    assert grad.dtype == torch.float32

    arguments = low_rank_arguments(CPU, torch.float32, 3, 2, 4, (3, 2))
    low = {**arguments, "features": [x.bfloat16() for x in arguments["features"]]}
    with torch.autocast("cpu", torch.bfloat16):
        assert msacore.low_rank_fusion(**low).dtype == torch.bfloat16


@given(small, small, small, st.lists(small, min_size=2, max_size=4), st.data())
def test_low_rank_fusion_does_not_depend_on_the_order_of_modalities(batch, rank, width, features, data) -> None:
    arguments = low_rank_arguments(CPU, FLOAT64, batch, rank, width, tuple(features), missing=True)
    order = data.draw(st.permutations(range(len(features))))
    permuted = dict(
        arguments,
        features=[arguments["features"][i] for i in order],
        factors=[arguments["factors"][i] for i in order],
        available=arguments["available"][:, order],
    )
    torch.testing.assert_close(msacore.low_rank_fusion(**permuted), msacore.low_rank_fusion(**arguments))


@given(small, small, small, st.lists(small, min_size=2, max_size=3))
def test_low_rank_fusion_is_the_full_tensor_product(batch, rank, width, features) -> None:
    arguments = low_rank_arguments(CPU, FLOAT64, batch, rank, width, tuple(features))
    weight, product = arguments["rank_weight"], torch.ones(batch, 1, dtype=FLOAT64)
    full = torch.ones(rank, 1, width, dtype=FLOAT64)
    for x, factor in zip(arguments["features"], arguments["factors"], strict=True):
        z = torch.cat([x, torch.ones(batch, 1, dtype=FLOAT64)], 1)
        product = (product[:, :, None] * z[:, None]).flatten(1)
        full = (full[:, :, None] * factor[:, None]).flatten(1, 2)
    expected = product @ (weight[:, None, None] * full).sum(0) + arguments["bias"]
    torch.testing.assert_close(msacore.low_rank_fusion(**arguments), expected)


def test_a_missing_modality_contributes_the_last_row_of_its_factors() -> None:
    arguments = low_rank_arguments(CPU, FLOAT64, 4, 3, 5, (3, 2))
    available = torch.tensor([[True, False]]).expand(4, 2)
    arguments["features"][1].fill_(float("nan"))
    left = torch.einsum("bd,rdh->rbh", arguments["features"][0], arguments["factors"][0][:, :-1])
    left = left + arguments["factors"][0][:, -1:]
    expected = torch.einsum("r,rbh->bh", arguments["rank_weight"], left * arguments["factors"][1][:, -1:])
    torch.testing.assert_close(msacore.low_rank_fusion(**arguments, available=available), expected + arguments["bias"])


@pytest.mark.parametrize("place", [nullcontext, CudaOnHost], ids=["cpu", "cuda on host"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_rank_gradients_are_the_same_bits_with_and_without_kept_projections(dtype: torch.dtype, place) -> None:
    arguments = low_rank_arguments(CPU, dtype, 70, 3, 19, (33, 20), missing=True)
    tensors = [*arguments["features"], *arguments["factors"], arguments["rank_weight"], arguments["bias"]]
    inputs = (tensors[:2], tensors[2:4], *tensors[4:], arguments["available"])
    results = []
    with place():
        for keep in (True, False):
            out, projections = torch.ops.msacore.low_rank_fusion(*inputs, keep=keep)
            assert projections.shape == (2 if keep else 0, 3, 70, 32)
            backward = torch.ops.msacore.low_rank_fusion_backward
            results.append([out, *outputs_of(backward(torch.ones_like(out), projections, *inputs))])
    for ours, ref in zip(*results, strict=True):
        assert torch.equal(ours, ref)


def test_low_rank_projections_beyond_the_limit_are_not_kept() -> None:
    for batch, kept in (2**20, 1), (2**20 + 1, 0):
        for device in "cpu", "meta":
            features, factors = [torch.empty(batch, 0, device=device)], [torch.ones(1, 1, 1, device=device)]
            weight, bias = torch.ones(1, device=device), torch.zeros(1, device=device)
            _, projections = torch.ops.msacore.low_rank_fusion(features, factors, weight, bias, None, keep=True)
            assert projections.shape == (kept, 1, batch, 16)


@pytest.mark.parametrize("on_host", [False, True], ids=["cpu", "cuda on host"])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_the_derivative_of_gelu_keeps_its_digits_where_it_is_nearly_1(dtype: torch.dtype, on_host: bool) -> None:
    """One row of one pair of one token is gelu of the bias; rows beyond the range of its square are linear or zero."""
    x = torch.cat([torch.linspace(-9, 9, 181, dtype=dtype), torch.tensor([-1e30, -40.0, 40.0, 1e30], dtype=dtype)])
    features = [torch.zeros(1, 1, 1, dtype=dtype)] * 2
    weights = torch.zeros(len(x), 1, dtype=dtype), x.clone().requires_grad_()
    mix = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    with CudaOnHost() if on_host else nullcontext():
        _, pairs = msacore.matrix_fusion(features, *weights, *mix, augment=False, activation="gelu")
        (ours,) = torch.autograd.grad(pairs.sum(), weights[1])
    two_u = (8 / torch.pi) ** 0.5 * (x.double() + 0.044715 * x.double() ** 3)
    slope = (8 / torch.pi) ** 0.5 * (1 + 0.134145 * x.double() ** 2) * two_u.sigmoid() * (-two_u).sigmoid()
    exact = torch.where(x.abs() < 20, two_u.sigmoid() + x.double() * slope, (x > 0).double())
    error = (ours.double() - exact).abs() / exact.abs().clamp(min=torch.finfo(dtype).tiny)
    near_1 = (x > 2) & (x < 20)
    assert error[near_1].max() <= 4 * torch.finfo(dtype).eps
    assert (ours - exact).abs().max() <= 16 * torch.finfo(dtype).eps
