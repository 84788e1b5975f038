"""An fp32 graph to an int8 graph: Q/DQ pairs on the inputs of the weighted operations, and int8 weights.

Rules:

1. In the form for CPUs the convolutions that are not depthwise are quantized, and in the form for GPUs the products: in
   each the weight, and the value it is multiplied with. Everything else is left as it is: in the form for GPUs its
   convolutions too, because TensorRT fuses GELU into a half convolution but not into one in int8, which then moves more
   bytes (`docs/int8.md` has the figures).
2. A pair is placed on the value that the layer reads, after any transpose or reshape, because ONNX Runtime 1.32
   mishandles pairs that it has to move through a reshape. TensorRT moves them correctly.
3. A value keeps its scale through transposes and reshapes, so that TensorRT quantizes it once and moves int8 values.
4. Every scale is symmetric and exact in fp16 and bf16, so that the half pass changes no quantized value.
5. Activation scales lie on a grid, a quarter octave apart: TensorRT compiles a scale into the kernel, so layers of
   equal scale share kernels. The graph's input keeps its own: no other layer could share the kernel that reads it.
6. A weight has one scale, or one for each output of its layer.
7. Unused floating-point weights are dropped.

ONNX Runtime's `QDQQuantizer` is not used: it leaves the nodes unsorted, and cannot make scales exact in 16 bits or
share them between tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto

from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.exporters.calibration import CalibrationTable, measure_ranges
from smlp_deploy.exporters.half import half_values
from smlp_deploy.graphs.check import read_metadata
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import METADATA_KEY, ModelMetadata

_LARGEST = 127
_MOVES = ("Transpose", "Reshape")
_ZERO_POINT = "int8_zero_point"
# Quarter octaves, in bf16's 8 binary digits.
_GRID = (128 / 256, 152 / 256, 181 / 256, 215 / 256, 1.0)
# TensorRT multiplies by the reciprocal in fp16; below fp16's smallest normal number that overflows.
_SMALLEST_ACTIVATION_SCALE = 2.0**-14
_SMALLEST_FP16 = 2.0**-24


def quantized_layers(model: ModelProto) -> tuple[str, ...]:
    """Names of the nodes that `quantize` quantizes, in the order of the graph."""
    return tuple(layer.name for layer in _layers(ir.from_proto(model)))


class CalibrationResult(NamedTuple):
    """What `calibrate` measured.

    Attributes:
        table: the ranges from which the graph is quantized.
        largest: the value that has the largest activation of those that are 16 bits wide in fp16, and that activation;
            None for methods that ignore outliers.
    """

    table: CalibrationTable
    largest: tuple[str, float] | None


def calibrate(
    model: ModelProto,
    batches: Iterable[FloatArray],
    *,
    method: str = "minmax",
    progress: Callable[[int], None] | None = None,
) -> CalibrationResult:
    """Measure the range of every tensor to quantize, on real images.

    Only the activations of one batch are in memory.

    Args:
        model: the fp32 graph, as `smlp export` writes it.
        batches: preprocessed images N, 3, S, S.
        method: "minmax" takes the largest value; "entropy" and "percentile" (99.999) ignore outliers.
        progress: called with the number of images done, after each batch.

    Raises:
        UsageError: an unknown method, no images, or batches of a size that the graph does not accept.
        ArtifactError: an activation is not finite.
    """
    graph = ir.from_proto(model)
    tensors = {str(_source(layer.reads).name) for layer in _layers(graph)}
    halves = half_values(graph) if method == "minmax" else frozenset()
    ranges, images = measure_ranges(model, tensors | halves, batches, method=method, progress=progress)
    table = CalibrationTable(
        ranges={name: ranges[name] for name in sorted(tensors)},
        method=method,
        images=images,
        checkpoint_sha256=_checkpoint_sha256(model),
    )
    largest = max(halves, key=ranges.__getitem__, default=None)
    return CalibrationResult(table, None if largest is None else (largest, ranges[largest]))


def quantize(
    model: ModelProto, table: CalibrationTable, *, per_channel: bool, exclude: Collection[str] = ()
) -> ModelProto:
    """The graph with int8 layers; `model` itself is unchanged, and the same input gives the same bytes.

    Args:
        model: the fp32 graph that was calibrated.
        table: its ranges.
        per_channel: scale weights by the outputs of their layers, which is finer. With one scale per weight
            TensorRT-RTX has kernels that write fp16 or int8; with finer scales its kernels do not.
        exclude: layers to leave as they are, from `quantized_layers(model)`.

    Raises:
        UsageError: `exclude` names any other layer.
        ArtifactError: the table lacks a tensor, or belongs to another checkpoint.
    """
    graph = ir.from_proto(model)
    unknown = sorted(set(exclude) - {layer.name for layer in _layers(graph)})
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not a quantized layer", fix="use layer names from the report")
    if table.checkpoint_sha256 != _checkpoint_sha256(model):
        raise ArtifactError("the calibration table was made for another checkpoint", fix="calibrate again")
    QuantizePass(table.ranges, per_channel=per_channel, exclude=exclude)(graph)
    return ir.to_proto(graph)


@dataclass(frozen=True)
class _Layer:
    """A node to quantize.

    Attributes:
        node: a convolution or a product.
        weight_at: which of its two factors is the weight, 0 or 1.
        weight: the initializer there.
        reads: the activation that is the other factor.
    """

    node: ir.Node
    weight_at: int
    weight: ir.Value
    reads: ir.Value

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def kept_axis(self) -> int:
        """The axis of the weight that the layer's outputs have: a constant on the right keeps its columns."""
        return 1 if self.node.op_type == "MatMul" and self.weight_at == 1 else 0


class QuantizePass(ir.passes.InPlacePass):
    """Quantizes the layers of an fp32 graph by the rules of this module.

    Args:
        ranges: largest absolute value of each activation, by name.
        per_channel: scale weights by the outputs of their layers.
        exclude: names of layers to leave as they are.

    Raises:
        ArtifactError: an activation has no range.
    """

    def __init__(self, ranges: Mapping[str, float], *, per_channel: bool, exclude: Collection[str] = ()) -> None:
        self.ranges = ranges
        self.per_channel = per_channel
        self.exclude = frozenset(exclude)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        layers = [layer for layer in _layers(model) if layer.name not in self.exclude]
        scales = _activation_scales(graph, layers, self.ranges)
        dequantized: dict[ir.Value, ir.Value] = {}
        for layer in layers:
            if layer.reads not in dequantized:
                dequantized[layer.reads] = _add_pair(graph, layer.reads, scales[_source(layer.reads)])
            if layer.weight not in dequantized:
                axis = layer.kept_axis if self.per_channel else None  # rule 6
                dequantized[layer.weight] = _narrow_weight(graph, layer, axis=axis)
            layer.node.replace_input_with(layer.weight_at, dequantized[layer.weight])
            layer.node.replace_input_with(1 - layer.weight_at, dequantized[layer.reads])
        for weight in tuple(graph.initializers.values()):
            if not weight.uses():  # rule 7
                del graph.initializers[str(weight.name)]
        return ir.passes.PassResult(model, modified=bool(layers))


def _layers(model: ir.Model) -> list[_Layer]:
    """Rule 1: the layers to quantize, in the order of the graph."""
    kind = "MatMul" if _is_for_gpus(model) else "Conv"
    return [layer for node in model.graph if node.op_type == kind and (layer := _weighted(node)) is not None]


def _weighted(node: ir.Node) -> _Layer | None:
    """The layer of a convolution or a product with a weight, unless it is a depthwise convolution."""
    if node.attributes.get_int("group", 1) != 1:
        return None
    for at in (0, 1):
        weight, reads = node.inputs[at], node.inputs[1 - at]
        if weight is not None and reads is not None and weight.is_initializer() and not reads.is_initializer():
            return _Layer(node, at, weight, reads)
    return None


def _is_for_gpus(model: ir.Model) -> bool:
    text = model.metadata_props.get(METADATA_KEY)
    return text is not None and ModelMetadata.from_json(text, where="the fp32 graph").form == "gpu"


def _source(value: ir.Value) -> ir.Value:
    """Rule 3: the value that becomes this one by transposes and reshapes alone."""
    producer = value.producer()
    while producer is not None and producer.op_type in _MOVES and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def _add_pair(graph: ir.Graph, value: ir.Value, scale: float) -> ir.Value:
    """Quantize and dequantize an activation where it is computed; return the result."""
    constants = [
        _constant(graph, f"{value.name}_scale", np.array(scale, np.float32)),
        _constant(graph, _ZERO_POINT, np.array(0, np.int8)),
    ]
    quantize = _node("QuantizeLinear", [value, *constants], f"{value.name}_quantized")
    dequantize = _node("DequantizeLinear", [*quantize.outputs, *constants], f"{value.name}_dequantized")
    producer = value.producer()
    if producer is None:
        graph[0].prepend([quantize, dequantize])
    else:
        producer.append([quantize, dequantize])  # rule 2
    return dequantize.outputs[0]


def _narrow_weight(graph: ir.Graph, layer: _Layer, *, axis: int | None) -> ir.Value:
    """Store a layer's weight in int8, dequantize it before the layer, and return the result.

    It has one scale, or one for each index of an axis.
    """
    name, tensor = layer.weight.name, layer.weight.const_value
    assert tensor is not None
    values = tensor.numpy().astype(np.float64)
    axes = tuple(other for other in range(values.ndim) if other != axis)
    scales = _exact_in_half(np.abs(values).max(axis=axes, keepdims=True) / _LARGEST)  # rule 4
    inputs = [
        _constant(graph, f"{name}_int8", np.rint(values / scales).astype(np.int8)),
        _constant(graph, f"{name}_scale", scales.reshape(() if axis is None else -1).astype(np.float32)),
    ]
    dequantize = _node("DequantizeLinear", inputs, f"{name}_dequantized", {} if axis is None else {"axis": axis})
    layer.node.prepend(dequantize)
    return dequantize.outputs[0]


def _constant(graph: ir.Graph, name: str, value: NDArray[Any]) -> ir.Value:
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(value, name=name)))
    return graph.initializers[name]


def _node(operator: str, inputs: list[ir.Value], output: str, attributes: Mapping[str, int] | None = None) -> ir.Node:
    return ir.node(operator, inputs, attributes, outputs=[ir.val(output)], name=f"{operator}/{inputs[0].name}")


def _activation_scales(graph: ir.Graph, layers: Iterable[_Layer], ranges: Mapping[str, float]) -> dict[ir.Value, float]:
    """The scale of each activation that a layer reads, before any transpose or reshape."""
    scales = {}
    for layer in layers:
        source = _source(layer.reads)
        name = str(source.name)
        if name not in ranges:
            raise ArtifactError(
                f"the calibration table has no range for {name!r}, which {layer.name} reads", fix="calibrate again"
            )
        scales[source] = _scale(ranges[name], on_grid=source.producer() is not None)
    return scales


def _scale(largest: float, *, on_grid: bool) -> float:
    """The scale of an activation, rounded up; the grid's steps cost an eighth of a bit on average."""
    scale = max(largest / _LARGEST, _SMALLEST_ACTIVATION_SCALE)
    if not on_grid:
        return float(_exact_in_half(np.array(scale)))
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(next(step for step in _GRID if mantissa <= step), exponent)


def _exact_in_half(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scales rounded up to what fp16 and bf16 both hold exactly: 8 binary digits, none below 2**-24."""
    _, exponents = np.frexp(scales)
    steps = np.maximum(np.exp2(exponents - 8.0), _SMALLEST_FP16)
    exact: NDArray[np.float64] = np.maximum(np.ceil(scales / steps), 1) * steps
    return exact


def _checkpoint_sha256(model: ModelProto) -> str:
    metadata = read_metadata(model, Path("the fp32 graph"))
    return "" if metadata is None else metadata.checkpoint_sha256
