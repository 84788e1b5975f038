from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from smlp_deploy.errors import ArtifactError, ConfigError, MissingDependencyError, UsageError
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.metadata import METADATA_KEY
from smlp_deploy.pipeline.export import Export
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.onnxruntime import PROVIDERS, OnnxRuntimeRunner
from tests.support.fakes import Exported


def test_a_fixed_batch_takes_any_number_of_images(exported: Exported, digits_export: Export) -> None:
    fixed = exported(batch=4).path
    batch = np.random.default_rng(0).standard_normal((6, 3, 32, 32), dtype=np.float32)
    with OnnxRuntimeRunner.open(fixed) as of_four, OnnxRuntimeRunner.open(digits_export.path) as of_any:
        assert np.abs(of_four.infer(batch) - of_any.infer(batch)).max() < 1e-4


def test_a_file_without_metadata_is_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(ArtifactError, match=r"no labels and preprocessing inside.*smlp export"):
        OnnxRuntimeRunner.open(tmp_path / "bare.onnx")


def test_damaged_metadata_are_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    onnx.helper.set_model_props(model, {METADATA_KEY: '{"schema": 99}'})
    onnx.save(model, tmp_path / "newer.onnx")
    with pytest.raises(ConfigError, match="metadata schema 99 is not 1"):
        OnnxRuntimeRunner.open(tmp_path / "newer.onnx")


@pytest.mark.parametrize("keep", [0, 10, 100_000])
def test_a_truncated_file_is_one_clear_error(digits_export: Export, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(digits_export.path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"^not an ONNX file"):
        OnnxRuntimeRunner.open(path)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_not_there_is_an_error(digits_export: Export, provider: str) -> None:
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip(f"this ONNX Runtime has {provider}")
    with pytest.raises(MissingDependencyError, match=r"has no (CUDA|Tensorrt)ExecutionProvider.*smlp-deploy\[gpu\]"):
        OnnxRuntimeRunner.open(digits_export.path, provider=provider)


def test_a_provider_that_falls_back_is_an_error(digits_export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    # What onnxruntime-gpu does without a GPU: it lists CUDA, and gives a session on the CPU.
    real = onnxruntime.InferenceSession

    def falls_back(source: Path, options: onnxruntime.SessionOptions, providers: list[str]) -> object:
        return real(source, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "InferenceSession", falls_back)
    with pytest.raises(MissingDependencyError, match="CUDAExecutionProvider does not start here, only CPU"):
        OnnxRuntimeRunner.open(digits_export.path, provider="cuda")


def test_a_provider_is_for_onnx_files(digits_export: Export) -> None:
    with open_runner(digits_export.path, provider="cpu") as runner:
        assert runner.name == "onnxruntime (CPU) digits-fp32.onnx"
    with pytest.raises(UsageError, match="only ONNX files take a provider"):
        open_runner(BUNDLED_CHECKPOINT, provider="cpu")


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        OnnxRuntimeRunner.open(tmp_path / "absent.onnx")
