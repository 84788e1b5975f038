from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from smlp_deploy.errors import ArtifactError
from smlp_deploy.evaluation.profile import GPUS, GraphProfile, profile_graph, roofline
from smlp_deploy.exporters.kernels import KernelSummary
from smlp_deploy.pipeline.export import Export

PROFILE = GraphProfile(
    source=Path("x.onnx"),
    precision="fp16",
    architecture="sm89",
    kernels=(),
    summary=KernelSummary(batch=8, count=0, by_kind={}, compute_by_precision={}, bytes_per_image=32_000_000),
    macs=3_250_000_000,
)


def test_a_profile_of_the_bundled_model(digits_export: Export) -> None:
    profile = profile_graph(digits_export.path, batch=4)
    assert profile.summary.count == len(profile.kernels) == 74
    assert profile.summary.compute_by_precision == {"Float": 43}
    assert profile.kernels[0].inputs[0].shape == (4, 3, 32, 32)
    assert {node.split("/")[0].split(".")[0] for kernel in profile.kernels for node in kernel.nodes} >= {
        "blocks",
        "head",
    }
    assert profile.macs > 1_000_000


def test_the_estimate_is_the_larger_of_two_times() -> None:
    t4 = roofline(PROFILE)[0]
    assert t4.gpu.name == "T4"
    assert t4.memory_us == pytest.approx(100)  # 32 MB at 320 GB/s
    assert t4.compute_us == pytest.approx(100)  # 6.5 G operations at 65 T/s
    slower = roofline(replace(PROFILE, macs=2 * PROFILE.macs))[0]
    assert slower.bound == "arithmetic"
    assert slower.microseconds == pytest.approx(200)


def test_only_gpus_that_have_the_precision_are_estimated() -> None:
    assert len(roofline(PROFILE)) == len(GPUS)
    assert "T4" not in {estimate.gpu.name for estimate in roofline(replace(PROFILE, precision="bf16"))}


def test_a_graph_of_another_tool_is_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="smlp-deploy did not write it"):
        profile_graph(tmp_path / "x.onnx")
