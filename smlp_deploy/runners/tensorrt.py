"""Engines in TensorRT or TensorRT-RTX.

An engine is code: it is loaded only if its sha256 matches the manifest beside it. TensorRT-RTX compiles an engine's
kernels on the GPU that runs them; they are cached in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import platform
import re
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.dependencies import (
    TENSORRT_DISTRIBUTIONS,
    TENSORRT_MODULES,
    GpuDevice,
    find_gpu,
    installed_version,
    require,
    start_tensorrt,
    tensorrt_log,
)
from smlp_deploy.errors import ArtifactError, GpuError, MissingDependencyError, SmlpError
from smlp_deploy.files import cache_folder, check_regular, read_file, read_text, sha256_of, write_bytes
from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.metadata import EngineManifest, trace_points
from smlp_deploy.runners.base import Closing, in_batches, padded
from smlp_deploy.runners.cuda import Cuda
from smlp_deploy.runners.execution import SLOTS, Execution

logger = logging.getLogger(__name__)

_OUTPUT = "logits"
MAX_ENGINE_BYTES = 4 << 30

_EXTRAS = {"tensorrt": "gpu", "tensorrt-rtx": "rtx"}


class TensorRTRunner(Closing):
    """Runs an engine on any number of images, split and padded to its batch profile.

    Args:
        path: the engine's file.
        manifest: the manifest beside it.
        execution: the engine on the GPU.
    """

    _is_kept = True
    """Whether it is worth while to cache the kernels that TensorRT-RTX compiles, and to capture CUDA graphs."""

    def __init__(self, path: Path, manifest: EngineManifest, execution: Execution) -> None:
        self._backend, self._file = manifest.backend, path.name
        self.metadata = manifest.metadata
        self.arithmetic = manifest.arithmetic
        self._profile = manifest.profile
        self._execution: Execution | None = execution
        self._submitted: deque[int] = deque()  # images of each batch under way
        self._stack = ExitStack()

    @property
    def name(self) -> str:
        graphs = " (CUDA graphs)" if self._execution is not None and self._execution.captured else ""
        return f"{self._backend}{graphs} {self._file}"

    @classmethod
    def open(cls, path: Path, *, gpu: GpuDevice | None = None) -> Self:
        """Load an engine onto a GPU, by default the first.

        Raises:
            ArtifactError: it does not match the manifest beside it, or there is no GPU that can run it.
            MissingDependencyError: its TensorRT backend is not installed, or in another major version.
        """
        plan = read_file(path, limit=MAX_ENGINE_BYTES, error=ArtifactError, fix="smlp build-engine makes one")
        manifest = _manifest_of(path, hashlib.sha256(plan).hexdigest())
        check_machine(path, manifest, gpu)
        return cls.load(plan, path, manifest, gpu)

    @classmethod
    def load(cls, plan: bytes, path: Path, manifest: EngineManifest, gpu: GpuDevice | None = None) -> Self:
        """Load an engine that is already in memory, onto a GPU that passed `check_machine`.

        Args:
            plan: its bytes.
            path: its file, for names and messages.
            manifest: its manifest.
            gpu: where to run; None for the first.

        Raises:
            ArtifactError: it does not load here, takes another input than its manifest says, or does not fit in the
                GPU's memory.
            GpuError: the GPU fails.
        """
        with ExitStack() as stack:
            cache_path = (lambda: runtime_cache_path(manifest, gpu)) if cls._is_kept else None
            execution = _execution(plan, path, manifest, gpu, stack=stack, cache_path=cache_path)
            runner = cls(path, manifest, execution)
            runner._stack = stack.pop_all()
        return runner

    @property
    def slots(self) -> int:
        return SLOTS

    @property
    def largest(self) -> int:
        return self._profile.max

    @property
    def batch_size(self) -> int:
        """Images per batch that it is fastest with."""
        return self._profile.opt

    @property
    def device_bytes(self) -> int:
        """The GPU memory of buffers and scratch, without the engine's weights."""
        return self._opened.device_bytes

    def infer(self, batch: ImageArray) -> FloatArray:
        return in_batches(batch, self._profile, self._run)

    def allocate(self, images: int) -> ImageArray:
        return self._opened.allocate(images)

    def release(self, memory: ImageArray) -> None:
        self._opened.release(memory)

    def submit(self, batch: ImageArray) -> None:
        self._submit(batch, reuse=True)

    def collect(self) -> FloatArray:
        logits: FloatArray = self._opened.collect()[_OUTPUT]
        return logits[: self._submitted.popleft()]

    def gpu_seconds(self, batch: FloatArray, *, runs: int) -> list[float]:
        if not self._profile.min <= len(batch) <= self._profile.max:
            return []
        self._run(batch)  # so that its images are on the GPU
        return self._opened.seconds(len(batch), runs=runs)

    @property
    def _opened(self) -> Execution:
        assert self._execution is not None, "the runner is closed"
        return self._execution

    def _run(self, batch: ImageArray) -> FloatArray:
        self._submit(batch, reuse=False)
        return self.collect()

    def _submit(self, batch: ImageArray, *, reuse: bool) -> None:
        self._opened.submit(padded(batch, self._profile.min), reuse=reuse)
        self._submitted.append(len(batch))

    def close(self) -> None:
        self._execution = None
        self._stack.close()


class TracingTensorRTRunner(TensorRTRunner):
    """Returns values inside an engine's graph by running a second engine, built with the trace points as outputs.

    The values inside an engine cannot be read. Because the second engine has to output them, TensorRT may fuse other
    operations in it, so they can differ from the first engine's in the last digits.

    Args:
        path: the first engine's file.
        manifest: the second engine's manifest.
        execution: the second engine on the GPU.
    """

    _is_kept = False

    @property
    def name(self) -> str:
        return f"{super().name} (rebuilt with trace points)"

    def trace(self, batch: ImageArray) -> dict[str, FloatArray]:
        names = [point.name for point in trace_points(self.metadata.config)]
        parts: list[dict[str, FloatArray]] = []

        def run(images: ImageArray) -> FloatArray:
            self._opened.submit(images)
            outputs = self._opened.collect()
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


def check_machine(path: Path, manifest: EngineManifest, gpu: GpuDevice | None = None) -> None:
    """Check that an engine can run here, on `gpu` or by default the first, as far as possible without loading it.

    Raises:
        GpuError: there is none.
        ArtifactError: the engine was built for others.
        MissingDependencyError: its backend is not installed, or in another major version.
    """
    gpu = gpu or find_gpu()
    if gpu is None:
        raise GpuError("needs an NVIDIA GPU and driver; none was found", where=path, fix="use the ONNX file")
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
    require(
        "cuda.bindings", TENSORRT_MODULES[manifest.backend], purpose=f"to run {manifest.backend} engines", extra=extra
    )
    installed = next(filter(None, map(installed_version, TENSORRT_DISTRIBUTIONS[manifest.backend])), "")
    if not _loads_in(installed, manifest):
        raise MissingDependencyError(
            f"built by {manifest.backend} {manifest.version}, but {installed or 'none'} is installed",
            where=path,
            fix="build the engine again with the installed version",
        )
    fits_all = manifest.options.get("hardware_compatible") or manifest.options.get("same_compute_capability")
    if manifest.gpu not in ("", gpu.name) and not fits_all:
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


def _binding(manifest: EngineManifest) -> Any:
    return importlib.import_module(TENSORRT_MODULES[manifest.backend])


def _execution(
    plan: bytes,
    path: Path,
    manifest: EngineManifest,
    gpu: GpuDevice | None,
    *,
    stack: ExitStack,
    cache_path: Callable[[], Path] | None,
) -> Execution:
    """The engine with the bytes `plan` on the GPU, until `stack` is closed; captured as graphs if kernels are kept."""
    trt = _binding(manifest)
    cuda = Cuda(gpu.index if gpu else 0)  # first, because TensorRT loads engines onto the GPU that is current here
    stack.callback(cuda.close)
    runtime = start_tensorrt(trt, "Runtime")
    if runtime is None:
        raise GpuError(
            f"{manifest.backend} does not start: the NVIDIA driver is missing or too old for it",
            where=path,
            fix="update the driver",
        )
    if manifest.options.get("version_compatible"):  # such an engine brings code of its own; its sha256 was checked
        runtime.engine_host_code_allowed = True
    with tensorrt_log(trt).recording():
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        logger.info("%s: %s", path, tensorrt_log(trt).last_error())
        built_for = ", ".join(manifest.architectures) or "the GPU of its builder"
        raise ArtifactError(
            f"{manifest.backend} {manifest.version} cannot load it on this GPU",
            where=path,
            fix=f"it was built for {built_for}; build it again here",
        )
    make_context = context_maker(trt, engine, cache_path, stack)
    execution = Execution(
        trt, engine, cuda, largest=manifest.profile.max, make_context=make_context, graphs=cache_path is not None
    )
    stack.callback(execution.close)
    _check_input(execution, path, manifest)
    return execution


def _check_input(execution: Execution, path: Path, manifest: EngineManifest) -> None:
    found = (execution.image_dtype.name, execution.image_shape)
    stated = (manifest.metadata.input, manifest.metadata.input_shape)
    if found != stated:
        texts = (f"{element} Nx{'x'.join(map(str, shape))}" for element, shape in (found, stated))
        raise ArtifactError(
            "takes {}, but its manifest says {}".format(*texts), where=path, fix="build the engine again"
        )


def runtime_cache_path(manifest: EngineManifest, gpu: GpuDevice | None = None) -> Path:
    """Where to cache the kernels that TensorRT-RTX compiles for this engine, GPU (by default the first) and driver.

    Raises:
        SmlpError: there is no home directory.
    """
    gpu = gpu or find_gpu()
    assert gpu is not None, "an engine was loaded without a GPU"
    name = "".join(c if c.isalnum() else "-" for c in gpu.name)
    return cache_folder("runtime") / f"{manifest.engine_sha256[:32]}-{name}-{gpu.driver}.cache"


def context_maker(trt: Any, engine: Any, cache_path: Callable[[], Path] | None, stack: ExitStack) -> Callable[[], Any]:
    """Makes execution contexts that are given their scratch memory; TensorRT-RTX's share a cache of compiled kernels.

    Args:
        trt: the binding.
        engine: loaded by it.
        cache_path: returns where to cache compiled kernels, called only for TensorRT-RTX; None for no cache.
        stack: on closing, writes the kernels if new ones were compiled.
    """
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    if not hasattr(trt, "IRuntimeCache"):
        return lambda: engine.create_execution_context(strategy)
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    # Compiled when a batch size first runs, not later in the background, so that a captured graph has the best kernels.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    path = _where_kept(cache_path) if cache_path is not None else None
    if path is not None:
        cache = config.create_runtime_cache()
        stored = path.read_bytes() if path.is_file() else b""
        if stored and not cache.deserialize(stored):
            logger.info("%s was written in another environment, so the kernels are compiled again", path)
        config.set_runtime_cache(cache)
        stack.callback(_keep, cache, path, stored)
    return lambda: engine.create_execution_context(config)


def _where_kept(cache_path: Callable[[], Path]) -> Path | None:
    try:
        return cache_path()
    except SmlpError as error:  # results stay correct; only the next start is slower
        logger.warning("compiled kernels were not cached: %s", error)
        return None


def _keep(cache: Any, path: Path, stored: bytes) -> None:
    kernels = bytes(cache.serialize())
    if kernels == stored:
        return
    try:
        write_bytes(path, kernels)
    except (OSError, SmlpError) as error:  # results stay correct; only the next start is slower
        logger.warning("compiled kernels were not cached: %s", error)
