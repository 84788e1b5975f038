"""smlp export."""

from __future__ import annotations

import json
from dataclasses import replace

import typer

from smlp_deploy.commands import options as o
from smlp_deploy.commands.groups import Calibration, Gates, StatedPreprocessing, with_groups
from smlp_deploy.commands.repository import export_to_triton
from smlp_deploy.commands.sources import export_and_show, load_source
from smlp_deploy.commands.terminal import suggest
from smlp_deploy.dependencies import require_onnxruntime, require_torch
from smlp_deploy.errors import UsageError
from smlp_deploy.files import check_writable
from smlp_deploy.images.labels import read_labels
from smlp_deploy.models.description import check_preprocessing, describe


@with_groups
def export(
    *,
    context: typer.Context,
    source: o.CheckpointArgument = None,
    format_: o.FormatOption = o.ExportFormat.onnx,
    output: o.OnnxOutputOption = None,
    form: o.FormOption = o.Form.gpu,
    batch: o.FixedBatchOption = None,
    uint8_input: o.Uint8InputOption = False,
    precision: o.PrecisionOption = None,
    fp16: o.Fp16Option = False,
    bf16: o.Bf16Option = False,
    int8: o.Int8Option = False,
    calibration: Calibration,
    per_channel: o.PerChannelOption = False,
    opset: o.OpsetOption = 20,
    ema: o.EmaOption = False,
    labels: o.LabelsOption = None,
    preprocessing: StatedPreprocessing,
    parity_images: o.ParityImagesOption = None,
    gates: Gates,
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Export a checkpoint to a deployable ONNX file, and prove that it computes what the network computes.

    With --format triton, put an ONNX file or engine into a model repository of NVIDIA's Triton Inference Server.
    """
    if format_ is o.ExportFormat.triton:
        export_to_triton(context, source, output, as_json=as_json)
        return
    require_torch("to export")
    require_onnxruntime()

    # All of it before PyTorch is loaded: usage errors come at once.
    names = read_labels(labels) if labels else None
    stated = preprocessing.fields
    check_preprocessing(stated)
    if output is not None and output.suffix != ".onnx":
        raise UsageError("an ONNX file's name ends in .onnx", where=output)
    wanted = o.choose_precision(precision, fp16=fp16, bf16=bf16, int8=int8) or "fp32"
    images = o.find_given_images(parity_images, "--parity-images") if parity_images else None
    o.check_source(source)
    how = calibration.int8_options(wanted, per_channel=per_channel)
    if output is not None:
        check_writable(output)
    checkpoint = load_source(source, ema=ema)
    metadata = describe(checkpoint, labels=names, preprocessing=stated, batch=batch, precision=wanted)
    metadata = replace(metadata, form=form.value, input="uint8" if uint8_input else "float32")
    result = export_and_show(checkpoint, metadata, output, opset=opset, images=images, bounds=gates.bounds, int8=how)
    if as_json:
        files = {"path": str(result.path), "report": str(result.report_path)}
        typer.echo(json.dumps({**files, "parity": json.loads(result.report.to_json())}, indent=2))
        return
    typer.echo(result.path)
    suggest("smlp", "predict", "--model", result.path, "IMAGES")
