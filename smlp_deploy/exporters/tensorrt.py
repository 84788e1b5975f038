"""An ONNX graph to a TensorRT engine, with TensorRT 10.12+, 11 or TensorRT-RTX, and proof of what is inside.

The graph decides the precision: networks are strongly typed, and nothing here sets a precision flag. TensorRT-RTX
builds ahead of time for named GPU architectures and needs no GPU; TensorRT builds for the GPU it finds. Features that
differ are looked up in the binding; calls made without a check exist in all of them.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from smlp_deploy.dependencies import TENSORRT_MODULES, find_gpu, start_tensorrt, tensorrt_log
from smlp_deploy.errors import BuildError, MissingDependencyError, UsageError
from smlp_deploy.exporters.kernels import Kernel, kernels_from_inspector, kernels_from_log
from smlp_deploy.interrupts import Progress, StopRequest, no_progress, put_off
from smlp_deploy.metadata import BatchProfile

logger = logging.getLogger(__name__)

DEFAULT_ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")
ALONE = "sm75"
DATA_CENTER = {"sm90": "H100 and H200", "sm100": "B200", "sm103": "B300"}
"""GPUs for which TensorRT builds engines, on such a GPU, and TensorRT-RTX does not."""
"""Combined with any other architecture, the common plan is twice as large and slower on all of them."""

_MEMORY_FIGURES = ("Max Scratch Memory", "Total Activation Memory", "Total Weights Memory", "Peak memory usage")


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build.

    Attributes:
        profile: batch sizes the engine takes.
        architectures: GPU architectures of an ahead-of-time build, `sm89` for example; empty for this machine's GPU.
        workspace_gib: bound on scratch memory; None for TensorRT's default.
        optimization_level: 0 to 5; None for TensorRT's default.
        timing_cache: contents of a timing cache to start from.
        version_compatible: loadable by later TensorRT versions.
        hardware_compatible: runs on every GPU from Ampere on; TensorRT only.
        same_compute_capability: runs on every GPU of this one's compute capability; TensorRT only.
        tf32: multiply fp32 numbers in TF32, with 10 binary digits, where the GPU has it.
    """

    profile: BatchProfile = field(default_factory=BatchProfile)
    architectures: tuple[str, ...] = ()
    workspace_gib: float | None = None
    optimization_level: int | None = None
    timing_cache: bytes | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    same_compute_capability: bool = False
    tf32: bool = False


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A built engine and what the build reported about it.

    Attributes:
        plan: the bytes as TensorRT wrote them.
        kernels: at the profile's optimal batch.
        memory: the log's memory figures, line by line.
        timing_cache: its contents after the build, or None.
    """

    plan: bytes
    kernels: tuple[Kernel, ...]
    memory: tuple[str, ...]
    timing_cache: bytes | None


def find_backend(target: str) -> str:
    """The backend to build with: `target`, or for `auto` TensorRT if it and a GPU are present, otherwise RTX.

    Raises:
        MissingDependencyError: it is not installed.
    """
    wanted = list(TENSORRT_MODULES) if target == "auto" else [target]
    there = [backend for backend in wanted if find_spec(TENSORRT_MODULES[backend]) is not None]
    if target == "auto" and "tensorrt" in there and find_gpu() is None:
        there.remove("tensorrt")
    if not there:
        raise MissingDependencyError(
            f"{' or '.join(TENSORRT_MODULES[backend] for backend in wanted)} not installed, needed to build engines",
            fix='pip install "smlp-deploy[rtx]" (no GPU needed) or "smlp-deploy[gpu]"',
        )
    return there[0]


def default_options(backend: str) -> BuildOptions:
    """How to build if nothing is asked for: ahead of time for the usual architectures, or for this machine's GPU."""
    return BuildOptions(architectures=DEFAULT_ARCHITECTURES if TensorRT.load(backend).ahead_of_time else ())


def check_alone(architectures: Sequence[str]) -> None:
    """Check that sm75 is not combined with another architecture.

    Raises:
        UsageError: it is.
    """
    if ALONE in architectures and len(architectures) > 1:
        raise UsageError(
            f"{ALONE} combined with other architectures makes a plan that is twice as large and slower on all of them",
            where="--gpu-arch",
            fix=f"build {ALONE} by itself",
        )


class TensorRT:
    """One binding of TensorRT.

    Args:
        module: `tensorrt` or `tensorrt_rtx`.
    """

    def __init__(self, module: Any) -> None:
        self._trt = module
        self._log = tensorrt_log(module)
        self.ahead_of_time = hasattr(module, "ComputeCapability")

    @classmethod
    def load(cls, backend: str) -> TensorRT:
        """The binding of a backend, loaded once per process, because TensorRT keeps the first logger it is given."""
        if backend not in _LOADED:
            _LOADED[backend] = cls(importlib.import_module(TENSORRT_MODULES[backend]))
        return _LOADED[backend]

    @property
    def version(self) -> str:
        return str(self._trt.__version__)

    def architectures(self) -> tuple[str, ...]:
        """The architectures it can build for ahead of time."""
        names = (name.lower() for name in vars(self._trt.ComputeCapability)) if self.ahead_of_time else ()
        return tuple(sorted((name for name in names if name.startswith("sm")), key=lambda name: int(name[2:])))

    def build(self, graph: bytes, options: BuildOptions, *, progress: Progress = no_progress) -> Engine:
        """Build an engine, then read its kernels.

        Args:
            graph: an ONNX model; its first input is the image batch.
            options: how to build it.
            progress: called after each step; Ctrl-C cancels between steps.

        Raises:
            BuildError: the parser or the builder refused; the message names the node.
            KeyboardInterrupt: cancelled; nothing was written.
        """
        with self._log.recording() as messages:
            plan, cache = self._build(graph, options, detailed=not self.ahead_of_time, progress=progress)
        memory = tuple(line for line in messages if any(figure in line for figure in _MEMORY_FIGURES))
        kernels = self.kernels(graph, options) if self.ahead_of_time else self._inspected_kernels(plan, options)
        return Engine(plan=plan, kernels=kernels, memory=memory, timing_cache=cache)

    def check_architectures(self, architectures: Sequence[str]) -> None:
        """Check the architectures of an ahead-of-time build.

        Raises:
            UsageError: one is unknown, or sm75 is combined with another.
        """
        known = self.architectures()
        unknown = [name for name in architectures if name not in known]
        if unknown and unknown[0] in DATA_CENTER:
            raise UsageError(
                f"{unknown[0]} ({DATA_CENTER[unknown[0]]}) is for --target tensorrt only",
                where="--gpu-arch",
                fix="on a machine with such a GPU: smlp build-engine --target tensorrt, without --gpu-arch",
            )
        if unknown:
            raise UsageError(
                f"no architecture is called {unknown[0]!r}", where="--gpu-arch", fix=f"known: {', '.join(known)}"
            )
        check_alone(architectures)

    def kernels(self, graph: bytes, options: BuildOptions) -> tuple[Kernel, ...]:
        """The kernels of a graph, from the log of an ahead-of-time build.

        It is built at the optimal batch only, for the first architecture; the engine is discarded.
        """
        single = BuildOptions(
            profile=BatchProfile.fixed(options.profile.opt),
            architectures=options.architectures[:1],
            workspace_gib=options.workspace_gib,
            tf32=options.tf32,
        )
        with self._log.recording() as messages:
            self._build(graph, single, detailed=True, progress=no_progress)
        return kernels_from_log(messages)

    def _inspected_kernels(self, plan: bytes, options: BuildOptions) -> tuple[Kernel, ...]:
        with _uninterrupted():
            runtime = self._create("Runtime")
            if options.version_compatible:  # such a plan brings code of its own
                runtime.engine_host_code_allowed = True
            engine = runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise BuildError(
                    "the engine that was just built cannot be loaded again", fix="build it on the GPU that is to run it"
                )
            inspector = engine.create_engine_inspector()
            context = self._context_at(engine, options.profile.opt)
            if context is not None:
                inspector.execution_context = context
            text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        try:
            return kernels_from_inspector(text)
        except ValueError as error:  # not a reason to lose an engine that took minutes to build
            logger.warning("the engine's kernels are unknown: TensorRT's list of them cannot be read: %s", error)
            return ()

    def _context_at(self, engine: Any, batch: int) -> Any:
        """An execution context for `batch` images, by which the inspector knows shapes; None if it lacks the memory."""
        context = engine.create_execution_context()
        if context is None:
            logger.info("no GPU memory for an execution context, so the kernels' shapes are unknown")
            return None
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT:
                context.set_input_shape(name, (batch, *tuple(engine.get_tensor_shape(name))[1:]))
        return context

    def _create(self, name: str) -> Any:
        """The binding's Builder or Runtime; either starts CUDA, which needs a driver.

        Raises:
            BuildError: there is none, or it is older than TensorRT's CUDA.
        """
        created = start_tensorrt(self._trt, name)
        if created is None:
            raise BuildError(
                f"cannot create TensorRT's {name}: the NVIDIA driver is missing or too old for it",
                fix="update the driver; TensorRT builds need an NVIDIA GPU and driver",
            )
        return created

    def _build(
        self, graph: bytes, options: BuildOptions, *, detailed: bool, progress: Progress
    ) -> tuple[bytes, bytes | None]:
        trt = self._trt
        with _uninterrupted() as request:
            builder = self._create("Builder")
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            self._parse(graph, network)
            config = builder.create_builder_config()
            self._configure(config, options, detailed=detailed)
            self._set_batch(builder, network, config, options.profile, static=detailed and self.ahead_of_time)
            cache = self._timing_cache(config, options.timing_cache)
            monitor = _make_monitor(trt, request, progress)  # TensorRT does not keep it alive
            config.progress_monitor = monitor
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise BuildError(f"TensorRT could not build it: {self._log.last_error()}", fix=_advice(options))
        return bytes(plan), bytes(cache.serialize()) if cache is not None else None

    def _parse(self, graph: bytes, network: Any) -> None:
        parser = self._trt.OnnxParser(network, self._log.handle)
        if parser.parse(graph):
            return
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [
            (f"{error.node_operator()} node {error.node_name()!r}: " if error.node_operator() else "") + error.desc()
            for error in errors
        ]
        raise BuildError(f"TensorRT cannot parse the graph: {'; '.join(reasons) or 'no reason given'}")

    def _configure(self, config: Any, options: BuildOptions, *, detailed: bool) -> None:
        trt = self._trt
        if detailed:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if not options.tf32:  # TensorRT sets it
            config.clear_flag(trt.BuilderFlag.TF32)
        if options.workspace_gib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * (1 << 30)))
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
            if self.ahead_of_time:
                config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
        self._set_compatibility(config, options)
        if options.architectures:
            config.num_compute_capabilities = len(options.architectures)
            for index, name in enumerate(options.architectures):
                config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)

    def _set_compatibility(self, config: Any, options: BuildOptions) -> None:
        """On which GPUs the engine runs besides this one."""
        levels = self._trt.HardwareCompatibilityLevel
        if options.hardware_compatible:
            config.hardware_compatibility_level = levels.AMPERE_PLUS
        if options.same_compute_capability:
            if not hasattr(levels, "SAME_COMPUTE_CAPABILITY"):
                raise UsageError(
                    f"TensorRT {self.version} has no such engines", where="--same-capability", fix="update TensorRT"
                )
            config.hardware_compatibility_level = levels.SAME_COMPUTE_CAPABILITY

    def _set_batch(self, builder: Any, network: Any, config: Any, profile: BatchProfile, *, static: bool) -> None:
        images = network.get_input(0)
        batch, *rest = images.shape
        if batch != -1:
            if profile != BatchProfile.fixed(batch):
                raise UsageError(f"the graph takes exactly {batch} images", fix=f"use --batch {batch}")
        elif static:
            images.shape = (profile.opt, *rest)
        else:
            shapes = builder.create_optimization_profile()
            shapes.set_shape(images.name, (profile.min, *rest), (profile.opt, *rest), (profile.max, *rest))
            config.add_optimization_profile(shapes)

    def _timing_cache(self, config: Any, contents: bytes | None) -> Any:
        if contents is None:
            return None
        cache = config.create_timing_cache(contents)
        config.set_timing_cache(cache, False)
        return cache


_LOADED: dict[str, TensorRT] = {}


def _advice(options: BuildOptions) -> str | None:
    return None if options.workspace_gib is None else "raise --workspace"


@contextmanager
def _uninterrupted() -> Iterator[StopRequest]:
    """Keep Ctrl-C and SIGTERM from being raised in TensorRT's callbacks, where it would swallow them."""
    with put_off(again=False) as request:
        yield request
        request.obey()


def _make_monitor(trt: Any, request: StopRequest, progress: Progress) -> Any:
    """Reports progress, and cancels the build once a signal has arrived."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self.steps.get(phase_name, step + 1))
            return not request

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()
