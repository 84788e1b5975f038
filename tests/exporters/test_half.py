from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from smlp_deploy.errors import ArtifactError
from smlp_deploy.exporters.half import to_half
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.pipeline.export import Export

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture
def model(digits_export: Export) -> onnx.ModelProto:
    return onnx.load(digits_export.path)


@pytest.fixture
def batch() -> FloatArray:
    return np.random.default_rng(0).standard_normal((5, 3, 32, 32), dtype=np.float32)


def run(model: onnx.ModelProto, batch: FloatArray) -> FloatArray:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    logits: FloatArray = session.run(["logits"], {"images": batch})[0]
    return logits


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    graph = inferred.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    return types


@pytest.mark.parametrize("precision", TYPES)
def test_rules_1_and_4_the_graph_is_valid_and_computes_in_half(model: onnx.ModelProto, precision: str) -> None:
    half = to_half(model, precision)
    onnx.checker.check_model(half, full_check=True)
    types = element_types(half)
    assert types["images"] == types["logits"] == TensorProto.FLOAT
    heavy = [node for node in half.graph.node if node.op_type in ("Conv", "MatMul", "Gelu", "Concat")]
    assert heavy
    assert {types[name] for node in heavy for name in (*node.input, *node.output)} == {TYPES[precision]}


@pytest.mark.parametrize("precision", TYPES)
def test_rules_2_and_3_statistics_and_the_mean_stay_float32(model: onnx.ModelProto, precision: str) -> None:
    half = to_half(model, precision)
    types = element_types(half)
    for node in half.graph.node:
        floats = {types[name] for name in (*node.input, *node.output)} - {TensorProto.INT64}
        if node.op_type in ("ReduceMean", "Sqrt", "Reciprocal", "Sub"):
            assert floats == {TensorProto.FLOAT}, node.name
        if node.op_type == "Gemm":
            assert floats == {TensorProto.FLOAT if precision == "bf16" else TYPES["fp16"]}


def test_fp16_runs_and_agrees(model: onnx.ModelProto, batch: FloatArray) -> None:
    expected = run(model, batch)
    assert np.abs(run(to_half(model, "fp16"), batch) - expected).max() < 5e-3 * expected.std()


def test_rule_5_casts_are_few_and_never_doubled(model: onnx.ModelProto, digits: Checkpoint) -> None:
    half = to_half(model, "fp16")
    casts = [node for node in half.graph.node if node.op_type == "Cast"]
    made_by = {name: node.op_type for node in half.graph.node for name in node.output}
    # Into and out of each LayerNorm and of the mean over tokens, of the input and of the output.
    assert len(casts) == 2 * sum(digits.config.depths) + 4
    assert all(made_by.get(node.input[0]) != "Cast" for node in casts)


def test_the_original_is_left_alone(model: onnx.ModelProto) -> None:
    before = model.SerializeToString(deterministic=True)
    to_half(model, "bf16")
    assert model.SerializeToString(deterministic=True) == before


def test_rule_7_a_weight_beyond_the_range_is_an_error_not_an_infinity(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "blocks.0.mixing.fuse.weight")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[3] = -70000
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    with pytest.raises(
        ArtifactError, match=r"'blocks\.0\.mixing\.fuse\.weight' has a value of 70000, beyond fp16's 65504"
    ):
        to_half(model, "fp16")
    to_half(model, "bf16")


def test_rule_6_a_weight_needed_in_both_types_is_kept_twice() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("images", "logits")]
    weight = numpy_helper.from_array(np.full((3, 3), 0.1, np.float32), "weight")
    nodes = [
        helper.make_node("MatMul", ["images", "weight"], ["hidden"], name="half"),
        helper.make_node("Gemm", ["hidden", "weight"], ["logits"], name="head"),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    half = to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "bf16")
    onnx.checker.check_model(half, full_check=True)
    assert {tensor.name: tensor.data_type for tensor in half.graph.initializer} == {
        "weight_bf16": TensorProto.BFLOAT16,
        "weight": TensorProto.FLOAT,
    }


def test_rule_1_an_output_made_in_half_is_cast_back() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("images", "logits")]
    graph = helper.make_graph([helper.make_node("Gelu", ["images"], ["logits"], name="g")], "g", values[:1], values[1:])
    half = to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "fp16")
    onnx.checker.check_model(half, full_check=True)
    assert [node.op_type for node in half.graph.node] == ["Cast", "Gelu", "Cast"]


def test_rule_5_one_cast_serves_all_readers_and_rule_6_unread_weights_are_dropped() -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("images", "logits")]
    unread = numpy_helper.from_array(np.zeros(3, np.float32), "unread")
    nodes = [
        helper.make_node("Gelu", ["images"], ["first"], name="first"),
        helper.make_node("Gelu", ["images"], ["second"], name="second"),
        helper.make_node("Add", ["first", "second"], ["logits"], name="sum"),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [unread])
    half = to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), "fp16")
    onnx.checker.check_model(half, full_check=True)
    assert [node.op_type for node in half.graph.node] == ["Cast", "Gelu", "Gelu", "Add", "Cast"]
    assert half.graph.node[1].input == half.graph.node[2].input == ["images_fp16"]
    assert not half.graph.initializer
