from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from smlp_deploy.images.batches import FloatArray
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.runners.pytorch import CompiledRunner, HalfRunner, PyTorchRunner, RecordingRunner


@pytest.fixture
def batch() -> FloatArray:
    return np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)


def test_true_half_arithmetic_is_near_but_not_equal(digits: Checkpoint, batch: FloatArray) -> None:
    metadata = describe(digits)
    with PyTorchRunner(digits, metadata) as trained, HalfRunner(digits, metadata) as half:
        expected, found = trained.infer(batch), half.infer(batch)
    assert found.dtype == np.float32
    assert 1e-5 < np.abs(found - expected).max() / expected.std() < 1e-2


def test_the_recorder_computes_the_same_and_remembers_the_largest(digits: Checkpoint, batch: FloatArray) -> None:
    metadata = describe(digits)
    with PyTorchRunner(digits, metadata) as trained, RecordingRunner(digits, metadata) as recorder:
        assert np.abs(recorder.infer(batch) - trained.infer(batch)).max() < 1e-4
        name, largest = recorder.largest()
        recorder.infer(batch * 1000)
        assert recorder.largest()[1] > largest > 1
        recorder.infer(batch)
        assert recorder.largest()[1] > largest
    assert name.split(".")[0] in ("blocks", "embeddings")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile uses it itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_the_same(micro_pth: Path, batch: FloatArray) -> None:
    micro = load_checkpoint(micro_pth)
    metadata = describe(micro)
    with PyTorchRunner(micro, metadata) as trained, CompiledRunner(micro, metadata) as compiled:
        expected, found = trained.infer(batch), compiled.infer(batch)
    assert compiled.name == "torch.compile (CPU) micro.pth"
    assert np.abs(found - expected).max() < 1e-4
