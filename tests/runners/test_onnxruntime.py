from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from smlp_deploy.errors import ArtifactError, ConfigError
from smlp_deploy.export import Export, export_checkpoint
from smlp_deploy.metadata import METADATA_KEY
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner


def test_a_fixed_batch_takes_any_number_of_images(digits: Checkpoint, digits_export: Export, tmp_path: Path) -> None:
    fixed = export_checkpoint(digits, describe(digits, batch=4), tmp_path / "fixed.onnx").path
    batch = np.random.default_rng(0).standard_normal((6, 3, 32, 32), dtype=np.float32)
    with OnnxRuntimeRunner(fixed) as of_four, OnnxRuntimeRunner(digits_export.path) as of_any:
        assert np.abs(of_four.infer(batch) - of_any.infer(batch)).max() < 1e-4


def test_a_file_without_metadata_is_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(ArtifactError, match=r"no labels and preprocessing inside.*smlp export"):
        OnnxRuntimeRunner(tmp_path / "bare.onnx")


def test_damaged_metadata_are_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    onnx.helper.set_model_props(model, {METADATA_KEY: '{"schema": 99}'})
    onnx.save(model, tmp_path / "newer.onnx")
    with pytest.raises(ConfigError, match="metadata schema 99 is not 1"):
        OnnxRuntimeRunner(tmp_path / "newer.onnx")


@pytest.mark.parametrize("keep", [0, 10, 100_000])
def test_a_truncated_file_is_one_clear_error(digits_export: Export, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(digits_export.path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="ONNX Runtime cannot load it"):
        OnnxRuntimeRunner(path)


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        OnnxRuntimeRunner(tmp_path / "absent.onnx")
