"""An fp32 graph to an fp16 or bf16 graph, node by node; the graph decides the precision of a TensorRT engine.

Inputs and outputs of the graph stay float32, and so do the operations whose sums overflow or lose digits in 16 bits:
the statistics of each LayerNorm and the mean over tokens. The head's sums are float32 too: in bf16, whose 8 digits
would tie classes, its operands are as well; in fp16 its operands are fp16, which every TensorRT kernel sums in float32,
because sm75 has no product of float32 operands in TensorRT-RTX. Everything else takes and gives 16-bit values; a Cast
stands wherever the two meet.

The pass is the project's own because the one converter of the field that keeps graphs valid
(onnxconverter-common 1.16) knows no bf16, rounds the logits to fp16, and clamps weights without an error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from smlp_deploy.errors import ArtifactError

_STATISTICS = frozenset({"ReduceMean", "Sqrt", "Reciprocal"})


@dataclass(frozen=True)
class _Half:
    name: str
    onnx_type: int
    dtype: np.dtype[np.generic]
    largest: float
    min_opset: int
    float32_operators: frozenset[str]


_HALVES = {
    "fp16": _Half("fp16", TensorProto.FLOAT16, np.dtype(np.float16), 65504.0, 19, _STATISTICS),
    "bf16": _Half("bf16", TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16), 3.3895314e38, 22, _STATISTICS | {"Gemm"}),
}


def to_half(model: ModelProto, precision: str) -> ModelProto:
    """The graph in `precision`, "fp16" or "bf16"; `model` itself is left alone.

    Raises:
        ArtifactError: a weight is beyond the type's range.
    """
    half = _HALVES[precision]
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset < half.min_opset:
        model = version_converter.convert_version(model, half.min_opset)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    converted = _Conversion(inferred, half).run()
    return onnx.shape_inference.infer_shapes(converted, strict_mode=True, data_prop=True)


class _Conversion:
    """One pass over the nodes of one graph, in their order."""

    def __init__(self, model: ModelProto, half: _Half) -> None:
        self.model = model
        self.half = half
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.float_values = _float_values(model)
        self.half_values: set[str] = set()
        self.casts: dict[tuple[str, int], str] = {}
        self.kept: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []

    def run(self) -> ModelProto:
        graph = self.model.graph
        wide = _float32_nodes(graph.node, self.half.float32_operators)
        outputs = {value.name for value in graph.output}
        for node in graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            self._convert(copy, TensorProto.FLOAT if node.name in wide else self.half.onnx_type, outputs)
        result = ModelProto()
        result.CopyFrom(self.model)
        result.graph.ClearField("node")
        result.graph.ClearField("initializer")
        result.graph.ClearField("value_info")
        result.graph.node.extend(self.nodes)
        result.graph.initializer.extend(self.kept.values())
        return result

    def _convert(self, node: NodeProto, element: int, outputs: set[str]) -> None:
        for i, name in enumerate(node.input):
            if name in self.weights:
                node.input[i] = self._weight(name, element)
            elif name in self.float_values:
                node.input[i] = self._value(name, element)
        casts = []
        for i, name in enumerate(node.output):
            if name not in self.float_values or element == TensorProto.FLOAT:
                continue
            if name in outputs:
                node.output[i] = f"{name}_{self.half.name}"
                casts.append(_cast(node.output[i], name, TensorProto.FLOAT))
            else:
                self.half_values.add(name)
        self.nodes += [node, *casts]

    def _value(self, name: str, element: int) -> str:
        """`name` in the element type, cast if need be, once for all its readers."""
        have = self.half.onnx_type if name in self.half_values else TensorProto.FLOAT
        if have == element:
            return name
        if (name, element) not in self.casts:
            cast = f"{name}_{'fp32' if element == TensorProto.FLOAT else self.half.name}"
            self.nodes.append(_cast(name, cast, element))
            self.casts[name, element] = cast
        return self.casts[name, element]

    def _weight(self, name: str, element: int) -> str:
        """An initializer in the element type; one that is needed in both types is kept twice."""
        tensor = self.weights[name]
        if tensor.data_type != TensorProto.FLOAT or element == TensorProto.FLOAT:
            self.kept[name] = tensor
            return name
        narrow = f"{name}_{self.half.name}"
        if narrow not in self.kept:
            self.kept[narrow] = self._narrowed(tensor, narrow)
        return narrow

    def _narrowed(self, tensor: TensorProto, name: str) -> TensorProto:
        values = numpy_helper.to_array(tensor)
        largest = float(np.abs(values).max(initial=0))
        if not largest <= self.half.largest:
            raise ArtifactError(
                f"weight {tensor.name!r} has a value of {largest:g}, beyond {self.half.name}'s {self.half.largest:g}",
                fix="export in fp32" if self.half.name == "bf16" else "export in bf16 or fp32",
            )
        return numpy_helper.from_array(values.astype(self.half.dtype), name)


def _cast(source: str, target: str, element: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast/{target}", to=element)


def _float_values(model: ModelProto) -> set[str]:
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}


def _float32_nodes(nodes: Iterable[NodeProto], operators: frozenset[str]) -> set[str]:
    """Names of the nodes that stay float32: those of the operators, and the rest of each decomposed LayerNorm."""
    producer: dict[str, NodeProto] = {}
    wide: set[str] = set()
    for node in nodes:
        made_by = [producer[name].op_type for name in node.input if name in producer]
        square = node.op_type == "Mul" and node.input[0] == node.input[1]
        centred = node.op_type in ("Sub", "Add") and "ReduceMean" in made_by
        scaled = node.op_type == "Mul" and "Reciprocal" in made_by
        if node.op_type in operators or square or centred or scaled:
            wide.add(node.name)
        producer.update(dict.fromkeys(node.output, node))
    return wide
