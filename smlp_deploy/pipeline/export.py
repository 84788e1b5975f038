"""From a checkpoint to an ONNX file; the bytes that are compared are the bytes that are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from smlp_deploy.artifacts import calibration_path, default_path, failed_path, parity_path, sensitivity_path
from smlp_deploy.dependencies import require_onnxruntime
from smlp_deploy.evaluation.parity import Bounds, ParityReport
from smlp_deploy.evaluation.sensitivity import SensitivityReport
from smlp_deploy.exporters.onnx import DEFAULT_OPSET, export_onnx
from smlp_deploy.files import check_writable, write_text
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.decode import give_memory_back
from smlp_deploy.images.defaults import default_images
from smlp_deploy.interrupts import Progress, no_progress
from smlp_deploy.metadata import ModelMetadata, Preprocessing
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.pretrained import find_checkpoint
from smlp_deploy.pipeline.precision import Int8Options, Quantization, plan_quantization, to_input, to_precision
from smlp_deploy.pipeline.verify import prove_against_checkpoint
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner


@dataclass(frozen=True, kw_only=True)
class Export:
    """The result of an export: the artifact (under its `.failed` name if it failed), its report and the report's file.

    `sensitivity` is each int8 layer's sensitivity and chosen precision, if measured.
    """

    graph: Graph
    path: Path
    report: ParityReport
    report_path: Path
    sensitivity: SensitivityReport | None = None


def export(
    checkpoint: str | Path | Checkpoint,
    target: str | Path | None = None,
    *,
    precision: str = "fp32",
    form: str = "gpu",
    batch: int | None = None,
    wanted_input: str = "float32",
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    ema: bool = False,
    opset: int = DEFAULT_OPSET,
    images: Sequence[Path] | None = None,
    bounds: Bounds | None = None,
    int8: Int8Options | None = None,
    progress: Progress = no_progress,
) -> Export:
    """Export a checkpoint to an ONNX file, and compare it with the trained network; see `export_checkpoint`.

    Args:
        checkpoint: the weights: a file, a variant whose official weights are fetched, or a loaded checkpoint.
        target: the file to write; by default in artifacts/.
        precision: "fp32", "fp16", "bf16" or "int8".
        form: of the axial layers: "gpu" or "cpu", whichever it will run on.
        batch: the one batch size the file accepts, or None for any.
        wanted_input: what the file takes: "float32", normalized images, or "uint8", pixels.
        labels: class names that replace the checkpoint's own.
        preprocessing: replaces the checkpoint's own, or those of its fields that are given.
        ema: take the averaged weights of a checkpoint that has both.
        opset: version of ONNX's default operator set.
        images: real images to compare on; by default the bundled ones, or those of the calibration.
        bounds: of the numeric gates; replace those of the precision.
        int8: how to quantize, for the precision int8.
        progress: told of each stage, and of how much of it is done.

    Returns:
        The file and its report. If a gate failed, `report.passed` is false and the file has a `.failed` name.

    Raises:
        SmlpError: the checkpoint cannot be used, or the graph could not be made or written.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = load_checkpoint(find_checkpoint(str(checkpoint)), ema=ema)
    fields = asdict(preprocessing) if isinstance(preprocessing, Preprocessing) else preprocessing
    names = None if labels is None else tuple(labels)
    metadata = describe(checkpoint, labels=names, preprocessing=fields, batch=batch, precision=precision)
    metadata = replace(metadata, form=form, input=wanted_input)
    return export_checkpoint(
        checkpoint,
        metadata,
        default_path(metadata) if target is None else Path(target),
        opset=opset,
        images=images,
        bounds=bounds,
        int8=int8,
        progress=progress,
    )


def export_checkpoint(
    checkpoint: Checkpoint,
    metadata: ModelMetadata,
    target: Path,
    *,
    opset: int = DEFAULT_OPSET,
    images: Sequence[Path] | None = None,
    bounds: Bounds | None = None,
    int8: Int8Options | None = None,
    progress: Progress = no_progress,
) -> Export:
    """Export `checkpoint` to a graph, compare it with the trained network, and write it.

    Only a graph that passes is written to `target`; one that fails is written under a `.failed` name, and an existing
    file at `target` is left unchanged. In both cases the report is written beside the file.

    Args:
        checkpoint: the weights.
        metadata: to write into the file; its precision and input are those of the graph.
        target: the file to write.
        opset: version of ONNX's default operator set.
        images: real images to compare on; by default the bundled ones, or those of the calibration.
        bounds: of the numeric gates; replace those of the precision.
        int8: how to quantize, for the precision int8.
        progress: told of each stage, and of how much of it is done.

    Raises:
        SmlpError: the graph could not be made or written.
    """
    require_onnxruntime()
    check_writable(target)
    give_memory_back()  # of reading the checkpoint, as much as its weights
    precision = metadata.precision
    progress("making the graph", 0, 0)
    graph = export_onnx(checkpoint.network(shared=True), metadata, path=target, opset=opset)
    give_memory_back()  # of the networks, several copies of the weights
    quantization = plan_quantization(graph, int8 or Int8Options(), progress=progress) if precision == "int8" else None
    progress(f"converting to {precision}", 0, 0)
    graph = to_input(to_precision(graph, precision, quantization=quantization), metadata.input)
    images = images or default_images(graph.metadata, quantization.images if quantization else ())
    seen = quantization.largest if quantization and tuple(images) == quantization.images else None
    with OnnxRuntimeRunner(graph) as candidate:
        report = prove_against_checkpoint(
            candidate, checkpoint, graph.metadata, images, bounds, graph.sha256, largest=seen, progress=progress
        )
    path = target if report.passed else failed_path(target)
    graph.save(path)
    report_path = parity_path(path)
    write_text(report_path, report.to_json())
    if quantization is not None:
        _write_quantization(quantization, path)
    sensitivity = quantization.sensitivity if quantization else None
    return Export(graph=graph, path=path, report=report, report_path=report_path, sensitivity=sensitivity)


def _write_quantization(quantization: Quantization, artifact: Path) -> None:
    """Write the calibration table, and the sensitivity report if there is one, beside an int8 artifact."""
    write_text(calibration_path(artifact), quantization.table.to_json())
    if quantization.sensitivity is not None:
        write_text(sensitivity_path(artifact), quantization.sensitivity.to_json())
