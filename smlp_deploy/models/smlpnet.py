"""sMLPNet as trained (arXiv 2109.05422), with the parameter names of the official checkpoints.

One block mixes tokens, then channels, each with a residual:

    x = x + sMLP(DepthwiseConv(x))          N, C, H, W; both start with BatchNorm and GELU
    x = x + MLP(LayerNorm(x))               over the channels of each token

This is the reference that every artifact is compared with; `lowering.py` holds the network as deployed.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from smlp_deploy.metadata import SMLPNetConfig


class DepthwiseConv(nn.Module):
    """BatchNorm, GELU, 3x3 depth-wise convolution without bias; N, C, H, W to the same shape (section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.conv_merge = nn.Sequential(
            OrderedDict(BN=nn.BatchNorm2d(channels), GELU=nn.GELU(), Conv=conv),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_merge(x)
        return out


class SparseMLP(nn.Module):
    """The sMLP block (section 3.2, figure 3): tokens mix along their row and along their column, then are fused.

    N, C, G, G to the same shape. `proj_h` mixes along the width and `proh_w` along the height; both names,
    spelling included, are those of the official checkpoints.
    """

    def __init__(self, channels: int, grid: int) -> None:
        super().__init__()
        self.BN = nn.BatchNorm2d(channels)
        self.activation = nn.GELU()
        self.proj_h = nn.Conv2d(grid, grid, 1)
        self.proh_w = nn.Conv2d(grid, grid, 1)
        self.fuse = nn.Conv2d(3 * channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.BN(x))
        along_width = self.proj_h(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        along_height = self.proh_w(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)
        out: Tensor = self.fuse(torch.cat([x, along_width, along_height], dim=1))
        return out


class ChannelMLP(nn.Module):
    """Linear, GELU, linear over the last axis; the gaps in `net`'s numbering are dropout layers of the training."""

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * channels
        self.net = nn.Sequential(
            OrderedDict([("0", nn.Linear(channels, hidden)), ("1", nn.GELU()), ("3", nn.Linear(hidden, channels))])
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class SMLPNet(nn.Module):
    """The network as trained: images N, 3, S, S to logits N, classes.

    `load_state_dict(strict=True)` takes an official checkpoint's `model` unchanged.
    """

    def __init__(self, config: SMLPNetConfig) -> None:
        super().__init__()
        self.config = config
        self.to_patch_embedding = nn.ModuleList(self._embedding(stage) for stage in range(len(config.depths)))
        blocks = [(config.channels(stage), config.grid(stage)) for stage in config.stages()]
        self.token_mix = nn.ModuleList(
            nn.Sequential(DepthwiseConv(channels), SparseMLP(channels, grid)) for channels, grid in blocks
        )
        self.channel_mix = nn.ModuleList(
            nn.Sequential(
                OrderedDict([("1", nn.LayerNorm(channels)), ("2", ChannelMLP(channels, config.expansion))]),
            )
            for channels, _ in blocks
        )
        last = config.channels(len(config.depths) - 1)
        self.batch_norm = nn.BatchNorm2d(last)
        self.mlp_head = nn.Sequential(nn.Linear(last, config.num_classes))

    def _embedding(self, stage: int) -> nn.Sequential:
        config = self.config
        if stage == 0:
            return nn.Sequential(nn.Conv2d(3, config.dim, config.patch_size, config.patch_size, bias=False))
        return nn.Sequential(nn.Conv2d(config.channels(stage - 1), config.channels(stage), 2, 2, bias=False))

    def forward(self, images: Tensor) -> Tensor:
        x = images
        entered = -1
        for stage, token_mix, channel_mix in zip(self.config.stages(), self.token_mix, self.channel_mix, strict=True):
            if stage != entered:
                x = self.to_patch_embedding[stage](x)
                entered = stage
            x = x + token_mix(x)
            x = x + channel_mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits: Tensor = self.mlp_head(self.batch_norm(x).mean(dim=(2, 3)))
        return logits
