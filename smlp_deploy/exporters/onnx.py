"""The trained network to an fp32 ONNX graph: lowered, traced, cleaned of machine-specific data, and checked."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import nn

from smlp_deploy.dependencies import installed_version
from smlp_deploy.errors import SmlpError
from smlp_deploy.graphs.file import INPUT_NAME, OUTPUT_NAME, Graph
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.models.lowering import lower
from smlp_deploy.models.smlpnet import SMLPNet

DEFAULT_OPSET = 20
OPSETS = range(18, 24)

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"


def export_unlowered(network: SMLPNet, metadata: ModelMetadata, *, path: Path) -> Graph:
    """The unlowered baseline that the lowered graph is measured against: `network` as `torch.onnx.export` writes it.

    Args:
        network: the trained network, float32.
        metadata: what to store in the graph.
        path: the file that it would become, for its name.
    """
    model = _trace(network, image_size=network.config.image_size, batch=metadata.batch, opset=DEFAULT_OPSET)
    return Graph.of(model, metadata, path=path)


def export_onnx(network: SMLPNet, metadata: ModelMetadata, *, path: Path, opset: int = DEFAULT_OPSET) -> Graph:
    """The lowered form of `network` as an fp32 graph: `images` N, 3, S, S float32 to `logits` N, classes.

    The same weights and metadata give the same bytes. N is any number, unless `metadata.batch` fixes it.

    Args:
        network: the trained network, float32.
        metadata: what to store in the graph; its precision becomes fp32 and its input float32, and the versions of the
            exporting libraries are added. Its `form` is that of the graph.
        path: the file that it is to become; nothing is written.
        opset: version of ONNX's default operator set.

    Raises:
        ArtifactError: a weight is not finite after folding.
        SmlpError: the exporter did not make a valid graph; the fault is this tool's or torch's.
    """
    libraries = {name: installed_version(name) or "unknown" for name in ("onnx", "onnxscript")}
    libraries = {**metadata.libraries, **libraries}
    metadata = replace(metadata, precision="fp32", input="float32", libraries=libraries)
    try:
        lowered = lower(network, metadata.form)
        model = _trace(lowered, image_size=network.config.image_size, batch=metadata.batch, opset=opset)
        _clean(model)
        return Graph.of(model, metadata, path=path)
    except (
        torch.onnx.errors.OnnxExporterError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as error:
        raise SmlpError(
            f"export at opset {opset} failed: {str(error).splitlines()[0]}", fix=f"try --opset {DEFAULT_OPSET}"
        ) from error


def _trace(network: nn.Module, *, image_size: int, batch: int | None, opset: int) -> onnx.ModelProto:
    example = torch.zeros(batch or 2, 3, image_size, image_size)
    with _quiet():
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_shapes=None if batch else ({0: torch.export.Dim("batch")},),
            opset_version=opset,
        )
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes about packages and deprecations, which do not concern the user."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)


def _clean(model: onnx.ModelProto) -> None:
    """Drop the exporter's debugging notes, and give the nodes readable names.

    1. A node is named after the module it was traced in and its operation.
    2. Metadata and doc strings go, because they hold source paths: of nodes, values, the graph and the model.
    3. The graph is named after the network.
    """
    graph = model.graph
    for node in graph.node:
        scopes = [prop.value for prop in node.metadata_props if prop.key == _SCOPES_KEY]
        node.name = _node_name(node.name, scopes[0] if scopes else "")  # rule 1
        node.ClearField("metadata_props")  # rule 2
        node.ClearField("doc_string")
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.ClearField("metadata_props")
    model.ClearField("metadata_props")
    graph.ClearField("metadata_props")
    graph.name = "smlpnet"  # rule 3


def _node_name(name: str, scopes: str) -> str:
    """`node_conv2d_1` in the scopes `['', 'blocks.0', 'blocks.0.depthwise', ...]` is `blocks.0.depthwise/conv2d_1`."""
    modules = [scope for scope in scopes.strip("[]").replace("'", "").split(", ") if scope][:-1]
    operation = name.removeprefix("node_")
    return f"{modules[-1]}/{operation}" if modules else operation
