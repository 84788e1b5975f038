"""ONNX files as values: reading, checking, writing, and the metadata inside. Needs onnx, but not torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto

from smlp_deploy.graphs.check import as_text, check_classifier, check_graph, read_metadata, read_onnx, value_text
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
    """Read an ONNX file that is to be computed with: checked first, against its metadata too if it has any.

    Raises:
        ArtifactError: no such file, not an ONNX file, or one that is refused.
        ConfigError: its metadata is damaged.
    """
    file = read_onnx(path)
    check_graph(file)
    metadata = file.metadata()
    if metadata is not None:
        check_classifier(file, metadata)
    return file.model()


def save_graph(model: ModelProto, metadata: ModelMetadata, path: Path) -> None:
    """Write `model` with `metadata` inside, checked with full shape inference; the same model gives the same bytes.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid.
    """
    onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def graph_facts(path: Path) -> GraphFacts:
    """What the ONNX file at `path` is, of whatever tool; nothing in it is computed.

    Raises:
        ArtifactError: no such file, or not an ONNX file.
        ConfigError: its metadata is damaged.
    """
    file = read_onnx(path)
    model = file.structure
    return GraphFacts(
        metadata=file.metadata(),
        opset=next((entry.version for entry in model.opset_import if entry.domain == ""), 0),
        producer=f"{as_text(model.producer_name)} {as_text(model.producer_version)}".strip(),
        inputs=tuple(value_text(value) for value in model.graph.input),
        outputs=tuple(value_text(value) for value in model.graph.output),
        operators=dict(Counter(as_text(node.op_type) for node in model.graph.node).most_common()),
        weight_bytes=sum(end - start for spans in file.spans for _, start, end in spans),
    )
