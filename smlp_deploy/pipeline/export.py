"""From a checkpoint to an artifact that is proven before it gets its name; and the same proof later."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from smlp_deploy.artifacts import CHECKPOINT_SUFFIXES, calibration_path, failed_path, parity_path, sensitivity_path
from smlp_deploy.dependencies import require_onnxruntime
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.evaluation.layers import DivergenceReport, find_divergence
from smlp_deploy.evaluation.parity import Bounds, ParityReport, check_half_range, compare
from smlp_deploy.evaluation.sensitivity import SensitivityReport
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.onnx import DEFAULT_OPSET, export_onnx, export_unlowered
from smlp_deploy.files import BUNDLED_CHECKPOINT, replacing, sha256_of, write_text
from smlp_deploy.graphs.file import load_graph, save_graph
from smlp_deploy.images.defaults import default_images
from smlp_deploy.interrupts import Progress
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.pretrained import cached_weights
from smlp_deploy.models.variants import VARIANTS
from smlp_deploy.pipeline.precision import Int8Options, Quantized, quantize_graph
from smlp_deploy.runners import open_runner, open_tracer
from smlp_deploy.runners.base import Runner, TracingRunner
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from smlp_deploy.runners.pytorch import HalfRunner, PyTorchRunner, RecordingRunner, TracingPyTorchRunner
from smlp_deploy.runners.tracing import QuantizedLayers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an export left: the artifact (under its failed name, if it failed), its report and the report's file.

    `sensitivity` is each int8 layer's harm and choice, if that was measured.
    """

    path: Path
    report: ParityReport
    report_path: Path
    sensitivity: SensitivityReport | None = None


def export_checkpoint(
    checkpoint: Checkpoint,
    metadata: ModelMetadata,
    target: Path,
    *,
    opset: int = DEFAULT_OPSET,
    images: Sequence[Path] | None = None,
    bounds: Bounds | None = None,
    int8: Int8Options | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write `checkpoint` as an ONNX file, open that file, and compare it with the trained network.

    Only a file that passes is moved to `target`; one that fails is kept under a `.failed` name, and whatever stood
    at `target` stays. The report is written in both cases, beside the file.

    Args:
        checkpoint: the weights.
        metadata: what the file is to carry.
        target: the file to write.
        opset: version of ONNX's default operator set.
        images: real images to compare on; by default the bundled ones, or those of the calibration.
        bounds: of the numeric gates, in place of the precision's own.
        int8: how to quantize, for the precision int8.
        progress: told of the steps of quantization.

    Raises:
        SmlpError: nothing could be written.
    """
    require_onnxruntime()
    quantized: Quantized | None = None
    with replacing(target) as temporary:
        metadata = export_onnx(checkpoint.network(), metadata, temporary, opset=opset)
        if metadata.precision == "int8":
            quantized = quantize_graph(load_graph(temporary), metadata, int8 or Int8Options(), progress=progress)
            metadata = quantized.metadata
            save_graph(quantized.model, metadata, temporary)
            images = images or default_images(metadata, quantized.images)
        elif metadata.precision != "fp32":
            save_graph(to_half(load_graph(temporary), metadata.precision), metadata, temporary)
        try:
            with OnnxRuntimeRunner(temporary) as candidate:
                report = _prove(candidate, checkpoint, metadata, images, bounds, sha256_of(temporary))
        except ArtifactError as error:  # weights that overflow when they are folded, for one
            raise ArtifactError(error.what, where=target, fix="nothing was written; check the checkpoint") from None
        report = replace(report, candidate=report.candidate.replace(temporary.name, target.name))
        path = target
        if not report.passed:
            path = failed_path(target)
            temporary.replace(path)
    report_path = parity_path(path)
    write_text(report_path, report.to_json())
    if quantized is not None:
        write_quantization(quantized, path)
    return Export(
        path=path,
        report=report,
        report_path=report_path,
        sensitivity=quantized.sensitivity if quantized else None,
    )


def write_quantization(quantized: Quantized, artifact: Path) -> None:
    """Write the calibration table, and the sensitivity report if there is one, beside an int8 artifact."""
    write_text(calibration_path(artifact), quantized.table.to_json())
    if quantized.sensitivity is not None:
        write_text(sensitivity_path(artifact), quantized.sensitivity.to_json())


def verify_artifact(
    candidate: Path,
    *,
    reference: Path | None = None,
    images: Sequence[Path] | None = None,
    bounds: Bounds | None = None,
) -> ParityReport:
    """Compare an artifact with the trained network it was made from.

    Args:
        candidate: the artifact.
        reference: the checkpoint; by default the one whose sha256 the artifact carries, if it is the bundled one or
            was downloaded.
        images: real images to compare on; by default the bundled ones.
        bounds: of the numeric gates, in place of the precision's own.

    Raises:
        UsageError: no reference is given and none is known.
        SmlpError: a file cannot be used.
    """
    with open_runner(candidate) as runner:
        path = reference or find_reference(runner.metadata, candidate)
        checkpoint = load_checkpoint(path, ema=runner.metadata.ema)
        if checkpoint.sha256 != runner.metadata.checkpoint_sha256:
            logger.warning("%s is not the file that %s was made from; comparing all the same", path, candidate)
        metadata = replace(
            runner.metadata, labels=checkpoint.metadata.labels or runner.metadata.labels, config=checkpoint.config
        )
        return _prove(runner, checkpoint, metadata, images, bounds, sha256_of(candidate))


def verify_layers(
    candidate: Path,
    *,
    reference: Path | None = None,
    images: Sequence[Path] | None = None,
    max_error: float | None = None,
) -> DivergenceReport:
    """Find where an ONNX file, or a checkpoint as it is deployed, parts from a reference.

    Of an int8 file each int8 layer's noise is measured too, against the layer in the fp32 file of the reference: the
    reference itself, or an export of the checkpoint that is made for it; if the reference is an ONNX file of another
    precision it is not measured.

    Args:
        candidate: the file.
        reference: an ONNX file, or the checkpoint, which is then run as trained; by default that checkpoint, found as
            `verify_artifact` finds it.
        images: real images to compare on; by default those of the parity.
        max_error: the gate; by default that of the candidate's precision.

    Raises:
        UsageError: no reference is given and none is known, or it has another shape.
        SmlpError: a file cannot be used.
    """
    with open_tracer(candidate) as inside:
        metadata = inside.metadata
        if reference is None:
            same = candidate.suffix.lower() in CHECKPOINT_SUFFIXES
            reference = candidate if same else find_reference(metadata, candidate)
        images = images or default_images(metadata)
        with _open_reference(reference, metadata) as truth:
            if metadata.precision != "int8" or truth.metadata.precision != "fp32":
                return find_divergence(truth, inside, images, max_error=max_error)
            with _open_layers(candidate, reference, metadata) as layers:
                return find_divergence(truth, inside, images, max_error=max_error, layers=layers)


def _open_reference(path: Path, metadata: ModelMetadata) -> TracingRunner:
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        return open_tracer(path)
    checkpoint = load_checkpoint(path, ema=metadata.ema)
    return TracingPyTorchRunner(checkpoint, describe(checkpoint))


@contextmanager
def _open_layers(candidate: Path, reference: Path, metadata: ModelMetadata) -> Iterator[QuantizedLayers]:
    """The int8 layers of `candidate` beside those of the fp32 file `reference`, or of an export of that checkpoint."""
    with TemporaryDirectory() as folder:
        path = reference
        if reference.suffix.lower() in CHECKPOINT_SUFFIXES:
            checkpoint = load_checkpoint(reference, ema=metadata.ema)
            path = Path(folder) / f"{reference.stem}.onnx"
            export_onnx(checkpoint.network(), describe(checkpoint), path)
        with QuantizedLayers(candidate, path) as layers:
            yield layers


def _prove(
    candidate: Runner,
    checkpoint: Checkpoint,
    metadata: ModelMetadata,
    images: Sequence[Path] | None,
    bounds: Bounds | None,
    artifact_sha256: str,
) -> ParityReport:
    images = images or default_images(candidate.metadata)
    with PyTorchRunner(checkpoint, metadata) as trained:
        report = compare(trained, candidate, images, bounds=bounds, artifact_sha256=artifact_sha256)
        if candidate.metadata.precision not in ("fp16", "int8"):
            return report
        half, recorder = HalfRunner(checkpoint, metadata), RecordingRunner(checkpoint, metadata)
        with half, recorder:
            return check_half_range(report, trained, half, recorder, images)


def find_reference(metadata: ModelMetadata, candidate: Path) -> Path:
    """The checkpoint that an artifact was made from, if it is the bundled one or was downloaded.

    Raises:
        UsageError: it is neither.
    """
    known = [BUNDLED_CHECKPOINT, *filter(None, map(cached_weights, VARIANTS.values()))]
    for path in known:
        if path.name == metadata.checkpoint and sha256_of(path) == metadata.checkpoint_sha256:
            return path
    raise UsageError(
        f"made from {metadata.checkpoint}, which is not at hand",
        where=candidate,
        fix="give it with --reference CHECKPOINT",
    )


def unlowered_baseline(checkpoint_path: Path, folder: Path) -> Path:
    """Write a checkpoint's network into `folder` as `torch.onnx.export` makes it, for comparison; where it is."""
    checkpoint = load_checkpoint(checkpoint_path)
    metadata = describe(checkpoint)
    path = folder / f"{metadata.name}-unlowered.onnx"
    export_unlowered(checkpoint.network(), metadata, path)
    return path
