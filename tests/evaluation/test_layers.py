from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from smlp_deploy.commands.tables import show_divergence
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.evaluation.layers import DivergenceReport, LayerNoise, find_divergence
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.defaults import bundled_images
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline.export import Export, export_checkpoint
from smlp_deploy.pipeline.precision import to_input
from smlp_deploy.pipeline.verify import verify_layers
from smlp_deploy.runners.base import LayerOutput
from tests.support.fakes import Exported, FakeRunner, metadata, quadrant_means

IMAGES = bundled_images()[:3]


class FakeTracer(FakeRunner):
    """Two points; what comes out of the second is changed."""

    def __init__(self, change: Callable[[FloatArray], FloatArray] = lambda values: values, *, classes: int = 4) -> None:
        super().__init__(quadrant_means, metadata(classes=classes))
        self._change = change

    def trace(self, batch: FloatArray) -> dict[str, FloatArray]:
        return {"first": batch, "second": self._change(batch.copy())}


class FakeLayers:
    """Two layers whose values are the images; one has noise of its own, the other what came through the first."""

    def trace_layers(self, batch: FloatArray) -> Iterator[LayerOutput]:
        for image in batch:
            yield LayerOutput("second", image, image, image * np.float32(1.25))
            yield LayerOutput("first", image, image * np.float32(1.125), image * np.float32(0.875))


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


def test_the_layer_with_the_most_noise_of_its_own_comes_first() -> None:
    report = find_divergence(FakeTracer(), FakeTracer(), IMAGES, layers=FakeLayers())
    eighth, quarter = 20 * math.log10(8), 20 * math.log10(4)
    first, second = report.layers
    assert (first.name, second.name) == ("first", "second")
    assert (first.own_sqnr_db, first.sqnr_db) == pytest.approx((eighth, eighth))
    assert (second.own_sqnr_db, second.sqnr_db) == pytest.approx((math.inf, quarter))


def test_the_layers_are_kept_too() -> None:
    report = find_divergence(FakeTracer(), FakeTracer(), IMAGES)
    layers = tuple(LayerNoise(name=name, sqnr_db=20.5, own_sqnr_db=math.pi) for name in "ab")
    noisy = replace(report, layers=layers)
    assert DivergenceReport.from_json(noisy.to_json(), where="x.json").layers == layers
    spoilt = replace(noisy, layers=(*layers, LayerNoise(name="c", sqnr_db=math.nan, own_sqnr_db=math.inf)))
    read = DivergenceReport.from_json(spoilt.to_json(), where="x.json")
    assert math.isnan(read.layers[2].sqnr_db)
    assert read.layers[2].own_sqnr_db == math.inf
    assert read.to_json() == spoilt.to_json()
    before = {key: value for key, value in json.loads(report.to_json()).items() if key != "layers"}
    assert DivergenceReport.from_json(json.dumps(before), where="x.json").layers == ()


def test_a_layer_with_a_value_that_is_not_finite_is_the_worst() -> None:
    class Spoilt(FakeLayers):
        def trace_layers(self, batch: FloatArray) -> Iterator[LayerOutput]:
            yield from super().trace_layers(batch)
            yield LayerOutput("bad", batch, batch * np.float32(np.nan), batch)

    (worst, *_) = find_divergence(FakeTracer(), FakeTracer(), IMAGES, layers=Spoilt()).layers
    assert worst.name == "bad"
    assert math.isnan(worst.own_sqnr_db)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"points": [{}]}', '{"points": 1, "unreadable": []}'])
def test_json_that_is_not_a_report_is_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"is not a report of smlp verify --layers · x\.json"):
        DivergenceReport.from_json(text, where="x.json")


@pytest.mark.parametrize(
    "change",
    [
        {"error": 10**400},
        {"error": "0.5"},
        {"error": True},
        {"error": -0.5},
        {"max_abs": "-inf"},
        {"error": None, "worst_error": -1},
        {"growth": "nan"},
        {"name": None},
        {"surprise": 1},
    ],
)
def test_a_point_with_a_wrong_value_is_refused(change: dict[str, object]) -> None:
    document = json.loads(find_divergence(FakeTracer(), FakeTracer(), IMAGES).to_json())
    document["points"][1].update(change)
    with pytest.raises(ArtifactError, match="is not a report of smlp verify --layers"):
        DivergenceReport.from_json(json.dumps(document), where="x.json")


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
        self, exported: Exported, precision: str
    ) -> None:
        report = verify_layers(exported(precision).path)
        assert report.first_over is None
        assert report.precision == precision
        assert len(report.layers) == (33 if precision == "int8" else 0)
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

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
    def test_the_form_for_gpus_agrees(
        self, exported: Exported, digits_export: Export, precision: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        artifact = exported(precision, form="gpu").path
        for reference in (None, exported(form="gpu").path, digits_export.path):
            report = verify_layers(artifact, reference=reference, images=IMAGES)
            assert report.first_over is None
            assert len(report.points) == 3 + 2 * 6
            # The products of each block's token mixing; the form for CPUs has others.
            measured = precision == "int8" and reference != digits_export.path
            assert len(report.layers) == (2 * 6 if measured else 0)
            said = "int8 layers are not compared: digits-fp32.onnx is of the form for another machine"
            assert (said in caplog.text) is (precision == "int8" and reference == digits_export.path)

    @pytest.mark.parametrize(
        ("weight", "where"),
        [
            ("blocks.3.hidden.weight", "stage 2 block 2"),
            ("blocks.2.mixing.width", "stage 2 block 1 token mixing"),
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
        with pytest.raises(ArtifactError, match=r"cannot be traced: it has no stage 1 embedding · .*x\.onnx"):
            verify_layers(tmp_path / "x.onnx")

    def test_a_file_of_a_fixed_batch_size_is_looked_into(self, exported: Exported) -> None:
        report = verify_layers(exported(batch=4).path)
        assert report.images == 18
        assert report.first_over is None

    def test_another_kind_of_file_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"cannot be compared block by block · .*x\.txt"):
            verify_layers(tmp_path / "x.txt")


@pytest.fixture(scope="module")
def int8(exported: Exported) -> Path:
    """The bundled model in int8; not to be written to."""
    return exported("int8").path


@pytest.fixture(scope="module")
def sound(digits_export: Export, int8: Path) -> dict[str, LayerNoise]:
    """The noise of each of its layers, by name."""
    report = verify_layers(int8, reference=digits_export.path)
    return {found.name: found for found in report.layers}


class TestInt8Layers:
    def coarsened(self, path: Path, layer: str, target: Path) -> Path:
        """The int8 file with an eightfold scale of what one layer reads."""
        model = onnx.load(path)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        (node,) = (node for node in model.graph.node if node.name == layer)
        reads = [name.removesuffix("_dequantized") for name in node.input if name.endswith("_dequantized")]
        (scale,) = (tensors[f"{name}_scale_fp16"] for name in reads if f"{name}_int8" not in tensors)
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float16(8), scale.name))
        onnx.save(model, target)
        return target

    def values(self, path: Path, name: str, images: FloatArray) -> FloatArray:
        """A value inside a graph."""
        model: ModelProto = onnx.load(path)
        model.graph.node.append(helper.make_node("Cast", [name], ["shown"], to=TensorProto.FLOAT))
        model.graph.output.append(helper.make_tensor_value_info("shown", TensorProto.FLOAT, None))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found: FloatArray = session.run(["shown"], {"images": images})[0]
        return found

    @pytest.mark.parametrize(
        "layer", ["embeddings.0/conv", "blocks.2.mixing.fuse_height/conv", "blocks.3.hidden/conv", "blocks.4.out/conv"]
    )
    def test_a_coarse_scale_makes_its_layer_the_worst(
        self, digits_export: Export, int8: Path, sound: dict[str, LayerNoise], tmp_path: Path, layer: str
    ) -> None:
        path = self.coarsened(int8, layer, tmp_path / "coarse.onnx")
        worst, *others = verify_layers(path, reference=digits_export.path).layers
        assert worst.name == layer
        assert worst.own_sqnr_db < others[0].own_sqnr_db
        assert 10 < sound[layer].own_sqnr_db - worst.own_sqnr_db < 21  # 20 log10(8) is 18
        assert {found.name: found.own_sqnr_db for found in others} == {
            name: found.own_sqnr_db for name, found in sound.items() if name != layer
        }

    @pytest.mark.parametrize(
        ("form", "layer", "weight", "reads"),
        [
            ("cpu", "blocks.3.mixing.fuse/conv", "blocks.3.mixing.fuse.weight", "blocks.3/gelu_1"),
            ("gpu", "blocks.3.mixing.fuse/matmul", "blocks.3.mixing.fuse.matrix", "blocks.3.mixing/reshape_1"),
        ],
    )
    def test_decibels_are_those_of_the_definition(
        self, digits: Checkpoint, exported: Exported, form: str, layer: str, weight: str, reads: str
    ) -> None:
        def decibels(clean: FloatArray, noisy: FloatArray) -> float:
            exact = clean.astype(np.float64)
            return 10 * math.log10((exact**2).sum() / ((exact - noisy) ** 2).sum())

        fp32, int8 = (exported(precision, form=form).path for precision in ("fp32", "int8"))
        images = np.stack([load_image(path, describe(digits).preprocessing) for path in IMAGES])
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(int8).graph.initializer}
        scale = np.float32(tensors[f"{reads}_scale_fp16"])
        clean = self.values(fp32, layer, images)
        x = np.clip(np.rint(self.values(fp32, reads, images) / scale), -128, 127) * scale
        narrow = tensors[f"{weight}_int8"].astype(np.float64) * tensors[f"{weight}_scale_fp16"].astype(np.float64)
        alone = np.einsum("oi,nihw->nohw", narrow[:, :, 0, 0], x) if form == "cpu" else x @ narrow
        report = verify_layers(int8, reference=fp32, images=IMAGES)
        found = next(noise for noise in report.layers if noise.name == layer)
        assert found.own_sqnr_db == pytest.approx(decibels(clean, alone.astype(np.float32)), abs=1e-3)
        assert found.sqnr_db == pytest.approx(decibels(clean, self.values(int8, layer, images)), abs=0.05)

    def test_layers_are_found_whatever_the_numbers_in_their_names(
        self, digits: Checkpoint, digits_export: Export, sound: dict[str, LayerNoise], tmp_path: Path
    ) -> None:
        metadata = describe(digits, precision="int8", batch=1)
        fixed = export_checkpoint(digits, metadata, tmp_path / "x.onnx", opset=18).path
        found = verify_layers(fixed, reference=digits_export.path, images=IMAGES[:1]).layers
        assert len(found) == len(sound) == 3 + 6 * 5
        assert all(10 < layer.own_sqnr_db < 80 for layer in found)

    def test_pixels_give_the_same_as_floats(self, exported: Exported, tmp_path: Path) -> None:
        paths = {}
        for precision in ("fp32", "int8"):
            for taken in ("float32", "uint8"):
                paths[precision, taken] = tmp_path / f"{precision}-{taken}.onnx"
                to_input(exported(precision).graph, taken).save(paths[precision, taken])
        expected = verify_layers(paths["int8", "float32"], reference=paths["fp32", "float32"], images=IMAGES)
        for candidate, reference in (("uint8", "float32"), ("float32", "uint8"), ("uint8", "uint8")):
            found = verify_layers(paths["int8", candidate], reference=paths["fp32", reference], images=IMAGES)
            assert {noise.name for noise in found.layers} == {noise.name for noise in expected.layers}
            for some, others in ((found.points, expected.points), (found.layers, expected.layers)):
                ratios = {each.name: each.sqnr_db for each in others}
                assert {each.name: each.sqnr_db for each in some} == pytest.approx(ratios, abs=0.2)

    def test_only_int8_against_fp32_has_layers(self, digits_export: Export, int8: Path) -> None:
        assert verify_layers(digits_export.path, images=IMAGES).layers == ()
        assert verify_layers(int8, reference=int8, images=IMAGES).layers == ()

    def test_a_reference_without_a_layer_is_refused(self, digits_export: Export, int8: Path, tmp_path: Path) -> None:
        model = onnx.load(digits_export.path)
        for node in model.graph.node:
            node.input[:] = ["other" if name == "blocks.1.out.weight" else name for name in node.input]
        next(tensor for tensor in model.graph.initializer if tensor.name == "blocks.1.out.weight").name = "other"
        onnx.save(model, tmp_path / "x.onnx")
        with pytest.raises(
            ArtifactError, match=r"has no layer with the weight blocks\.1\.out\.weight · .*x\.onnx · give"
        ):
            verify_layers(int8, reference=tmp_path / "x.onnx")


def test_the_worst_layers_are_shown_and_all_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    report = find_divergence(FakeTracer(), FakeTracer(), IMAGES)
    show_divergence(report)
    assert "int8" not in capsys.readouterr().out
    layers = tuple(LayerNoise(name=f"layer {i}", sqnr_db=20 + i, own_sqnr_db=30.25 + i) for i in range(33))
    show_divergence(replace(report, layers=layers))
    shown = capsys.readouterr().out
    assert ["layer", "0", "30.2", "20.0"] in [line.split() for line in shown.splitlines()]
    assert "layer 9 " in shown
    assert "layer 10" not in shown
    assert "the 10 int8 layers with the most noise of their own, of 33" in shown
