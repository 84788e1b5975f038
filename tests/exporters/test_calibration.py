from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto
from PIL import Image

from scripts.digits import Digits, load_digits
from smlp_deploy.errors import ArtifactError, SmlpError, UsageError
from smlp_deploy.exporters.calibration import METHODS, CalibrationTable
from smlp_deploy.exporters.int8 import calibrate
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.preprocessing import prepare
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline.export import Export
from smlp_deploy.runners.pytorch import RecordingRunner


@pytest.fixture(scope="module")
def model(digits_export: Export) -> ModelProto:
    """The fp32 graph; not to be changed."""
    return onnx.load(digits_export.path)


@pytest.fixture(scope="module")
def training(digits: Checkpoint) -> FloatArray:
    """128 training digits."""
    part = load_digits()[0]
    chosen = slice(None, 31 * 128, 31)
    return prepared(Digits(part.pixels[chosen], part.labels[chosen], part.positions[chosen]), digits)


@pytest.fixture(scope="module")
def table(model: ModelProto, training: FloatArray) -> CalibrationTable:
    return calibrate(model, batches(training)).table


def prepared(part: Digits, checkpoint: Checkpoint) -> FloatArray:
    preprocessing = describe(checkpoint).preprocessing
    return np.stack([prepare(Image.fromarray(pixels), preprocessing) for pixels in part.pixels])


def batches(images: FloatArray, size: int = 32) -> Iterator[FloatArray]:
    yield from (images[at : at + size] for at in range(0, len(images), size))


def run(model: ModelProto, batch: FloatArray, output: str = "logits") -> FloatArray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result: FloatArray = session.run([output], {"images": batch})[0]
    return result


def copy_of(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def test_minmax_is_the_largest_value_however_the_images_are_batched(
    model: ModelProto, table: CalibrationTable, training: FloatArray
) -> None:
    exposed = copy_of(model)
    exposed.graph.output.append(next(value for value in model.graph.value_info if value.name == "blocks.0/gelu_1"))
    assert table.ranges["blocks.0/gelu_1"] == pytest.approx(
        np.abs(run(exposed, training, "blocks.0/gelu_1")).max(), rel=1e-5
    )
    assert table.ranges["images"] == np.abs(training).max()
    at_once = calibrate(model, [training]).table
    assert at_once.ranges == pytest.approx(table.ranges, rel=1e-5)
    assert (table.images, table.method) == (128, "minmax")


@pytest.mark.parametrize("form", ["gpu", "cpu"])
def test_the_largest_activation_is_that_of_the_lowered_network(
    digits: Checkpoint, training: FloatArray, form: str
) -> None:
    metadata = replace(describe(digits), form=form)
    graph = export_onnx(digits.network(), metadata, path=Path("x.onnx"))
    name, largest = calibrate(graph.model(), batches(training)).largest or ("", 0.0)
    with RecordingRunner(digits, metadata) as recorder:
        recorder.infer(training)
        layer, expected = recorder.largest()
    assert largest == pytest.approx(expected, rel=1e-4)
    assert name.startswith(layer)


def test_the_other_methods_leave_outliers_out(small_graph: Graph, training: FloatArray) -> None:
    images = training[:16].copy()
    images[0, :, 3, 3] = 1000
    model = small_graph.model()
    found = {method: calibrate(model, [images], method=method) for method in METHODS}
    assert found["minmax"].table.ranges["images"] == 1000
    assert found["entropy"].table.ranges["images"] < 1000
    assert [method for method in METHODS if found[method].largest is None] == ["entropy", "percentile"]


def test_calibration_reports_progress_and_prints_nothing(
    model: ModelProto, training: FloatArray, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[int] = []
    calibrate(model, batches(training[:10], 4), method="percentile", progress=seen.append)
    assert seen == [4, 8, 10]
    assert capsys.readouterr().out == ""


def test_calibrating_again_gives_the_same_table(
    model: ModelProto, training: FloatArray, table: CalibrationTable
) -> None:
    assert calibrate(model, batches(training)).table == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.pop("ranges"), "damaged: Object missing required field `ranges`"),
        (lambda document: document.update(ranges=[1, 2]), "damaged: Expected `object`, got `array` - .*ranges"),
        (lambda document: document["ranges"].update(cat="wide"), "Expected `float`, got `str` - .*ranges"),
        (lambda document: document["ranges"].update(cat=-1), "the range of 'cat' is -1"),
        (lambda document: document["ranges"].update(cat=True), "Expected `float`, got `bool` - .*ranges"),
        (lambda document: document.update(images=0), "the number of images is 0"),
        (lambda document: document.update(method="guess"), "the method is 'guess'"),
        (lambda document: document.update(images=True), "Expected `int`, got `bool` - .*images"),
        (lambda document: document.update(checkpoint_sha256=None), "Expected `str`, got `null` - .*checkpoint_sha256"),
        (lambda document: document.update(surprise=1), "unknown field 'surprise'"),
        (lambda document: document.update(schema=2), "schema 2 is not 1"),
        (lambda document: document.pop("schema"), "schema None is not 1"),
    ],
)
def test_a_damaged_table_is_an_error(
    table: CalibrationTable, change: Callable[[dict[str, object]], object], message: str
) -> None:
    document = json.loads(table.to_json())
    change(document)
    with pytest.raises(ArtifactError, match=message) as caught:
        CalibrationTable.from_json(json.dumps(document), where="table.json")
    assert caught.value.where == "table.json"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 1, "ranges": {"cat": NaN}}'])
def test_what_is_no_table_is_an_error(text: str) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        CalibrationTable.from_json(text, where="table.json")


def test_what_cannot_be_calibrated_is_refused(model: ModelProto, training: FloatArray) -> None:
    fixed = copy_of(model)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    infinite = training[:4].copy()
    infinite[0, 0, 0, 0] = np.inf
    calls: list[tuple[Callable[[], object], type[SmlpError], str]] = [
        (lambda: calibrate(model, [training], method="guess"), UsageError, "'guess' is unknown"),
        (lambda: calibrate(model, []), UsageError, "no calibration images"),
        (lambda: calibrate(fixed, [training[:3]]), UsageError, "batch of 3 images; the graph takes exactly 4"),
        (lambda: calibrate(model, [infinite]), ArtifactError, "is not finite on the calibration images"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no sysfs here, in which nobody can create files")
def test_temporary_files_that_cannot_be_written_are_one_line(
    model: ModelProto, training: FloatArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/sys")
    with pytest.raises(SmlpError, match=r"^cannot write temporary files: [^\n]+ · set TMPDIR to a folder with room"):
        calibrate(model, [training])
