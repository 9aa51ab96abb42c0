"""The modules: their parameters reach the operator, can be trained, and are described."""

import pytest
import torch

import msacore
from msacore.nn import LowRankFusion, MatrixFusion, RankNContrast


def test_matrix_fusion_module_is_the_operator_with_its_parameters() -> None:
    module = MatrixFusion(6, 4, channels=2, modalities=4, activation="gelu", dtype=torch.float64)
    features = [torch.randn(3, 5, 6, dtype=torch.float64) for _ in range(4)]
    mask, available = torch.rand(3, 5) < 0.7, torch.rand(3, 4) < 0.7
    parameters = module.row_weight, module.row_bias, module.pair_weight, module.pair_bias
    expected = msacore.matrix_fusion(features, *parameters, mask=mask, available=available, activation="gelu")
    for ours, ref in zip(module(features, mask, available), expected, strict=True):
        assert torch.equal(ours, ref)
    assert expected[0].shape == (3, 2, 4)
    assert expected[1].shape == (3, 6, 4)


def test_without_augment_the_row_weight_has_no_column_for_the_1() -> None:
    assert MatrixFusion(6, 4, augment=False).row_weight.shape == (4, 6)
    assert MatrixFusion(6, 4).row_weight.shape == (4, 7)


def test_low_rank_fusion_module_is_the_operator_with_its_parameters() -> None:
    module = LowRankFusion((3, 4), 5, rank=2)
    features = [torch.randn(6, 3), torch.randn(6, 4)]
    available = torch.rand(6, 2) < 0.5
    expected = msacore.low_rank_fusion(
        features, list(module.factors), module.rank_weight, module.bias, available=available
    )
    assert torch.equal(module(features, available), expected)


@pytest.mark.parametrize(
    ("module", "features"),
    [(MatrixFusion(6, 4), [(8, 5, 6)] * 3), (LowRankFusion((3, 4, 2), 5), [(8, 3), (8, 4), (8, 2)])],
    ids=["matrix", "low rank"],
)
def test_every_parameter_trains(module: torch.nn.Module, features: list[tuple[int, ...]]) -> None:
    inputs = [torch.randn(shape) for shape in features]

    def loss() -> torch.Tensor:
        result = module(inputs)
        return sum(((t - 1) ** 2).mean() for t in (result if isinstance(result, tuple) else (result,)))

    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    start = loss()
    start.backward()
    optimiser.step()
    assert loss() < start
    assert all(not torch.equal(before[name], p) for name, p in module.named_parameters())


def test_sizes_are_shown_and_bad_options_refused() -> None:
    shown = repr(MatrixFusion(6, 4))
    assert shown == ("MatrixFusion(in_features=6, rows=4, channels=3, modalities=3, augment=True, activation='relu')")
    assert "in_features=(3, 4), out_features=5, rank=2" in repr(LowRankFusion((3, 4), 5, rank=2))
    with pytest.raises(ValueError, match=r"`modalities`.*got 1"):
        MatrixFusion(6, 4, modalities=1)
    with pytest.raises(ValueError, match=r"`activation`.*'tanh'"):
        MatrixFusion(6, 4, activation="tanh")


def test_rank_n_contrast_module_is_the_operator_and_can_learn_its_temperature() -> None:
    embeddings, targets, mask = torch.randn(9, 4), torch.randint(0, 3, (9, 2)), torch.rand(9) < 0.8
    expected = msacore.rank_n_contrast(embeddings, targets, temperature=0.5, mask=mask)
    assert torch.equal(RankNContrast(0.5)(embeddings, targets, mask), expected)
    module = RankNContrast(0.5, learn_temperature=True, dtype=torch.float64)
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    msacore.rank_n_contrast(embeddings, targets, temperature=temperature, mask=mask).backward()
    module(embeddings, targets, mask).backward()
    torch.testing.assert_close(module.log_temperature.grad, temperature.grad * 0.5)
    assert [name for name, _ in module.named_parameters()] == ["log_temperature"]
    assert not list(RankNContrast().parameters())
    assert str(module) == "RankNContrast(temperature=0.5, learn_temperature=True)"
    with pytest.raises(ValueError, match="`temperature` to be positive"):
        RankNContrast(0.0)
