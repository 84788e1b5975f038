"""smlp export."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import typer

from smlp_deploy.commands import options as o
from smlp_deploy.errors import UsageError


def export(
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
    calibration_data: o.CalibrationDataOption = None,
    calibrator: o.CalibratorOption = o.Calibrator.minmax,
    calibration_table: o.CalibrationTableOption = None,
    max_drop: o.MaxDropOption = None,
    per_channel: o.PerChannelOption = False,
    opset: o.OpsetOption = 20,
    ema: o.EmaOption = False,
    labels: o.LabelsOption = None,
    mean: o.MeanOption = None,
    std: o.StdOption = None,
    crop_pct: o.CropPctOption = None,
    interpolation: o.InterpolationOption = None,
    parity_images: o.ParityImagesOption = None,
    min_cosine: o.MinCosineOption = None,
    max_difference: o.MaxDifferenceOption = None,
    min_top1: o.MinTop1Option = None,
    as_json: o.JsonOption = False,
    quiet: o.QuietOption = False,
) -> None:
    """Export a checkpoint to a deployable ONNX file, and prove that it computes what the network computes.

    With --format triton, put an ONNX file or engine into a model repository of NVIDIA's Triton Inference Server.
    """
    if format_ is o.ExportFormat.triton:
        from smlp_deploy.commands.repository import export_to_triton

        export_to_triton(context, source, output, as_json=as_json)
        return
    from smlp_deploy.commands.sources import export_and_show, load_source
    from smlp_deploy.commands.terminal import suggest
    from smlp_deploy.dependencies import require_onnxruntime, require_torch

    require_torch("to export")
    require_onnxruntime()
    from smlp_deploy.files import check_writable
    from smlp_deploy.images.labels import read_labels
    from smlp_deploy.models.description import check_preprocessing, describe

    # All of it before PyTorch is loaded: usage errors come at once.
    names = read_labels(labels) if labels else None
    prepared = _preprocessing(mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
    check_preprocessing(prepared)
    if output is not None and output.suffix != ".onnx":
        raise UsageError("an ONNX file's name ends in .onnx", where=output)
    wanted = o.choose_precision(precision, fp16=fp16, bf16=bf16, int8=int8) or "fp32"
    images = o.find_given_images(parity_images, "--parity-images") if parity_images else None
    o.check_source(source)
    data = (calibration_data, calibrator, calibration_table)
    quantize = o.choose_int8(wanted, *data, max_drop=max_drop, per_channel=per_channel)
    if output is not None:
        check_writable(output)
    checkpoint = load_source(source, ema=ema)
    metadata = describe(checkpoint, labels=names, preprocessing=prepared, batch=batch, precision=wanted)
    result = export_and_show(
        checkpoint,
        replace(metadata, form=form.value, input="uint8" if uint8_input else "float32"),
        output,
        opset=opset,
        images=images,
        bounds=o.gate_bounds(cosine=min_cosine, difference=max_difference, top1=min_top1),
        int8=quantize,
    )
    if as_json:
        files = {"path": str(result.path), "report": str(result.report_path)}
        typer.echo(json.dumps({**files, "parity": json.loads(result.report.to_json())}, indent=2))
        return
    typer.echo(result.path)
    suggest("smlp", "predict", "--model", result.path, "IMAGES")


def _preprocessing(
    *, mean: str | None, std: str | None, crop_pct: float | None, interpolation: str | None
) -> dict[str, Any]:
    """The options that were given, as fields of Preprocessing."""
    given: dict[str, Any] = {"crop_pct": crop_pct, "interpolation": interpolation}
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                red, green, blue = (float(part) for part in text.split(","))
            except ValueError:
                raise UsageError(
                    f"{text!r} is not three numbers", where=f"--{name}", fix="for example 0.5,0.5,0.5"
                ) from None
            given[name] = (red, green, blue)
    return {name: value for name, value in given.items() if value is not None}
