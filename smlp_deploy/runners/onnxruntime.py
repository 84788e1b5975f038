"""ONNX graphs in ONNX Runtime: on the CPU, or on request with its CUDA or TensorRT provider.

ONNX Runtime's CPU provider computes an fp16 graph in fp32 with rounded weights, and has no bf16 convolution. A bf16
graph is therefore emulated: computed in fp32, with every value that is bf16 in the graph rounded to bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self, cast

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as KernelMissing

from smlp_deploy.errors import ArtifactError, MissingDependencyError
from smlp_deploy.graphs.check import check_sizes
from smlp_deploy.graphs.edit import emulate_bf16
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.runners.base import Closing, in_batches

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

_ERRORS_ONLY = 3


class OnnxRuntimeRunner(Closing):
    """Runs a graph that `smlp export` made.

    Args:
        graph: what to run.
        provider: "cpu", "cuda" or "tensorrt"; never falls back to another.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
        MissingDependencyError: the provider is not in this ONNX Runtime, or does not start here.
    """

    def __init__(self, graph: Graph, *, provider: str = "cpu") -> None:
        wanted = _available(provider)
        session, emulated = _session(self._content(graph), graph.path, wanted)
        # A listed provider may not start: without its libraries or a GPU, ONNX Runtime falls back to the CPU.
        if session.get_providers()[0] != wanted:
            raise MissingDependencyError(
                f"{wanted} does not start here, only {session.get_providers()[0]}",
                fix="check the NVIDIA driver and CUDA libraries, or use --provider cpu",
            )
        device = f"{provider.upper()}, bf16 emulated" if emulated else provider.upper()
        self.name = f"onnxruntime ({device}) {graph.path.name}"
        self.metadata = graph.metadata
        self._path, self._structure = graph.path, graph.structure
        self._batch_sizes = {graph.metadata.batch or 1}
        self._session: onnxruntime.InferenceSession | None = session

    @classmethod
    def open(cls, path: Path, *, provider: str = "cpu") -> Self:
        """Run a file that `smlp export` wrote.

        Raises:
            ArtifactError: it is not an ONNX file, lacks smlp-deploy's metadata, or is refused by `graphs/check.py`.
            MissingDependencyError: the provider is not in this ONNX Runtime, or does not start here.
            ConfigError: its metadata is damaged.
        """
        _available(provider)
        return cls(Graph.read(path), provider=provider)

    def infer(self, batch: FloatArray) -> FloatArray:
        if self.metadata.batch is not None:
            return in_batches(batch, BatchProfile.fixed(self.metadata.batch), self._run)
        return self._run(batch)

    def _content(self, graph: Graph) -> bytes:
        """The serialized model to run."""
        return graph.content

    def _run(self, batch: FloatArray) -> FloatArray:
        return self._outputs(batch)[0]

    def _outputs(self, batch: FloatArray) -> list[FloatArray]:
        assert self._session is not None, "the runner is closed"
        if len(batch) not in self._batch_sizes:
            check_sizes(self._structure, self._path, batch=len(batch))
            self._batch_sizes.add(len(batch))
        try:
            return cast(list[FloatArray], self._session.run(None, {self._session.get_inputs()[0].name: batch}))
        # onnxruntime's exceptions have no common base class.
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime cannot run it: {_reason(error)}", where=self._path) from None

    def close(self) -> None:
        self._session = None


def _available(provider: str) -> str:
    """ONNX Runtime's name for a provider.

    Raises:
        MissingDependencyError: the installed ONNX Runtime lacks it.
    """
    name = PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise MissingDependencyError(
            f"the installed ONNX Runtime has no {name}", fix='pip install "smlp-deploy[gpu]" in its own environment'
        )
    return name


def _session(content: bytes, path: Path, provider: str) -> tuple[onnxruntime.InferenceSession, bool]:
    """A session for checked bytes, and whether it emulates bf16."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    # Otherwise bytes valid as both ONNX and ONNX Runtime's own format are loaded as the latter, which was not checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        try:
            return onnxruntime.InferenceSession(content, options, providers=[provider]), False
        except KernelMissing:
            emulated = emulate_bf16(ModelProto.FromString(content)).SerializeToString()
            return onnxruntime.InferenceSession(emulated, options, providers=[provider]), True
    # onnxruntime's exceptions have no common base class.
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime cannot load it: {_reason(error)}", where=path, fix="export it again"
        ) from None


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def working_providers() -> dict[str, bool]:
    """For each provider that ONNX Runtime lists and `OnnxRuntimeRunner` knows: whether a session really uses it."""
    listed = onnxruntime.get_available_providers()
    return {name: _starts(provider) for name, provider in PROVIDERS.items() if provider in listed}


def _starts(provider: str) -> bool:
    """Whether a minimal session runs on it."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "smallest", value[:1], value[1:])
    # Old versions, which every supported ONNX Runtime reads.
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
        session.run(None, {"x": np.ones(1, np.float32)})
    # onnxruntime's exceptions have no common base class.
    except Exception:
        return False
    return bool(session.get_providers()[0] == provider)
