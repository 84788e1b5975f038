"""From an ONNX file or engine to a model repository of Triton."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.dependencies import require
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.exporters.triton import MODEL_FILES, ONNX, PLAN, Interface, Repository, Tensor, write_repository
from smlp_deploy.files import read_file
from smlp_deploy.inference.classify import DEFAULT_TOPK
from smlp_deploy.metadata import BatchProfile, ModelMetadata
from smlp_deploy.runners.tensorrt import MAX_ENGINE_BYTES, read_manifest

DEFAULT_REPOSITORY = Path("model_repository")

_INPUT, _OUTPUT = "images", "logits"  # of every graph that smlp export writes, and of the engines built from them

logger = logging.getLogger(__name__)


def export_repository(artifact: Path, repository: Path = DEFAULT_REPOSITORY) -> Repository:
    """Add an artifact to a model repository; see `exporters/triton.py` for what is in it.

    Args:
        artifact: an ONNX file, or a TensorRT engine with its manifest beside it.
        repository: a folder; if the network is there already, this becomes its next version.

    Raises:
        UsageError: it is a file of another kind.
        ArtifactError: it cannot be used, or Triton cannot run it.
        ConfigError: its batch sizes or labels cannot be served.
        SmlpError: the repository cannot be written, or what is in it does not go with this artifact.
    """
    suffix = artifact.suffix.lower()
    if suffix not in (".onnx", ".engine"):
        raise UsageError(
            "a model repository is made of an ONNX file or an engine",
            where=artifact,
            fix="export the checkpoint first: smlp export CHECKPOINT",
        )
    interface, network = _onnx(artifact) if suffix == ".onnx" else _engine(artifact)
    return write_repository(repository, interface, network)


def _onnx(path: Path) -> tuple[Interface, dict[str, bytes]]:
    require("onnx", purpose="to read ONNX files", extra="cpu")
    from smlp_deploy.graphs.file import Graph

    graph = Graph.read(path)
    metadata = graph.metadata
    if metadata.precision == "bf16":
        logger.warning("ONNX Runtime has no bf16 kernels for CPUs, so Triton can run %s on GPUs only", path)
    profile = BatchProfile.fixed(metadata.batch) if metadata.batch else BatchProfile()
    nodes = graph.structure.graph
    weights = {tensor.name for tensor in nodes.initializer}
    (images,) = (value.name for value in nodes.input if value.name not in weights)
    return _interface(ONNX, metadata, profile, images, nodes.output[0].name), {MODEL_FILES[ONNX]: graph.content}


def _engine(path: Path) -> tuple[Interface, dict[str, bytes]]:
    """An engine and its manifest, so that the version in the repository can be checked again."""
    manifest = read_manifest(path)
    if manifest.backend != "tensorrt":
        raise ArtifactError(
            f"is an engine of {manifest.backend}, and Triton runs TensorRT's",
            where=path,
            fix="build it with smlp build-engine --target tensorrt, or serve the ONNX file",
        )
    plan = read_file(path, limit=MAX_ENGINE_BYTES, error=ArtifactError, fix="build the engine again")
    if hashlib.sha256(plan).hexdigest() != manifest.engine_sha256:
        raise ArtifactError("changed while it was read", where=path, fix="try again")
    name = MODEL_FILES[PLAN]
    files = {name: plan, engine_manifest_path(Path(name)).name: manifest.to_json().encode()}
    logger.warning(
        "the engine loads only in a Triton with TensorRT %s, on %s", manifest.version, _gpus(manifest.architectures)
    )
    return _interface(PLAN, manifest.metadata, manifest.profile, _INPUT, _OUTPUT), files


def _gpus(architectures: tuple[str, ...]) -> str:
    return ", ".join(architectures) or "the GPU that it was built for"


def _interface(
    platform: str, metadata: ModelMetadata, profile: BatchProfile, input_name: str, output_name: str
) -> Interface:
    """How a network is served; an engine of one batch size is as one whose graph has only that."""
    element = "UINT8" if metadata.input == "uint8" else "FP32"
    return Interface(
        platform=platform,
        batch=metadata.batch or (profile.max if profile.min == profile.max else None),
        profile=profile,
        input=Tensor(name=input_name, data_type=element, dims=metadata.input_shape),
        output=Tensor(name=output_name, data_type="FP32", dims=(metadata.config.num_classes,)),
        labels=metadata.labels,
        preprocessing=metadata.preprocessing,
        topk=min(DEFAULT_TOPK, len(metadata.labels)),
    )
