from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from smlp_deploy.errors import UsageError
from smlp_deploy.metadata import SMLPNetConfig
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.models.variants import VARIANTS, find_variant, mac_count, parameter_count, variant_of

CONFIGS = [
    *(variant.config for variant in VARIANTS.values()),
    SMLPNetConfig(dim=24, depths=(2, 3), image_size=48, num_classes=5),
    SMLPNetConfig(dim=10, depths=(1,), expansion=2, patch_size=8, image_size=40, num_classes=3),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_parameters_are_the_networks(config: SMLPNetConfig) -> None:
    with torch.device("meta"):
        network = SMLPNet(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_macs_are_those_torch_counts(config: SMLPNetConfig) -> None:
    with torch.device("meta"):
        network = SMLPNet(config).eval()
        images = torch.empty(1, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        network(images)
    assert mac_count(config) * 2 == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [("smlpnet_tiny", 24.1, 4.99), ("smlpnet_small", 48.6, 10.31), ("smlpnet_base", 65.9, 13.99)],
)
def test_variants_cost_what_the_paper_says(name: str, parameters: float, macs: float) -> None:
    config = VARIANTS[name].config
    assert round(parameter_count(config) / 1e6, 1) == parameters
    assert round(mac_count(config) / 1e9, 2) == macs


def test_a_configuration_is_recognised() -> None:
    assert variant_of(VARIANTS["smlpnet_base"].config) is VARIANTS["smlpnet_base"]
    assert variant_of(CONFIGS[-1]) is None


def test_a_mistyped_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean smlpnet_tiny"):
        find_variant("smlpnet_tny")
