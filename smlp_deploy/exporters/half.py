"""An fp32 graph to an fp16 or bf16 graph; the graph decides the precision of a TensorRT engine.

Rules:

1. The inputs and outputs of the graph stay float32.
2. Operations whose sums overflow or lose digits in 16 bits stay float32: each decomposed LayerNorm from its mean to its
   last product, and the mean over tokens.
3. In bf16, whose 8 binary digits would tie classes, the head stays float32 too. In fp16 it does not: every TensorRT
   kernel sums fp16 operands in float32, and TensorRT-RTX has no float32 matrix product for sm75.
4. Every other operation reads and writes the 16-bit type wherever it had float32.
5. Where the two types meet, a Cast is inserted before the first reader and serves all later ones.
6. A weight is stored in the type that its readers use, twice if they use both; an unused weight is dropped.
7. A weight beyond the range of the 16-bit type is an error.

The project has its own pass because the one available converter that keeps graphs valid (onnxconverter-common 1.16)
does not support bf16, rounds the logits to fp16, and clamps weights without an error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx import ModelProto, version_converter

from smlp_deploy.errors import ArtifactError

_STATISTICS = frozenset({"ReduceMean", "Sqrt", "Reciprocal"})
_WEIGHTED = frozenset({"Conv", "MatMul", "Gemm"})


@dataclass(frozen=True)
class _Half:
    name: str
    element: ir.DataType
    largest: float
    min_opset: int
    float32_operators: frozenset[str]


_HALVES = {
    "fp16": _Half("fp16", ir.DataType.FLOAT16, 65504.0, 19, _STATISTICS),
    "bf16": _Half("bf16", ir.DataType.BFLOAT16, 3.3895314e38, 22, _STATISTICS | {"Gemm"}),
}


def to_half(model: ModelProto, precision: str) -> ModelProto:
    """The graph in `precision`, "fp16" or "bf16"; `model` itself is unchanged.

    Raises:
        ArtifactError: a weight is beyond the type's range.
    """
    half = _HALVES[precision]
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset < half.min_opset:
        model = version_converter.convert_version(model, half.min_opset)
    return _inferred(_converted(_inferred(model), half))


def half_values(model: ir.Model) -> frozenset[str]:
    """Names of values of an fp32 graph that are 16 bits wide in fp16: those that may be the largest of them.

    These are what convolutions and products read and compute, and sums. A GELU computes nothing larger than it reads.
    """
    names: set[str] = set()
    for node in model.graph:
        if node.op_type in _WEIGHTED:
            read = (value for value in node.inputs if value is not None and value.const_value is None)
            names.update(str(value.name) for value in (*read, *node.outputs))
        elif node.op_type == "Add" and not _stays_float32(node, _STATISTICS):
            names.update(str(value.name) for value in node.outputs)
    return frozenset(names)


class HalfPass(ir.passes.InPlacePass):
    """Narrows a graph by the rules of this module; its values must have types, as shape inference sets them."""

    def __init__(self, half: _Half) -> None:
        self.half = half
        self.other_forms: dict[ir.Value, ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        self.other_forms = {}
        wide = {node for node in model.graph if _stays_float32(node, self.half.float32_operators)}
        for node in tuple(model.graph):
            element = ir.DataType.FLOAT if node in wide else self.half.element
            for i, value in enumerate(node.inputs):
                if value is not None and value.dtype in (ir.DataType.FLOAT, self.half.element):
                    node.replace_input_with(i, self._form(value, element, node))
            for value in node.outputs:
                if value.dtype == ir.DataType.FLOAT and node not in wide:
                    self._narrow(value, node)
        _store_what_is_read(model.graph)
        return ir.passes.PassResult(model, modified=True)

    def _form(self, value: ir.Value, element: ir.DataType, reader: ir.Node) -> ir.Value:
        """`value` in the element type, for `reader` and the nodes after it."""
        if value.dtype == element:
            return value
        if value not in self.other_forms:
            name = f"{value.name}_{'fp32' if element == ir.DataType.FLOAT else self.half.name}"
            if value.const_value is not None:  # rule 6
                self.other_forms[value] = self._stored(value.const_value, element, name)
            else:  # rule 5
                self.other_forms[value] = ir.val(name, element, value.shape)
                reader.prepend(_cast(value, self.other_forms[value]))
        return self.other_forms[value]

    def _narrow(self, value: ir.Value, producer: ir.Node) -> None:
        if value.is_graph_output():  # rule 1
            output = ir.val(value.name, value.dtype, value.shape)
            value.replace_all_uses_with(output, replace_graph_outputs=True)
            value.name = f"{value.name}_{self.half.name}"
            producer.append(_cast(value, output))
        value.type = ir.TensorType(self.half.element)  # rule 4

    def _stored(self, weight: ir.TensorProtocol, element: ir.DataType, name: str) -> ir.Value:
        values = weight.numpy()
        largest = float(np.abs(values).max(initial=0))
        if not largest <= self.half.largest:  # rule 7
            raise ArtifactError(
                f"weight {weight.name!r} has a value of {largest:g}, beyond {self.half.name}'s {self.half.largest:g}",
                fix="export in fp32" if self.half.name == "bf16" else "export in bf16 or fp32",
            )
        return ir.val(name, const_value=ir.tensor(values.astype(element.numpy()), name=name))


def _converted(model: ModelProto, half: _Half) -> ModelProto:
    graph = ir.from_proto(model)
    HalfPass(half)(graph)
    converted = ir.to_proto(graph)
    converted.graph.ClearField("value_info")  # shape inference rewrites it, in its own order
    return converted


def _stays_float32(node: ir.Node, operators: frozenset[str]) -> bool:
    """Rules 2 and 3, including the operations between the statistics of a decomposed LayerNorm."""
    sources = [producer.op_type for producer in node.predecessors()]
    square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    centred = node.op_type in ("Sub", "Add") and "ReduceMean" in sources
    scaled = node.op_type == "Mul" and "Reciprocal" in sources
    return node.op_type in operators or square or centred or scaled


def _store_what_is_read(graph: ir.Graph) -> None:
    """Rule 6: keep exactly the initializers that nodes read, in the order of their first readers."""
    read = dict.fromkeys(
        value for node in graph for value in node.inputs if value is not None and value.const_value is not None
    )
    graph.initializers.clear()
    for value in read:
        graph.register_initializer(value)


def _cast(source: ir.Value, target: ir.Value) -> ir.Node:
    assert target.dtype is not None
    to = {"to": int(target.dtype)}
    return ir.node("Cast", [source], to, outputs=[target], name=f"cast/{target.name}")


def _inferred(model: ModelProto) -> ModelProto:
    return onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
