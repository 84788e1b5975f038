from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from smlp_deploy.errors import ArtifactError
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.pipeline.export import Export
from smlp_deploy.runners import open_runner


def test_both_backends_agree_on_an_odd_batch(digits_export: Export) -> None:
    batch = np.random.default_rng(0).standard_normal((5, 3, 32, 32), dtype=np.float32)
    with open_runner(BUNDLED_CHECKPOINT) as trained, open_runner(digits_export.path) as exported:
        expected, found = trained.infer(batch), exported.infer(batch)
        assert trained.metadata.labels == exported.metadata.labels
        assert (trained.name, exported.name) == (
            "pytorch (CPU) smlpnet_digits.safetensors",
            "onnxruntime (CPU) digits-fp32.onnx",
        )
    assert found.shape == expected.shape == (5, 10)
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("fixture", ["checkpoint", "artifact"])
def test_logits_are_a_copy_that_the_caller_owns(digits_export: Export, fixture: str) -> None:
    batch = np.zeros((2, 3, 32, 32), np.float32)
    with open_runner(BUNDLED_CHECKPOINT if fixture == "checkpoint" else digits_export.path) as runner:
        first = runner.infer(batch)
        kept = first.copy()
        second = runner.infer(batch + 1)
        np.testing.assert_array_equal(first, kept)
        first[:] = 0
        assert np.abs(second).sum() > 0
        assert not np.array_equal(runner.infer(batch + 1), first)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no runner for this kind of file.*expected an ONNX file"):
        open_runner(tmp_path / "model.h5")
