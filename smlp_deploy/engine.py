"""From an ONNX file to an engine with its facts beside it, proven as far as this machine can."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smlp_deploy.artifacts import engine_card_path, failed_path
from smlp_deploy.dependencies import find_gpu, require_onnxruntime
from smlp_deploy.errors import ArtifactError, BuildError, SmlpError, UsageError
from smlp_deploy.export import default_images
from smlp_deploy.exporters.graph import ModelProto, load_graph, read_metadata, save_graph
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.kernels import KernelSummary, summarize
from smlp_deploy.exporters.tensorrt import BuildOptions, Progress, TensorRT
from smlp_deploy.files import replacing, sha256_of
from smlp_deploy.metadata import EngineCard, ModelMetadata
from smlp_deploy.parity import Bounds, ParityReport, compare
from smlp_deploy.quantization import Int8Options, quantize_graph
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from smlp_deploy.runners.tensorrt import TensorRTRunner, check_machine
from smlp_deploy.sensitivity import SensitivityReport

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
    card_path: Path
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
    model = load_graph(source)
    metadata = read_metadata(model, source)
    if metadata is None:
        raise ArtifactError("smlp-deploy did not write it", where=source, fix="export the checkpoint with smlp export")
    if precision is None or precision == metadata.precision:
        return Graph(source=source, model=model, metadata=metadata, images=default_images(metadata))
    if metadata.precision != "fp32":
        raise UsageError(
            f"the graph is {metadata.precision} and decides the precision of its engine, {precision} was asked for",
            where=source,
            fix="give the fp32 file",
        )
    sensitivity = None
    calibrated: Sequence[Path] = ()
    if precision == "int8":
        quantized = quantize_graph(model, metadata, int8 or Int8Options(), progress=progress)
        model, metadata, sensitivity = quantized.model, quantized.metadata, quantized.sensitivity
        calibrated = quantized.images
    else:
        metadata = replace(metadata, precision=precision)
        model = to_half(model, precision)
    images = default_images(metadata, calibrated)
    parity = _compare(source, model, metadata, images, bounds)
    if not parity.passed:
        raise ArtifactError(f"in {precision} it computes something else: {_failures(parity)}", where=source)
    return Graph(source=source, model=model, metadata=metadata, images=images, parity=parity, sensitivity=sensitivity)


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
    flavour: str,
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
        flavour: "tensorrt" or "tensorrt-rtx".
        bounds: of the numeric gates, in place of the precision's own.
        progress: told of each step.

    Raises:
        BuildError: TensorRT refused, built no kernel in the precision asked for, or built what computes something else.
    """
    tensorrt = TensorRT.load(flavour)
    with replacing(target) as temporary, replacing(engine_card_path(target)) as card:
        engine = tensorrt.build(graph.model.SerializeToString(), options, progress=progress)
        summary = summarize(engine.kernels, batch=options.profile.opt)
        check_precision(summary, graph.metadata.precision)
        temporary.write_bytes(engine.plan)
        facts = EngineCard(
            engine_sha256=sha256_of(temporary),
            metadata=graph.metadata,
            onnx_file=graph.source.name,
            onnx_sha256=sha256_of(graph.source),
            flavour=flavour,
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
        card.write_text(facts.to_json(), encoding="utf-8")
    return EngineBuild(
        path=target,
        card_path=engine_card_path(target),
        summary=summary,
        parity=parity,
        timing_cache=engine.timing_cache,
    )


def _run_here(engine: Path, facts: EngineCard, graph: Graph, bounds: Bounds | None) -> ParityReport | None:
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
