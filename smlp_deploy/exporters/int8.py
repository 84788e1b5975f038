"""An fp32 graph to an int8 graph: Q/DQ pairs on what enters the weighted operations, and int8 weights.

Quantized are the inputs of every convolution that is not depthwise and of every axial product. Depthwise convolutions,
LayerNorm, GELU, the residual stream and the head stay in floating point, and so do all biases. A pair stands directly
at the layer: ONNX Runtime 1.32 gets pairs wrong that it has to move through a reshape. TensorRT moves them well, and
what is transposed, reshaped or concatenated has one scale throughout, so that it is quantized once and moved in int8.

Ranges come from ONNX Runtime's calibrators. Its `QDQQuantizer` is not used: it leaves the nodes unsorted,
and knows no scales that are exact in 16 bits or shared between tensors.
"""

from __future__ import annotations

import io
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import calibrate as calibrators

from smlp_deploy import strictjson
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.files import read_text
from smlp_deploy.graphs.file import INPUT_NAME, read_metadata
from smlp_deploy.images.batches import FloatArray

METHODS = ("minmax", "entropy", "percentile")
TABLE_SCHEMA = 1

_LARGEST = 127
_ENTROPY_BINS = 512
_MOVES = ("Transpose", "Reshape")
_ZERO_POINT = "int8_zero_point"
# Quarter octaves, in the 8 binary digits that bf16 has.
_GRID = (128 / 256, 152 / 256, 181 / 256, 215 / 256, 1.0)
# TensorRT multiplies by the reciprocal in fp16; below fp16's smallest normal number that overflows.
_SMALLEST_ACTIVATION_SCALE = 2.0**-14
_SMALLEST_FP16 = 2.0**-24


@dataclass(frozen=True, kw_only=True)
class CalibrationTable:
    """The result of a calibration, with which a graph is quantized without images.

    Attributes:
        ranges: the largest absolute value to represent, of each tensor.
        method: how it was chosen, one of `METHODS`.
        images: number of images used.
        checkpoint_sha256: of the weights in the calibrated graph.

    Raises:
        ValueError: a value is out of range.
    """

    ranges: Mapping[str, float]
    method: str
    images: int
    checkpoint_sha256: str

    def __post_init__(self) -> None:
        for name, value in self.ranges.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"the range of {name!r} is {value!r}")
        if self.method not in METHODS:
            raise ValueError(f"the method is {self.method!r}")
        if self.images < 1:
            raise ValueError(f"the number of images is {self.images!r}")

    def to_json(self) -> str:
        return json.dumps({"schema": TABLE_SCHEMA, **asdict(self)}, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: object) -> CalibrationTable:
        """Read the JSON form, which came from the file `where`.

        Raises:
            ArtifactError: not that form, or of another schema.
        """
        try:
            return strictjson.read(text, cls, schema=TABLE_SCHEMA)
        except strictjson.SchemaError as error:
            fix = "upgrade smlp-deploy, or calibrate again"
            raise ArtifactError(f"calibration table {error}", where=where, fix=fix) from None
        except ValueError as error:
            raise ArtifactError(
                f"the calibration table is damaged: {error}", where=where, fix="calibrate again"
            ) from None


def read_table(path: Path) -> CalibrationTable:
    """The calibration table in a file.

    Raises:
        ArtifactError: it cannot be read, or is damaged.
    """
    text = read_text(path, error=ArtifactError, fix="an int8 export writes one beside its file: x.calibration.json")
    return CalibrationTable.from_json(text, where=path)


def quantized_layers(model: ModelProto) -> tuple[str, ...]:
    """Names of the nodes that `quantize` quantizes, in the order of the graph."""
    return tuple(layer.name for layer in _layers(model))


def calibrate(
    model: ModelProto,
    batches: Iterable[FloatArray],
    *,
    method: str = "minmax",
    progress: Callable[[int], None] | None = None,
) -> CalibrationTable:
    """Measure the range of every tensor that is to be quantized, on real images.

    Memory holds the activations of one batch.

    Args:
        model: the fp32 graph, as `smlp export` writes it.
        batches: preprocessed images N, 3, S, S.
        method: "minmax" takes the largest value; "entropy" and "percentile" (99.999) leave outliers out.
        progress: called with the number of images done, after each batch.

    Raises:
        UsageError: an unknown method, no images, or batches of a size that the graph does not take.
        ArtifactError: an activation is not finite.
    """
    if method not in METHODS:
        raise UsageError(f"calibration method {method!r} is unknown", fix=f"use one of {', '.join(METHODS)}")
    tensors = sorted({layer.tensor for layer in _layers(model)})
    size = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    images = 0
    # ONNX Runtime's calibrators work on files, and print.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of NaN, which `_range` refuses
        calibrator = _calibrator(model, tensors, method=method, folder=Path(folder))
        for batch in batches:
            if size and len(batch) != size:
                raise UsageError(f"a calibration batch of {len(batch)} images; the graph takes exactly {size}")
            calibrator.collect_data(_OneBatch(batch))
            images += len(batch)
            if progress is not None:
                progress(images)
        if not images:
            raise UsageError("there are no calibration images", fix="give at least one, better 128 or more")
        found = calibrator.compute_data()
    return CalibrationTable(
        ranges={name: _range(name, found[name].range_value) for name in tensors},
        method=method,
        images=images,
        checkpoint_sha256=_checkpoint_sha256(model),
    )


def quantize(
    model: ModelProto, table: CalibrationTable, *, per_channel: bool, exclude: Collection[str] = ()
) -> ModelProto:
    """The graph with int8 layers; `model` itself is left alone, and the same input gives the same bytes.

    All scales are symmetric and exact in fp16 and bf16, so that the half pass changes no
    quantized value. Axial matrices are scaled by row, the axis that the product keeps.

    Args:
        model: the fp32 graph that was calibrated.
        table: its ranges.
        per_channel: scale convolution weights by output channel, which is finer; for one scale per weight
            TensorRT-RTX has kernels that write fp16, for the finer ones only such that write fp32.
        exclude: layers to leave as they are, of `quantized_layers(model)`.

    Raises:
        UsageError: `exclude` names something else.
        ArtifactError: the table lacks a tensor, or belongs to another checkpoint.
    """
    layers = _layers(model)
    unknown = sorted(set(exclude) - {layer.name for layer in layers})
    if unknown:
        raise UsageError(f"{unknown[0]!r} is not a layer that is quantized", fix="name layers as the report does")
    if table.checkpoint_sha256 != _checkpoint_sha256(model):
        raise ArtifactError("the calibration table was made for another checkpoint", fix="calibrate again")
    chosen = [layer for layer in layers if layer.name not in set(exclude)]
    return _Quantization(model, _activation_scales(model, chosen, table), chosen, per_channel=per_channel).run()


@dataclass(frozen=True)
class _Layer:
    """A node to quantize: its weight, the tensor it reads, and the same before any transpose or reshape."""

    name: str
    weight: str
    reads: str
    tensor: str
    is_product: bool


class _OneBatch:
    """The data reader that ONNX Runtime's calibrators want."""

    def __init__(self, batch: FloatArray) -> None:
        self._inputs: list[dict[str, FloatArray]] = [{INPUT_NAME: batch}]

    def get_next(self) -> dict[str, FloatArray] | None:
        return self._inputs.pop() if self._inputs else None


class _Quantization:
    """One pass over the nodes of one graph, in their order."""

    def __init__(
        self, model: ModelProto, scales: Mapping[str, float], layers: Iterable[_Layer], *, per_channel: bool
    ) -> None:
        self.model = model
        self.layers = {layer.name: layer for layer in layers}
        self.scales = {layer.reads: scales[layer.tensor] for layer in self.layers.values()}
        self.per_channel = per_channel
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.added: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []

    def run(self) -> ModelProto:
        graph = self.model.graph
        self._pairs(value.name for value in graph.input)
        for node in graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            layer = self.layers.get(node.name)
            for i, name in enumerate(node.input):
                if layer is not None and name == layer.reads:
                    copy.input[i] = f"{name}_dequantized"
                elif layer is not None and name == layer.weight:
                    copy.input[i] = self._weight(layer)
            self.nodes.append(copy)
            self._pairs(node.output)
        used = {name for node in self.nodes for name in node.input}
        result = ModelProto()
        result.CopyFrom(self.model)
        result.graph.ClearField("node")
        result.graph.ClearField("initializer")
        result.graph.node.extend(self.nodes)
        result.graph.initializer.extend(tensor for name, tensor in self.weights.items() if name in used)
        result.graph.initializer.extend(self.added.values())
        return result

    def _pairs(self, names: Iterable[str]) -> None:
        """Quantize and dequantize those of the tensors that a layer reads."""
        for name in names:
            if name in self.scales:
                scale = self._constant(f"{name}_scale", np.array(self.scales[name], np.float32))
                zero_point = self._constant(_ZERO_POINT, np.array(0, np.int8))
                self._node("QuantizeLinear", [name, scale, zero_point], f"{name}_quantized")
                self._node("DequantizeLinear", [f"{name}_quantized", scale, zero_point], f"{name}_dequantized")

    def _weight(self, layer: _Layer) -> str:
        """The layer's weight in int8, dequantized."""
        name = layer.weight
        if f"{name}_int8" not in self.added:
            values = numpy_helper.to_array(self.weights[name]).astype(np.float64)
            by_row = layer.is_product or self.per_channel
            axes = tuple(range(1 if by_row else 0, values.ndim))
            scales = _exact_in_half(np.abs(values).max(axis=axes, keepdims=True) / _LARGEST)
            narrow = np.rint(values / scales).astype(np.int8)
            inputs = [
                self._constant(f"{name}_int8", narrow),
                self._constant(f"{name}_scale", scales.reshape(-1 if by_row else ()).astype(np.float32)),
            ]
            self._node("DequantizeLinear", inputs, f"{name}_dequantized", axis=0 if by_row else None)
        return f"{name}_dequantized"

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self.added.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, *, axis: int | None = None) -> None:
        node = helper.make_node(operator, inputs, [output], name=f"{operator}/{inputs[0]}")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)


def _layers(model: ModelProto) -> list[_Layer]:
    weights = {tensor.name for tensor in model.graph.initializer}
    producer = _producer(model)
    layers = []
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in weights and _groups(node) == 1:
            layers.append(_layer(node, node.input[1], node.input[0], producer))
        elif node.op_type == "MatMul" and node.input[0] in weights:
            layers.append(_layer(node, node.input[0], node.input[1], producer))
    return layers


def _layer(node: NodeProto, weight: str, reads: str, producer: Mapping[str, NodeProto]) -> _Layer:
    return _Layer(node.name, weight, reads, _source(reads, producer), is_product=node.op_type == "MatMul")


def _producer(model: ModelProto) -> dict[str, NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def _groups(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def _source(name: str, producer: Mapping[str, NodeProto]) -> str:
    """The tensor that becomes `name` by transposes and reshapes alone."""
    while name in producer and producer[name].op_type in _MOVES:
        name = producer[name].input[0]
    return name


def _activation_scales(model: ModelProto, layers: Iterable[_Layer], table: CalibrationTable) -> dict[str, float]:
    """The scale of each quantized tensor: the input's own, one for all that are concatenated, the others on a grid.

    TensorRT writes a scale into the code of its kernel: layers of equal scale share kernels, and a concatenation of
    equal scales moves int8 values instead of converting them. No other layer could share the first one's kernel.
    """
    ranges: dict[str, float] = {}
    for layer in layers:
        if layer.tensor not in table.ranges:
            raise ArtifactError(
                f"the calibration table has no range of {layer.tensor!r}, which {layer.name} reads",
                fix="calibrate again",
            )
        ranges[layer.tensor] = table.ranges[layer.tensor]
    producer = _producer(model)
    for node in model.graph.node:
        if node.op_type == "Concat":
            sources = {_source(name, producer) for name in (*node.input, *node.output)} & ranges.keys()
            ranges.update(dict.fromkeys(sources, max((ranges[name] for name in sources), default=0.0)))
    return {name: _scale(ranges[name], on_grid=name in producer) for name in ranges}


def _scale(largest: float, *, on_grid: bool) -> float:
    """The next scale from above for an activation; the grid's steps cost an eighth of a bit on average."""
    scale = max(largest / _LARGEST, _SMALLEST_ACTIVATION_SCALE)
    if not on_grid:
        return float(_exact_in_half(np.array(scale)))
    mantissa, exponent = math.frexp(scale)
    return math.ldexp(next(step for step in _GRID if mantissa <= step), exponent)


def _exact_in_half(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """The next scales from above that fp16 and bf16 both hold exactly: of 8 binary digits, none below 2**-24."""
    _, exponents = np.frexp(scales)
    steps = np.maximum(np.exp2(exponents - 8.0), _SMALLEST_FP16)
    exact: NDArray[np.float64] = np.maximum(np.ceil(scales / steps), 1) * steps
    return exact


def _calibrator(model: ModelProto, tensors: list[str], *, method: str, folder: Path) -> Any:
    """One of ONNX Runtime's calibrators, for these tensors only instead of all those of some types of operators."""
    source, augmented = folder / "graph.onnx", str(folder / "augmented.onnx")
    onnx.save(model, source)
    if method == "minmax":
        calibrator = calibrators.MinMaxCalibrater(source, augmented_model_path=augmented, symmetric=True)
    elif method == "entropy":
        calibrator = calibrators.EntropyCalibrater(
            source, augmented_model_path=augmented, symmetric=True, num_bins=_ENTROPY_BINS
        )
    else:
        calibrator = calibrators.PercentileCalibrater(source, augmented_model_path=augmented, symmetric=True)
    values = {value.name: value for value in (*calibrator.model.graph.input, *calibrator.model.graph.value_info)}
    calibrator.select_tensors_to_calibrate = lambda _: (tensors, values)
    calibrator.augment_graph()
    calibrator.create_inference_session()
    return calibrator


def _range(name: str, bounds: Iterable[NDArray[np.float32]]) -> float:
    largest = float(np.max(np.abs(np.array([np.ravel(bound)[0] for bound in bounds], np.float64))))
    if not math.isfinite(largest):
        raise ArtifactError(f"tensor {name!r} is not finite on the calibration images", fix="check the checkpoint")
    return largest


def _checkpoint_sha256(model: ModelProto) -> str:
    metadata = read_metadata(model, Path("the fp32 graph"))
    return "" if metadata is None else metadata.checkpoint_sha256
