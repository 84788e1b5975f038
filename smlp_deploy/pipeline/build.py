"""From an ONNX file to an engine with its facts beside it, proven as far as this machine can."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smlp_deploy.artifacts import engine_manifest_path, failed_path
from smlp_deploy.dependencies import find_gpu, require_onnxruntime
from smlp_deploy.errors import ArtifactError, BuildError, SmlpError, UsageError
from smlp_deploy.evaluation.layers import DivergenceReport, find_divergence
from smlp_deploy.evaluation.parity import Bounds, ParityReport, compare
from smlp_deploy.evaluation.sensitivity import SensitivityReport
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.kernels import KernelSummary, summarize
from smlp_deploy.exporters.tensorrt import BuildOptions, TensorRT
from smlp_deploy.files import check_regular, replacing, sha256_of
from smlp_deploy.graphs.edit import add_trace_outputs
from smlp_deploy.graphs.file import ModelProto, load_graph, read_metadata, save_graph
from smlp_deploy.images.defaults import default_images, is_bundled
from smlp_deploy.interrupts import Progress
from smlp_deploy.metadata import EngineManifest, ModelMetadata
from smlp_deploy.pipeline.precision import Int8Options, quantize_graph
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from smlp_deploy.runners.tensorrt import TensorRTRunner, TracingTensorRTRunner, check_machine, read_manifest
from smlp_deploy.runners.tracing import TracingOnnxRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The graph that an engine is built from: an ONNX file's own, or made from it in another precision.

    Attributes:
        source: the ONNX file.
        model: the graph.
        metadata: of the graph.
        images: to prove it, and its engine, on.
        parity: its comparison with the file, if it was made from it.
        sensitivity: each int8 layer's harm and choice, if that was measured.
    """

    source: Path
    model: ModelProto
    metadata: ModelMetadata
    images: Sequence[Path] = ()
    parity: ParityReport | None = None
    sensitivity: SensitivityReport | None = None


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """What a build left: the engine, the facts beside it, its kernels, and the timing cache if one was used.

    `parity` is its comparison with its ONNX source, or None where it could not run.
    """

    path: Path
    manifest_path: Path
    summary: KernelSummary
    parity: ParityReport | None
    timing_cache: bytes | None


def prepare_graph(
    source: Path,
    precision: str | None,
    *,
    bounds: Bounds | None = None,
    int8: Int8Options | None = None,
    progress: Progress | None = None,
) -> Graph:
    """Read an ONNX file and bring it into a precision, which is compared with the file as it is.

    Args:
        source: the ONNX file.
        precision: "fp32", "fp16", "bf16" or "int8"; None for the file's own.
        bounds: of the numeric gates, in place of the precision's own.
        int8: how to quantize.
        progress: told of the steps of quantization.

    Raises:
        ArtifactError: the file cannot be used, or its 16-bit form computes something else.
        UsageError: the file is in another precision already.
    """
    given = _read(source)
    if precision is None or precision == given.metadata.precision:
        return given
    graph = _convert(given, precision, int8=int8 or Int8Options(), progress=progress)
    parity = _compare(source, graph.model, graph.metadata, graph.images, bounds)
    if not parity.passed:
        raise ArtifactError(f"in {precision} it computes something else: {_failures(parity)}", where=source)
    return replace(graph, parity=parity)


def _read(source: Path) -> Graph:
    """The graph of an ONNX file as it is."""
    model = load_graph(source)
    metadata = read_metadata(model, source)
    if metadata is None:
        raise ArtifactError("smlp-deploy did not write it", where=source, fix="export the checkpoint with smlp export")
    return Graph(source=source, model=model, metadata=metadata, images=default_images(metadata))


def _convert(given: Graph, precision: str, *, int8: Int8Options, progress: Progress | None = None) -> Graph:
    """A file's graph in another precision, not compared with it yet."""
    if given.metadata.precision != "fp32":
        raise UsageError(
            f"the graph is {given.metadata.precision} and decides the precision of its engine, "
            f"{precision} was asked for",
            where=given.source,
            fix="give the fp32 file",
        )
    if precision == "int8":
        made = quantize_graph(given.model, given.metadata, int8, progress=progress)
        images = default_images(made.metadata, made.images)
        return replace(given, model=made.model, metadata=made.metadata, images=images, sensitivity=made.sensitivity)
    metadata = replace(given.metadata, precision=precision)
    return replace(given, model=to_half(given.model, precision), metadata=metadata, images=default_images(metadata))


def _compare(
    source: Path, model: ModelProto, metadata: ModelMetadata, images: Sequence[Path], bounds: Bounds | None
) -> ParityReport:
    require_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{metadata.precision}.onnx"
        save_graph(model, metadata, path)
        with OnnxRuntimeRunner(source) as reference, OnnxRuntimeRunner(path) as candidate:
            return compare(reference, candidate, images, bounds=bounds, artifact_sha256=sha256_of(path))


def build_engine(
    graph: Graph,
    target: Path,
    options: BuildOptions,
    *,
    backend: str,
    bounds: Bounds | None = None,
    progress: Progress | None = None,
) -> EngineBuild:
    """Build an engine, check what is inside, and write it with its facts beside it; both, or neither.

    Where the engine can run it is also compared with its ONNX source. One that computes something else is kept under
    a `.failed` name, and whatever stood at `target` stays.

    Args:
        graph: what to build.
        target: the engine's file.
        options: how to build it.
        backend: "tensorrt" or "tensorrt-rtx".
        bounds: of the numeric gates, in place of the precision's own.
        progress: told of each step.

    Raises:
        BuildError: TensorRT refused, built no kernel in the precision asked for, or built what computes something else.
    """
    tensorrt = TensorRT.load(backend)
    with replacing(target) as temporary, replacing(engine_manifest_path(target)) as manifest:
        engine = tensorrt.build(graph.model.SerializeToString(), options, progress=progress)
        summary = summarize(engine.kernels, batch=options.profile.opt)
        check_precision(summary, graph.metadata.precision)
        temporary.write_bytes(engine.plan)
        facts = EngineManifest(
            engine_sha256=sha256_of(temporary),
            metadata=graph.metadata,
            onnx_file=graph.source.name,
            onnx_sha256=sha256_of(graph.source),
            backend=backend,
            version=tensorrt.version,
            profile=options.profile,
            architectures=options.architectures or _architecture_here(),
            ran_here=False,
            options=_other_options(options),
            memory=engine.memory,
            kernels=asdict(summary),
            graph_parity=_as_json(graph.parity) if graph.parity else None,
        )
        parity = _run_here(temporary, facts, graph, bounds)
        if parity is not None:
            parity = replace(parity, candidate=parity.candidate.replace(temporary.name, target.name))
            facts = replace(facts, ran_here=True, engine_parity=_as_json(parity))
            if not parity.passed:
                temporary.replace(failed_path(target))
                raise BuildError(
                    f"run on this GPU it computes something else: {_failures(parity)}", where=failed_path(target)
                )
        manifest.write_text(facts.to_json(), encoding="utf-8")
    return EngineBuild(
        path=target,
        manifest_path=engine_manifest_path(target),
        summary=summary,
        parity=parity,
        timing_cache=engine.timing_cache,
    )


def _run_here(engine: Path, facts: EngineManifest, graph: Graph, bounds: Bounds | None) -> ParityReport | None:
    """The engine compared with its ONNX source; None where the engine cannot run."""
    try:
        check_machine(engine, facts)
    except SmlpError as error:
        logger.info("the engine was not run: %s", error)
        return None
    with OnnxRuntimeRunner(graph.source) as reference, TensorRTRunner.load(engine, facts) as candidate:
        return compare(reference, candidate, graph.images, bounds=bounds, artifact_sha256=facts.engine_sha256)


def _architecture_here() -> tuple[str, ...]:
    gpu = find_gpu()
    return (gpu.architecture,) if gpu else ()


def _failures(parity: ParityReport) -> str:
    return ", ".join(f"{gate.name} ({gate.detail})" for gate in parity.failures)


def _as_json(parity: ParityReport) -> Mapping[str, Any]:
    document: Mapping[str, Any] = json.loads(parity.to_json())
    return document


def verify_engine_layers(
    candidate: Path,
    *,
    reference: Path | None = None,
    images: Sequence[Path] | None = None,
    max_error: float | None = None,
) -> DivergenceReport:
    """Find where the graph of an engine, run by TensorRT, parts from the ONNX file the engine was built from.

    The values inside an engine cannot be read. What is run is a second engine: the graph that the first was made from,
    with every point as one more output, built again on this GPU with the options in the JSON beside the first.
    TensorRT may fuse other operations in it at those points, so that its values, and what is wrong with them, can
    differ from the first one's. ONNX Runtime runs the file on the CPU.

    For want of a GPU this was never run for this project; it is tested with a stand-in for what runs the second engine.

    Args:
        candidate: the engine.
        reference: the ONNX file it was built from; by default the one of that name beside it.
        images: real images to compare on; by default those of the parity.
        max_error: the gate; by default that of the engine's precision.

    Raises:
        ArtifactError: the engine cannot run here, or the ONNX file is missing or another.
        ConfigError: the engine's JSON is damaged.
        MissingDependencyError: the engine's backend of TensorRT is not installed, or another major version is.
        BuildError: TensorRT does not build the second engine.
    """
    manifest = read_manifest(candidate)
    check_machine(candidate, manifest)
    require_onnxruntime()
    graph = _graph_of(manifest, _source_of(candidate, manifest, reference), candidate)
    add_trace_outputs(graph.model.graph, graph.metadata.config, graph.source)
    tensorrt = TensorRT.load(manifest.backend)
    options = _options_of(candidate, manifest, ahead_of_time=tensorrt.ahead_of_time)
    plan = tensorrt.build(graph.model.SerializeToString(), options).plan
    second = replace(manifest, version=tensorrt.version)
    with (
        TracingOnnxRunner(graph.source) as truth,
        TracingTensorRTRunner.load_plan(plan, candidate, second) as inside,
    ):
        return find_divergence(truth, inside, images or graph.images, max_error=max_error)


def _source_of(engine: Path, manifest: EngineManifest, given: Path | None) -> Path:
    """The ONNX file that an engine was built from: the one given, or the one of that name beside the engine."""
    fix = f"give the ONNX file that {engine.name} was built from with --reference, or build the engine again"
    source = given or engine.parent / Path(manifest.onnx_file).name
    check_regular(source, error=ArtifactError, fix=fix)
    try:
        sha256 = sha256_of(source)
    except OSError as error:
        raise ArtifactError(f"cannot read it: {error.strerror}", where=source, fix="mend its permissions") from None
    if sha256 != manifest.onnx_sha256:
        raise ArtifactError(f"is not the {manifest.onnx_file} that {engine.name} was built from", where=source, fix=fix)
    return source


def _graph_of(manifest: EngineManifest, source: Path, engine: Path) -> Graph:
    """The graph that an engine was built from, made from its ONNX file again."""
    given, precision, made = _read(source), manifest.metadata.precision, manifest.metadata.quantization
    if precision == given.metadata.precision:
        return given
    if precision != "int8":
        return _convert(given, precision, int8=Int8Options())
    if is_bundled(given.metadata):  # quantized on its own images, unless others were given
        options = Int8Options(method=str(made.get("method")), per_channel=made.get("weights") == "per channel")
        graph = _convert(given, precision, int8=options)
        if graph.metadata.quantization == made:
            return graph
    raise ArtifactError(
        "was quantized while it was built, and its JSON does not say with which ranges",
        where=engine,
        fix="write an int8 ONNX file with smlp export --int8, and build the engine from that",
    )


def _options_of(engine: Path, manifest: EngineManifest, *, ahead_of_time: bool) -> BuildOptions:
    """How an engine was built, without its timing cache."""
    architectures = manifest.architectures if ahead_of_time else ()
    try:
        return BuildOptions(profile=manifest.profile, architectures=architectures, **manifest.options)
    except TypeError:
        raise ArtifactError(
            f"its JSON has options that this version does not know: {', '.join(manifest.options)}",
            where=engine,
            fix="build it again",
        ) from None


def check_precision(summary: KernelSummary, precision: str) -> None:
    """Check that convolutions and matrix products run in the precision asked for.

    Raises:
        BuildError: none does.
    """
    if not summary.share(precision):
        raise BuildError(
            f"no kernel computes in {precision}: {dict(summary.compute_by_precision)}",
            fix="the graph decides the precision; export it again",
        )


def _other_options(options: BuildOptions) -> Mapping[str, Any]:
    elsewhere = ("timing_cache", "profile", "architectures")
    return {key: value for key, value in asdict(options).items() if key not in elsewhere}
