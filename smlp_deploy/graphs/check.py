"""Untrusted ONNX files: read once, and checked before anything is computed. Needs onnx, but neither torch nor a GPU.

Protobuf can turn one byte of a file into a hundred bytes of objects. Therefore fields are counted in the wire format
first, and only the structure becomes objects; weights stay in the file's bytes (`docs/security.md`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from smlp_deploy.errors import ArtifactError
from smlp_deploy.files import read_file
from smlp_deploy.graphs.wire import BYTES, TooManyFieldsError, WireReader
from smlp_deploy.metadata import METADATA_KEY, ModelMetadata

MAX_FILE_BYTES = (2 << 30) - 1
"""Protobuf's limit for a message."""
MAX_STRUCTURE_BYTES = 8 << 20
"""Everything in a file except its weights; as objects it can take a hundred times that (sMLPNet-Base: 0.3 MB)."""
MAX_PARTS = 200_000
"""Fields of the model, its graph and its weights together; sMLPNet-Base has fewer than 10,000."""
MAX_NODES = 20_000
"""Also the largest number of weights."""
MAX_ATTRIBUTES = 32
"""Per node; no operator below has more than 8."""
MAX_ELEMENTS = 1 << 26
"""Per value and image; sMLPNet-Base at 224 pixels needs 2^20."""
MAX_TOTAL_ELEMENTS = 1 << 31
"""Of all values in total, per image; sMLPNet-Base at 224 pixels needs 2^27."""
MAX_MACS = 1 << 40
"""Multiply-accumulates per image; sMLPNet-Base at 224 pixels needs 2^34."""

# What smlp-deploy writes, and what optimizers turn that into. No output shape depends on pixel values.
_OPERATORS = (
    "Add Cast Concat Conv DequantizeLinear Div Erf Gelu Gemm MatMul Mul QuantizeLinear Reciprocal ReduceMean Reshape "
    "Sqrt Sub Transpose "
    "Abs BatchNormalization Clip Constant Dropout Exp Flatten GlobalAveragePool Identity LayerNormalization Log Max "
    "Min Neg Pow ReduceSum Relu Sigmoid Slice Softmax Split Squeeze Sum Tanh Unsqueeze"
)
OPERATORS = frozenset(_OPERATORS.split())
ELEMENT_TYPES: dict[int, int] = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.DOUBLE: 8,
    TensorProto.INT8: 1,
    TensorProto.UINT8: 1,
    TensorProto.INT32: 4,
    TensorProto.INT64: 8,
    TensorProto.BOOL: 1,
}
"""The types that weights may have, and their sizes in bytes."""

_INPUTS = {"float32": (TensorProto.FLOAT, "float"), "uint8": (TensorProto.UINT8, "uint8")}
_DEFAULT_DOMAIN = ("", "ai.onnx")
_KEPT_BYTES = 1024
# Field numbers of ModelProto, GraphProto and TensorProto in onnx.proto.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_DATA = {4, 5, 7, _RAW_DATA, 10, 11}
# The bits of a float's exponent: all set in infinities and NaNs.
_EXPONENTS: dict[int, np.unsignedinteger[Any]] = {
    TensorProto.FLOAT: np.uint32(0x7F80_0000),
    TensorProto.FLOAT16: np.uint16(0x7C00),
    TensorProto.BFLOAT16: np.uint16(0x7F80),
    TensorProto.DOUBLE: np.uint64(0x7FF0_0000_0000_0000),
}
_CHUNK = 1 << 18
_SHOWN = 120

_Span = tuple[int, int, int]
"""Field number, start and end of a tensor's values in the file."""


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """An ONNX file in memory.

    Attributes:
        path: where it was read from; it is not opened again.
        content: the whole file.
        structure: the model, without the values of initializers of more than 1,024 bytes.
        spans: where in `content` the values of each initializer are.
    """

    path: Path
    content: bytes
    structure: ModelProto
    spans: tuple[tuple[_Span, ...], ...]

    def model(self) -> ModelProto:
        """The model with its weights, parsed again.

        Raises:
            ArtifactError: its messages are nested deeper than protobuf parses.
        """
        try:
            model: ModelProto = ModelProto.FromString(self.content)
        except DecodeError:
            raise _no_onnx(self.path, ", or one that is nested too deeply") from None
        return model

    def metadata(self) -> ModelMetadata | None:
        """The metadata that smlp-deploy wrote into the file, or None.

        Raises:
            ConfigError: it is damaged, or has a newer schema version.
        """
        return read_metadata(self.structure, self.path)


def read_metadata(model: ModelProto, path: Path) -> ModelMetadata | None:
    """The metadata that smlp-deploy wrote into a model, or None.

    Raises:
        ConfigError: it is damaged, or has a newer schema version.
    """
    text = {prop.key: prop.value for prop in model.metadata_props}.get(METADATA_KEY)
    return None if text is None else ModelMetadata.from_json(text, where=path)


def read_onnx(path: Path) -> OnnxFile:
    """Read an ONNX file written by any tool; external data is not read, and nothing the file claims is trusted.

    Raises:
        ArtifactError: not a regular file, too large, or not an ONNX file.
    """
    fix = "name an ONNX file; smlp export makes one"
    return parse_onnx(read_file(path, limit=MAX_FILE_BYTES, error=ArtifactError, fix=fix), path)


def parse_onnx(content: bytes, path: Path) -> OnnxFile:
    """Parse the bytes of an ONNX file; nothing is read from disk.

    Args:
        content: the whole file.
        path: where it came from, for errors.

    Raises:
        ArtifactError: not an ONNX file, or its structure is larger than the bounds above allow.
    """
    try:
        structure, spans = _structure(content, path)
    except (DecodeError, ValueError) as error:
        raise _no_onnx(path, f", or a damaged one ({type(error).__name__})") from None
    if not structure.graph.node:
        raise _no_onnx(path, ": it has no graph")
    return OnnxFile(path=path, content=content, structure=structure, spans=spans)


def check_graph(file: OnnxFile) -> None:
    """Check that the graph uses only allowed operators, and that its weights are finite and all inside the file.

    Raises:
        ArtifactError: a check fails, or the file is newer than the installed onnx.
    """
    model, path = file.structure, file.path
    _check_versions(model, path)
    if model.functions or model.training_info or model.graph.sparse_initializer:
        _refuse("it has model-local functions, training steps or sparse weights", path)
    graph = model.graph
    if max(len(graph.node), len(graph.initializer)) > MAX_NODES:
        _refuse(f"it has more than {MAX_NODES} nodes or weights", path)
    if any(len(node.attribute) > MAX_ATTRIBUTES for node in graph.node):
        _refuse(f"one of its nodes has more than {MAX_ATTRIBUTES} attributes", path)
    named = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    if not all(isinstance(part.name, str) for part in named):
        _refuse("a name in it is not UTF-8", path)
    for node in graph.node:
        _check_node(node, path)
    for tensor, spans in zip(graph.initializer, file.spans, strict=True):
        _check_weight(tensor, spans, file)


def check_classifier(file: OnnxFile, metadata: ModelMetadata) -> None:
    """Check that the graph matches its metadata: images to logits (N, classes), float32.

    The images are (N, 3, S, S) float32 or (N, S, S, 3) uint8, as the metadata says.

    Raises:
        ArtifactError: it does not, or it would take more memory or time than the bounds above allow.
    """
    graph, path = file.structure.graph, file.path
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        _refuse(f"it has {len(inputs)} inputs and {len(graph.output)} outputs; a classifier has one of each", path)
    batch = metadata.batch or 1
    dims = inputs[0].type.tensor_type.shape.dim
    found = [dim.dim_value if dim.HasField("dim_value") else "N" for dim in dims]
    expected = [metadata.batch or "N", *metadata.input_shape]
    element, name = _INPUTS[metadata.input]
    if inputs[0].type.tensor_type.elem_type != element or found != expected:
        _refuse(
            f"its input is {_short(value_text(inputs[0]))}, but its metadata says {name} {_shape_text(expected)}", path
        )
    if graph.output[0].type.tensor_type.elem_type != TensorProto.FLOAT:
        _refuse(f"its output is {_short(value_text(graph.output[0]))}, expected float", path)
    logits = check_sizes(file.structure, path, batch=batch)
    if logits != (batch, metadata.config.num_classes):
        of = f"{metadata.config.num_classes} classes" + (f" at batch {batch}" if batch > 1 else "")
        _refuse(f"its output has shape {_shape_text(logits)}, but its metadata says {of}", path)


def check_depth(file: OnnxFile) -> None:
    """Check that protobuf can parse the whole file: the structure was put together field by field, which goes deeper.

    Raises:
        ArtifactError: its messages are nested too deeply.
    """
    try:
        ModelProto.FromString(file.structure.SerializeToString())
    except (DecodeError, EncodeError):
        raise _no_onnx(file.path, ", or one that is nested too deeply") from None


def check_sizes(structure: ModelProto, path: Path, *, batch: int) -> tuple[int, ...]:
    """Compute the shape of every value at one batch size, and check that they stay within the bounds above.

    Args:
        structure: a model that passed `check_graph` and has one input; its weights may lack values.
        path: where it came from, for errors.
        batch: number of images.

    Returns:
        The shape of the output.

    Raises:
        ArtifactError: a bound is exceeded, or a shape is not known before the graph runs.
    """
    shapes = _shapes(structure, path, batch)
    total = macs = 0
    for node in structure.graph.node:
        for name in filter(None, node.output):
            elements = _elements(shapes.get(name))
            if elements is None:
                _refuse(f"the size of its value {_short(name)} cannot be determined", path)
            if elements > MAX_ELEMENTS * batch:
                _refuse(f"its value {_short(name)} has more than {MAX_ELEMENTS} elements per image", path)
            total += elements
        macs += _macs(node, shapes)
    if total > MAX_TOTAL_ELEMENTS * batch:
        _refuse(f"its values have more than {MAX_TOTAL_ELEMENTS} elements per image in total", path)
    if macs > MAX_MACS * batch:
        _refuse(f"it needs more than {MAX_MACS} multiplications per image", path)
    return shapes[structure.graph.output[0].name] or ()


def _no_onnx(path: Path, why: str) -> ArtifactError:
    return ArtifactError(f"not an ONNX file{why}", where=path, fix="export it again")


def _refuse(why: str, path: Path, fix: str | None = None) -> NoReturn:
    raise ArtifactError(f"refused: {why}", where=path, fix=fix or "use a file that smlp export wrote")


def _structure(content: bytes, path: Path) -> tuple[ModelProto, tuple[tuple[_Span, ...], ...]]:
    """The graph without the values of its larger initializers, and where the values of each initializer are."""
    model, left = ModelProto(), MAX_STRUCTURE_BYTES
    spans: list[tuple[_Span, ...]] = []
    try:
        for message, start, end in _structure_fields(content, model, spans):
            left -= end - start
            if left < 0:
                _refuse(f"it has more than {MAX_STRUCTURE_BYTES} bytes besides its weights", path)
            # By protobuf's rules, merging the fields of a message one by one is the same as parsing it whole.
            message.MergeFromString(content[start:end])
    except TooManyFieldsError:
        _refuse(f"it has more than {MAX_PARTS} fields", path)
    return model, tuple(spans)


def _structure_fields(
    content: bytes, model: ModelProto, spans: list[tuple[_Span, ...]]
) -> Iterator[tuple[Message, int, int]]:
    """For each field of the structure, the message of `model` that it belongs to, and its start and end."""
    reader = WireReader(content, limit=MAX_PARTS)
    for field in reader.fields(0, len(content)):
        if (field.number, field.kind) != (_GRAPH, BYTES):
            yield model, field.start, field.end
            continue
        for part in reader.fields(field.value, field.end):
            if (part.number, part.kind) != (_INITIALIZER, BYTES):
                yield model.graph, part.start, part.end
                continue
            tensor, values = model.graph.initializer.add(), []
            for entry in reader.fields(part.value, part.end):
                if entry.number in _DATA and entry.kind == BYTES:
                    values.append((entry.number, entry.value, entry.end))
                    if entry.end - entry.value > _KEPT_BYTES:
                        continue
                yield tensor, entry.start, entry.end
            spans.append(tuple(values))


def _check_versions(model: ModelProto, path: Path) -> None:
    known, upgrade = onnx.defs.onnx_opset_version(), "upgrade onnx, or export it again with a lower --opset"
    if model.ir_version > onnx.IR_VERSION:
        _refuse(
            f"its format version {model.ir_version} is newer than the {onnx.IR_VERSION} of this onnx", path, upgrade
        )
    opsets = [entry.version for entry in model.opset_import if entry.domain in _DEFAULT_DOMAIN]
    if len(opsets) != 1 or opsets[0] < 1 or model.ir_version < 1:
        _refuse("it does not state one format version and one operator set", path)
    if opsets[0] > known:
        _refuse(f"its operator set {opsets[0]} is newer than the {known} of this onnx", path, upgrade)


def _check_node(node: NodeProto, path: Path) -> None:
    operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs:
            _refuse(f"its operator {_short(operator)} runs a graph inside the graph", path)
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors or attribute.ref_attr_name:
            _refuse(f"its operator {_short(operator)} has an attribute of a kind that is not allowed", path)
        for tensor in (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors):
            _check_values(tensor, path)
    if node.domain not in _DEFAULT_DOMAIN or node.op_type not in OPERATORS:
        _refuse(f"its operator {_short(operator)} is not one that a classifier needs", path)
    if not all(isinstance(name, str) for name in (node.name, *node.input, *node.output)):
        _refuse("a name in it is not UTF-8", path)


def _check_weight(tensor: TensorProto, spans: tuple[_Span, ...], file: OnnxFile) -> None:
    """Check an initializer; large values are only in `file.content`."""
    if not any(end - start > _KEPT_BYTES for _, start, end in spans):
        _check_values(tensor, file.path)
        return
    _check_type(tensor, file.path)
    (number, start, end), name = spans[0], _short(tensor.name)
    if len(spans) > 1 or number != _RAW_DATA:
        _refuse(f"the values of {name} are not stored as raw data", file.path)
    claimed = _elements(tuple(tensor.dims)) or 0
    if claimed * ELEMENT_TYPES[tensor.data_type] != end - start:
        _refuse(f"{name} claims {_shape_text(tensor.dims)} values but has {end - start} bytes", file.path)
    exponent = _EXPONENTS.get(tensor.data_type)
    if exponent is None:
        return
    values = np.frombuffer(file.content, exponent.dtype, claimed, start)
    if any(((values[at : at + _CHUNK] & exponent) == exponent).any() for at in range(0, claimed, _CHUNK)):
        _refuse_nan(name, file.path)


def _check_values(tensor: TensorProto, path: Path) -> None:
    """Check a tensor whose values are in its message."""
    _check_type(tensor, path)
    name = _short(tensor.name)
    try:
        values = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OverflowError):
        _refuse(f"{name} claims {_shape_text(tensor.dims)} values but has a different number", path)
    if values.shape != tuple(tensor.dims):
        _refuse(f"{name} claims {_shape_text(tensor.dims)} values but has a different number", path)
    if tensor.data_type in _EXPONENTS and not np.isfinite(values.astype(np.float64)).all():
        _refuse_nan(name, path)


def _check_type(tensor: TensorProto, path: Path) -> None:
    if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
        _refuse(
            f"the values of {_short(tensor.name)} are in another file; smlp-deploy keeps all weights inside",
            path,
            "save it as one file, without external data",
        )
    if tensor.data_type not in ELEMENT_TYPES or tensor.HasField("segment"):
        _refuse(f"{_short(tensor.name)} has an element type that is not supported", path)


def _refuse_nan(name: str, path: Path) -> NoReturn:
    _refuse(f"{name} has values that are NaN or infinite", path)


def _shapes(structure: ModelProto, path: Path, batch: int) -> dict[str, tuple[int, ...] | None]:
    """The shape of every value at a batch size, or None; inferred afresh, ignoring the shapes that the file states."""
    graph = structure.graph
    bare = ModelProto(ir_version=onnx.IR_VERSION, opset_import=structure.opset_import)
    bare.graph.name = "sizes"
    bare.graph.node.extend(graph.node)
    weights = {tensor.name for tensor in graph.initializer}
    for tensor in graph.initializer:
        if _has_values(tensor):
            bare.graph.initializer.append(tensor)
        else:
            shape = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            bare.graph.input.append(shape)
    for value in graph.input:
        if value.name not in weights:
            bare.graph.input.append(value)
            bare.graph.input[-1].type.tensor_type.shape.dim[0].dim_value = batch
    for value in graph.output:
        bare.graph.output.add(name=value.name).type.tensor_type.elem_type = value.type.tensor_type.elem_type
    try:
        inferred = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    # onnx's checks raise errors of several types without a common base class.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _refuse(f"its shapes do not fit together: {_short(reason)}", path)
    known = (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
    shapes = {value.name: _static(value) for value in known}
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in inferred.graph.initializer}


def _has_values(tensor: TensorProto) -> bool:
    return bool(tensor.raw_data or tensor.float_data or tensor.int32_data or tensor.int64_data or tensor.double_data)


def _static(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def _elements(shape: Iterable[int] | None) -> int | None:
    """How many elements a shape has; None if it is unknown or has a size below 1."""
    sizes = None if shape is None else tuple(shape)
    return None if sizes is None or any(size < 1 for size in sizes) else math.prod(sizes)


def _macs(node: NodeProto, shapes: dict[str, tuple[int, ...] | None]) -> int:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or not node.output:
        return 0
    left, right = (shapes.get(name) or (1,) for name in node.input[:2])
    if node.op_type == "Conv":
        return (_elements(shapes.get(node.output[0])) or 0) * math.prod(right[1:])
    # Depending on transA either size of a Gemm's left operand is the inner one; the larger is an upper bound.
    inner = left[-1] if node.op_type == "MatMul" else max(left)
    return (_elements(shapes.get(node.output[0])) or 0) * inner


def as_text(name: str | bytes) -> str:
    """A name from a file; protobuf returns one that is not UTF-8 as bytes."""
    return name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")


def value_text(value: onnx.ValueInfoProto) -> str:
    """Name, element type and dimensions of an input or output: `images float batchx3x224x224`."""
    tensor = value.type.tensor_type
    known = TensorProto.DataType.values()
    element = TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type in known else "unknown"
    dimensions = (as_text(dim.dim_param) or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{as_text(value.name)} {element} {'x'.join(dimensions)}"


def _short(text: str | bytes) -> str:
    """Text from a file, quoted and shortened for a message."""
    text = as_text(text)
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _shape_text(shape: Iterable[object]) -> str:
    return "x".join(map(str, shape))[:_SHOWN] or "a single value"
