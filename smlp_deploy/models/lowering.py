"""sMLPNet as deployed: the trained network rewritten by exact algebra into fewer, faster operations.

Each identity is one small function; `lower` applies them all. Nothing is approximated: in float64 both networks
agree to rounding. There are two forms, which differ in the mixing of tokens: one has the fewest operations, for CPUs;
the other has more of them in fewer and larger products, for GPUs (`docs/lowering.md` has the kernel counts).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from smlp_deploy.metadata import SMLPNetConfig
from smlp_deploy.models.smlpnet import ChannelMLP, DepthwiseConv, SMLPNet, SparseMLP

LARGEST_DENSE_GRID = 14
"""Tokens per side up to which the form for GPUs mixes them along both axes in one product.

That product has `3 * G**2 / (2 * G)` times the arithmetic of the two axial ones, 21 at 14 and 84 at 56.
"""


def batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift (C each, float64) with `norm(x) == x * scale + shift` in evaluation."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    scale = norm.weight.double() / torch.sqrt(variance + norm.eps)
    return scale, norm.bias.double() - mean * scale


def fold_into_convolution_before(weight: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (O, I, k, k) and bias (O) of the one convolution that equals `conv(x) * scale + shift`.

    `weight` is that of a convolution without bias; all results are float64.
    """
    return weight.double() * scale[:, None, None, None], shift


def fold_into_linear_after(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias (O) of the one linear map that equals `linear(x * scale + shift)`, in float64."""
    return weight.double() * scale, bias.double() + weight.double() @ shift


def axial_matrix(projection: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Matrix M (G, G) and bias (G, 1), float64, of a 1x1 convolution whose channels are positions on one axis.

    The axial MLP is one product without a transpose. For tokens N, C, G, G: along the width `x @ M.T`, along the height
    `M @ x`. With channels-last, N, G, G, C: along the width `M @ x`, along the height `M @ x.reshape(N, G, G * C)`.
    """
    return projection.weight.double()[:, :, 0, 0], cast(Tensor, projection.bias).double()[:, None]


def token_matrix(width: Tensor, height: Tensor) -> Tensor:
    """Matrix (3*G*G, G*G) of both axial products of G*G tokens, interleaved with the tokens themselves.

    `width` and `height` are axial matrices (G, G). Its rows 3p, 3p + 1 and 3p + 2 give token p, its mix along the width
    and its mix along the height, so that for x of N, G*G, C `token_matrix(...) @ x`, reshaped to N, G*G, 3C, is their
    concatenation over the channels.
    """
    one = torch.eye(len(width), dtype=width.dtype)
    rows = torch.stack([torch.kron(one, one), torch.kron(one, width), torch.kron(height, one)], dim=1)
    return rows.flatten(0, 1)


def width_matrix_with_identity(width: Tensor) -> Tensor:
    """Matrix (2G, G) of the axial product along the width, interleaved with the tokens themselves.

    For x of N, G, G, C the product `... @ x`, reshaped to N, G, G, 2C, is the concatenation of x and its mix.
    """
    one = torch.eye(len(width), dtype=width.dtype)
    return torch.stack([one, width], dim=1).flatten(0, 1)


def biases_behind_fuse(fuse: Tensor, width_bias: Tensor, height_bias: Tensor) -> Tensor:
    """What the axial biases (G, 1) add to each token's channels behind the fuse layer (C, 3C): a map (G, G, C)."""
    _, along_width, along_height = fuse.chunk(3, dim=1)
    return width_bias * along_width.sum(dim=1) + height_bias[:, :, None] * along_height.sum(dim=1)


def pointwise_convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """The 1x1 convolution over N, I, H, W that equals a linear map (O, I) over channels.

    TensorRT fuses convolution, bias and GELU into one kernel, but not a matrix product with them.
    """
    return _convolution(weight[:, :, None, None], bias)


def fold_mean_into_linear_after(weight: Tensor) -> Tensor:
    """Weight (O, I) with `(x - x.mean()) @ weight.T == x @ result.T` for x of I numbers, in float64."""
    return weight.double() - weight.double().mean(dim=1, keepdim=True)


def aligned_columns(grid: int) -> int:
    """The smallest number of columns, at least `grid`, that makes the number of tokens a multiple of 8.

    Tensor cores read 8 fp16 numbers at a time. On an H100 `token_matrix` of 14x14 tokens times 8 images took 15.2 µs
    with 196 columns and 4.3 with 224.
    """
    return next(columns for columns in range(grid, grid + 8) if grid * columns % 8 == 0)


def with_columns_behind(weight: Tensor, extra: int) -> Tensor:
    """Kernel (O, I, 3, 3 + extra) whose convolution adds that many columns to the result of `weight` (O, I, 3, 3).

    Padded by 1, `weight` maps G, G to G, G. Padded by 1 and 1 + extra, this one maps G, G to G, G + extra, of which the
    first G columns are the same.
    """
    return functional.pad(weight, (extra, 0))


def _convolution(
    weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int | tuple[int, int] = 0, groups: int = 1
) -> nn.Conv2d:
    out_channels, in_channels, *kernel = weight.shape
    conv = nn.Conv2d(
        in_channels * groups,
        out_channels,
        (kernel[0], kernel[1]),
        stride,
        padding,
        groups=groups,
        bias=bias is not None,
        device="meta",  # so that no random weights are drawn
    )
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv


class Product(nn.Module):
    """A matrix product with a constant (rows, columns), on the left or on the right."""

    matrix: Tensor

    def __init__(self, matrix: Tensor, *, on_left: bool) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix.contiguous())
        self.on_left = on_left

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix @ x if self.on_left else x @ self.matrix


def _weights_of(sparse: SparseMLP) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """The axial matrix and bias along the width, those along the height, and the fuse layer's weight (C, 3C)."""
    return axial_matrix(sparse.proj_h), axial_matrix(sparse.proh_w), sparse.fuse.weight.double()[:, :, 0, 0]


class AxialMixing(nn.Module):
    """sMLP in one product for each axis, from x of N, C, G, G to the same shape.

    The fuse layer is a sum of three convolutions, over the tokens and each of their mixes: nothing is concatenated.
    """

    width: Tensor
    height: Tensor
    biases: Tensor

    def __init__(self, sparse: SparseMLP) -> None:
        super().__init__()
        (width, width_bias), (height, height_bias), fuse = _weights_of(sparse)
        self.register_buffer("width", width.T.contiguous())
        self.register_buffer("height", height)
        self.register_buffer("biases", biases_behind_fuse(fuse, width_bias, height_bias).permute(2, 0, 1).contiguous())
        self.fuse, self.fuse_width, self.fuse_height = (
            pointwise_convolution(third, None) for third in fuse.chunk(3, dim=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        along_width, along_height = x @ self.width, self.height @ x
        fused: Tensor = self.fuse(x) + self.fuse_width(along_width) + self.fuse_height(along_height) + self.biases
        return fused


class DenseMixing(nn.Module):
    """sMLP in two products, from x of N, G, `aligned_columns(G)`, C to N, G, G, C; those beyond G count for nothing."""

    biases: Tensor

    def __init__(self, sparse: SparseMLP) -> None:
        super().__init__()
        (width, width_bias), (height, height_bias), fuse = _weights_of(sparse)
        grid = len(width)
        tokens = token_matrix(width, height).reshape(-1, grid, grid)
        self.tokens = Product(functional.pad(tokens, (0, aligned_columns(grid) - grid)).flatten(1), on_left=True)
        self.fuse = Product(fuse.T, on_left=False)
        self.register_buffer("biases", biases_behind_fuse(fuse, width_bias, height_bias).flatten(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        _, grid, columns, channels = x.shape
        x = self.tokens(x.reshape(-1, grid * columns, channels)).reshape(-1, grid * grid, 3 * channels)
        x = self.fuse(x) + self.biases
        return x.reshape(-1, grid, grid, channels)


class PairedMixing(nn.Module):
    """sMLP in two products for each axis, from x of N, G, G, C to the same shape.

    The fuse layer is a sum of two: over x and its mix along the width, and over its mix along the height.
    """

    biases: Tensor

    def __init__(self, sparse: SparseMLP) -> None:
        super().__init__()
        (width, width_bias), (height, height_bias), fuse = _weights_of(sparse)
        channels = len(fuse)
        self.width = Product(width_matrix_with_identity(width), on_left=True)
        self.height = Product(height, on_left=True)
        self.fuse_width = Product(fuse[:, : 2 * channels].T, on_left=False)
        self.fuse_height = Product(fuse[:, 2 * channels :].T, on_left=False)
        self.register_buffer("biases", biases_behind_fuse(fuse, width_bias, height_bias))

    def forward(self, x: Tensor) -> Tensor:
        _, grid, _, channels = x.shape
        along_width = self.width(x).reshape(-1, grid, grid, 2 * channels)
        along_height = self.height(x.reshape(-1, grid, grid * channels)).reshape(-1, grid, grid, channels)
        fused: Tensor = self.fuse_width(along_width) + self.fuse_height(along_height) + self.biases
        return fused


class LoweredBlock(nn.Module, ABC):
    """One block of the deployed network: N, C, G, G to the same shape.

    `mixing` is a module of its own, so that a graph's node names tell its sums from the block's residual sums.
    """

    scale: Tensor
    shift: Tensor
    mixing: nn.Module

    def __init__(self, depthwise: DepthwiseConv, sparse: SparseMLP, norm: nn.LayerNorm, mlp: ChannelMLP) -> None:
        super().__init__()
        merge = depthwise.conv_merge
        scale, shift = batch_norm_affine(cast(nn.BatchNorm2d, merge.BN))
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])
        weight, bias = fold_into_convolution_before(cast(nn.Conv2d, merge.Conv).weight, *batch_norm_affine(sparse.BN))
        self.depthwise = _convolution(weight, bias, padding=1, groups=len(weight))
        self._take(sparse)
        self.eps = norm.eps
        first, second = cast(nn.Linear, mlp.net[0]), cast(nn.Linear, mlp.net[2])
        self.hidden = pointwise_convolution(
            *fold_into_linear_after(first.weight, first.bias, norm.weight.double(), norm.bias.double())
        )
        self.out = pointwise_convolution(second.weight.double(), second.bias.double())

    @abstractmethod
    def _take(self, sparse: SparseMLP) -> None:
        """Take over the weights of the sMLP."""

    @abstractmethod
    def _mix_along_axes(self, x: Tensor) -> Tensor:
        """sMLP of x, N, C, G, G, to the same shape."""

    def mix_tokens(self, x: Tensor) -> Tensor:
        """Depth-wise convolution and sMLP."""
        x = functional.gelu(x * self.scale + self.shift)
        return self._mix_along_axes(functional.gelu(self.depthwise(x)))

    def mix_channels(self, x: Tensor) -> Tensor:
        """LayerNorm over the channels without its affine, then the two-layer MLP."""
        centred, scale = self._layer_norm_of(x)
        normal = (centred * scale).to(x.dtype)
        mixed: Tensor = self.out(functional.gelu(self.hidden(normal)))
        return mixed

    def _layer_norm_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of LayerNorm without its affine: `x` less its mean, and the scale of each token."""
        wide = _at_least_float32(x)
        centred = wide - wide.mean(dim=1, keepdim=True)
        variance = (centred * centred).mean(dim=1, keepdim=True)
        return centred, torch.rsqrt(variance + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(x)
        return x + self.mix_channels(x)


class CpuBlock(LoweredBlock):
    """A block with the fewest operations: each axis is one small product."""

    def _take(self, sparse: SparseMLP) -> None:
        self.mixing = AxialMixing(sparse)

    def _mix_along_axes(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mixing(x)
        return mixed


class GpuBlock(LoweredBlock):
    """A block with the fewest kernels: products whose results need neither a concatenation nor a transpose.

    On large grids LayerNorm's scale is applied behind the hidden layer's convolution, with which TensorRT fuses it, so
    that normalized tokens are neither written nor read. On small grids TensorRT makes that layer a matrix product,
    with which it does not.
    """

    hidden_bias: Tensor

    def __init__(self, depthwise: DepthwiseConv, sparse: SparseMLP, norm: nn.LayerNorm, mlp: ChannelMLP) -> None:
        super().__init__(depthwise, sparse, norm, mlp)
        self.scales_behind = isinstance(self.mixing, PairedMixing)
        if self.scales_behind:
            self.register_buffer("hidden_bias", cast(Tensor, self.hidden.bias)[:, None, None].detach().clone())
            self.hidden = pointwise_convolution(fold_mean_into_linear_after(self.hidden.weight[:, :, 0, 0]), None)

    def mix_channels(self, x: Tensor) -> Tensor:
        """LayerNorm over the channels without its affine, then the two-layer MLP."""
        if not self.scales_behind:
            return super().mix_channels(x)
        _, scale = self._layer_norm_of(x)
        hidden = (_at_least_float32(self.hidden(x)) * scale).to(x.dtype) + self.hidden_bias
        mixed: Tensor = self.out(functional.gelu(hidden))
        return mixed

    def _take(self, sparse: SparseMLP) -> None:
        grid = sparse.proj_h.out_channels
        dense = grid <= LARGEST_DENSE_GRID
        self.mixing = DenseMixing(sparse) if dense else PairedMixing(sparse)
        extra = aligned_columns(grid) - grid
        if dense and extra:
            weight = with_columns_behind(self.depthwise.weight, extra)
            self.depthwise = _convolution(weight, self.depthwise.bias, padding=(1, 1 + extra), groups=len(weight))

    def _mix_along_axes(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.mixing(x.permute(0, 2, 3, 1))
        return mixed.permute(0, 3, 1, 2)


_BLOCKS: dict[str, type[LoweredBlock]] = {"cpu": CpuBlock, "gpu": GpuBlock}


class LoweredSMLPNet(nn.Module):
    """The deployed network: images N, 3, S, S to logits N, classes; the same numbers as the trained one."""

    def __init__(self, network: SMLPNet, form: str) -> None:
        super().__init__()
        self.config: SMLPNetConfig = network.config
        self.embeddings = nn.ModuleList()
        for embedding in network.to_patch_embedding:
            conv = cast(nn.Conv2d, cast(nn.Sequential, embedding)[0])
            self.embeddings.append(_convolution(conv.weight.double(), None, stride=conv.stride[0]))
        self.blocks = nn.ModuleList(
            _BLOCKS[form](*cast(nn.Sequential, token_mix), *cast(nn.Sequential, channel_mix))
            for token_mix, channel_mix in zip(network.token_mix, network.channel_mix, strict=True)
        )
        # The final BatchNorm is affine and so commutes with the mean over tokens that follows it.
        head = cast(nn.Linear, network.mlp_head[0])
        weight, bias = fold_into_linear_after(head.weight, head.bias, *batch_norm_affine(network.batch_norm))
        self.head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.head.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.head.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        entered = -1
        for stage, block in zip(self.config.stages(), self.blocks, strict=True):
            if stage != entered:
                x = self.embeddings[stage](x)
                entered = stage
            x = block(x)
        mean = _at_least_float32(x).mean(dim=(2, 3))
        logits: Tensor = self.head(mean.to(self.head.weight.dtype))
        return logits

    def narrow(self, dtype: torch.dtype) -> Self:
        """This network, changed to compute in a 16-bit type wherever a graph from `exporters/half.py` does."""
        self.to(dtype)
        if dtype == torch.bfloat16:
            self.head.float()
        return self


def _at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it has 16 bits: for LayerNorm's statistics and the mean over tokens."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def lower(network: SMLPNet, form: str = "cpu") -> LoweredSMLPNet:
    """The deployed form of `network` for CPUs or for GPUs ("cpu", "gpu"), in its dtype; the algebra is done in float64.

    The network's weights are copied, not shared, and the result is in evaluation mode.
    """
    dtype = network.batch_norm.weight.dtype
    with torch.no_grad():
        return LoweredSMLPNet(network, form).to(dtype).eval()
