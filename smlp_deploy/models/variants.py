"""The paper's three variants, and what any configuration costs (arXiv 2109.05422, table 1 and section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from smlp_deploy.errors import UsageError
from smlp_deploy.metadata import SMLPNetConfig

OFFICIAL_URL = "https://github.com/microsoft/SPACH/releases/download/v1.0/"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A network of the paper.

    Attributes:
        name: as commands accept it.
        config: its shape on ImageNet-1k.
        paper_top1: ImageNet-1k top-1 accuracy in percent, as the paper states it.
        weights_file: file name of the official release, or None if no weights were released.
    """

    name: str
    config: SMLPNetConfig
    paper_top1: float
    weights_file: str | None

    @property
    def weights_url(self) -> str | None:
        """Where the official weights are."""
        return OFFICIAL_URL + self.weights_file if self.weights_file else None


_ALL = (
    Variant(
        name="smlpnet_tiny",
        config=SMLPNetConfig(dim=80, depths=(2, 8, 14, 2)),
        paper_top1=81.9,
        weights_file=None,
    ),
    Variant(
        name="smlpnet_small",
        config=SMLPNetConfig(dim=96, depths=(2, 10, 24, 2)),
        paper_top1=83.1,
        weights_file="smlp_s.pth",
    ),
    Variant(
        name="smlpnet_base",
        config=SMLPNetConfig(dim=112, depths=(2, 10, 24, 2)),
        paper_top1=83.4,
        weights_file="smlp_b.pth",
    ),
)
VARIANTS: dict[str, Variant] = {variant.name: variant for variant in _ALL}


def find_variant(name: str) -> Variant:
    """The variant of this name.

    Raises:
        UsageError: no variant has this name.
    """
    if name not in VARIANTS:
        close = get_close_matches(name, VARIANTS, n=1)
        raise UsageError(
            f"no variant is called {name!r}",
            fix=f"did you mean {close[0]}?" if close else f"variants: {', '.join(VARIANTS)}",
        )
    return VARIANTS[name]


def variant_facts(variant: Variant) -> dict[str, Any]:
    """Facts about a variant, ready for JSON."""
    return {
        "name": variant.name,
        "parameters": parameter_count(variant.config),
        "macs": mac_count(variant.config),
        "paper_top1": variant.paper_top1,
        "weights_url": variant.weights_url,
    }


def variant_of(config: SMLPNetConfig) -> Variant | None:
    """The paper's variant with exactly this configuration."""
    return next((variant for variant in _ALL if variant.config == config), None)


def parameter_count(config: SMLPNetConfig) -> int:
    """Trainable parameters of the trained network."""
    total = 3 * config.patch_size**2 * config.dim
    total += sum(4 * config.channels(s - 1) * config.channels(s) for s in range(1, len(config.depths)))
    for stage in config.stages():
        c, g, hidden = config.channels(stage), config.grid(stage), config.expansion * config.channels(stage)
        norms_and_depthwise = 2 * c + 9 * c + 2 * c + 2 * c
        axial_and_fuse = 2 * (g * g + g) + 3 * c * c
        total += norms_and_depthwise + axial_and_fuse + (c * hidden + hidden) + (hidden * c + c)
    last = config.channels(len(config.depths) - 1)
    return total + 2 * last + last * config.num_classes + config.num_classes


def mac_count(config: SMLPNetConfig) -> int:
    """Multiply-accumulates of convolutions and linear maps for one image; norms and activations not counted."""
    total = 3 * config.patch_size**2 * config.dim * config.grid(0) ** 2
    total += sum(
        4 * config.channels(s - 1) * config.channels(s) * config.grid(s) ** 2 for s in range(1, len(config.depths))
    )
    for stage in config.stages():
        c, g = config.channels(stage), config.grid(stage)
        total += g * g * c * (9 + 2 * g + 3 * c + 2 * config.expansion * c)
    return total + config.channels(len(config.depths) - 1) * config.num_classes
