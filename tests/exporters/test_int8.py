from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from PIL import Image

from scripts.digits import Digits, load_digits
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.evaluation.sensitivity import choose, measure_sensitivity
from smlp_deploy.exporters.calibration import METHODS, CalibrationTable
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.int8 import calibrate, quantize, quantized_layers
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.preprocessing import prepare
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline.export import Export
from tests.support.fakes import Exported
from tests.support.graphs import kept

SCALINGS = pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])


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
def held_out(digits: Checkpoint) -> tuple[FloatArray, NDArray[np.int64]]:
    """Every other one of the 1,000 held-out digits, and their labels."""
    part = load_digits()[1]
    part = Digits(part.pixels[::2], part.labels[::2], part.positions[::2])
    return prepared(part, digits), part.labels


@pytest.fixture(scope="module")
def expected(model: ModelProto, held_out: tuple[FloatArray, NDArray[np.int64]]) -> FloatArray:
    """The fp32 logits of the held-out digits."""
    return run(model, held_out[0])


@pytest.fixture(scope="module")
def tables(model: ModelProto, training: FloatArray, shared: Path) -> dict[str, CalibrationTable]:
    return {
        method: kept(
            shared, f"calibrated by {method}", partial(calibrate, model, batches(training), method=method)
        ).table
        for method in METHODS
    }


@pytest.fixture(scope="module")
def table(tables: dict[str, CalibrationTable]) -> CalibrationTable:
    return tables["minmax"]


def prepared(part: Digits, checkpoint: Checkpoint) -> FloatArray:
    preprocessing = describe(checkpoint).preprocessing
    return np.stack([prepare(Image.fromarray(pixels), preprocessing) for pixels in part.pixels])


def batches(images: FloatArray, size: int = 32) -> Iterator[FloatArray]:
    yield from (images[at : at + size] for at in range(0, len(images), size))


def run(model: ModelProto, batch: FloatArray, output: str = "logits") -> FloatArray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    result: FloatArray = session.run([output], {"images": batch})[0]
    return result


def cosines(a: FloatArray, b: FloatArray) -> FloatArray:
    found: FloatArray = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found


def copy_of(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def constants(model: ModelProto) -> dict[str, NDArray[np.generic]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def set_constant(model: ModelProto, name: str, values: NDArray[np.float32]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def producers(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


@SCALINGS
@pytest.mark.parametrize("method", METHODS)
def test_digits_are_still_recognized(
    model: ModelProto,
    tables: dict[str, CalibrationTable],
    held_out: tuple[FloatArray, NDArray[np.int64]],
    expected: FloatArray,
    method: str,
    per_channel: bool,
) -> None:
    images, labels = held_out
    quantized = quantize(model, tables[method], per_channel=per_channel)
    for graph in (quantized, to_half(quantized, "fp16")):
        logits = run(graph, images)
        cosine = cosines(logits, expected)
        assert cosine.mean() >= 0.999
        assert cosine.min() >= (0.99 if method == "minmax" else 0.98)
        assert (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.99
        lost = (expected.argmax(axis=1) == labels).mean() - (logits.argmax(axis=1) == labels).mean()
        assert lost <= 0.005


@SCALINGS
def test_the_graph_is_valid_and_carries_what_it_did(
    model: ModelProto, table: CalibrationTable, per_channel: bool
) -> None:
    before = model.SerializeToString(deterministic=True)
    quantized = quantize(model, table, per_channel=per_channel)
    onnx.checker.check_model(quantized, full_check=True)
    assert model.SerializeToString(deterministic=True) == before
    assert quantized.metadata_props == model.metadata_props
    assert quantized.opset_import == model.opset_import
    names = [node.name for node in quantized.graph.node]
    assert len(set(names)) == len(names)
    added = ("QuantizeLinear", "DequantizeLinear")
    others = [node.name for node in quantized.graph.node if node.op_type not in added]
    assert others == [node.name for node in model.graph.node]


def test_convolutions_are_quantized(model: ModelProto, digits: Checkpoint) -> None:
    layers = quantized_layers(model)
    assert len(layers) == 5 * sum(digits.config.depths) + len(digits.config.depths)
    assert not [name for name in layers if "depthwise" in name or "head" in name]
    assert list(layers) == [node.name for node in model.graph.node if node.name in layers]


@pytest.fixture(scope="module")
def for_gpus(exported: Exported) -> ModelProto:
    """The fp32 graph of the form for GPUs; not to be changed."""
    return onnx.load(exported(form="gpu").path)


def test_of_the_form_for_gpus_only_the_products_are_quantized(for_gpus: ModelProto) -> None:
    products = [node.name for node in for_gpus.graph.node if node.op_type == "MatMul"]
    assert products
    assert list(quantized_layers(for_gpus)) == products


@SCALINGS
def test_digits_are_still_recognized_in_the_form_for_gpus(
    for_gpus: ModelProto,
    training: FloatArray,
    held_out: tuple[FloatArray, NDArray[np.int64]],
    expected: FloatArray,
    per_channel: bool,
) -> None:
    quantized = quantize(for_gpus, calibrate(for_gpus, batches(training)).table, per_channel=per_channel)
    logits = run(to_half(quantized, "fp16"), held_out[0])
    assert cosines(logits, expected).min() >= 0.99
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.99


@SCALINGS
def test_weights_of_products_for_gpus_are_scaled_alone_or_by_what_they_keep(
    for_gpus: ModelProto, training: FloatArray, per_channel: bool
) -> None:
    quantized = quantize(for_gpus, calibrate(for_gpus, [training]).table, per_channel=per_channel)
    before, after, made_by = constants(for_gpus), constants(quantized), producers(quantized)
    for node in quantized.graph.node:
        if node.op_type != "MatMul":
            continue
        left = node.input[0].endswith("matrix_dequantized")
        dequantize = made_by[node.input[0 if left else 1]]
        weight = before[dequantize.input[0].removesuffix("_int8")].astype(np.float64)
        narrow, scale = (after[name] for name in dequantize.input)
        axes = [attribute.i for attribute in dequantize.attribute if attribute.name == "axis"]
        scaled = 0 if left else 1
        assert (scale.shape, axes) == ((weight.shape[scaled : scaled + 1], [scaled]) if per_channel else ((), []))
        spread = scale.astype(np.float64) if not per_channel else np.expand_dims(scale.astype(np.float64), 1 - scaled)
        assert np.abs(narrow.astype(np.float64) * spread - weight).max() <= spread.max() / 2 * (1 + 1e-9)


def test_only_what_enters_those_layers_is_quantized(model: ModelProto, table: CalibrationTable) -> None:
    quantized = quantize(model, table, per_channel=False)
    layers = quantized_layers(model)
    made_by = producers(quantized)
    for node in quantized.graph.node:
        # The depthwise convolutions, every Add of the residual stream and the head are among the others.
        sources = [made_by[name].op_type if name in made_by else "" for name in node.input]
        assert sources.count("DequantizeLinear") == (2 if node.name in layers else 0), node.name
    values = constants(quantized)
    biases = [values[node.input[2]] for node in quantized.graph.node if node.op_type == "Conv" and len(node.input) == 3]
    assert {bias.dtype for bias in biases} == {np.dtype(np.float32)}


@SCALINGS
def test_weights_are_int8(model: ModelProto, table: CalibrationTable, per_channel: bool) -> None:
    quantized = quantize(model, table, per_channel=per_channel)
    before, after, made_by = constants(model), constants(quantized), producers(quantized)
    layers = quantized_layers(model)
    for node in quantized.graph.node:
        if node.name not in layers:
            continue
        dequantize = made_by[node.input[1]]
        weight = before[dequantize.input[0].removesuffix("_int8")].astype(np.float64)
        narrow, scale = (after[name] for name in dequantize.input)
        axes = [attribute.i for attribute in dequantize.attribute if attribute.name == "axis"]
        assert narrow.dtype == np.int8
        assert (scale.shape, axes) == ((weight.shape[:1], [0]) if per_channel else ((), []))
        spread = scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
        assert np.abs(narrow.astype(np.float64) * spread - weight).max() <= spread.max() / 2 * (1 + 1e-9)
        assert np.abs(narrow.astype(int)).max() in (126, 127)
    assert not [name for name in after if f"{name}_int8" in after]


@SCALINGS
def test_every_scale_is_exact_in_both_half_types(model: ModelProto, table: CalibrationTable, per_channel: bool) -> None:
    graph = quantize(model, table, per_channel=per_channel)
    scales = [scale.ravel() for name, scale in constants(graph).items() if name.endswith("_scale")]
    values = np.concatenate(scales).astype(np.float32)
    for half in (np.float16, ml_dtypes.bfloat16):
        assert (values.astype(half).astype(np.float32) == values).all()


def test_an_excluded_layer_is_left_as_it_was(model: ModelProto, table: CalibrationTable) -> None:
    layer = next(name for name in quantized_layers(model) if "blocks.2.hidden" in name)
    quantized = quantize(model, table, per_channel=False, exclude=[layer])
    original = next(node for node in model.graph.node if node.name == layer)
    assert next(node for node in quantized.graph.node if node.name == layer) == original
    assert "blocks.2.hidden.weight" in constants(quantized)
    nothing = quantize(model, table, per_channel=False, exclude=quantized_layers(model))
    assert nothing.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_the_half_pass_makes_int8_layers_compute_in_half(model: ModelProto, table: CalibrationTable) -> None:
    half = to_half(quantize(model, table, per_channel=False), "fp16")
    onnx.checker.check_model(half, full_check=True)
    types = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    for value in (*half.graph.input, *half.graph.output, *half.graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    pairs = [node for node in half.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    found = {types[name] for node in pairs for name in (*node.input, *node.output)}
    assert found == {TensorProto.FLOAT16, TensorProto.INT8}
    assert {types[node.output[0]] for node in half.graph.node if node.op_type == "Conv"} == {TensorProto.FLOAT16}


@pytest.mark.parametrize("opset", [18, 23])
def test_other_operator_sets_work_too(digits: Checkpoint, training: FloatArray, opset: int, tmp_path: Path) -> None:
    model = export_onnx(digits.network(), describe(digits), path=tmp_path / "x.onnx", opset=opset).model()
    quantized = quantize(model, calibrate(model, [training]).table, per_channel=False)
    expected = run(model, training)
    for graph in (quantized, to_half(quantized, "fp16")):
        onnx.checker.check_model(graph, full_check=True)
        assert cosines(run(graph, training), expected).min() >= 0.99


def test_only_the_tensors_that_are_quantized_have_ranges(model: ModelProto, table: CalibrationTable) -> None:
    made_by = producers(model)
    read = set()
    for node in quantize(model, table, per_channel=False).graph.node:
        if node.op_type == "QuantizeLinear":
            name = node.input[0]
            while name in made_by and made_by[name].op_type in ("Transpose", "Reshape"):
                name = made_by[name].input[0]
            read.add(name)
    assert read == set(table.ranges)


@pytest.mark.parametrize("method", METHODS)
def test_a_table_read_back_gives_the_same_bytes_without_images(
    model: ModelProto, tables: dict[str, CalibrationTable], method: str
) -> None:
    table = tables[method]
    read = CalibrationTable.from_json(table.to_json(), where="table.json")
    assert read == table
    first, second = (quantize(model, each, per_channel=False) for each in (table, read))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_a_table_that_does_not_fit_the_graph_is_an_error(model: ModelProto, table: CalibrationTable) -> None:
    ranges = {name: value for name, value in table.ranges.items() if name != "blocks.0/gelu_1"}
    with pytest.raises(
        ArtifactError, match=r"no range for 'blocks.0/gelu_1', which blocks\.0\.mixing\.fuse.* reads · "
    ):
        quantize(model, replace(table, ranges=ranges), per_channel=False)
    with pytest.raises(ArtifactError, match="another checkpoint"):
        quantize(model, replace(table, checkpoint_sha256="0" * 64), per_channel=False)


def test_an_unknown_layer_cannot_be_excluded(model: ModelProto, table: CalibrationTable) -> None:
    with pytest.raises(UsageError, match="'head' is not a quantized layer"):
        quantize(model, table, per_channel=False, exclude=["head"])


def test_a_layer_with_a_ruined_scale_is_the_one_left_in_half(model: ModelProto, training: FloatArray) -> None:
    """One weight 1,000 times larger, of a hidden unit that is never active: harmless in fp32, ruinous per tensor."""
    damaged = copy_of(model)
    values = constants(model)
    bias, weight = (values[f"blocks.5.{name}"].astype(np.float32) for name in ("hidden.bias", "out.weight"))
    bias[0] = -30
    weight[0, 0] = 1000 * np.abs(weight).max()
    set_constant(damaged, "blocks.5.hidden.bias", bias)
    set_constant(damaged, "blocks.5.out.weight", weight)
    training = training[::4]
    table = calibrate(damaged, [training]).table
    layers = quantized_layers(damaged)
    expected = run(damaged, training)

    def logits_without(left_out: tuple[str, ...]) -> FloatArray:
        return run(quantize(damaged, table, per_channel=False, exclude=left_out), training)

    report = measure_sensitivity(
        layers, lambda layer: logits_without(tuple(name for name in layers if name != layer)), expected
    )
    chosen = choose(report, 1.0, logits_without, reference_logits=expected)
    assert [name.partition("/")[0] for name in chosen.left_out] == ["blocks.5.out"]
    assert report.layers[0].drop > 5
