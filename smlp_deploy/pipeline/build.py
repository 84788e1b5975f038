"""From an fp32 graph to an engine with its manifest beside it, verified as far as this machine allows."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smlp_deploy.artifacts import engine_manifest_path, engine_path, failed_path, untried_path
from smlp_deploy.dependencies import GpuDevice, find_gpu, require_onnxruntime
from smlp_deploy.errors import BuildError, CheckError, SmlpError, UsageError
from smlp_deploy.evaluation.parity import Bounds, ParityReport, prove
from smlp_deploy.evaluation.sensitivity import SensitivityReport
from smlp_deploy.exporters.kernels import UNKNOWN, KernelSummary, summarize
from smlp_deploy.exporters.tensorrt import BuildOptions, Engine, TensorRT, default_options, find_backend
from smlp_deploy.files import check_writable, replacing
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.defaults import default_images
from smlp_deploy.interrupts import Progress, no_progress
from smlp_deploy.metadata import EngineManifest
from smlp_deploy.pipeline.precision import Int8Options, plan_quantization, to_input, to_precision
from smlp_deploy.runners.cuda import use_gpu
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from smlp_deploy.runners.tensorrt import TensorRTRunner, check_machine, system

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The graph to build an engine from, and the ONNX file's graph, which may be the same.

    Attributes:
        source: the graph of the ONNX file.
        graph: in the precision of the engine, and with its input.
        images: to compare the graph and its engine on.
        parity: the comparison of `graph` with `source`; None if they are the same.
        sensitivity: each int8 layer's sensitivity and chosen precision, if measured.
    """

    source: Graph
    graph: Graph
    images: Sequence[Path]
    parity: ParityReport | None = None
    sensitivity: SensitivityReport | None = None


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """The result of a build: the engine, the manifest beside it, its kernels, and the timing cache if one was used.

    `sensitivity` is each int8 layer's sensitivity and chosen precision, if measured. `parity` is its comparison
    with its ONNX source, or None if the engine could not run here; `not_run` says why.
    """

    path: Path
    manifest_path: Path
    summary: KernelSummary
    parity: ParityReport | None
    timing_cache: bytes | None
    not_run: str = ""
    sensitivity: SensitivityReport | None = None


def build_engine(
    source: str | Path | Graph,
    target: str | Path | None = None,
    *,
    precision: str | None = None,
    wanted_input: str = "uint8",
    options: BuildOptions | None = None,
    backend: str | None = None,
    bounds: Bounds | None = None,
    int8: Int8Options | None = None,
    gpu: GpuDevice | None = None,
    progress: Progress = no_progress,
) -> EngineBuild:
    """Build a TensorRT engine from an ONNX file, with its manifest beside it; see `prepare_graph`, `build_prepared`.

    Args:
        source: the ONNX file, or its graph.
        target: the engine's file; by default in artifacts/.
        precision: "fp32", "fp16", "bf16" or "int8"; None for that of the file.
        wanted_input: what the engine takes: "uint8", pixels, or "float32", normalized images.
        options: how to build it; by default `default_options` of the backend.
        backend: "tensorrt" or "tensorrt-rtx"; by default the one that is installed.
        bounds: of the numeric gates; replace those of the precision.
        int8: how to quantize.
        gpu: where TensorRT builds it, unless ahead of time, and where it is tried; None for the first.
        progress: told of each step.

    Raises:
        SmlpError: the graph, its conversion or the engine fails; see `prepare_graph` and `build_prepared`.
    """
    graph = source if isinstance(source, Graph) else Graph.read(Path(source))
    backend = backend or find_backend("auto")
    prepared = prepare_graph(graph, precision, wanted_input=wanted_input, bounds=bounds, int8=int8, progress=progress)
    path = Path(target) if target is not None else engine_path(prepared.graph.metadata)
    built = build_prepared(
        prepared,
        path,
        options or default_options(backend),
        backend=backend,
        bounds=bounds,
        gpu=gpu,
        progress=progress,
    )
    return replace(built, sensitivity=prepared.sensitivity)


def prepare_graph(
    source: Graph,
    precision: str | None,
    *,
    wanted_input: str = "uint8",
    bounds: Bounds | None = None,
    int8: Int8Options | None = None,
    progress: Progress = no_progress,
) -> Prepared:
    """Convert a graph to a precision and an input, and compare the result with the source.

    Args:
        source: the graph of the ONNX file.
        precision: "fp32", "fp16", "bf16" or "int8"; None for that of the file.
        wanted_input: what the engine takes: "uint8", pixels, or "float32", normalized images.
        bounds: of the numeric gates; replace those of the precision.
        int8: how to quantize.
        progress: told of each stage, and of how much of it is done.

    Raises:
        CheckError: the converted graph fails parity.
        UsageError: the graph is already in a precision other than fp32, or takes uint8 and cannot be converted.
    """
    precision = precision or source.metadata.precision
    if (precision, wanted_input) == (source.metadata.precision, source.metadata.input):
        return Prepared(source=source, graph=source, images=default_images(source.metadata))
    quantization = None
    if precision == "int8" and source.metadata.precision == "fp32":
        quantization = plan_quantization(source, int8 or Int8Options(), progress=progress)
    path = Path(f"{precision}.onnx" if wanted_input == "float32" else f"{precision}-{wanted_input}.onnx")
    progress(f"converting to {precision}", 0, 0)
    graph = to_precision(source, precision, quantization=quantization, path=path)
    graph = to_input(graph, wanted_input, path=path)
    images = default_images(graph.metadata, quantization.images if quantization else ())
    require_onnxruntime()
    with OnnxRuntimeRunner(source) as reference, OnnxRuntimeRunner(graph) as candidate:
        parity = prove(reference, candidate, images, bounds=bounds, artifact_sha256=graph.sha256, progress=progress)
    if not parity.passed:
        converted = precision if precision != source.metadata.precision else f"{precision} with {wanted_input} input"
        raise CheckError(f"parity failed in {converted}: {_failures(parity)}", where=source.path)
    sensitivity = quantization.sensitivity if quantization else None
    return Prepared(source=source, graph=graph, images=images, parity=parity, sensitivity=sensitivity)


def build_prepared(
    prepared: Prepared,
    target: Path,
    options: BuildOptions,
    *,
    backend: str,
    bounds: Bounds | None = None,
    gpu: GpuDevice | None = None,
    progress: Progress = no_progress,
) -> EngineBuild:
    """Build an engine, check its kernels, and write it with its manifest beside it.

    If the engine can run here, it is first written under an `.untried` name and compared with its ONNX source. One that
    fails parity or cannot be run is kept under a `.failed` name, and an existing file at `target` is left unchanged.

    Args:
        prepared: what to build.
        target: the engine's file.
        options: how to build it.
        backend: "tensorrt" or "tensorrt-rtx".
        bounds: of the numeric gates; replace those of the precision.
        gpu: where TensorRT builds it, unless ahead of time, and where it is tried; None for the first.
        progress: told of each step.

    Raises:
        BuildError: TensorRT refused, built all kernels in another precision, or the engine cannot be run.
        CheckError: the engine failed parity.
        UsageError: TF32 for another precision than fp32.
    """
    if options.tf32 and prepared.graph.metadata.precision != "fp32":
        raise UsageError(f"TF32 is for fp32 engines; this one is {prepared.graph.metadata.precision}", where="--tf32")
    for path in (target, engine_manifest_path(target)):
        check_writable(path)
    tensorrt = TensorRT.load(backend)
    use_gpu(gpu)
    engine = tensorrt.build(prepared.graph.content, options, progress=progress)
    summary = summarize(engine.kernels, batch=options.profile.opt)
    check_precision(summary, prepared.graph.metadata.precision)
    gpu = gpu or find_gpu()
    manifest = _manifest(prepared, engine, summary, options, gpu, backend=backend, version=tensorrt.version)
    parity, not_run = None, _why_not_run(target, manifest, gpu, tensorrt)
    if not_run:
        _write(target, engine.plan, manifest)
    else:
        parity = _try(engine.plan, target, manifest, prepared, bounds, gpu)
    return EngineBuild(
        path=target,
        manifest_path=engine_manifest_path(target),
        summary=summary,
        parity=parity,
        timing_cache=engine.timing_cache,
        not_run=not_run,
    )


def _write(path: Path, plan: bytes, manifest: EngineManifest) -> None:
    """Both files, or neither."""
    with replacing(path) as temporary, replacing(engine_manifest_path(path)) as beside:
        temporary.write_bytes(plan)
        beside.write_text(manifest.to_json(), encoding="utf-8")


def _manifest(
    prepared: Prepared,
    engine: Engine,
    summary: KernelSummary,
    options: BuildOptions,
    gpu: GpuDevice | None,
    *,
    backend: str,
    version: str,
) -> EngineManifest:
    gpu = None if options.architectures else gpu
    return EngineManifest(
        engine_sha256=hashlib.sha256(engine.plan).hexdigest(),
        metadata=prepared.graph.metadata,
        onnx_file=prepared.source.path.name,
        onnx_sha256=prepared.source.sha256,
        backend=backend,
        version=version,
        profile=options.profile,
        architectures=options.architectures or ((gpu.architecture,) if gpu else ()),
        ran_here=False,
        gpu=gpu.name if gpu else "",
        system="" if options.architectures else system(),
        options=_other_options(options),
        memory=engine.memory,
        kernels=asdict(summary),
        graph_parity=_as_json(prepared.parity) if prepared.parity else None,
    )


def _why_not_run(path: Path, manifest: EngineManifest, gpu: GpuDevice | None, tensorrt: TensorRT) -> str:
    """Why an engine cannot run on this GPU, or an empty text if it can."""
    try:
        check_machine(path, manifest, gpu)
    except SmlpError as error:
        logger.info("the engine was not run: %s", error)
        if gpu is None:
            return "no NVIDIA GPU and driver was found"
        if gpu.architecture in manifest.architectures:
            return error.what
        this = f"this GPU is {gpu.architecture} ({gpu.name})"
        if gpu.architecture in tensorrt.architectures():
            return f"{this}; build for it with --gpu-arch {gpu.architecture}"
        return f"{this}, for which {manifest.backend} has no kernels; TensorRT has, with --target tensorrt"
    return ""


def _try(
    plan: bytes,
    target: Path,
    manifest: EngineManifest,
    prepared: Prepared,
    bounds: Bounds | None,
    gpu: GpuDevice | None,
) -> ParityReport:
    """Compare an engine with its ONNX source, and write it to `target` if it passes.

    A build takes minutes, and a try can end the process, so the engine is on disk before it is tried.

    Raises:
        BuildError: it cannot be run; it is kept under its `.failed` name.
        CheckError: it failed parity; it is kept as well.
    """
    untried = untried_path(target)
    _write(untried, plan, manifest)
    try:
        loaded = TensorRTRunner.load(plan, target, manifest, gpu)
        with loaded as candidate, OnnxRuntimeRunner(prepared.source) as reference:
            parity = prove(reference, candidate, prepared.images, bounds=bounds, artifact_sha256=manifest.engine_sha256)
    # TensorRT and the CUDA runtime may raise anything.
    except Exception as error:
        kept = _move(untried, failed_path(target), manifest)
        what = error.what if isinstance(error, SmlpError) else f"{type(error).__name__}: {error}".splitlines()[0]
        fix = "smlp doctor says what this machine lacks; the engine itself may be fine"
        raise BuildError(f"built, but could not be run on this GPU: {what}", where=kept, fix=fix) from error
    except BaseException:
        logger.warning("the engine was built but not compared with its ONNX file; it is kept as %s", untried)
        raise
    manifest = replace(manifest, ran_here=True, engine_parity=_as_json(parity))
    kept = _move(untried, target if parity.passed else failed_path(target), manifest)
    if not parity.passed:
        raise CheckError(f"parity failed on this GPU: {_failures(parity)}", where=kept)
    return parity


def _move(untried: Path, path: Path, manifest: EngineManifest) -> Path:
    """Give an engine that was tried its name, and write its manifest beside it."""
    with replacing(engine_manifest_path(path)) as beside:
        beside.write_text(manifest.to_json(), encoding="utf-8")
        untried.replace(path)
    engine_manifest_path(untried).unlink(missing_ok=True)
    return path


def _failures(parity: ParityReport) -> str:
    return ", ".join(f"{gate.name} ({gate.detail})" for gate in parity.failures)


def _as_json(parity: ParityReport) -> Mapping[str, Any]:
    document: Mapping[str, Any] = json.loads(parity.to_json())
    return document


def check_precision(summary: KernelSummary, precision: str) -> None:
    """Check that convolutions and matrix products run in the requested precision.

    If TensorRT does not state the precision of all of them, a warning says so.

    Raises:
        BuildError: none of them does.
    """
    if summary.share(precision):
        return
    if not summary.count or summary.compute_by_precision.get(UNKNOWN):
        logger.warning(
            "TensorRT does not say whether the engine computes in %s (convolutions and matrix products: %s)",
            precision,
            summary.compute or UNKNOWN,
        )
        return
    raise BuildError(
        f"no kernel computes in {precision}: {dict(summary.compute_by_precision)}",
        fix="the graph sets the precision; export it again",
    )


def _other_options(options: BuildOptions) -> Mapping[str, Any]:
    elsewhere = ("timing_cache", "profile", "architectures")
    return {key: value for key, value in asdict(options).items() if key not in elsewhere}
