"""sMLPNet as deployed: the trained network rewritten by exact algebra into fewer, faster operations.

Each identity is one small function; `lower` applies them all. Nothing is approximated: in float64 both networks
agree to rounding. The forms are those that TensorRT fuses best (`docs/lowering.md` has the kernel counts).
"""

from __future__ import annotations

from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from smlp_deploy.metadata import SMLPNetConfig
from smlp_deploy.models.smlpnet import ChannelMLP, DepthwiseConv, SMLPNet, SparseMLP


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

    With tokens channels-last the axial MLP is one product with the constant on the left and no transpose:
    along the width `M @ x` for x of N, G, G, C; along the height `M @ x.reshape(N, G, G * C)`.
    """
    return projection.weight.double()[:, :, 0, 0], cast(Tensor, projection.bias).double()[:, None]


def pointwise_convolution(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """The 1x1 convolution over N, I, H, W that equals a linear map (O, I) over channels.

    TensorRT fuses convolution, bias and GELU into one kernel, but not a matrix product with them.
    """
    return _convolution(weight[:, :, None, None], bias)


def _convolution(
    weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0, groups: int = 1
) -> nn.Conv2d:
    out_channels, in_channels, kernel, _ = weight.shape
    conv = nn.Conv2d(
        in_channels * groups,
        out_channels,
        kernel,
        stride,
        padding,
        groups=groups,
        bias=bias is not None,
        dtype=weight.dtype,
    )
    conv.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return conv


class LoweredBlock(nn.Module):
    """One block of the deployed network: N, C, G, G to the same shape."""

    scale: Tensor
    shift: Tensor
    width_matrix: Tensor
    width_bias: Tensor
    height_matrix: Tensor
    height_bias: Tensor

    def __init__(self, depthwise: DepthwiseConv, sparse: SparseMLP, norm: nn.LayerNorm, mlp: ChannelMLP) -> None:
        super().__init__()
        merge = depthwise.conv_merge
        scale, shift = batch_norm_affine(cast(nn.BatchNorm2d, merge.BN))
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])
        weight, bias = fold_into_convolution_before(cast(nn.Conv2d, merge.Conv).weight, *batch_norm_affine(sparse.BN))
        self.depthwise = _convolution(weight, bias, padding=1, groups=len(weight))
        for name, projection in (("width", sparse.proj_h), ("height", sparse.proh_w)):
            matrix, axial_bias = axial_matrix(projection)
            self.register_buffer(f"{name}_matrix", matrix)
            self.register_buffer(f"{name}_bias", axial_bias)
        self.fuse = _convolution(sparse.fuse.weight.double(), None)
        self.eps = norm.eps
        first, second = cast(nn.Linear, mlp.net[0]), cast(nn.Linear, mlp.net[2])
        self.hidden = pointwise_convolution(
            *fold_into_linear_after(first.weight, first.bias, norm.weight.double(), norm.bias.double())
        )
        self.out = pointwise_convolution(second.weight.double(), second.bias.double())

    def mix_tokens(self, x: Tensor) -> Tensor:
        """Depth-wise convolution and sMLP."""
        _, channels, grid, _ = x.shape
        x = functional.gelu(x * self.scale + self.shift)
        x = functional.gelu(self.depthwise(x)).permute(0, 2, 3, 1)
        along_width = self.width_matrix @ x + self.width_bias
        along_height = self.height_matrix @ x.reshape(-1, grid, grid * channels) + self.height_bias
        along_height = along_height.reshape(-1, grid, grid, channels)
        fused: Tensor = self.fuse(torch.cat([x, along_width, along_height], dim=3).permute(0, 3, 1, 2))
        return fused

    def mix_channels(self, x: Tensor) -> Tensor:
        """LayerNorm over the channels without its affine, then the two-layer MLP."""
        wide = _at_least_float32(x)
        centred = wide - wide.mean(dim=1, keepdim=True)
        variance = (centred * centred).mean(dim=1, keepdim=True)
        normal = (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)
        mixed: Tensor = self.out(functional.gelu(self.hidden(normal)))
        return mixed

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(x)
        return x + self.mix_channels(x)


class LoweredSMLPNet(nn.Module):
    """The deployed network: images N, 3, S, S to logits N, classes; the same numbers as the trained one."""

    def __init__(self, network: SMLPNet) -> None:
        super().__init__()
        self.config: SMLPNetConfig = network.config
        self.embeddings = nn.ModuleList()
        for embedding in network.to_patch_embedding:
            conv = cast(nn.Conv2d, cast(nn.Sequential, embedding)[0])
            self.embeddings.append(_convolution(conv.weight.double(), None, stride=conv.stride[0]))
        self.blocks = nn.ModuleList(
            LoweredBlock(*cast(nn.Sequential, token_mix), *cast(nn.Sequential, channel_mix))
            for token_mix, channel_mix in zip(network.token_mix, network.channel_mix, strict=True)
        )
        # The final BatchNorm is affine and so commutes with the mean over tokens that follows it.
        head = cast(nn.Linear, network.mlp_head[0])
        weight, bias = fold_into_linear_after(head.weight, head.bias, *batch_norm_affine(network.batch_norm))
        self.head = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
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


def lower(network: SMLPNet) -> LoweredSMLPNet:
    """The deployed form of `network`, in its dtype; the algebra itself is done in float64.

    The network's weights are copied, not shared, and the result is in evaluation mode.
    """
    dtype = network.batch_norm.weight.dtype
    with torch.no_grad():
        return LoweredSMLPNet(network).to(dtype).eval()
