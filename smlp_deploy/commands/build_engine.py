"""smlp build-engine."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from smlp_deploy.commands import options as o
from smlp_deploy.commands.groups import Calibration, Gates, with_groups
from smlp_deploy.dependencies import require, require_onnxruntime
from smlp_deploy.errors import ConfigError, UsageError
from smlp_deploy.files import check_writable
from smlp_deploy.metadata import BatchProfile

if TYPE_CHECKING:
    from smlp_deploy.dependencies import GpuDevice
    from smlp_deploy.exporters.tensorrt import BuildOptions
    from smlp_deploy.pipeline.build import EngineBuild
    from smlp_deploy.pipeline.precision import Int8Options


@dataclass(frozen=True, kw_only=True)
class _Batches:
    """The batch sizes of an engine."""

    min_batch: o.MinBatchOption = None
    opt_batch: o.OptBatchOption = None
    max_batch: o.MaxBatchOption = None
    batch: o.ExactBatchOption = None

    def profile(self) -> BatchProfile:
        """The batch profile that the options give.

        Raises:
            UsageError: they contradict each other, or are not in order.
        """
        named = {"min": self.min_batch, "opt": self.opt_batch, "max": self.max_batch}
        sizes = {name: size for name, size in named.items() if size is not None}
        if self.batch is not None:
            if sizes:
                raise UsageError(f"--batch contradicts --{next(iter(sizes))}-batch", fix="give one or the other")
            return BatchProfile.fixed(self.batch)
        default = BatchProfile()
        opt = sizes.get("opt", min(default.opt, sizes.get("max", default.max)))
        try:
            return BatchProfile(**{"opt": opt, "max": max(opt, default.max)} | sizes)
        except ConfigError as error:
            raise UsageError(error.what, where="--min-batch, --opt-batch, --max-batch", fix=error.fix) from None


@dataclass(frozen=True, kw_only=True)
class _Tuning:
    """What TensorRT is told besides."""

    workspace: o.WorkspaceOption = None
    timing_cache: o.TimingCacheOption = None
    optimization_level: o.OptimizationLevelOption = None
    version_compatible: o.VersionCompatibleOption = False
    hardware_compatible: o.HardwareCompatibleOption = False
    same_capability: o.SameCapabilityOption = False
    tf32: o.Tf32Option = False

    def check(self, backend: str) -> None:
        """Check that they are for a backend.

        Raises:
            UsageError: one is not, or two contradict each other.
        """
        hardware, capability = self.hardware_compatible, self.same_capability
        for option, given in (("--hardware-compatible", hardware), ("--same-capability", capability)):
            if given and backend != "tensorrt":
                raise UsageError(f"{backend} builds for the architectures of --gpu-arch", where=option)
        if hardware and capability:
            raise UsageError("--hardware-compatible contradicts --same-capability", fix="give one or the other")

    def build_options(self, profile: BatchProfile, architectures: tuple[str, ...], backend: str) -> BuildOptions:
        """How to build an engine.

        Raises:
            UsageError: the timing cache cannot be read.
        """
        from smlp_deploy.exporters.tensorrt import BuildOptions

        return BuildOptions(
            profile=profile,
            architectures=architectures,
            workspace_gib=self.workspace,
            optimization_level=self.optimization_level,
            timing_cache=_read_timing_cache(self.timing_cache, backend),
            version_compatible=self.version_compatible,
            hardware_compatible=self.hardware_compatible,
            same_compute_capability=self.same_capability,
            tf32=self.tf32,
        )


@with_groups
def build_engine(
    *,
    source: o.BuildSourceArgument = None,
    fp16: o.EngineFp16Option = False,
    bf16: o.EngineBf16Option = False,
    int8: o.Int8Option = False,
    fp32: o.EngineFp32Option = False,
    calibration: Calibration,
    batches: _Batches,
    float_input: o.FloatInputOption = False,
    target: o.EngineTargetOption = o.EngineTarget.auto,
    device: o.BuildDeviceOption = None,
    gpu_arch: o.GpuArchOption = None,
    tuning: _Tuning,
    gates: Gates,
    output: o.EngineOutputOption = None,
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Build a TensorRT engine and summarize it: kernels by precision, bytes moved."""
    from smlp_deploy.exporters.tensorrt import find_backend

    if output is not None and output.suffix != ".engine":
        raise UsageError("an engine's name ends in .engine", where=output)
    precision = o.choose_precision(None, fp16=fp16, bf16=bf16, int8=int8, fp32=fp32)
    profile = batches.profile()
    o.check_source(source)
    backend = find_backend(target)
    tuning.check(backend)
    gpu = _chosen_gpu(device)
    options = tuning.build_options(profile, _architectures(gpu_arch, backend), backend)
    require("ml_dtypes", "onnx", "onnx_ir", purpose="to convert graphs", extra="export")
    require_onnxruntime()
    for written in (output, tuning.timing_cache):
        if written is not None:
            check_writable(written)
    quantization = calibration.int8_options(precision, per_channel=backend == "tensorrt")
    _build(
        source,
        precision,
        "float32" if float_input else "uint8",
        quantization,
        options,
        output,
        tuning.timing_cache,
        backend=backend,
        bounds=gates.bounds,
        gpu=gpu,
        as_json=as_json,
    )


def _build(
    source: str | None,
    precision: str | None,
    wanted_input: str,
    quantization: Int8Options | None,
    options: BuildOptions,
    output: Path | None,
    timing_cache: Path | None,
    *,
    backend: str,
    bounds: dict[str, float],
    gpu: GpuDevice | None,
    as_json: bool,
) -> None:
    """Build with the checked options, and show the result."""
    from smlp_deploy.commands.sources import source_graph
    from smlp_deploy.commands.tables import show_kernels, show_parity, show_sensitivity
    from smlp_deploy.commands.terminal import building, say, suggest
    from smlp_deploy.files import write_bytes
    from smlp_deploy.pipeline.build import build_engine

    graph = source_graph(source, form="gpu")
    with building("reading the graph") as progress:
        result = build_engine(
            graph,
            output,
            precision=precision,
            wanted_input=wanted_input,
            options=options,
            backend=backend,
            bounds=bounds,
            int8=quantization,
            gpu=gpu,
            progress=progress,
        )
    if result.sensitivity is not None:
        show_sensitivity(result.sensitivity)
    if timing_cache is not None and result.timing_cache is not None:
        write_bytes(timing_cache, result.timing_cache)
    show_kernels(result.summary)
    typer.echo(_as_json(result) if as_json else result.path)
    if result.parity is not None:
        show_parity(result.parity, on_stderr=True)
    how = f"built ahead of time by {backend} for {', '.join(options.architectures)}" if options.architectures else ""
    ran = "run here and compared with its ONNX file" if result.parity else f"not run here: {result.not_run}"
    say(f"{how or f'built by {backend} for this GPU'}; {ran}")
    say(f"batches of {_range(options.profile)}; smlp predict uses {options.profile.opt}")
    if not as_json:
        suggest("smlp", "predict", "--model", result.path, "IMAGES")


def _as_json(result: EngineBuild) -> str:
    """The engine's files, its kernels, and its comparison with the ONNX file, or why there is none."""
    facts = {
        "path": str(result.path),
        "manifest": str(result.manifest_path),
        "kernels": asdict(result.summary),
        "parity": json.loads(result.parity.to_json()) if result.parity is not None else None,
        "not_run": result.not_run or None,
    }
    return json.dumps(facts, indent=2)


def _range(profile: BatchProfile) -> str:
    return str(profile.max) if profile.min == profile.max else f"{profile.min} to {profile.max}"


def _chosen_gpu(device: str | None) -> GpuDevice | None:
    placement = o.choose_placement(device, None)
    if placement.only_cpu:
        raise UsageError("an engine runs only on a GPU", where="--device cpu", fix="leave it out")
    return placement.gpu


def _architectures(given: str | None, backend: str) -> tuple[str, ...]:
    """The GPU architectures to build for ahead of time; empty where TensorRT builds for the GPU it finds."""
    from smlp_deploy.exporters.tensorrt import DEFAULT_ARCHITECTURES, TensorRT

    tensorrt = TensorRT.load(backend)
    if not tensorrt.ahead_of_time:
        if given is not None:
            raise UsageError(
                f"{backend} builds for this machine's GPU", where="--gpu-arch", fix="--target tensorrt-rtx"
            )
        return ()
    names = tuple(name.strip().lower() for name in given.split(",")) if given else DEFAULT_ARCHITECTURES
    tensorrt.check_architectures(names)
    return names


def _read_timing_cache(path: Path | None, backend: str) -> bytes | None:
    """The contents of a timing cache; empty for a new file."""
    from smlp_deploy.commands.terminal import note
    from smlp_deploy.exporters.tensorrt import TensorRT

    if path is None:
        return None
    if TensorRT.load(backend).ahead_of_time:
        note(f"{backend} does not time kernels, so the timing cache has no effect")
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UsageError(f"cannot read the timing cache: {error.strerror}", where=path) from None
