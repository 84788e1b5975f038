"""What is inside an ONNX file: the values between its parts, and what int8 does to each layer, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from smlp_deploy.errors import ArtifactError
from smlp_deploy.graphs.check import OnnxFile
from smlp_deploy.metadata import SMLPNetConfig
from smlp_deploy.runners.base import Closing, FloatArray, LayerOutput, TracePoint, trace_points
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner


class _OpenedRunner(OnnxRuntimeRunner):
    """Runs an ONNX file in a graph of which more comes out than the logits.

    Args:
        path: the file.
        extend: adds the outputs to its graph; it is given the path too.
    """

    def __init__(self, path: Path, extend: Callable[[GraphProto, Path], None]) -> None:
        self._extend = extend
        super().__init__(path)

    def added(self, batch: FloatArray) -> list[FloatArray]:
        """What comes out of the added outputs; a fixed batch size is filled up with zeros."""
        size = self.metadata.batch or len(batch)
        parts = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            missing = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            outputs = self._outputs(np.concatenate([part, missing]))[1:]
            parts.append([values[: len(part)] for values in outputs])
        return [np.concatenate(values) for values in zip(*parts, strict=True)]

    def _content(self, file: OnnxFile) -> bytes:
        model = file.model()
        self._extend(model.graph, file.path)
        return bytes(model.SerializeToString())


class TracingOnnxRunner(_OpenedRunner):
    """Runs an ONNX file that `smlp export` wrote, in any precision, and shows what is inside.

    Raises:
        ArtifactError: like `OnnxRuntimeRunner`, or its nodes do not have the names that `smlp export` gives.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, self._watch)

    def trace(self, batch: FloatArray) -> dict[str, FloatArray]:
        names = [point.name for point in trace_points(self.metadata.config)]
        return dict(zip(names, self.added(batch), strict=True))

    def _watch(self, graph: GraphProto, path: Path) -> None:
        add_trace_outputs(graph, self.metadata.config, path)


def add_trace_outputs(graph: GraphProto, config: SMLPNetConfig, path: Path) -> None:
    """Let the values at the points of `trace_points` come out of a graph too, in float32, by the points' names.

    Args:
        graph: of a file that `smlp export` wrote, in any precision, or made from it; changed in place.
        config: the network's shape.
        path: the file.

    Raises:
        ArtifactError: its nodes do not have the names that `smlp export` gives.
    """
    for point in trace_points(config):
        _add_output(graph, _traced_value(graph, point, path), point.name)


class QuantizedLayers(Closing):
    """The int8 layers of one ONNX file beside the same layers of the fp32 file it was made from, or could have been.

    A layer is found by its weight's name, because the number in a node's name depends on how the file was exported.

    Args:
        candidate: an int8 file that `smlp export` wrote.
        reference: an fp32 file of a network of the same shape.

    Raises:
        ArtifactError: like `OnnxRuntimeRunner`, or the fp32 file lacks a layer.
    """

    def __init__(self, candidate: Path, reference: Path) -> None:
        self._layers: list[_Int8Layer] = []
        self._deployed = _OpenedRunner(candidate, self._watch_deployed)
        self._reference = _OpenedRunner(reference, self._watch_reference)

    def trace_layers(self, batch: FloatArray) -> Iterator[LayerOutput]:
        """See `LayerTracer`; image by image where the graph allows it, because all layers are in memory at once."""
        size = self._deployed.metadata.batch or self._reference.metadata.batch or 1
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            deployed, both = self._deployed.added(part), self._reference.added(part)
            for i, layer in enumerate(self._layers):
                yield LayerOutput(layer.name, both[2 * i], both[2 * i + 1], deployed[i])

    def close(self) -> None:
        self._deployed.close()
        self._reference.close()

    def _watch_deployed(self, graph: GraphProto, path: Path) -> None:
        self._layers = _int8_layers(graph)
        for layer in self._layers:
            _add_output(graph, layer.output, f"{layer.weight}_out")

    def _watch_reference(self, graph: GraphProto, path: Path) -> None:
        """Two outputs more for each layer: its own, and that of a copy in int8 which reads the same value."""
        nodes = {name: node for node in graph.node for name in node.input}
        for layer in self._layers:
            if layer.weight not in nodes:
                raise ArtifactError(
                    f"has no layer with the weight {layer.weight}",
                    where=path,
                    fix="give the checkpoint as the reference",
                )
            node = nodes[layer.weight]
            _add_output(graph, node.output[0], f"{layer.weight}_out")
            _add_output(graph, _add_int8_copy(graph, node, layer), f"{layer.weight}_alone")


@dataclass(frozen=True)
class _Int8Layer:
    """A layer of an int8 graph.

    Attributes:
        name: of its node.
        output: the value that it computes.
        weight: name of its weight in the fp32 graph.
        values: that weight as int8 has it, in float32.
        scale: of the activation that it reads.
    """

    name: str
    output: str
    weight: str
    values: FloatArray
    scale: float


def _int8_layers(graph: GraphProto) -> list[_Int8Layer]:
    """The nodes that read a quantized weight and a quantized activation, in the order of the graph."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    pairs = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    layers = []
    for node in graph.node:
        read = [pairs[name] for name in node.input if name in pairs]
        constant = [pair for pair in read if pair.input[0] in weights]
        if len(read) != 2 or len(constant) != 1 or not all(pair.input[1] in weights for pair in read):
            continue
        (weight,), (activation,) = constant, [pair for pair in read if pair is not constant[0]]
        narrow, scale = (numpy_helper.to_array(weights[name]).astype(np.float32) for name in weight.input[:2])
        by_row = scale.reshape(-1, *[1] * (narrow.ndim - 1))  # one scale, or one for each row
        layers.append(
            _Int8Layer(
                name=node.name,
                output=node.output[0],
                weight=weight.input[0].removesuffix("_int8"),
                values=narrow * by_row,
                scale=float(numpy_helper.to_array(weights[activation.input[1]])),
            )
        )
    return layers


def _add_int8_copy(graph: GraphProto, node: NodeProto, layer: _Int8Layer) -> str:
    """Put a copy of a layer's fp32 node beside it that computes with int8 values; the value that it computes."""
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


def _add_output(graph: GraphProto, value: str, name: str) -> None:
    """Let `value`, of any precision, come out of the graph in float32."""
    graph.node.append(helper.make_node("Cast", [value], [name], to=TensorProto.FLOAT))
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))


def _traced_value(graph: GraphProto, point: TracePoint, path: Path) -> str:
    """The value of a graph at a point: an embedding's convolution, or one of a block's two residual sums."""
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
            f"cannot be looked into: no {point.name} in it", where=path, fix="use a file that smlp export wrote"
        )
    return str(found[position].output[0])
