"""Engines in TensorRT or TensorRT-RTX, through polygraphy.

An engine is code: it is loaded only if its sha256 matches the manifest beside it. TensorRT-RTX compiles an engine's
kernels on the GPU that runs them; they are cached in the user's cache directory, and run as CUDA graphs. TensorRT does
neither at run time.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
import os
import platform
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from platformdirs import user_cache_path

from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.dependencies import (
    TENSORRT_DISTRIBUTIONS,
    TENSORRT_MODULES,
    GpuDevice,
    find_gpu,
    installed_version,
    require,
)
from smlp_deploy.errors import ArtifactError, MissingDependencyError, SmlpError
from smlp_deploy.files import check_regular, read_file, read_text, sha256_of, write_bytes
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import EngineManifest, trace_points
from smlp_deploy.runners.base import Closing, in_batches

logger = logging.getLogger(__name__)

_INPUT, _OUTPUT = "images", "logits"
MAX_ENGINE_BYTES = 4 << 30

_EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}


class Session(Protocol):
    """Polygraphy's TrtRunner; the next run overwrites its output buffers."""

    def infer(self, feed_dict: Mapping[str, FloatArray]) -> Mapping[str, Any]: ...


class TensorRTRunner(Closing):
    """Runs an engine on any number of images, split and padded to its batch profile.

    Args:
        path: the engine's file.
        manifest: the manifest beside it.
        session: runs the engine.
    """

    _keeps_kernels = True
    """Whether to cache the kernels that TensorRT-RTX compiles."""

    def __init__(self, path: Path, manifest: EngineManifest, session: Session) -> None:
        graphs = " (CUDA graphs)" if manifest.backend == "tensorrt-rtx" else ""
        self.name = f"{manifest.backend}{graphs} {path.name}"
        self.metadata = manifest.metadata
        self.arithmetic = manifest.arithmetic
        self._profile = manifest.profile
        self._session: Session | None = session
        self._stack = ExitStack()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Load an engine onto the GPU.

        Raises:
            ArtifactError: it does not match the manifest beside it, or there is no GPU that can run it.
            MissingDependencyError: its TensorRT backend is not installed, or in another major version.
        """
        plan = read_file(path, limit=MAX_ENGINE_BYTES, error=ArtifactError, fix="smlp build-engine makes one")
        manifest = _manifest_of(path, hashlib.sha256(plan).hexdigest())
        check_machine(path, manifest)
        return cls.load(plan, path, manifest)

    @classmethod
    def load(cls, plan: bytes, path: Path, manifest: EngineManifest) -> Self:
        """Load an engine that is already in memory, onto a GPU that passed `check_machine`.

        Args:
            plan: its bytes.
            path: its file, for names and messages.
            manifest: its manifest.

        Raises:
            ArtifactError: it does not load here.
        """
        with ExitStack() as stack:
            cache_path = (lambda: runtime_cache_path(manifest)) if cls._keeps_kernels else None
            runner = cls(path, manifest, _session(plan, path, manifest, stack=stack, cache_path=cache_path))
            runner._stack = stack.pop_all()
        return runner

    def infer(self, batch: FloatArray) -> FloatArray:
        return in_batches(batch, self._profile, self._run)

    def gpu_seconds(self, batch: FloatArray, *, runs: int) -> list[float]:
        if not self._profile.min <= len(batch) <= self._profile.max:
            return []
        self._run(batch)  # sets shapes and buffers, and copies the images to the GPU
        from polygraphy import cuda

        return time_executions(cuda.wrapper(), self._session, runs=runs)

    def _run(self, batch: FloatArray) -> FloatArray:
        assert self._session is not None, "the runner is closed"
        logits: FloatArray = self._session.infer({_INPUT: batch})[_OUTPUT]
        return logits

    def close(self) -> None:
        self._session = None
        self._stack.close()


class TracingTensorRTRunner(TensorRTRunner):
    """Returns values inside an engine's graph by running a second engine, built with the trace points as outputs.

    The values inside an engine cannot be read. Because the second engine has to output them, TensorRT may fuse other
    operations in it, so they can differ from the first engine's in the last digits.

    Args:
        path: the first engine's file.
        manifest: the second engine's manifest.
        session: runs the second engine.
    """

    _keeps_kernels = False

    def __init__(self, path: Path, manifest: EngineManifest, session: Session) -> None:
        super().__init__(path, manifest, session)
        self.name += " (rebuilt with trace points)"

    def trace(self, batch: FloatArray) -> dict[str, FloatArray]:
        names = [point.name for point in trace_points(self.metadata.config)]
        parts: list[dict[str, FloatArray]] = []

        def run(images: FloatArray) -> FloatArray:
            assert self._session is not None, "the runner is closed"
            outputs = self._session.infer({_INPUT: images})
            parts.append({name: outputs[name].copy() for name in names})
            logits: FloatArray = outputs[_OUTPUT]
            return logits

        in_batches(batch, self._profile, run)
        # Only the end of the last part can be padded.
        return {name: np.concatenate([part[name] for part in parts])[: len(batch)] for name in names}


def read_manifest(path: Path) -> EngineManifest:
    """The manifest of the engine at `path`, checked against the engine's sha256; the engine is not loaded.

    Raises:
        ArtifactError: one of the two files cannot be read, or the manifest is of another engine.
        ConfigError: the manifest is damaged.
    """
    check_regular(path, error=ArtifactError, fix="smlp build-engine makes one")
    try:
        sha256 = sha256_of(path)
    except OSError as error:
        raise ArtifactError(f"cannot read it: {error.strerror}", where=path, fix="make it readable") from None
    return _manifest_of(path, sha256)


def _manifest_of(path: Path, sha256: str) -> EngineManifest:
    """The manifest beside an engine, if it is of the engine with this hash."""
    beside = engine_manifest_path(path)
    text = read_text(beside, error=ArtifactError, fix="build the engine again")
    manifest = EngineManifest.from_json(text, where=beside)
    if manifest.engine_sha256 != sha256:
        raise ArtifactError(
            "does not match the sha256 in its manifest, so it is not loaded", where=path, fix="build it again"
        )
    return manifest


def check_machine(path: Path, manifest: EngineManifest) -> None:
    """Check that an engine can run here, as far as possible without loading it.

    Raises:
        ArtifactError: there is no GPU, or the engine was built for others.
        MissingDependencyError: its backend is not installed, or in another major version.
    """
    gpu = find_gpu()
    if gpu is None:
        raise ArtifactError("needs an NVIDIA GPU and driver; none was found", where=path, fix="use the ONNX file")
    if not _built_for(gpu, manifest):
        raise ArtifactError(
            f"was built for {', '.join(manifest.architectures)}, this GPU is {gpu.architecture} ({gpu.name})",
            where=path,
            fix="build it again for this GPU",
        )
    if manifest.system not in ("", system()):
        raise ArtifactError(
            f"was built on {manifest.system}, this is {system()}", where=path, fix="build it again on this machine"
        )
    extra = _EXTRAS[manifest.backend]
    require("polygraphy", TENSORRT_MODULES[manifest.backend], purpose=f"to run {manifest.backend} engines", extra=extra)
    installed = next(filter(None, map(installed_version, TENSORRT_DISTRIBUTIONS[manifest.backend])), "")
    if not _loads_in(installed, manifest):
        raise MissingDependencyError(
            f"built by {manifest.backend} {manifest.version}, but {installed or 'none'} is installed",
            where=path,
            fix="build the engine again with the installed version",
        )
    if manifest.gpu not in ("", gpu.name) and not manifest.options.get("hardware_compatible"):
        logger.warning("%s was built on %s, this GPU is %s: build it again if it is slow", path, manifest.gpu, gpu.name)


def system() -> str:
    """The operating system and processor, outside of which an engine does not load: "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def _loads_in(installed: str, manifest: EngineManifest) -> bool:
    """Whether an installed version can load the engine: the same release, or a later one if it was built for that."""
    now, then = (tuple(map(int, re.findall(r"\d+", version)[:4])) for version in (installed, manifest.version))
    if manifest.options.get("version_compatible"):
        return now >= then
    digits = min(len(now), len(then))
    return digits > 0 and now[:digits] == then[:digits]


def _built_for(gpu: GpuDevice, manifest: EngineManifest) -> bool:
    if manifest.options.get("hardware_compatible"):  # for Ampere and later
        return int(gpu.architecture[2:]) >= 80
    return not manifest.architectures or gpu.architecture in manifest.architectures


def _session(
    plan: bytes, path: Path, manifest: EngineManifest, *, stack: ExitStack, cache_path: Callable[[], Path] | None
) -> Session:
    """Polygraphy's runner for the engine with the bytes `plan`, active until `stack` is closed."""
    if manifest.backend == "tensorrt-rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when polygraphy is imported
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.exception import PolygraphyException

    try:
        engine = EngineFromBytes(plan)()
        module = importlib.import_module(TENSORRT_MODULES[manifest.backend])
        context = create_context(module, engine, cache_path, stack)
        session: Session = stack.enter_context(TrtRunner(context))
    except PolygraphyException:
        built_for = ", ".join(manifest.architectures) or "the GPU of its builder"
        raise ArtifactError(
            f"{manifest.backend} {manifest.version} cannot load it on this GPU",
            where=path,
            fix=f"it was built for {built_for}; build it again here",
        ) from None
    return session


def time_executions(cuda: Any, session: Any, *, runs: int) -> list[float]:
    """Seconds that the GPU takes to repeat the session's last run, each between two CUDA events.

    The events belong to the CUDA runtime that polygraphy has loaded. cuda-bindings is not worth it for five calls: it
    is 31 MB, brings its own runtime, and needs its own error check in place of polygraphy's.

    Args:
        cuda: polygraphy's wrapper of the CUDA runtime, which does not wrap events.
        session: polygraphy's TrtRunner with shapes and buffers set.
        runs: number of runs.
    """
    runtime, stream = cuda.handle, ctypes.c_void_p(session.stream.ptr)
    start, end, milliseconds = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float()
    with ExitStack() as stack:
        for event in (start, end):
            cuda.check(runtime.cudaEventCreate(ctypes.byref(event)))
            stack.callback(runtime.cudaEventDestroy, event)
        seconds = []
        for _ in range(runs):
            cuda.check(runtime.cudaEventRecord(start, stream))
            if not session.context.execute_async_v3(session.stream.ptr):
                raise ArtifactError("TensorRT cannot run it")
            cuda.check(runtime.cudaEventRecord(end, stream))
            cuda.check(runtime.cudaEventSynchronize(end))
            cuda.check(runtime.cudaEventElapsedTime(ctypes.byref(milliseconds), start, end))
            seconds.append(milliseconds.value / 1000)
    return seconds


def runtime_cache_path(manifest: EngineManifest) -> Path:
    """Where to cache the kernels that TensorRT-RTX compiles for this engine, GPU and driver."""
    gpu = find_gpu()
    assert gpu is not None, "an engine was loaded without a GPU"
    name = "".join(c if c.isalnum() else "-" for c in gpu.name)
    return user_cache_path("smlp-deploy") / "runtime" / f"{manifest.engine_sha256[:32]}-{name}-{gpu.driver}.cache"


def create_context(trt: Any, engine: Any, cache_path: Callable[[], Path] | None, stack: ExitStack) -> Any:
    """An execution context; for TensorRT-RTX one that captures CUDA graphs and caches its compiled kernels.

    Args:
        trt: the binding.
        engine: loaded by it.
        cache_path: returns where to cache compiled kernels, called only for TensorRT-RTX; None for no cache.
        stack: on closing, writes the kernels if new ones were compiled.
    """
    if not hasattr(trt, "IRuntimeCache"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    if cache_path is None:
        return engine.create_execution_context(config)
    cache = config.create_runtime_cache()
    path = cache_path()
    stored = path.read_bytes() if path.is_file() else b""
    if stored and not cache.deserialize(stored):
        logger.info("%s was written in another environment, so the kernels are compiled again", path)
    config.set_runtime_cache(cache)
    stack.callback(_keep, cache, path, stored)
    return engine.create_execution_context(config)


def _keep(cache: Any, path: Path, stored: bytes) -> None:
    kernels = bytes(cache.serialize())
    if kernels == stored:
        return
    try:
        write_bytes(path, kernels)
    except (OSError, SmlpError) as error:  # results stay correct; only the next start is slower
        logger.warning("compiled kernels were not cached: %s", error)
