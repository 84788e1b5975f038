"""Proof that an artifact computes the same as its source, as a whole or block by block.

PyTorch is imported only to run a checkpoint, because comparing an engine with its ONNX file does not need it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from smlp_deploy.artifacts import CHECKPOINT_SUFFIXES, is_checkpoint
from smlp_deploy.dependencies import GpuDevice, require, require_onnxruntime, require_proof
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.evaluation.layers import DivergenceReport, find_divergence
from smlp_deploy.evaluation.parity import Bounds, ParityReport, check_half_range, prove
from smlp_deploy.files import BUNDLED_CHECKPOINT, read_file, sha256_of
from smlp_deploy.images.defaults import default_images, is_bundled
from smlp_deploy.interrupts import Progress, no_progress
from smlp_deploy.metadata import EngineManifest, ModelMetadata
from smlp_deploy.models.pretrained import cached_weights
from smlp_deploy.models.variants import VARIANTS
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.base import Runner, TracingRunner
from smlp_deploy.runners.placement import ANYWHERE, AUTO, OPENVINO, Placement

if TYPE_CHECKING:
    from smlp_deploy.exporters.tensorrt import BuildOptions
    from smlp_deploy.graphs.file import Graph
    from smlp_deploy.models.checkpoint import Checkpoint
    from smlp_deploy.runners.tracing import QuantizedLayers

logger = logging.getLogger(__name__)

_MAX_REFERENCES = 64


def verify_artifact(
    candidate: str | Path,
    *,
    reference: str | Path | None = None,
    images: Sequence[Path] | None = None,
    bounds: Bounds | None = None,
    placement: Placement = ANYWHERE,
) -> ParityReport:
    """Compare an artifact with the trained network it was made from.

    Args:
        candidate: the artifact.
        reference: the checkpoint; by default the one whose sha256 the artifact has, if `find_reference` finds it.
        images: real images to compare on; by default the bundled ones.
        bounds: of the numeric gates; replace those of the precision.
        placement: where the artifact runs; the trained network runs on the same GPU if one was chosen.

    Raises:
        UsageError: no reference was given or found.
        SmlpError: a file cannot be used.
    """
    require_proof("to run the trained network")
    from smlp_deploy.models.checkpoint import load_checkpoint

    candidate = Path(candidate)
    with open_runner(candidate, placement=placement) as runner:
        path = Path(reference) if reference is not None else find_reference(runner.metadata, candidate)
        checkpoint = load_checkpoint(path, ema=runner.metadata.ema)
        if checkpoint.sha256 != runner.metadata.checkpoint_sha256:
            logger.warning("%s is not the file that %s was made from; comparing anyway", path, candidate)
        labels = checkpoint.metadata.labels or runner.metadata.labels
        metadata = replace(runner.metadata, labels=labels, config=checkpoint.config)
        images = images or default_images(runner.metadata)
        sha256 = sha256_of(candidate)
        return prove_against_checkpoint(runner, checkpoint, metadata, images, bounds, sha256, gpu=placement.gpu)


def prove_against_checkpoint(
    candidate: Runner,
    checkpoint: Checkpoint,
    metadata: ModelMetadata,
    images: Sequence[Path],
    bounds: Bounds | None,
    artifact_sha256: str,
    *,
    gpu: GpuDevice | None = None,
    largest: tuple[str, float] | None = None,
    progress: Progress = no_progress,
) -> ParityReport:
    """Compare a runner with the trained network; for fp16 and int8, also the network in true fp16 arithmetic.

    Args:
        candidate: the runner under test.
        checkpoint: the trained weights.
        metadata: the labels and preprocessing of the trained network.
        images: real images.
        bounds: of the numeric gates; replace those of the precision.
        artifact_sha256: of the candidate's file, for the report.
        gpu: where the trained network runs; None for the CPU.
        largest: the largest activation on these images, if known; see `check_half_range`.
        progress: told of the inputs that are compared.
    """
    from smlp_deploy.runners.pytorch import HalfRunner, PyTorchRunner, RecordingRunner

    with PyTorchRunner(checkpoint, metadata, gpu=gpu) as trained:
        report = prove(trained, candidate, images, bounds=bounds, artifact_sha256=artifact_sha256, progress=progress)
        if candidate.metadata.precision not in ("fp16", "int8"):
            return report
        half = HalfRunner(checkpoint, metadata, gpu=gpu)
        recorder = RecordingRunner(checkpoint, metadata, gpu=gpu)
        with half, recorder:
            return check_half_range(report, trained, half, recorder, images, largest=largest, progress=progress)


def find_reference(metadata: ModelMetadata, candidate: Path) -> Path:
    """The checkpoint that an artifact was made from, known by its sha256.

    It is looked for in the package, in the cache of downloads, beside the artifact and in the working folder: first
    under its name, then among the checkpoints there, at most 64 of them, under any name.

    Raises:
        UsageError: it is nowhere there.
    """
    for path in islice(_possible_references(metadata, candidate), _MAX_REFERENCES):
        # A file may vanish, or may not be readable.
        with suppress(OSError):
            if path.is_file() and sha256_of(path) == metadata.checkpoint_sha256:
                return path
    raise UsageError(
        f"made from {metadata.checkpoint}, which was not found beside it or in the working folder",
        where=candidate,
        fix="give it with --reference CHECKPOINT",
    )


def _possible_references(metadata: ModelMetadata, candidate: Path) -> Iterator[Path]:
    """The files whose sha256 is worth computing, the most likely first."""
    known = [BUNDLED_CHECKPOINT, *filter(None, map(cached_weights, VARIANTS.values()))]
    yield from (path for path in known if path.name == metadata.checkpoint)
    folders = [candidate.parent, Path()]
    name = Path(metadata.checkpoint).name  # an untrusted artifact may name a path
    if name:
        yield from (folder / name for folder in folders)
    for folder in folders:
        with suppress(OSError):
            yield from sorted(path for path in folder.iterdir() if path.suffix.lower() in CHECKPOINT_SUFFIXES)


def verify_layers(
    candidate: Path,
    *,
    reference: Path | None = None,
    images: Sequence[Path] | None = None,
    max_error: float | None = None,
    placement: Placement = ANYWHERE,
) -> DivergenceReport:
    """Find where an artifact, or a lowered checkpoint, diverges from a reference.

    For an int8 file the noise of each int8 layer is measured too, against the same layer in an fp32 graph: the
    reference itself, or an export of the reference checkpoint made for this purpose. It is not measured against an ONNX
    file of another precision.

    The values inside an engine cannot be read. A second engine runs in its place: the same graph with every point as
    an additional output, built on this GPU with the options in the first engine's manifest. Because of these outputs
    TensorRT may fuse other operations, so the values and errors can differ from those of the first engine. This has not
    been run on a GPU; it is tested with a fake that runs the second engine's graph in ONNX Runtime.

    Args:
        candidate: the file.
        reference: an ONNX file, or a checkpoint, which is run as trained; by default the checkpoint that
            `verify_artifact` finds. For an engine, the ONNX file it was built from; by default the file of that name
            beside it.
        images: real images to compare on; by default those of the parity check.
        max_error: the gate; by default that of the candidate's precision.
        placement: where the candidate runs. A reference runs on the same GPU if one was chosen, but the reference of an
            engine, and int8 layers beside their fp32 form, run on the CPU.

    Raises:
        UsageError: no reference was given or found, or it has another shape.
        BuildError: TensorRT does not build the second engine.
        SmlpError: a file cannot be used, or an engine cannot run here.
    """
    placement.check(candidate)
    if placement.runtime == OPENVINO:
        raise UsageError(
            "values inside a graph are read with ONNX Runtime", where="--runtime openvino", fix="leave it out"
        )
    if candidate.suffix.lower() == ".engine":
        return _verify_engine_layers(
            candidate, reference=reference, images=images, max_error=max_error, gpu=placement.gpu
        )
    require_proof("to compare block by block")
    source = _load(candidate, ema=False)
    with _open_tracer(source, placement, lowered=True) as inside:
        metadata = inside.metadata
        if reference is None:
            reference = candidate if is_checkpoint(candidate) else find_reference(metadata, candidate)
        truth = source if reference == candidate else _load(reference, ema=metadata.ema)
        images = images or default_images(metadata)
        with _open_tracer(truth, replace(placement, provider=None, runtime=AUTO), lowered=False) as tracer:
            quantized = metadata.precision == "int8" and tracer.metadata.precision == "fp32"
            with _quantized_layers(source, truth, metadata.form) if quantized else nullcontext() as layers:
                return find_divergence(tracer, inside, images, max_error=max_error, layers=layers)


def _quantized_layers(
    source: Graph | Checkpoint, truth: Graph | Checkpoint, form: str
) -> AbstractContextManager[QuantizedLayers | None]:
    """The int8 layers of a graph beside those of an fp32 graph; None, with a warning, if that one has another form."""
    from smlp_deploy.runners.tracing import QuantizedLayers

    fp32 = _as_graph(truth, form)
    if fp32.metadata.form == form:
        return QuantizedLayers(_as_graph(source, form), fp32)
    logger.warning(
        "int8 layers are not compared: %s is of the form for another machine; give the checkpoint as the reference",
        fp32.path.name,
    )
    return nullcontext()


def _load(path: Path, *, ema: bool) -> Graph | Checkpoint:
    """The graph or checkpoint in a file."""
    if path.suffix.lower() == ".onnx":
        from smlp_deploy.graphs.file import Graph

        return Graph.read(path)
    if is_checkpoint(path):
        from smlp_deploy.models.checkpoint import load_checkpoint

        return load_checkpoint(path, ema=ema)
    raise UsageError("cannot be compared block by block", where=path, fix="give an ONNX file or a checkpoint")


def _open_tracer(source: Graph | Checkpoint, placement: Placement, *, lowered: bool) -> TracingRunner:
    """A runner that returns the values inside; of a checkpoint as trained, or lowered."""
    from smlp_deploy.graphs.file import Graph

    if isinstance(source, Graph):
        from smlp_deploy.runners.tracing import TracingOnnxRunner

        return TracingOnnxRunner(source, provider=placement.onnx_provider, gpu=placement.gpu)
    from smlp_deploy.models.description import describe
    from smlp_deploy.runners.pytorch import TracingPyTorchRunner

    return TracingPyTorchRunner(source, describe(source), lowered=lowered, gpu=placement.gpu)


def _as_graph(source: Graph | Checkpoint, form: str) -> Graph:
    """The graph itself, or the fp32 graph of a checkpoint in a form."""
    from smlp_deploy.graphs.file import Graph

    if isinstance(source, Graph):
        return source
    from smlp_deploy.exporters.onnx import export_onnx
    from smlp_deploy.models.description import describe

    metadata = replace(describe(source), form=form)
    return export_onnx(source.network(), metadata, path=source.path.with_suffix(".onnx"))


def _verify_engine_layers(
    candidate: Path,
    *,
    reference: Path | None,
    images: Sequence[Path] | None,
    max_error: float | None,
    gpu: GpuDevice | None,
) -> DivergenceReport:
    """See `verify_layers`. ONNX Runtime runs the ONNX file on the CPU."""
    require("ml_dtypes", "onnx", "onnx_ir", purpose="to read its graph", extra="export")
    require_onnxruntime()
    from smlp_deploy.exporters.tensorrt import TensorRT
    from smlp_deploy.graphs.edit import add_trace_outputs
    from smlp_deploy.runners.cuda import use_gpu
    from smlp_deploy.runners.tensorrt import TracingTensorRTRunner, check_machine, read_manifest
    from smlp_deploy.runners.tracing import TracingOnnxRunner

    manifest = read_manifest(candidate)
    check_machine(candidate, manifest, gpu)
    source = _source_of(candidate, manifest, reference)
    graph = _graph_of(candidate, manifest, source)
    model = graph.model()
    add_trace_outputs(model.graph, graph.metadata.config, source.path)
    tensorrt = TensorRT.load(manifest.backend)
    options = _options_of(candidate, manifest, ahead_of_time=tensorrt.ahead_of_time)
    use_gpu(gpu)
    plan = tensorrt.build(model.SerializeToString(), options).plan
    second = replace(manifest, version=tensorrt.version)
    with (
        TracingOnnxRunner(source) as truth,
        TracingTensorRTRunner.load(plan, candidate, second, gpu) as inside,
    ):
        return find_divergence(truth, inside, images or default_images(graph.metadata), max_error=max_error)


def _source_of(engine: Path, manifest: EngineManifest, given: Path | None) -> Graph:
    """The ONNX file that an engine was built from: the one given, or the one of that name beside the engine."""
    from smlp_deploy.graphs.check import MAX_FILE_BYTES
    from smlp_deploy.graphs.file import Graph

    fix = f"give the ONNX file that {engine.name} was built from with --reference, or build the engine again"
    path = given or engine.parent / Path(manifest.onnx_file).name
    content = read_file(path, limit=MAX_FILE_BYTES, error=ArtifactError, fix=fix)
    if hashlib.sha256(content).hexdigest() != manifest.onnx_sha256:
        raise ArtifactError(f"is not the {manifest.onnx_file} that {engine.name} was built from", where=path, fix=fix)
    return Graph.parse(content, path=path)


def _graph_of(engine: Path, manifest: EngineManifest, source: Graph) -> Graph:
    """The graph that an engine was built from, made again from its ONNX file."""
    from smlp_deploy.pipeline.precision import Int8Options, plan_quantization, to_input, to_precision

    precision, made = manifest.metadata.precision, manifest.metadata.quantization
    if precision == source.metadata.precision or precision != "int8":
        return to_input(to_precision(source, precision), manifest.metadata.input)
    if is_bundled(source.metadata):  # calibrated on its own images by default
        options = Int8Options(method=str(made.get("method")), per_channel=made.get("weights") == "per channel")
        graph = to_precision(source, precision, quantization=plan_quantization(source, options))
        if graph.metadata.quantization == made:
            return to_input(graph, manifest.metadata.input)
    raise ArtifactError(
        "was quantized during the build, and its manifest does not state the ranges",
        where=engine,
        fix="write an int8 ONNX file with smlp export --int8, and build the engine from it",
    )


def _options_of(engine: Path, manifest: EngineManifest, *, ahead_of_time: bool) -> BuildOptions:
    """How an engine was built, without its timing cache."""
    from smlp_deploy.exporters.tensorrt import BuildOptions

    architectures = manifest.architectures if ahead_of_time else ()
    try:
        return BuildOptions(profile=manifest.profile, architectures=architectures, **manifest.options)
    except TypeError:
        raise ArtifactError(
            f"its manifest has options unknown to this version: {', '.join(manifest.options)}",
            where=engine,
            fix="build it again",
        ) from None
