"""ONNX graphs in ONNX Runtime: on the CPU, or on request with its CUDA or TensorRT provider.

ONNX Runtime's CPU provider computes an fp16 graph in fp32 with rounded weights, and has no bf16 convolution. A bf16
graph is therefore emulated: computed in fp32, with every value that is bf16 in the graph rounded to bf16.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, helper
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as KernelMissing

from smlp_deploy.dependencies import (
    PROVIDER_TENSORRT,
    TENSORRT_DISTRIBUTIONS,
    GpuDevice,
    find_gpu,
    installed_version,
    provider_tensorrt,
)
from smlp_deploy.errors import ArtifactError, MissingDependencyError, SmlpError
from smlp_deploy.files import cache_folder
from smlp_deploy.graphs.check import check_sizes
from smlp_deploy.graphs.edit import emulate_bf16
from smlp_deploy.graphs.file import INPUT_NAME, Graph
from smlp_deploy.images.batches import FloatArray, ImageArray, available_cores
from smlp_deploy.images.decode import give_memory_back
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.runners.base import Closing, images_at_once, in_batches, padded

logger = logging.getLogger(__name__)

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

Options = dict[str, Any]

_ERRORS_ONLY, _FATAL_ONLY = 3, 4

_IMAGES_PER_CORE = 4


class OnnxRuntimeRunner(Closing):
    """Runs a graph that `smlp export` made.

    With TensorRT, a session for a graph of any batch size begins with the first batch, whose size decides for which
    sizes the engine is built; a larger batch later begins another. Engines are kept in the user's cache directory.

    On the CPU a large batch runs in pieces, unless the graph takes only one batch size: that is faster, and memory does
    not grow with the batch.

    Args:
        graph: what to run.
        provider: "cpu", "cuda" or "tensorrt"; never falls back to another. The others than "cpu" silence ONNX Runtime's
            default logger in the whole process.
        gpu: which GPU these run on; None for the first.
        cores: to compute on; by default all that this process may use.

    Attributes:
        arithmetic: what products are computed in; see `arithmetic_of`.
        on_gpu: whether it runs on a GPU.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
        MissingDependencyError: the provider is not in this ONNX Runtime, or does not start here.
    """

    def __init__(
        self, graph: Graph, *, provider: str = "cpu", gpu: GpuDevice | None = None, cores: int | None = None
    ) -> None:
        self._cores = cores or available_cores()
        self._provider = _available(provider)
        _load_libraries(provider)
        self.on_gpu = provider != "cpu"
        self._gpu = gpu
        self.metadata = graph.metadata
        self.arithmetic = _arithmetic(provider, graph.metadata.precision)
        number = f":{gpu.index}" if gpu is not None and gpu.index and provider != "cpu" else ""
        tf32 = ", TF32" if self.arithmetic == "tf32" else ""
        self.name = f"onnxruntime ({provider.upper()}{number}{tf32}) {graph.path.name}"
        self._path, self._structure = graph.path, graph.structure
        self._batch_sizes = {graph.metadata.batch or 1}
        self._ran: set[int] = set()  # batch sizes
        self._session: onnxruntime.InferenceSession | None = None
        self._content_of_any_batch = b""
        self._largest = 0  # batch that the session takes, where it is begun by the first
        self._pieces = self._batch_profile()
        content = self._content(graph)
        if provider == "tensorrt" and graph.metadata.batch is None:
            if not _starts(self._provider):
                raise _does_not_start(self._provider, "a session of one node fails")
            self._content_of_any_batch = content
        else:
            self._session = self._begin(content, self._options(content))

    def _options(self, content: bytes, **shapes: Any) -> Options:
        """The options of its provider for a graph."""
        if self._provider == PROVIDERS["cpu"]:
            return {}
        number = {"device_id": str(self._gpu.index if self._gpu else 0)}
        if self._provider == PROVIDERS["tensorrt"]:
            return number | tensorrt_options(content, gpu=self._gpu, **shapes)
        return number | cuda_options(self.metadata.precision)

    def _begin(self, content: bytes, options: Options) -> onnxruntime.InferenceSession:
        """Create a session."""
        session, emulated = _session(content, self._path, self._provider, options, self._cores)
        # A listed provider may not start: without its libraries or a GPU, ONNX Runtime falls back to the CPU.
        if session.get_providers()[0] != self._provider:
            raise _does_not_start(self._provider, f"only {session.get_providers()[0]}")
        if emulated:
            self.name = self.name.replace(")", ", bf16 emulated)", 1)
        return session

    def _session_for(self, batch: int) -> onnxruntime.InferenceSession:
        if self._content_of_any_batch and batch > self._largest:
            largest = 1 << (batch - 1).bit_length()  # so that few engines serve all sizes
            self._session = None  # two do not have to fit on the GPU
            options = self._options(self._content_of_any_batch, largest=largest, images=self.metadata.input_shape)
            self._session = self._begin(self._content_of_any_batch, options)
            self._largest = largest
        assert self._session is not None, "the runner is closed"
        return self._session

    @classmethod
    def open(cls, path: Path, *, provider: str = "cpu", gpu: GpuDevice | None = None, cores: int | None = None) -> Self:
        """Run a file that `smlp export` wrote.

        Raises:
            ArtifactError: it is not an ONNX file, lacks smlp-deploy's metadata, or is refused by `graphs/check.py`.
            MissingDependencyError: the provider is not in this ONNX Runtime, or does not start here.
            ConfigError: its metadata is damaged.
        """
        _available(provider)
        return cls(Graph.read(path), provider=provider, gpu=gpu, cores=cores)

    def infer(self, batch: ImageArray) -> FloatArray:
        return self._run(batch) if self._pieces is None else in_batches(batch, self._pieces, self._run)

    def _batch_profile(self) -> BatchProfile | None:
        """The batch sizes that it runs at once; None for any."""
        if self.metadata.batch is not None:
            return BatchProfile.fixed(self.metadata.batch)
        if self.on_gpu:
            return None
        most = images_at_once(self.metadata.config.image_size, per_core=_IMAGES_PER_CORE, cores=self._cores)
        return BatchProfile(opt=most, max=most)

    def _content(self, graph: Graph) -> bytes:
        """The serialized model to run."""
        return graph.content

    def _run(self, batch: ImageArray) -> FloatArray:
        logits = self._outputs(padded(batch, self._size_for(len(batch))))[0]
        self._ran.add(len(logits))
        return logits[: len(batch)]

    def _size_for(self, batch: int) -> int:
        """The size to run a batch at: with CUDA, one that ran before and is at most four times as large.

        ONNX Runtime has cuDNN choose its kernels for each new size, which took 5 to 7 s for smlpnet_tiny in fp16 on an
        H100, where a batch of 64 takes 0.03 s. The last batch of a run would wait for that.
        """
        if self._provider != PROVIDERS["cuda"] or self.metadata.batch is not None:
            return batch
        return min((size for size in self._ran if batch <= size <= 4 * batch), default=batch)

    def _outputs(self, batch: ImageArray) -> list[FloatArray]:
        if len(batch) not in self._batch_sizes:
            check_sizes(self._structure, self._path, batch=len(batch))
            self._batch_sizes.add(len(batch))
        session = self._session_for(len(batch))
        try:
            return cast(list[FloatArray], session.run(None, {session.get_inputs()[0].name: batch}))
        # onnxruntime's exceptions have no common base class.
        except Exception as error:
            raise ArtifactError(f"ONNX Runtime cannot run it: {_reason(error)}", where=self._path) from None

    def close(self) -> None:
        self._session = None
        self._content_of_any_batch = b""


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


def _load_libraries(provider: str) -> None:
    """Load what a GPU provider links against: the libraries in NVIDIA's packages are not on the loader's path.

    Raises:
        MissingDependencyError: the TensorRT that is installed is not the one that the provider needs.
    """
    if provider == "cpu":
        return
    # What fails is an exception, or a provider that is missing from the session's, and becomes one line of ours. The
    # default logger also writes a line for each plan that cuDNN tries in vain, hundreds for one graph that then runs.
    onnxruntime.set_default_logger_severity(_FATAL_ONLY)
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with redirect_stdout(StringIO()) as said:  # it prints what it does not find, and stdout belongs to records
            preload(directory="")
        for line in said.getvalue().splitlines():
            logger.info("%s", line)
    if provider == "tensorrt" and find_spec("tensorrt") is not None:  # else the loader may find the system's
        _load_tensorrt()


def _load_tensorrt() -> None:
    try:
        version = str(importlib.import_module("tensorrt").__version__)
    # Its libraries are loaded by its import: one that is missing is an OSError or a RuntimeError.
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"tensorrt cannot be imported: {_reason(error)}", fix="smlp doctor names what is missing"
        ) from None
    if version.split(".")[0] != str(PROVIDER_TENSORRT):
        raise MissingDependencyError(
            f"ONNX Runtime's TensorRT provider needs TensorRT {PROVIDER_TENSORRT}, but {version} is installed",
            fix="smlp doctor says how to install it",
        )


def _arithmetic(provider: str, precision: str) -> str:
    """TensorRT multiplies fp32 numbers in TF32 by default, and ONNX Runtime does not pass on its switch for that."""
    return "tf32" if provider == "tensorrt" and precision == "fp32" else precision


def cuda_options(precision: str) -> Options:
    """Options of ONNX Runtime's CUDA provider for a graph.

    Without `use_tf32`, products and convolutions of fp32 numbers are computed in TF32: on an H100 logits of
    smlpnet_tiny then differ by 2.0e-3 of their scale, in place of 2.7e-6. `prefer_nhwc` makes the same network in fp16
    faster there, 21.1 in place of 28.0 ms for a batch of 64, with the same results; for fp32 it was not measured.
    """
    nhwc = {} if precision == "fp32" else {"prefer_nhwc": "1"}
    return {"use_tf32": "0", **nhwc}


def tensorrt_options(
    content: bytes, *, gpu: GpuDevice | None = None, largest: int = 0, images: tuple[int, ...] = ()
) -> Options:
    """Options of ONNX Runtime's TensorRT provider: its engine is kept, and built once for a range of batch sizes.

    ONNX Runtime finds an engine by names in the graph, whatever its weights, and TensorRT's versions cannot load each
    other's. So each file, version and GPU has a folder of its own.

    Args:
        content: the graph.
        gpu: which runs it; None for the first.
        largest: batch size that it is built for, and fastest at; 0 if the graph's is fixed.
        images: shape of one image at the graph's input.
    """
    options: Options = {}
    if largest:
        sizes = {"min": 1, "opt": largest, "max": largest}
        shapes = {name: "x".join(map(str, (batch, *images))) for name, batch in sizes.items()}
        options = {f"trt_profile_{name}_shapes": f"{INPUT_NAME}:{shape}" for name, shape in shapes.items()}
    tensorrt = next(filter(None, map(installed_version, TENSORRT_DISTRIBUTIONS["tensorrt"])), "of the system")
    gpu = gpu or find_gpu()
    machine = f"{gpu.name} {gpu.driver}" if gpu else "no GPU"
    folder = f"onnxruntime {onnxruntime.__version__} tensorrt {tensorrt} {machine}"
    try:
        kept = cache_folder("runtime") / "".join(c if c.isalnum() else "-" for c in folder)
        engines = kept / f"{hashlib.sha256(content).hexdigest()[:32]}-{largest}"
        engines.mkdir(parents=True, exist_ok=True)
    except (OSError, SmlpError) as error:  # results stay correct; only the next start is slower
        logger.warning("engines are not kept: %s", error)
        return options
    return options | {
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(kept),
    }


def _does_not_start(provider: str, reason: str) -> MissingDependencyError:
    # A TensorRT that is installed was imported before, and is of the right version.
    if provider == PROVIDERS["tensorrt"] and find_spec("tensorrt") is None and (gpu := find_gpu()) is not None:
        missing = provider_tensorrt(gpu)
        if missing is not None:
            what, line = missing
            return MissingDependencyError(f"{provider} does not start here: {what}", fix=line)
    return MissingDependencyError(
        f"{provider} does not start here, {reason}",
        fix="check the NVIDIA driver and CUDA libraries with smlp doctor, or use --provider cpu",
    )


def _session(
    content: bytes, path: Path, provider: str, options: Options, cores: int
) -> tuple[onnxruntime.InferenceSession, bool]:
    """A session for checked bytes, and whether it emulates bf16."""
    try:
        try:
            return _create(content, provider, options, cores), False
        except KernelMissing:
            emulated = emulate_bf16(ModelProto.FromString(content)).SerializeToString()
            return _create(emulated, provider, options, cores), True
    # onnxruntime's exceptions have no common base class.
    except Exception as error:
        if provider != PROVIDERS["cpu"] and not _starts(provider):
            raise _does_not_start(provider, _reason(error)) from None
        raise ArtifactError(
            f"ONNX Runtime cannot load it: {_reason(error)}", where=path, fix="export it again"
        ) from None


def _create(content: bytes, provider: str, options: Options, cores: int | None = None) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = _ERRORS_ONLY
    cores = cores or available_cores()
    if cores < (os.cpu_count() or 1):
        # Otherwise it starts a thread for each core of the machine and binds it there, whatever the process may use.
        settings.intra_op_num_threads = cores
    # Otherwise bytes valid as both ONNX and ONNX Runtime's own format are loaded as the latter, which was not checked.
    settings.add_session_config_entry("session.load_model_format", "ONNX")
    if provider == PROVIDERS["cpu"]:
        # The first run of each batch size records where its values lay, and reserves all of that once more for later
        # ones: for smlpnet_tiny and a batch of 32 another 0.57 GB, and no run is faster for it.
        settings.enable_mem_pattern = False
        session = onnxruntime.InferenceSession(content, settings, providers=[provider], enable_fallback=0)
        session._model_bytes = b""  # kept only to begin another session for a fallback, which is off
        give_memory_back()  # of what it parsed
        return session
    # Otherwise a session that fails, now or in any run, prints so and goes on with another provider.
    return onnxruntime.InferenceSession(content, settings, providers=[(provider, options)], enable_fallback=0)


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def working_providers() -> dict[str, bool]:
    """For each provider that ONNX Runtime lists and `OnnxRuntimeRunner` knows: whether a session really uses it."""
    listed = onnxruntime.get_available_providers()
    return {name: _works(name) for name, provider in PROVIDERS.items() if provider in listed}


def _works(name: str) -> bool:
    try:
        _load_libraries(name)
    except MissingDependencyError:
        return False
    return _starts(PROVIDERS[name])


def _starts(provider: str) -> bool:
    """Whether a minimal session runs on it."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "smallest", value[:1], value[1:])
    # Old versions, which every supported ONNX Runtime reads.
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    try:
        session = _create(model.SerializeToString(), provider, {})
        session.run(None, {"x": np.ones(1, np.float32)})
    # onnxruntime's exceptions have no common base class.
    except Exception:
        return False
    return bool(session.get_providers()[0] == provider)
