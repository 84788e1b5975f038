from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fakes import FakeRunner, metadata, quadrant_means
from smlp_deploy.divergence import DivergenceReport, find_divergence
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.export import Export, bundled_images, export_checkpoint, verify_layers
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.runners.base import FloatArray

IMAGES = bundled_images()[:3]


class FakeTracer(FakeRunner):
    """Two points; what comes out of the second is changed."""

    def __init__(self, change: Callable[[FloatArray], FloatArray] = lambda values: values, *, classes: int = 4) -> None:
        super().__init__(quadrant_means, metadata(classes=classes))
        self._change = change

    def trace(self, batch: FloatArray) -> dict[str, FloatArray]:
        return {"first": batch, "second": self._change(batch.copy())}


def test_the_error_at_each_point_is_measured() -> None:
    report = find_divergence(FakeTracer(), FakeTracer(lambda x: x * np.float32(1.125)), IMAGES, max_error=0.1)
    first, second = report.points
    assert (first.error, first.growth, first.sqnr_db) == (0, None, math.inf)
    assert second.error == pytest.approx(0.125)
    assert second.worst_error == pytest.approx(0.125)
    assert second.sqnr_db == pytest.approx(18.06, abs=0.01)
    assert second.growth is None
    assert report.first_over is second
    assert report.judged_by(0.2).first_over is None
    assert (report.images, report.precision) == (3, "fp32")


def test_the_worst_image_is_named() -> None:
    def only_the_second(values: FloatArray) -> FloatArray:
        values[1] *= 2
        return values

    point = find_divergence(FakeTracer(), FakeTracer(only_the_second), IMAGES).points[1]
    assert point.worst_image == IMAGES[1].name
    assert point.worst_error == pytest.approx(1)
    assert 0 < point.error < 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_over_the_gate(bad: float) -> None:
    def spoil(values: FloatArray) -> FloatArray:
        values[2, 0, 0, 0] = bad
        return values

    report = find_divergence(FakeTracer(), FakeTracer(spoil), IMAGES, max_error=1e9)
    assert report.first_over is report.points[1]
    assert report.points[1].worst_image == IMAGES[2].name


def test_a_report_can_be_kept_and_read_again() -> None:
    report = find_divergence(FakeTracer(), FakeTracer(lambda x: x * np.float32(np.nan)), IMAGES)
    read = DivergenceReport.from_json(report.to_json(), where="x.json")
    assert math.isnan(read.points[1].error)
    assert read.to_json() == report.to_json()
    assert json.loads(report.to_json())["points"][1]["error"] is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"points": [{}]}', '{"points": 1, "unreadable": []}'])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"is no report of smlp verify --layers · x\.json"):
        DivergenceReport.from_json(text, where="x.json")


def test_networks_of_different_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="different shapes"):
        find_divergence(FakeTracer(), FakeTracer(classes=5), IMAGES)


def test_images_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    report = find_divergence(FakeTracer(), FakeTracer(), [tmp_path / "absent.jpg", *IMAGES])
    assert report.images == 3
    assert report.unreadable == (f"{tmp_path / 'absent.jpg'}: no such file or directory",)
    with pytest.raises(UsageError, match=r"no image can be read · .*absent\.jpg: no such file"):
        find_divergence(FakeTracer(), FakeTracer(), [tmp_path / "absent.jpg"])


class TestRealNetworks:
    @pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
    def test_each_precision_is_within_its_gate_and_beyond_the_one_before(
        self, digits: Checkpoint, tmp_path: Path, precision: str
    ) -> None:
        path = export_checkpoint(digits, describe(digits, precision=precision), tmp_path / "x.onnx").path
        report = verify_layers(path)
        assert report.first_over is None
        assert report.precision == precision
        assert report.judged_by({"fp16": 1e-5, "bf16": 1e-3, "int8": 5e-3}[precision]).first_over is not None

    def test_every_form_agrees(self, digits_export: Export) -> None:
        report = verify_layers(digits_export.path)
        assert report.first_over is None
        assert [point.name for point in report.points][:3] == [
            "stage 1 embedding",
            "stage 1 block 1 token mixing",
            "stage 1 block 1",
        ]
        assert len(report.points) == 3 + 2 * 6
        lowered = verify_layers(BUNDLED_CHECKPOINT)
        assert lowered.first_over is None
        assert "lowered" in lowered.candidate
        assert "lowered" not in lowered.reference
        same = verify_layers(digits_export.path, reference=digits_export.path)
        assert [point.error for point in same.points] == [0] * 15

    @pytest.mark.parametrize(
        ("weight", "where"),
        [
            ("blocks.3.hidden.weight", "stage 2 block 2"),
            ("blocks.2.width_matrix", "stage 2 block 1 token mixing"),
            ("embeddings.2.weight", "stage 3 embedding"),
        ],
    )
    def test_perturbed_weights_are_found(self, digits_export: Export, tmp_path: Path, weight: str, where: str) -> None:
        model = onnx.load(digits_export.path)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == weight)
        values = numpy_helper.to_array(tensor)
        noise = np.random.default_rng(0).standard_normal(values.shape).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values + np.float32(0.01) * values.std() * noise, weight))
        onnx.save(model, tmp_path / "x.onnx")
        over = verify_layers(tmp_path / "x.onnx").first_over
        assert over is not None
        assert over.name == where

    def test_a_graph_with_other_names_is_refused(self, digits_export: Export, tmp_path: Path) -> None:
        model = onnx.load(digits_export.path)
        for node in model.graph.node:
            node.name = ""
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(ArtifactError, match=r"cannot be looked into: no stage 1 embedding in it · .*x\.onnx"):
            verify_layers(tmp_path / "x.onnx")

    def test_another_kind_of_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"cannot be looked into · .*x\.engine"):
            verify_layers(tmp_path / "x.engine")
