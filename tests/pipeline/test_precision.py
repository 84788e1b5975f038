from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from scripts.digits import load_digits
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.exporters.calibration import read_table
from smlp_deploy.exporters.int8 import quantized_layers
from smlp_deploy.exporters.tensorrt import BuildOptions
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.defaults import bundled_images, calibration_images, default_images
from smlp_deploy.images.preprocessing import prepare
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline import precision as quantization
from smlp_deploy.pipeline.build import build_prepared, prepare_graph
from smlp_deploy.pipeline.export import Export, export_checkpoint
from smlp_deploy.pipeline.precision import Int8Options, plan_quantization, to_input, to_precision
from smlp_deploy.pipeline.verify import verify_artifact
from smlp_deploy.runners import open_runner
from tests.support.fakes import Exported


@pytest.fixture
def int8_export(exported: Exported) -> Export:
    """The bundled model in int8; not to be written to."""
    return exported("int8")


@pytest.fixture
def graph(digits_export: Export) -> Graph:
    return digits_export.graph


@pytest.fixture
def metadata(graph: Graph) -> ModelMetadata:
    return graph.metadata


def foreign(metadata: ModelMetadata) -> ModelMetadata:
    """Of a model that is not the bundled one, for which there are no images."""
    return replace(metadata, checkpoint_sha256="0" * 64)


def foreign_graph(graph: Graph) -> Graph:
    return Graph.of(graph.model(), foreign(graph.metadata), path=graph.path)


def test_an_int8_export_passes_and_tells_how_it_was_made(int8_export: Export) -> None:
    assert int8_export.report.passed, int8_export.report.failures
    assert int8_export.report.min_cosine >= 0.99
    metadata = Graph.read(int8_export.path).metadata
    assert metadata.precision == "int8"
    assert metadata.quantization == {
        "method": "minmax",
        "images": 130,
        "weights": "per tensor",
        "layers_in_half": [],
    }
    assert verify_artifact(int8_export.path).passed


def top1_on_held_out_digits(*paths: Path) -> list[float]:
    """In percent, of each artifact."""
    _, held_out = load_digits()
    found = []
    for path in paths:
        with open_runner(path) as runner:
            images = np.stack([prepare(Image.fromarray(p), runner.metadata.preprocessing) for p in held_out.pixels])
            found.append(100 * float((runner.infer(images).argmax(axis=1) == held_out.labels).mean()))
    return found


def test_accuracy_on_held_out_digits_is_kept(exported: Exported) -> None:
    fp32, fp16, int8 = top1_on_held_out_digits(*(exported(name).path for name in ("fp32", "fp16", "int8")))
    assert abs(fp32 - fp16) < 0.1 + 1e-9
    assert abs(fp32 - int8) < 0.5 + 1e-9


def test_the_table_makes_the_same_graph_without_images(int8_export: Export, graph: Graph) -> None:
    table = read_table(int8_export.path.with_suffix(".calibration.json"))
    quantization = plan_quantization(graph, Int8Options(table=table))
    assert to_precision(graph, "int8", quantization=quantization).content == int8_export.path.read_bytes()


def test_a_damaged_layer_alone_is_left_in_half_precision(graph: Graph) -> None:
    model = graph.model()
    # A hidden unit that is never active gets one weight so large that the scale of all the others is ruined.
    weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def change(name: str, row: tuple[int, ...] | int, value: float) -> None:
        values = onnx.numpy_helper.to_array(weights[name]).copy()
        values[row] = value
        weights[name].CopyFrom(onnx.numpy_helper.from_array(values, name))

    change("blocks.5.hidden.weight", 0, 0)
    change("blocks.5.hidden.bias", 0, -20)
    change("blocks.5.out.weight", (0, 0, 0, 0), 500)
    damaged = next(name for name in quantized_layers(model) if name.startswith("blocks.5.out/"))
    worse = Graph.of(model, graph.metadata, path=graph.path)
    images = calibration_images(graph.metadata)[::8]
    quantized = plan_quantization(worse, Int8Options(images=images, max_drop=0.3))
    assert quantized.sensitivity is not None
    assert quantized.sensitivity.left_out == (damaged,)
    made = to_precision(worse, "int8", quantization=quantized)
    assert made.metadata.quantization["layers_in_half"] == [damaged]
    assert json.loads(quantized.sensitivity.to_json())["layers"][0]["precision"] == "half"
    assert len(quantized.sensitivity.layers) == len(quantized_layers(model))


def test_a_graph_of_one_batch_size_is_calibrated_on_whole_batches(digits: Checkpoint, tmp_path: Path) -> None:
    metadata = describe(digits, precision="int8", batch=4)
    result = export_checkpoint(digits, metadata, tmp_path / "x.onnx")
    assert result.report.passed
    assert read_table(tmp_path / "x.calibration.json").images == 128


def test_labels_come_from_folders_named_like_classes(
    small_graph: Graph, digit_images: list[Path], tmp_path: Path
) -> None:
    paths = []
    for image in digit_images:
        path = tmp_path / image.name.split("-")[1] / image.name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(image)
        paths.append(path)
    quantized = plan_quantization(small_graph, Int8Options(images=tuple(paths), max_drop=5.0))
    assert quantized.sensitivity is not None
    assert quantized.sensitivity.measure == "accuracy"
    assert quantized.table.images == 12


def test_unreadable_images_are_left_out_with_a_warning(
    graph: Graph, digit_images: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    quantized = plan_quantization(graph, Int8Options(images=(Path("absent.jpg"), *digit_images)))
    assert quantized.table.images == 12
    assert "calibration skips absent.jpg: no such file" in caplog.text
    assert "only 12 calibration images" in caplog.text


def test_another_model_needs_images(graph: Graph) -> None:
    with pytest.raises(UsageError, match="int8 needs images to calibrate on"):
        plan_quantization(foreign_graph(graph), Int8Options())
    with pytest.raises(UsageError, match="none of the calibration images can be read"):
        plan_quantization(foreign_graph(graph), Int8Options(images=(Path("absent.jpg"),)))


def test_a_table_of_another_checkpoint_is_refused(graph: Graph, int8_export: Export) -> None:
    other = foreign_graph(graph)
    quantization = plan_quantization(
        other, Int8Options(table=read_table(int8_export.path.with_suffix(".calibration.json")))
    )
    with pytest.raises(ArtifactError, match="made for another checkpoint"):
        to_precision(other, "int8", quantization=quantization)


def test_parity_is_proven_on_images_of_the_kind(metadata: ModelMetadata, digit_images: list[Path]) -> None:
    int8 = replace(metadata, precision="int8")
    assert {path.name[:6] for path in default_images(int8)} == {"digit-"}
    assert default_images(foreign(int8), digit_images) == digit_images
    assert default_images(foreign(int8)) == default_images(metadata) == bundled_images()


def test_an_int8_engine_has_int8_kernels(digits_export: Export, tmp_path: Path) -> None:
    prepared = prepare_graph(digits_export.graph, "int8")
    assert prepared.parity is not None
    assert prepared.parity.passed
    result = build_prepared(
        prepared, tmp_path / "x.engine", BuildOptions(architectures=("sm89",)), backend="tensorrt-rtx"
    )
    assert result.summary.compute_by_precision == {"Int8": 33, "Half": 10}


def test_of_many_images_an_even_selection_is_used(
    graph: Graph,
    digit_images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(quantization, "MOST_IMAGES", 4)
    quantized = plan_quantization(graph, Int8Options(images=tuple(digit_images)))
    assert quantized.images == tuple(digit_images[0:12:3])
    assert "using 4 of the 12 calibration images" in caplog.text


class TestInput:
    def test_a_graph_that_takes_it_is_returned(self, graph: Graph) -> None:
        assert to_input(graph, "float32") is graph
        pixels = to_input(graph, "uint8", path=Path("pixels.onnx"))
        assert to_input(pixels, "uint8") is to_precision(pixels, "fp32") is pixels
        assert pixels.metadata == replace(graph.metadata, input="uint8")
        assert pixels.path == Path("pixels.onnx")

    def test_the_normalization_is_not_narrowed_or_quantized_afterwards(self, graph: Graph) -> None:
        pixels = to_input(graph, "uint8")
        fix = r"digits-fp32\.onnx · give the float32-input file$"
        for precision in ("fp16", "bf16", "int8"):
            with pytest.raises(
                UsageError, match=rf"^the graph takes uint8 and cannot be converted to {precision} · .*{fix}"
            ):
                to_precision(pixels, precision)
        with pytest.raises(UsageError, match=rf"^the graph takes uint8 and cannot be calibrated · .*{fix}"):
            plan_quantization(pixels, Int8Options())
        with pytest.raises(UsageError, match=rf"^the graph takes uint8 and cannot take float32 again · .*{fix}"):
            to_input(pixels, "float32")
