"""ONNX graphs as values: read once, passed on, and written once. Needs onnx, but not torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import onnx
from onnx import ModelProto

from smlp_deploy.errors import ArtifactError
from smlp_deploy.files import write_bytes
from smlp_deploy.graphs.check import (
    OnnxFile,
    as_text,
    check_classifier,
    check_depth,
    check_graph,
    parse_onnx,
    read_onnx,
    value_text,
)
from smlp_deploy.metadata import METADATA_KEY, ModelMetadata

INPUT_NAME = "images"
OUTPUT_NAME = "logits"


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A checked ONNX graph with its metadata; the bytes it holds are what is run, hashed and written.

    Attributes:
        file: its bytes, and the file it was read from or is to become, which is not opened again.
        metadata: what is stored inside.
    """

    file: OnnxFile
    metadata: ModelMetadata

    @classmethod
    def of(cls, model: ModelProto, metadata: ModelMetadata, *, path: Path) -> Self:
        """A graph that was made here; the same model and metadata give the same bytes.

        Args:
            model: the graph; the metadata is put into it.
            metadata: of the graph.
            path: the file that it is to become.

        Raises:
            onnx.checker.ValidationError, onnx.shape_inference.InferenceError: the graph is not valid.
            ArtifactError: it does not compute what its metadata says, or a weight is not finite.
        """
        onnx.helper.set_model_props(model, {METADATA_KEY: metadata.to_json()})
        content = model.SerializeToString(deterministic=True)
        onnx.checker.check_model(content, full_check=True)
        file = parse_onnx(content, path)
        try:
            return cls._checked(file)
        except ArtifactError as error:  # for example, weights that overflow when folded
            raise ArtifactError(error.what, where=path, fix="nothing was written; check the checkpoint") from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read an ONNX file that smlp-deploy wrote, once; it is checked before anything is computed with it.

        Raises:
            ArtifactError: no such file, not an ONNX file, one from another tool, or one that is refused.
            ConfigError: its metadata is damaged.
        """
        return cls._checked(read_onnx(path))

    @classmethod
    def parse(cls, content: bytes, *, path: Path) -> Self:
        """The graph in the bytes of a file that was read already; see `read`."""
        return cls._checked(parse_onnx(content, path))

    @classmethod
    def _checked(cls, file: OnnxFile) -> Self:
        check_graph(file)
        metadata = file.metadata()
        if metadata is None:
            raise ArtifactError(
                "has no labels and preprocessing inside: smlp-deploy did not write it",
                where=file.path,
                fix="export the checkpoint with smlp export",
            )
        check_classifier(file, metadata)
        check_depth(file)
        return cls(file=file, metadata=metadata)

    @property
    def path(self) -> Path:
        """Gives the graph its name."""
        return self.file.path

    @property
    def content(self) -> bytes:
        """The bytes of the ONNX file."""
        return self.file.content

    @property
    def structure(self) -> ModelProto:
        """The graph without the values of its larger weights; not to be changed."""
        return self.file.structure

    @cached_property
    def sha256(self) -> str:
        """Of the bytes, as 64 hexadecimal digits."""
        return hashlib.sha256(self.content).hexdigest()

    def model(self) -> ModelProto:
        """The whole graph with its weights, which the caller may change."""
        return self.file.model()

    def save(self, path: Path | None = None) -> None:
        """Write the file, whole or not at all; by default where the graph says.

        Raises:
            SmlpError: it cannot be written there.
        """
        write_bytes(path or self.path, self.content)


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """What an ONNX file is.

    Attributes:
        metadata: what smlp-deploy wrote into it, or None in a file from another tool.
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


def graph_facts(path: Path) -> GraphFacts:
    """What the ONNX file at `path` is, from any tool; nothing in it is computed.

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
