"""From an ONNX file to an engine with its facts beside it, proven as far as this machine can."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smlp_deploy.artifacts import engine_card_path
from smlp_deploy.dependencies import require_onnxruntime
from smlp_deploy.errors import ArtifactError, BuildError, UsageError
from smlp_deploy.export import bundled_images
from smlp_deploy.exporters.graph import ModelProto, load_graph, read_metadata, save_graph
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.kernels import KernelSummary, summarize
from smlp_deploy.exporters.tensorrt import BuildOptions, Progress, TensorRT
from smlp_deploy.files import replacing, sha256_of
from smlp_deploy.metadata import EngineCard, ModelMetadata
from smlp_deploy.parity import ParityReport, compare
from smlp_deploy.quantization import Int8Options, parity_images, quantize_graph
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from smlp_deploy.sensitivity import SensitivityReport


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The graph that an engine is built from: an ONNX file's own, or made from it in another precision."""

    source: Path
    model: ModelProto
    metadata: ModelMetadata
    parity: ParityReport | None = None
    sensitivity: SensitivityReport | None = None


@dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """What a build left: the engine, the facts beside it, its kernels, and the timing cache if one was used."""

    path: Path
    card_path: Path
    summary: KernelSummary
    timing_cache: bytes | None


def prepare_graph(
    source: Path, precision: str | None, *, int8: Int8Options | None = None, progress: Progress | None = None
) -> Graph:
    """Read an ONNX file and bring it into a precision, which is compared with the file as it is.

    Args:
        source: the ONNX file.
        precision: "fp32", "fp16", "bf16" or "int8"; None for the file's own.
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
        return Graph(source=source, model=model, metadata=metadata)
    if metadata.precision != "fp32":
        raise UsageError(
            f"the graph is {metadata.precision} and decides the precision of its engine, {precision} was asked for",
            where=source,
            fix="give the fp32 file",
        )
    sensitivity = None
    images = bundled_images()
    if precision == "int8":
        quantized = quantize_graph(model, metadata, int8 or Int8Options(), progress=progress)
        model, metadata, sensitivity = quantized.model, quantized.metadata, quantized.sensitivity
        images = parity_images(quantized.images, metadata) or images
    else:
        metadata = replace(metadata, precision=precision)
        model = to_half(model, precision)
    parity = _compare(source, model, metadata, images)
    if not parity.passed:
        failed = ", ".join(f"{gate.name} ({gate.detail})" for gate in parity.failures)
        raise ArtifactError(f"in {precision} it computes something else: {failed}", where=source)
    return Graph(source=source, model=model, metadata=metadata, parity=parity, sensitivity=sensitivity)


def _compare(source: Path, model: ModelProto, metadata: ModelMetadata, images: Sequence[Path]) -> ParityReport:
    require_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{metadata.precision}.onnx"
        save_graph(model, metadata, path)
        with OnnxRuntimeRunner(source) as reference, OnnxRuntimeRunner(path) as candidate:
            return compare(reference, candidate, images, artifact_sha256=sha256_of(path))


def build_engine(
    graph: Graph, target: Path, options: BuildOptions, *, flavour: str, progress: Progress | None = None
) -> EngineBuild:
    """Build an engine, check what is inside, and write it with its facts beside it; both, or neither.

    Args:
        graph: what to build.
        target: the engine's file.
        options: how to build it.
        flavour: "tensorrt" or "tensorrt-rtx".
        progress: told of each step.

    Raises:
        BuildError: TensorRT refused, or built no kernel in the precision asked for.
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
            architectures=options.architectures,
            ran_here=False,
            options=_other_options(options),
            memory=engine.memory,
            kernels=asdict(summary),
            graph_parity=json.loads(graph.parity.to_json()) if graph.parity else None,
        )
        card.write_text(facts.to_json(), encoding="utf-8")
    return EngineBuild(
        path=target, card_path=engine_card_path(target), summary=summary, timing_cache=engine.timing_cache
    )


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
