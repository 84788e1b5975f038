"""Edits for ONNX graphs that are run but never shipped: bf16 emulated in fp32, and extra outputs for inspection.

Rules of the emulation:

1. A bf16 weight becomes an fp32 weight of the same values.
2. A bf16 value is rounded where it is computed, and keeps its name, so that its readers stay as they are. A Cast to
   bf16 rounds by itself; what any other node computes in fp32 is cast to bf16 and back.
3. Recorded types are dropped, because ONNX Runtime infers them.

Rules of the outputs:

4. Every value comes out in float32, whatever its precision.
5. An embedding's value is that of its only convolution. A block's two residual sums are the additions of its own,
   outside the modules in it, whose operands are both computed; a bias addition has a weight among its operands.
6. An int8 layer is a node that reads two dequantized values, exactly one of them a constant.
7. A copy of such a layer computes in fp32 with the int8 weight, and quantizes what it reads by the layer's own scale.

Rule for OpenVINO:

8. The weight of a convolution that has more than one position, as in a patch embedding, is stored as the values that
   its DequantizeLinear gives, so that OpenVINO computes what the graph says, but not in int8: its int8 form of these
   convolutions is wrong (2026.4.1 on a CPU with AVX2: cosines of the bundled model's logits down to -0.12).

Unlike the passes of `exporters`, these work on protobuf, not onnx_ir: this module is imported to run any ONNX file, and
importing onnx_ir loads sympy, which takes longer than importing ONNX Runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from smlp_deploy.errors import ArtifactError
from smlp_deploy.metadata import SMLPNetConfig, TracePoint, trace_points


def emulate_bf16(model: ModelProto) -> ModelProto:
    """A bf16 graph as an fp32 graph in which every bf16 value is rounded to bf16; `model` is changed in place."""
    graph = model.graph
    bf16 = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:  # rule 1
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in bf16:
                nodes += _rounding(node, i, name)
    graph.ClearField("node")
    graph.ClearField("value_info")  # rule 3
    graph.node.extend(nodes)
    return model


def _rounding(node: NodeProto, output: int, name: str) -> list[NodeProto]:
    """Rule 2: nodes that round one output of `node` and take over its name."""
    if node.op_type == "Cast":
        node.output[output] = f"{name}_rounded"
        return [helper.make_node("Cast", [f"{name}_rounded"], [name], to=TensorProto.FLOAT)]
    node.output[output] = f"{name}_unrounded"
    return [
        helper.make_node("Cast", [f"{name}_unrounded"], [f"{name}_rounded"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [f"{name}_rounded"], [name], to=TensorProto.FLOAT),
    ]


def add_trace_outputs(graph: GraphProto, config: SMLPNetConfig, path: Path) -> None:
    """Add the values at the points of `trace_points` to a graph's outputs, in float32 and under the points' names.

    Args:
        graph: of a file that `smlp export` wrote, in any precision, or derived from one; changed in place.
        config: the network's shape.
        path: the file.

    Raises:
        ArtifactError: its nodes do not have the names that `smlp export` gives.
    """
    for point in trace_points(config):
        add_output(graph, _traced_value(graph, point, path), point.name)


@dataclass(frozen=True)
class Int8Layer:
    """A layer of an int8 graph.

    Attributes:
        name: of its node.
        output: the value that it computes.
        weight: name of its weight in the fp32 graph.
        values: that weight as int8 represents it, in float32.
        scale: of the activation that it reads.
    """

    name: str
    output: str
    weight: str
    values: NDArray[np.float32]
    scale: float


def int8_layers(graph: GraphProto) -> list[Int8Layer]:
    """The layers of a graph that read a quantized weight and a quantized activation, in the order of the graph."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    pairs = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = []
    for node in graph.node:
        read = [pairs[name] for name in node.input if name in pairs]
        constant = [pair for pair in read if pair.input[0] in weights]
        if len(read) != 2 or len(constant) != 1 or not all(pair.input[1] in weights for pair in read):
            continue  # rule 6
        (weight,), (activation,) = constant, [pair for pair in read if pair is not constant[0]]
        narrow, scale = (numpy_helper.to_array(weights[name]).astype(np.float32) for name in weight.input[:2])
        axis = next((attribute.i for attribute in weight.attribute if attribute.name == "axis"), 0)
        shape = [-1 if at == axis else 1 for at in range(narrow.ndim)]  # one scale, or one for each index of an axis
        layers.append(
            Int8Layer(
                name=node.name,
                output=node.output[0],
                weight=weight.input[0].removesuffix("_int8"),
                values=narrow * scale.reshape(shape),
                scale=float(numpy_helper.to_array(weights[activation.input[1]])),
            )
        )
    return layers


def add_int8_copy(graph: GraphProto, node: NodeProto, layer: Int8Layer) -> str:
    """Add a copy of a layer's fp32 node that computes with int8 values (rule 7), and return its output."""
    name = f"{layer.weight}_copy"
    scale, zero_point, weight = (f"{name}_{part}" for part in ("scale", "zero_point", "weight"))
    for constant, value in (
        (scale, np.float32(layer.scale)),
        (zero_point, np.int8(0)),
        (weight, layer.values),
    ):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), constant))
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.name, copy.output[0] = name, name
    for i, read in enumerate(node.input[:2]):
        if read == layer.weight:
            copy.input[i] = weight
        else:
            quantized, copy.input[i] = f"{name}_quantized", f"{name}_dequantized"
            graph.node.append(helper.make_node("QuantizeLinear", [read, scale, zero_point], [quantized]))
            graph.node.append(helper.make_node("DequantizeLinear", [quantized, scale, zero_point], [copy.input[i]]))
    graph.node.append(copy)
    return name


def dequantize_embeddings(graph: GraphProto) -> None:
    """Rule 8; `graph` is changed in place."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    pairs = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    wide = {node.input[1] for node in graph.node if node.op_type == "Conv" and node.input[1] in pairs}
    for name in wide:
        narrow, scale = (weights.get(read) for read in pairs[name].input[:2])
        if narrow is None or scale is None or np.prod(narrow.dims[2:]) == 1:
            continue
        values, by_row = numpy_helper.to_array(narrow), numpy_helper.to_array(scale)
        by_row = by_row.reshape(-1, *[1] * (values.ndim - 1))  # one scale, or one for each row
        graph.initializer.append(numpy_helper.from_array(values.astype(by_row.dtype) * by_row, name))
        graph.initializer.remove(narrow)
        graph.node.remove(pairs[name])


def add_output(graph: GraphProto, value: str, name: str) -> None:
    """Add `value` to the graph's outputs under another name, in float32 (rule 4)."""
    graph.node.append(helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT))
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _traced_value(graph: GraphProto, point: TracePoint, path: Path) -> str:
    """Rule 5: the value of a graph at a point."""
    if point.kind == "embedding":
        found = [n for n in graph.node if n.op_type == "Conv" and n.name.startswith(f"embeddings.{point.index}/")]
        position, count = 0, 1
    else:
        weights = {tensor.name for tensor in graph.initializer}
        adds = (n for n in graph.node if n.op_type == "Add" and n.name.startswith(f"blocks.{point.index}/"))
        found = [node for node in adds if weights.isdisjoint(node.input)]
        position, count = (0 if point.kind == "tokens" else 1), 2
    if len(found) != count:
        raise ArtifactError(
            f"cannot be traced: it has no {point.name}", where=path, fix="use a file that smlp export wrote"
        )
    return str(found[position].output[0])
