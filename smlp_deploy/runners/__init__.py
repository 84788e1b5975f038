"""Opens a runner for a file; the only place that knows which backend runs which kind of file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smlp_deploy.artifacts import CHECKPOINT_SUFFIXES
from smlp_deploy.dependencies import require_onnxruntime, require_torch
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.runners.base import Runner

if TYPE_CHECKING:
    from smlp_deploy.graphs.file import Graph


def _open_onnx(path: Path, *, provider: str = "cpu") -> Runner:
    require_onnxruntime()
    from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner.open(path, provider=provider)


def _open_checkpoint(path: Path) -> Runner:
    require_torch("to run a checkpoint; an exported ONNX file runs without it")
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.description import describe
    from smlp_deploy.runners.pytorch import PyTorchRunner

    checkpoint = load_checkpoint(path)
    return PyTorchRunner(checkpoint, describe(checkpoint))


def _open_engine(path: Path) -> Runner:
    from smlp_deploy.runners.tensorrt import TensorRTRunner

    return TensorRTRunner.open(path)


_OPENERS: dict[str, Callable[[Path], Runner]] = {
    ".onnx": _open_onnx,
    ".engine": _open_engine,
    **dict.fromkeys(CHECKPOINT_SUFFIXES, _open_checkpoint),
}


def open_runner(path: Path, *, provider: str | None = None) -> Runner:
    """Load an artifact or checkpoint.

    Args:
        path: the file.
        provider: what ONNX Runtime runs an ONNX file on: "cpu" (the default), "cuda" or "tensorrt".

    Raises:
        UsageError: a provider was given for another kind of file.
        ArtifactError, CheckpointError: the file cannot be used.
        MissingDependencyError: its backend is not installed.
    """
    opener = _OPENERS.get(path.suffix.lower())
    if opener is None:
        raise ArtifactError("no runner for this kind of file", where=path, fix=f"expected {', '.join(_OPENERS)}")
    if provider is None:
        return opener(path)
    if opener is not _open_onnx:
        raise UsageError("only ONNX files take a provider", where=path, fix="omit --provider")
    return _open_onnx(path, provider=provider)


def open_graph(graph: Graph, *, provider: str | None = None) -> Runner:
    """Load a graph into ONNX Runtime; see `open_runner`."""
    require_onnxruntime()
    from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

    return OnnxRuntimeRunner(graph, provider=provider or "cpu")


def open_compiled(path: Path) -> Runner:
    """Load a checkpoint to run through `torch.compile`.

    Raises:
        CheckpointError: the file cannot be used.
        MissingDependencyError: PyTorch is not installed.
    """
    require_torch("to run a checkpoint")
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.description import describe
    from smlp_deploy.runners.pytorch import CompiledRunner

    checkpoint = load_checkpoint(path)
    return CompiledRunner(checkpoint, describe(checkpoint))
