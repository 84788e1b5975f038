from __future__ import annotations

import numpy as np
import pytest
import torch

from smlp_deploy.models.smlpnet import SMLPNet
from tests.support.recipe import CASES, config_of, recipe_input, recipe_network, recipe_weights


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_papers_implementation(name: str) -> None:
    case, network, images = CASES[name], recipe_network(name), recipe_input(name)
    with torch.inference_mode():
        single = network(images).double().numpy()
        double = network.double()(images.double()).numpy()
    scale = np.array(case["logits_std"])[:, None]
    shown = len(case["logits"][0])
    assert (np.abs(double[:, :shown] - case["logits"]) / scale).max() < 1e-8
    assert (np.abs(single[:, :shown] - case["logits"]) / scale).max() < 1e-4
    np.testing.assert_allclose(double.mean(axis=1), case["logits_mean"], rtol=0, atol=1e-8 * scale.min())
    np.testing.assert_allclose(double.std(axis=1), case["logits_std"], rtol=1e-8)
    assert double.argmax(axis=1).tolist() == case["argmax"]


@pytest.mark.parametrize("name", CASES)
def test_parameter_count_is_the_official_one(name: str) -> None:
    with torch.device("meta"):
        network = SMLPNet(config_of(CASES[name]))
    assert sum(parameter.numel() for parameter in network.parameters()) == CASES[name]["parameters"]


def test_swapped_axes_would_be_noticed() -> None:
    case = CASES["micro"]
    weights = recipe_weights(config_of(case), case["seed"])
    for key in [key for key in weights if ".proj_h." in key]:
        other = key.replace("proj_h", "proh_w")
        weights[key], weights[other] = weights[other], weights[key]
    network = SMLPNet(config_of(case)).eval()
    network.load_state_dict(weights)
    with torch.inference_mode():
        logits = network(recipe_input("micro")).numpy()
    assert np.abs(logits - case["logits"]).max() > 0.01
