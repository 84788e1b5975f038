from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from smlp_deploy.errors import ArtifactError
from smlp_deploy.exporters.calibration import CalibrationTable
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.int8 import quantize, quantized_layers
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.graphs.edit import (
    add_int8_copy,
    add_output,
    add_trace_outputs,
    dequantize_embeddings,
    emulate_bf16,
    int8_layers,
)
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import trace_points
from smlp_deploy.models import lowering
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.lowering import lower
from smlp_deploy.pipeline.export import Export

PATH = Path("x.onnx")


@pytest.fixture
def model(digits_export: Export) -> ModelProto:
    return onnx.load(digits_export.path)


@pytest.fixture
def batch() -> FloatArray:
    return np.random.default_rng(0).standard_normal((5, 3, 32, 32), dtype=np.float32)


@pytest.fixture
def quantized(model: ModelProto, digits: Checkpoint) -> ModelProto:
    """The model in int8, every activation between -3 and 3."""
    tensors = {name for node in model.graph.node for name in (*node.input, *node.output)}
    table = CalibrationTable(
        ranges=dict.fromkeys(tensors, 3.0), method="minmax", images=1, checkpoint_sha256=digits.sha256
    )
    return quantize(model, table, per_channel=True)


def run(model: ModelProto, batch: FloatArray) -> dict[str, FloatArray]:
    """All outputs, by name."""
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": batch}), strict=True))


def small_graph(weight: NDArray[np.generic]) -> ModelProto:
    """The images, cast to bf16, multiplied in bf16, and cast to the fp32 output."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("images", "logits")]
    inner = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1, 4]) for name in ("narrow", "result")]
    nodes = [
        helper.make_node("Cast", ["images"], ["narrow"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["narrow", "weight"], ["result"]),
        helper.make_node("Cast", ["result"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(weight, "weight")], value_info=inner
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


def test_rules_1_to_3_every_bf16_value_is_rounded_exactly() -> None:
    images = np.array([[1.001, -2.007, 300.3, 1e-3]], np.float32)
    weight = np.array([0.1, 1.7, 3.3, -5.1], np.float32).astype(ml_dtypes.bfloat16)
    emulated = emulate_bf16(small_graph(weight))
    narrow = images.astype(ml_dtypes.bfloat16).astype(np.float32)
    exact = narrow * weight.astype(np.float32)
    expected = exact.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (expected != exact).any()
    np.testing.assert_array_equal(run(emulated, images)["logits"], expected)


def test_rule_1_no_weight_is_left_in_bf16(model: ModelProto) -> None:
    half = to_half(model, "bf16")
    before = {tensor.name: numpy_helper.to_array(tensor).astype(np.float32) for tensor in half.graph.initializer}
    after = {tensor.name: numpy_helper.to_array(tensor) for tensor in emulate_bf16(half).graph.initializer}
    assert {values.dtype for values in after.values()} == {np.dtype(np.float32), np.dtype(np.int64)}
    for name, values in before.items():
        np.testing.assert_array_equal(after[name].astype(np.float32), values)


def test_bf16_emulated_agrees_with_torch_and_is_really_rounded(
    model: ModelProto, batch: FloatArray, digits: Checkpoint
) -> None:
    expected = run(model, batch)["logits"]
    found = run(emulate_bf16(to_half(model, "bf16")), batch)["logits"]
    with torch.inference_mode():
        lowered = lower(digits.network()).narrow(torch.bfloat16)
        torch_logits = lowered(torch.from_numpy(batch).bfloat16()).float().numpy()
    difference = np.abs(found - expected).max() / expected.std()
    assert 1e-4 < difference < 5e-2
    assert np.abs(found - torch_logits).max() / expected.std() < 5e-2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rules_4_and_5_the_trace_points_come_out_in_float32(
    model: ModelProto, batch: FloatArray, digits: Checkpoint, precision: str
) -> None:
    half = to_half(model, precision)
    if precision == "bf16":
        half = emulate_bf16(half)
    for graph in (model.graph, half.graph):
        add_trace_outputs(graph, digits.config, PATH)
    expected, found = run(model, batch), run(half, batch)
    assert list(found) == ["logits", *(point.name for point in trace_points(digits.config))]
    for name, values in found.items():
        assert values.dtype == np.float32
        assert np.abs(values - expected[name]).max() < 5e-2 * expected[name].std(), name


def test_rule_5_the_residual_sums_are_in_their_order(model: ModelProto, digits: Checkpoint) -> None:
    add_trace_outputs(model.graph, digits.config, PATH)
    made_by = {node.output[0]: node for node in model.graph.node}
    for point in trace_points(digits.config):
        node = made_by[made_by[point.name].input[0]]
        assert node.op_type == ("Conv" if point.kind == "embedding" else "Add")
        if point.kind != "embedding":
            layer = made_by[node.input[1]].name
            assert layer.startswith(f"blocks.{point.index}.{'mixing' if point.kind == 'tokens' else 'out'}/")


def test_rule_5_the_residual_sums_of_the_form_for_gpus(
    digits: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both kinds of token mixing: one of them adds two products."""
    monkeypatch.setattr(lowering, "LARGEST_DENSE_GRID", digits.config.grid(1))
    metadata = replace(describe(digits), form="gpu")
    graph = export_onnx(digits.network(), metadata, path=tmp_path / "x.onnx").model().graph
    add_trace_outputs(graph, digits.config, PATH)
    made_by = {node.output[0]: node for node in graph.node}
    sums = [made_by[made_by[p.name].input[0]] for p in trace_points(digits.config) if p.kind != "embedding"]
    assert [node.name.split("/")[0] for node in sums] == [f"blocks.{i // 2}" for i in range(12)]
    assert [node.op_type for node in sums] == ["Add"] * 12
    # The first operand is the residual stream, the second what the block adds to it.
    assert [made_by[node.input[1]].op_type for node in sums] == ["Transpose", "Conv"] * 6
    assert [node.input[0] for node in sums[1::2]] == [node.output[0] for node in sums[::2]]


def test_a_graph_without_the_names_of_smlp_export_is_an_error(model: ModelProto, digits: Checkpoint) -> None:
    for node in model.graph.node:
        node.name = node.name.removeprefix("embeddings.1/")
    with pytest.raises(ArtifactError, match=r"cannot be traced: it has no stage 2 embedding · x\.onnx"):
        add_trace_outputs(model.graph, digits.config, PATH)


def test_rule_6_the_int8_layers_are_those_that_were_quantized(model: ModelProto, quantized: ModelProto) -> None:
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for graph in (quantized.graph, to_half(quantized, "fp16").graph):
        layers = int8_layers(graph)
        assert tuple(layer.name for layer in layers) == quantized_layers(model)
        for layer in layers:
            weight = weights[layer.weight]
            assert np.abs(layer.values - weight).max() <= np.abs(weight).max() / 127
            assert 3 / 127 <= layer.scale < 3 / 127 * 2**0.25 * 1.01
    assert int8_layers(model.graph) == []


def test_rule_7_a_copy_computes_what_the_layer_computes(
    model: ModelProto, quantized: ModelProto, batch: FloatArray
) -> None:
    layer = int8_layers(quantized.graph)[0]  # the first embedding: it reads the images in both graphs
    node = next(node for node in model.graph.node if node.name == layer.name)
    original = node.SerializeToString()
    add_output(model.graph, add_int8_copy(model.graph, node, layer), "copy")
    add_output(model.graph, node.output[0], "fp32")
    add_output(quantized.graph, layer.output, "int8")
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model))
    assert node.SerializeToString() == original
    here, there = run(model, batch), run(quantized, batch)
    np.testing.assert_allclose(here["copy"], there["int8"], rtol=1e-4, atol=1e-5)
    assert np.abs(here["copy"] - here["fp32"]).max() > 1e-3


@pytest.mark.parametrize("per_channel", [False, True])
def test_rule_8_an_embedding_has_the_values_of_its_int8_weight(per_channel: bool) -> None:
    weight, scales = np.arange(24, dtype=np.int8).reshape(2, 3, 2, 2) - 12, np.array([0.5, 0.25], np.float32)
    scale = scales if per_channel else scales[:1].reshape(())
    axis: dict[str, Any] = {"axis": 0} if per_channel else {}
    pointwise = weight[:, :, :1, :1]
    nodes = [
        helper.make_node("DequantizeLinear", ["wide_int8", "scale"], ["wide"], **axis),
        helper.make_node("DequantizeLinear", ["pointwise_int8", "scale"], ["pointwise"], **axis),
        helper.make_node("Conv", ["x", "wide"], ["y"], strides=[2, 2]),
        helper.make_node("Conv", ["x", "pointwise"], ["z"]),
    ]
    values = {"wide_int8": weight, "pointwise_int8": pointwise, "scale": scale}
    constants = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in values.items()]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yz"]
    graph = helper.make_graph(nodes, "int8", given, results, constants)
    expected = _run_both(graph)
    dequantize_embeddings(graph)
    assert [node.op_type for node in graph.node] == ["DequantizeLinear", "Conv", "Conv"]
    for ours, theirs in zip(_run_both(graph), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # summed in another order


def _run_both(graph: onnx.GraphProto) -> list[FloatArray]:
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 20)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((1, 3, 4, 4), dtype=np.float32)
    outputs: list[FloatArray] = session.run(None, {"x": images})
    return outputs
