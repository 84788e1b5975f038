"""Where training tools put the weights, and that exactly one set of them is taken, and said which."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from smlp_deploy.errors import CheckpointError
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.smlpnet import SMLPNet
from tests.support.recipe import CASES, config_of, recipe_weights

CONFIG = config_of(CASES["micro"])
State = dict[str, Tensor]


@pytest.fixture
def weights() -> State:
    return recipe_weights(CONFIG, 1)


@pytest.fixture
def second() -> State:
    return recipe_weights(CONFIG, 2)


def under(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def loaded(tmp_path: Path, content: Any, name: str = "model.pth", *, ema: bool = False) -> Checkpoint:
    torch.save(content, tmp_path / name)
    return load_checkpoint(tmp_path / name, ema=ema)


def holds(checkpoint: Checkpoint, weights: State) -> bool:
    same = (torch.equal(checkpoint.state_dict[key], tensor) for key, tensor in weights.items())
    return checkpoint.config == CONFIG and all(same)


LAYOUTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "bare": (lambda w: w, "the whole file"),
    "lightning": (
        lambda w: {"state_dict": under("model.", w), "hyper_parameters": {"root": Path("x")}},
        "state_dict (keys model.*)",
    ),
    "model_state_dict": (lambda w: {"epoch": 3, "model_state_dict": w, "loss": np.float64(2.0)}, "model_state_dict"),
    "net": (lambda w: {"net": w, "acc": 93.1, "epoch": 7}, "net"),
    "net.": (lambda w: under("net.", w), "keys net.*"),
    "backbone.": (lambda w: {"state_dict": under("backbone.", w)}, "state_dict (keys backbone.*)"),
    "module.model.": (lambda w: {"model": under("module.model.", w)}, "model (keys module.model.*)"),
    "compiled": (lambda w: under("module._orig_mod.", w), "keys module._orig_mod.*"),
    "two wrappers": (lambda w: {"best": {"model": {"state_dict": w}}, "step": 3}, "best.model.state_dict"),
    "beside a loss": (
        lambda w: {"state_dict": under("model.", w) | {"criterion.weight": torch.ones(3)}},
        "state_dict (keys model.*)",
    ),
    "beside numbers": (lambda w: w | {"epoch": 3, "version": "1.0"}, "the whole file"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_weights_are_found_and_named(tmp_path: Path, weights: State, name: str) -> None:
    make, place = LAYOUTS[name]
    checkpoint = loaded(tmp_path, make(weights))
    assert holds(checkpoint, weights)
    assert (checkpoint.weights, checkpoint.others) == (place, ())
    assert checkpoint.left_out == (1 if name == "beside a loss" else 0)


@pytest.mark.parametrize("prefix", ["model.", "module.model.", ""])
@pytest.mark.parametrize("name", ["model.safetensors", "model", "model.weights"])
def test_safetensors_too_whatever_the_name(tmp_path: Path, weights: State, prefix: str, name: str) -> None:
    save_file(under(prefix, weights), tmp_path / name)
    assert holds(load_checkpoint(tmp_path / name), weights)


@pytest.mark.parametrize("name", ["last.ckpt", "model_best.pth.tar", "weights", "pytorch_model.bin", "x.safetensors"])
def test_a_torch_file_has_any_name(tmp_path: Path, weights: State, name: str) -> None:
    assert holds(loaded(tmp_path, {"model": weights}, name), weights)


def test_the_json_beside_pth_tar_has_its_name_without_both(tmp_path: Path, weights: State) -> None:
    (tmp_path / "model_best.json").write_text('{"labels": ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]}')
    assert loaded(tmp_path, weights, "model_best.pth.tar").metadata.labels == tuple("abcdefghij")


def timm(weights: State, averaged: State) -> dict[str, Any]:
    """What timm's CheckpointSaver saves with --amp and --model-ema."""
    network = SMLPNet(CONFIG)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {
        "epoch": 299,
        "arch": "smlpnet_tiny",
        "state_dict": OrderedDict(weights),
        "optimizer": optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(lr=1e-3, data_dir=Path("/data"), mean=None, device="cuda"),
        "amp_scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
        "metric": np.float64(81.3),
        "state_dict_ema": OrderedDict(averaged),
    }


def test_timms_layout(tmp_path: Path, weights: State, second: State) -> None:
    checkpoint = loaded(tmp_path, timm(weights, second), "model_best.pth.tar")
    assert holds(checkpoint, weights)
    assert checkpoint.weights == "state_dict"
    assert checkpoint.others == ("state_dict_ema; --ema takes it",)
    assert {"argparse.Namespace", "pathlib.PosixPath"} <= set(checkpoint.not_built)
    averaged = load_checkpoint(tmp_path / "model_best.pth.tar", ema=True)
    assert holds(averaged, second)
    assert (averaged.weights, averaged.others) == ("state_dict_ema", ("state_dict; taken without --ema",))


class TestMovingAverages:
    @pytest.mark.parametrize(
        ("make", "place"),
        [
            (lambda a, b: {"model": a, "model_ema": under("module.", b)}, "model_ema (keys module.*)"),
            (lambda a, b: {"state_dict": under("model.", a) | under("ema_model.", b)}, "state_dict (keys ema_model.*)"),
            (lambda a, b: a | under("ema.", b), "keys ema.*"),
            (lambda a, b: {"net": a, "callbacks": {"EMA": {"state_dict": b}}}, "callbacks.EMA.state_dict"),
        ],
    )
    def test_are_taken_when_asked_for(
        self, tmp_path: Path, weights: State, second: State, make: Callable[[State, State], Any], place: str
    ) -> None:
        plain = loaded(tmp_path, make(weights, second))
        assert holds(plain, weights)
        assert plain.others == (f"{place}; --ema takes it",)
        averaged = load_checkpoint(plain.path, ema=True)
        assert holds(averaged, second)
        assert averaged.weights == place

    def test_alone_are_an_error_that_says_so(self, tmp_path: Path, weights: State) -> None:
        with pytest.raises(CheckpointError, match=r"^has only moving-average weights, model_ema · .* · add --ema"):
            loaded(tmp_path, {"model_ema": weights})

    def test_of_safetensors(self, tmp_path: Path, weights: State, second: State) -> None:
        save_file(under("model.", weights) | under("model_ema.", second), tmp_path / "x.safetensors")
        assert holds(load_checkpoint(tmp_path / "x.safetensors"), weights)
        assert holds(load_checkpoint(tmp_path / "x.safetensors", ema=True), second)

    def test_a_word_that_only_contains_ema_is_none(self, tmp_path: Path, weights: State) -> None:
        assert holds(loaded(tmp_path, {"state_dict": under("schemas.", weights)}), weights)


class TestSeveral:
    @pytest.mark.parametrize(
        ("make", "names"),
        [
            (
                lambda a, b: {"state_dict": under("student.", a) | under("teacher.", b)},
                r"state_dict \(keys student\.\*\), state_dict \(keys teacher\.\*\)",
            ),
            (lambda a, b: {"model": a, "net": b}, "net, model"),
            (lambda a, b: {"one": a, "two": b}, "one, two"),
        ],
    )
    def test_that_differ_are_an_error_naming_them(
        self, tmp_path: Path, weights: State, second: State, make: Callable[[State, State], Any], names: str
    ) -> None:
        reason = rf"^has 2 different sets of weights, {names}, and does not say which is meant · .*torch\.save"
        with pytest.raises(CheckpointError, match=reason):
            loaded(tmp_path, make(weights, second))

    def test_that_are_one_stored_twice_are_no_choice(self, tmp_path: Path, weights: State) -> None:
        checkpoint = loaded(tmp_path, {"state_dict": under("net.", weights) | under("compiled._orig_mod.", weights)})
        assert holds(checkpoint, weights)
        assert (checkpoint.weights, checkpoint.others) == ("state_dict (keys net.*)", ())

    def test_the_one_in_a_usual_place_is_taken(self, tmp_path: Path, weights: State, second: State) -> None:
        checkpoint = loaded(
            tmp_path, {"previous": second, "state_dict": weights, "callbacks": {"x": {"model": dict(second)}}}
        )
        assert holds(checkpoint, weights)
        assert checkpoint.others == (
            "previous; to take it, save it alone",
            "callbacks.x.model; to take it, save it alone",
        )

    def test_very_many_are_refused(self, tmp_path: Path, weights: State) -> None:
        few = {key: weights[key] for key in ("mlp_head.0.weight", "to_patch_embedding.0.0.weight")}
        many = {key: tensor for i in range(30) for key, tensor in under(f"{i}.", few).items()}
        with pytest.raises(CheckpointError, match=r"^refused: it has more than 16 sets of weights"):
            loaded(tmp_path, many)


def test_a_network_with_a_key_too_many_is_refused_under_any_prefix(tmp_path: Path, weights: State) -> None:
    weights["head_dist.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"'head_dist\.bias' of shape \(3,\) is not part of sMLPNet"):
        loaded(tmp_path, {"state_dict": under("model.", weights)})


def test_a_whole_network_is_not_built(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^holds a smlp_deploy\.models\.smlpnet\.SMLPNet, .* · save the state"):
        loaded(tmp_path, SMLPNet(CONFIG))
    with pytest.raises(CheckpointError, match=r"^its weights are a smlp_deploy\..*SMLPNet, which is not built"):
        loaded(tmp_path, {"model": SMLPNet(CONFIG), "epoch": 3})


def test_another_network_in_a_wrapper_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^not an sMLPNet checkpoint: it has no 'to_patch_embedding"):
        loaded(tmp_path, {"state_dict": {"model.conv1.weight": torch.zeros(3)}})
    with pytest.raises(CheckpointError, match=r"^holds no weights of an sMLPNet: 'net' is a dict"):
        loaded(tmp_path, {"net": {"conv1.weight": torch.zeros(3)}})


def test_a_name_of_a_million_characters_is_quoted_shortly(tmp_path: Path, weights: State, second: State) -> None:
    long = "x" * (1 << 20)
    with pytest.raises(CheckpointError) as caught:
        loaded(tmp_path, {f"{long}1": under(f"{long}.", weights), f"{long}2": second})
    assert len(str(caught.value)) < 800
