from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from smlp_deploy.models import lowering
from smlp_deploy.models.lowering import (
    DenseMixing,
    GpuBlock,
    PairedMixing,
    aligned_columns,
    axial_matrix,
    batch_norm_affine,
    biases_behind_fuse,
    fold_into_convolution_before,
    fold_into_linear_after,
    fold_mean_into_linear_after,
    lower,
    pointwise_convolution,
    token_matrix,
    width_matrix_with_identity,
    with_columns_behind,
)
from smlp_deploy.models.smlpnet import SparseMLP
from tests.support.recipe import recipe_input, recipe_network

SIX_TOKENS_PER_SIDE = (2, 10, 6, 6)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal_to_rounding(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.fixture
def norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(10, dtype=torch.float64).eval()
    norm.load_state_dict(
        {
            "weight": normal(10, seed=1),
            "bias": normal(10, seed=2),
            "running_mean": normal(10, seed=3),
            "running_var": normal(10, seed=4).abs() + 0.1,
            "num_batches_tracked": torch.tensor(1),
        }
    )
    return norm.requires_grad_(False)


def test_batch_norm_is_a_scale_and_a_shift(norm: nn.BatchNorm2d) -> None:
    x = normal(*SIX_TOKENS_PER_SIDE)
    scale, shift = batch_norm_affine(norm)
    assert_equal_to_rounding(x * scale[:, None, None] + shift[:, None, None], norm(x))


def test_batch_norm_folds_into_the_convolution_before(norm: nn.BatchNorm2d) -> None:
    x = normal(*SIX_TOKENS_PER_SIDE)
    conv = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False, dtype=torch.float64).requires_grad_(False)
    weight, bias = fold_into_convolution_before(conv.weight, *batch_norm_affine(norm))
    folded = nn.functional.conv2d(x, weight, bias, padding=1, groups=10)
    assert_equal_to_rounding(folded, norm(conv(x)))


def test_layer_norm_affine_folds_into_the_linear_after() -> None:
    x = normal(7, 10)
    norm = nn.LayerNorm(10, dtype=torch.float64).requires_grad_(False)
    norm.weight.copy_(normal(10, seed=1))
    norm.bias.copy_(normal(10, seed=2))
    linear = nn.Linear(10, 30, dtype=torch.float64).requires_grad_(False)
    weight, bias = fold_into_linear_after(linear.weight, linear.bias, norm.weight, norm.bias)
    plain = nn.functional.layer_norm(x, (10,), eps=norm.eps)
    assert_equal_to_rounding(plain @ weight.T + bias, linear(norm(x)))


def test_the_mean_that_layer_norm_subtracts_folds_into_the_linear_after() -> None:
    x, weight = normal(7, 10), normal(30, 10, seed=1)
    assert_equal_to_rounding(x @ fold_mean_into_linear_after(weight).T, (x - x.mean(dim=1, keepdim=True)) @ weight.T)


def test_final_batch_norm_folds_through_the_mean_into_the_head(norm: nn.BatchNorm2d) -> None:
    x = normal(*SIX_TOKENS_PER_SIDE)
    head = nn.Linear(10, 5, dtype=torch.float64).requires_grad_(False)
    weight, bias = fold_into_linear_after(head.weight, head.bias, *batch_norm_affine(norm))
    assert_equal_to_rounding(x.mean(dim=(2, 3)) @ weight.T + bias, head(norm(x).mean(dim=(2, 3))))


def test_axial_convolutions_are_matrices_on_the_left() -> None:
    x = normal(*SIX_TOKENS_PER_SIDE)
    n, channels, grid, _ = x.shape
    projection = nn.Conv2d(grid, grid, 1, dtype=torch.float64).requires_grad_(False)
    matrix, bias = axial_matrix(projection)
    channels_last = x.permute(0, 2, 3, 1)

    along_width = projection(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert_equal_to_rounding((matrix @ channels_last + bias).permute(0, 3, 1, 2), along_width)

    along_height = projection(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
    product = matrix @ channels_last.reshape(n, grid, grid * channels) + bias
    assert_equal_to_rounding(product.reshape(n, grid, grid, channels).permute(0, 3, 1, 2), along_height)


def test_both_axial_products_and_their_concatenation_are_one_product() -> None:
    x = normal(*SIX_TOKENS_PER_SIDE).permute(0, 2, 3, 1)
    n, grid, _, channels = x.shape
    width, height = normal(grid, grid, seed=1), normal(grid, grid, seed=2)
    along_height = (height @ x.reshape(n, grid, grid * channels)).reshape(x.shape)
    product = token_matrix(width, height) @ x.reshape(n, grid * grid, channels)
    expected = torch.cat([x, width @ x, along_height], dim=3)
    assert_equal_to_rounding(product.reshape(expected.shape), expected)


def test_tokens_and_their_mix_along_the_width_are_one_product() -> None:
    x = normal(*SIX_TOKENS_PER_SIDE).permute(0, 2, 3, 1)
    width = normal(6, 6, seed=1)
    expected = torch.cat([x, width @ x], dim=3)
    assert_equal_to_rounding((width_matrix_with_identity(width) @ x).reshape(expected.shape), expected)


def test_axial_biases_are_a_map_behind_the_fuse_layer() -> None:
    grid, channels = 6, 10
    fuse, width_bias, height_bias = normal(channels, 3 * channels), normal(grid, 1, seed=1), normal(grid, 1, seed=2)
    zeros = torch.zeros(grid, grid, channels, dtype=torch.float64)
    before = torch.cat([zeros, zeros + width_bias, zeros + height_bias[:, :, None]], dim=2)
    assert_equal_to_rounding(biases_behind_fuse(fuse, width_bias, height_bias), before @ fuse.T)


@pytest.mark.parametrize("extra", [0, 1, 2, 5])
def test_a_wider_kernel_adds_columns_behind(extra: int) -> None:
    x = normal(*SIX_TOKENS_PER_SIDE)
    weight = normal(10, 1, 3, 3, seed=1)
    expected = nn.functional.conv2d(x, weight, padding=1, groups=10)
    found = nn.functional.conv2d(x, with_columns_behind(weight, extra), padding=(1, 1 + extra), groups=10)
    assert found.shape == (2, 10, 6, 6 + extra)
    assert_equal_to_rounding(found[..., :6], expected)


@pytest.mark.parametrize(("grid", "columns"), [(14, 16), (7, 8), (8, 8), (4, 4), (6, 8), (1, 8)])
def test_a_row_of_all_tokens_is_a_multiple_of_eight(grid: int, columns: int) -> None:
    assert aligned_columns(grid) == columns


@pytest.mark.parametrize("grid", [6, 7, 8])
def test_further_columns_count_for_nothing(grid: int) -> None:
    sparse = SparseMLP(10, grid).double().eval().requires_grad_(False)
    x = normal(2, 10, grid, grid)
    expected = sparse(x)
    active = nn.functional.gelu(sparse.BN(x)).permute(0, 2, 3, 1)
    further = 1e3 * normal(2, grid, aligned_columns(grid) - grid, 10, seed=1)
    assert_equal_to_rounding(DenseMixing(sparse)(torch.cat([active, further], dim=2)).permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("mixing", [DenseMixing, PairedMixing])
def test_token_mixing_for_gpus_is_the_smlp(mixing: type[DenseMixing | PairedMixing]) -> None:
    x = normal(2, 10, 8, 8)
    sparse = SparseMLP(10, 8).double().eval().requires_grad_(False)
    expected = sparse(x)
    found = mixing(sparse)(nn.functional.gelu(sparse.BN(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_equal_to_rounding(found, expected)


def test_linear_over_channels_is_a_pointwise_convolution() -> None:
    x = normal(*SIX_TOKENS_PER_SIDE)
    linear = nn.Linear(10, 4, dtype=torch.float64).requires_grad_(False)
    conv = pointwise_convolution(linear.weight, linear.bias)
    assert_equal_to_rounding(conv(x), linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("name", ["micro", "small-input", "two-stage"])
def test_lowered_network_computes_the_same_in_float64(name: str) -> None:
    network = recipe_network(name).double()
    with torch.inference_mode():
        expected = network(recipe_input(name).double())
        assert_equal_to_rounding(lower(network)(recipe_input(name).double()), expected)


@pytest.mark.parametrize("name", ["micro", "small-input", "two-stage"])
@pytest.mark.parametrize("largest_dense_grid", [0, 4, 14])
def test_the_form_for_gpus_computes_the_same_in_float64(
    name: str, largest_dense_grid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "LARGEST_DENSE_GRID", largest_dense_grid)
    network = recipe_network(name).double()
    lowered = lower(network, "gpu")
    for stage, block in zip(network.config.stages(), lowered.blocks, strict=True):
        assert isinstance(block, GpuBlock)
        dense = network.config.grid(stage) <= largest_dense_grid
        assert isinstance(block.mixing, DenseMixing if dense else PairedMixing)
        assert block.scales_behind is not dense
    with torch.inference_mode():
        expected = network(recipe_input(name).double())
        assert_equal_to_rounding(lowered(recipe_input(name).double()), expected)


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_lowering_leaves_the_trained_network_alone(form: str) -> None:
    network = recipe_network("micro")
    before = copy.deepcopy(network.state_dict())
    lowered = lower(network, form)
    with torch.no_grad():
        for tensor in lowered.state_dict().values():
            tensor.zero_()
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert not lowered.training


@pytest.mark.parametrize("form", ["cpu", "gpu"])
def test_lowered_network_keeps_the_dtype(form: str) -> None:
    assert {tensor.dtype for tensor in lower(recipe_network("micro"), form).state_dict().values()} == {torch.float32}
