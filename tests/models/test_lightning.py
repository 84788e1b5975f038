"""Checkpoints that real PyTorch Lightning writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.torchfile import open_torch_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tests.support.lightning_run` leaves."""
    folder = tmp_path_factory.mktemp("lightning")
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.lightning_run", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Tensor]:
    """The weights after the last step of training."""
    state: dict[str, Tensor] = torch.load(folder / "expected.pth", weights_only=True)
    return state


def test_the_newest_is_read_and_everything_else_left_unbuilt(folder: Path) -> None:
    (best,) = folder.glob("epoch=1-val_loss=*.ckpt")
    checkpoint = load_checkpoint(folder / "last.ckpt")
    assert checkpoint.weights == "state_dict (keys model.*)"
    assert checkpoint.left_out == 1  # the loss's buffer
    assert checkpoint.others == ()
    expected = {"pathlib.PosixPath", "numpy.ndarray", "datetime.timedelta", "torch.nn.functional.relu"}
    assert expected | {"__main__.Options", "__main__.Schedule"} <= set(checkpoint.not_built)
    same = load_checkpoint(best)
    assert all(torch.equal(checkpoint.state_dict[key], same.state_dict[key]) for key in same.state_dict)


def test_of_averaged_weights_the_averages_are_taken(folder: Path) -> None:
    checkpoint = load_checkpoint(folder / "averaged.ckpt")
    with open_torch_file(folder / "averaged.ckpt") as file:
        states = [file.content[name]["model.mlp_head.0.weight"] for name in ("state_dict", "current_model_state")]
        averaged, current = map(file.read, states)
    assert not torch.equal(averaged, current)
    assert torch.equal(checkpoint.state_dict["mlp_head.0.weight"], averaged)
    assert checkpoint.weights == "state_dict (keys model.*)"
    assert checkpoint.others == ("current_model_state (keys model.*); to take it, save it alone",)


def test_the_values_are_those_of_training(folder: Path, trained: dict[str, Tensor]) -> None:
    state = load_checkpoint(folder / "whole-2.ckpt").state_dict
    compared = [key for key in trained if not key.endswith("num_batches_tracked")]
    assert all(torch.equal(state[key], trained[key]) for key in compared)


def test_one_without_the_state_of_training_is_read(folder: Path) -> None:
    weights = load_checkpoint(folder / "whole-1.ckpt").state_dict
    last = load_checkpoint(folder / "last.ckpt").state_dict
    assert all(torch.equal(weights[key], last[key]) for key in last)
