"""Seeded weights and the reference logits that the paper's implementation gives for them in float64.

`data/golden.json` holds six networks. Their weights follow a recipe: going through the sorted keys of the state dict
(counters skipped), each takes the next standard normal values of one generator and scales them by its kind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smlp_deploy.metadata import SMLPNetConfig
from smlp_deploy.models.smlpnet import SMLPNet

CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())["cases"]
}


ONE_BLOCK = SMLPNetConfig(dim=8, depths=(1,), expansion=3, patch_size=4, image_size=32, num_classes=10)
"""The smallest network that has every kind of layer."""


def config_of(case: Mapping[str, Any]) -> SMLPNetConfig:
    return SMLPNetConfig(
        dim=case["dim"],
        depths=tuple(case["depths"]),
        expansion=case["alpha"],
        patch_size=case["patch_size"],
        image_size=case["image_size"],
        num_classes=case["num_classes"],
    )


def recipe_weights(config: SMLPNetConfig, seed: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {key: tuple(tensor.shape) for key, tensor in SMLPNet(config).state_dict().items()}
    rng = np.random.default_rng(seed)
    weights = {}
    for key in sorted(shapes):
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.tensor(0)
            continue
        weights[key] = torch.from_numpy(_scaled(key, rng.standard_normal(shapes[key], dtype=np.float32)))
    return weights


def _scaled(key: str, z: NDArray[np.float32]) -> NDArray[np.float32]:
    one = np.float32
    if key.endswith("running_mean"):
        return one(0.1) * z
    if key.endswith("running_var"):
        return one(0.5) + np.abs(z)
    if key.endswith("bias"):
        return one(0.05) * z
    if z.ndim == 1:
        return one(1) + one(0.1) * z
    scaled: NDArray[np.float32] = z / np.sqrt(one(np.prod(z.shape[1:])))
    return scaled


def recipe_network(name: str) -> SMLPNet:
    case = CASES[name]
    with torch.device("meta"):
        network = SMLPNet(config_of(case))
    network.load_state_dict(recipe_weights(network.config, case["seed"]), strict=True, assign=True)
    return network.eval()


def recipe_input(name: str) -> Tensor:
    case = CASES[name]
    size = case["image_size"]
    values = np.random.default_rng(1000 + case["seed"]).standard_normal((2, 3, size, size), dtype=np.float32)
    return torch.from_numpy(values)
