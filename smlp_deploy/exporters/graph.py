"""ONNX files as values: reading, checking, writing, and the metadata inside. Needs onnx, but not torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto

from smlp_deploy.errors import ArtifactError
from smlp_deploy.metadata import METADATA_KEY, ModelMetadata

__all__ = ["GraphFacts", "ModelProto", "graph_facts", "load_graph", "read_metadata", "save_graph"]

INPUT_NAME = "images"
OUTPUT_NAME = "logits"


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """What an ONNX file is.

    Attributes:
        metadata: what smlp-deploy wrote into it, or None in a file of another tool.
        opset: version of the default operator set.
        producer: the tool that wrote it.
        inputs: name, element type and dimensions of each input, as text.
        outputs: the same of each output.
        operators: how many nodes there are of each type.
        weight_bytes: of all initializers.
    """

    metadata: ModelMetadata | None
    opset: int
    producer: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]
    weight_bytes: int


def load_graph(path: Path) -> ModelProto:
    """Read an ONNX file, not following any external data.

    Raises:
        ArtifactError: no such file, or not an ONNX file.
    """
    if not path.is_file():
        raise ArtifactError("is a directory" if path.is_dir() else "no such file", where=path, fix="name an ONNX file")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ArtifactError(f"not an ONNX file ({type(error).__name__})", where=path, fix="export it again") from None
    if not model.graph.node:
        raise ArtifactError("not an ONNX file: it has no graph", where=path, fix="export it again")
    return model


def save_graph(model: ModelProto, metadata: ModelMetadata, path: Path) -> None:
    """Write `model` with `metadata` inside, checked with full shape inference; the same model gives the same bytes.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid.
    """
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def read_metadata(model: ModelProto, path: Path) -> ModelMetadata | None:
    """The metadata that smlp-deploy wrote into a graph, or None.

    Raises:
        ConfigError: it is damaged, or of a newer schema.
    """
    text = {prop.key: prop.value for prop in model.metadata_props}.get(METADATA_KEY)
    return None if text is None else ModelMetadata.from_json(text, where=path)


def graph_facts(path: Path) -> GraphFacts:
    """What the ONNX file at `path` is.

    Raises:
        ArtifactError: not an ONNX file.
        ConfigError: its metadata is damaged.
    """
    model = load_graph(path)
    return GraphFacts(
        metadata=read_metadata(model, path),
        opset=next((entry.version for entry in model.opset_import if entry.domain == ""), 0),
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        inputs=tuple(_value_text(value) for value in model.graph.input),
        outputs=tuple(_value_text(value) for value in model.graph.output),
        operators=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        weight_bytes=sum(len(tensor.raw_data) for tensor in model.graph.initializer),
    )


def _value_text(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    element = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    dimensions = [dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim]
    return f"{value.name} {element} {'x'.join(dimensions)}"
