"""The trained network to an fp32 ONNX graph: lowered, captured, and checked."""

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
from smlp_deploy.exporters.capture import capture
from smlp_deploy.graphs.file import INPUT_NAME, OUTPUT_NAME, Graph
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.models.lowering import lower
from smlp_deploy.models.smlpnet import SMLPNet

DEFAULT_OPSET = 20
OPSETS = range(18, 24)


def export_unlowered(network: SMLPNet, metadata: ModelMetadata, *, path: Path) -> Graph:
    """The unlowered baseline that the lowered graph is measured against: `network` as `torch.onnx.export` writes it.

    Args:
        network: the trained network, float32.
        metadata: what to store in the graph.
        path: the file that it would become, for its name.
    """
    model = _trace(network, image_size=network.config.image_size, batch=metadata.batch)
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
        SmlpError: the graph is not valid; the fault is this tool's or onnx's.
    """
    libraries = {**metadata.libraries, "onnx": installed_version("onnx") or "unknown"}
    metadata = replace(metadata, precision="fp32", input="float32", libraries=libraries)
    lowered = lower(network, metadata.form)
    size, ends = network.config.image_size, (INPUT_NAME, OUTPUT_NAME)
    model = capture(lowered, image_size=size, batch=metadata.batch, opset=opset, ends=ends)
    del lowered  # with a copy of the weights
    model.producer_name, model.producer_version = "smlp-deploy", libraries.get("smlp-deploy", "")
    try:
        return Graph.of(model, metadata, path=path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise SmlpError(
            f"export at opset {opset} failed: {str(error).splitlines()[0]}", fix=f"try --opset {DEFAULT_OPSET}"
        ) from error


def _trace(network: nn.Module, *, image_size: int, batch: int | None) -> onnx.ModelProto:
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
            opset_version=DEFAULT_OPSET,
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
