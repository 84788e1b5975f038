"""Opens a runner for a file; the only place that knows which backend runs which kind of file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smlp_deploy.artifacts import is_checkpoint
from smlp_deploy.dependencies import require, require_onnxruntime, require_torch
from smlp_deploy.errors import ArtifactError
from smlp_deploy.runners.base import Runner
from smlp_deploy.runners.placement import ANYWHERE, AUTO, CPU, ONNXRUNTIME, OPENVINO, Placement

if TYPE_CHECKING:
    from smlp_deploy.graphs.file import Graph


def _open_onnx(path: Path, placement: Placement) -> Runner:
    if placement.runtime == OPENVINO:
        _require_openvino()
        from smlp_deploy.runners.openvino import OpenVinoRunner

        return OpenVinoRunner.open(path, cores=placement.threads)
    if placement.runtime == ONNXRUNTIME or placement.onnx_provider != CPU:
        require_onnxruntime()
        from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner.open(
            path, provider=placement.onnx_provider, gpu=placement.gpu, cores=placement.threads
        )
    require("onnx", purpose="to read ONNX files", extra="cpu")
    from smlp_deploy.graphs.file import Graph

    return open_graph(Graph.read(path), placement=placement)


def _require_openvino() -> None:
    require("openvino", "onnx", purpose="for --runtime openvino", extra="cpu")


def _open_checkpoint(path: Path, placement: Placement) -> Runner:
    require_torch("to run a checkpoint; an exported ONNX file runs without it")
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.description import describe
    from smlp_deploy.runners.pytorch import PyTorchRunner

    checkpoint = load_checkpoint(path)
    return PyTorchRunner(checkpoint, describe(checkpoint), gpu=placement.gpu)


def _open_engine(path: Path, placement: Placement) -> Runner:
    from smlp_deploy.runners.tensorrt import TensorRTRunner

    return TensorRTRunner.open(path, gpu=placement.gpu)


_OPENERS: dict[str, Callable[[Path, Placement], Runner]] = {
    ".onnx": _open_onnx,
    ".engine": _open_engine,
}


def open_runner(
    path: Path,
    *,
    provider: str | None = None,
    device: str | None = None,
    runtime: str = AUTO,
    placement: Placement | None = None,
) -> Runner:
    """Load an artifact or checkpoint.

    Args:
        path: the file.
        provider: what ONNX Runtime runs an ONNX file on: "cpu", "cuda" or "tensorrt"; by default "cuda" if `device` is
            a GPU, otherwise "cpu".
        device: "cpu", or a GPU: "cuda" for the first, "cuda:1" or "1" by its number in CUDA, or its UUID. By default
            engines run on the first GPU, and everything else on the CPU.
        runtime: what runs an ONNX file: "onnxruntime" or "openvino"; by default what `default_runtime` says on the
            CPU, and ONNX Runtime on a GPU.
        placement: all three in one, if they were read before.

    Raises:
        UsageError: a provider was given for another kind of file, there is no such GPU, or the choices contradict each
            other.
        ArtifactError, CheckpointError: the file cannot be used.
        MissingDependencyError: its backend is not installed.
    """
    opener = _open_checkpoint if is_checkpoint(path) else _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise ArtifactError(
            "no runner for this kind of file", where=path, fix="expected an ONNX file, an engine or a checkpoint"
        )
    placement = placement or Placement.of(device=device, provider=provider, runtime=runtime)
    placement.check(path)
    return opener(path, placement)


def open_graph(graph: Graph, *, placement: Placement = ANYWHERE) -> Runner:
    """Load a graph into ONNX Runtime or OpenVINO; see `open_runner`."""
    if placement.runtime_for(graph.metadata) == OPENVINO:
        _require_openvino()
        from smlp_deploy.runners.openvino import OpenVinoRunner

        return OpenVinoRunner(graph, cores=placement.threads)
    require_onnxruntime()
    from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(graph, provider=placement.onnx_provider, gpu=placement.gpu, cores=placement.threads)


def open_compiled(path: Path, *, placement: Placement = ANYWHERE) -> Runner:
    """Load a checkpoint to run through `torch.compile`.

    Raises:
        CheckpointError: the file cannot be used.
        MissingDependencyError: PyTorch is not installed, or cannot use the GPU.
    """
    require_torch("to run a checkpoint")
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.description import describe
    from smlp_deploy.runners.pytorch import CompiledRunner

    checkpoint = load_checkpoint(path)
    return CompiledRunner(checkpoint, describe(checkpoint), gpu=placement.gpu)
