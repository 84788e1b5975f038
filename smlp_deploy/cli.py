"""The command line: one function per verb, which parses, calls and shows. The only place that prints and exits."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from smlp_deploy import __version__
from smlp_deploy.commands.options import (
    BATCH_PANEL,
    CALIBRATION_PANEL,
    GATES_PANEL,
    PRECISION_PANEL,
    PREPROCESSING_PANEL,
    TENSORRT_PANEL,
    CalibrationDataOption,
    CalibrationTableOption,
    Calibrator,
    CalibratorOption,
    CheckpointArgument,
    EmaOption,
    EngineTarget,
    ExportFormat,
    HtmlOption,
    Int8Option,
    JsonOption,
    MaxDifferenceOption,
    MaxDropOption,
    MinCosineOption,
    MinTop1Option,
    Precision,
    Provider,
    QuietOption,
    RecordFormat,
    check_html,
    choose_architectures,
    choose_batch_profile,
    choose_format,
    choose_int8,
    choose_precision,
    choose_preprocessing,
    find_given_images,
    gate_bounds,
    parse_batch_sizes,
    read_timing_cache,
    standard_input,
)
from smlp_deploy.errors import SmlpError, UsageError, printable
from smlp_deploy.interrupts import Terminated, handle_sigterm

if TYPE_CHECKING:
    from smlp_deploy.inference.classify import Classifier, Prediction
    from smlp_deploy.inference.records import RecordStream, RunIdentity
    from smlp_deploy.inference.resume import RecordFile
    from smlp_deploy.interrupts import StopRequest
    from smlp_deploy.metadata import ModelMetadata
    from smlp_deploy.models.checkpoint import Checkpoint
    from smlp_deploy.pipeline.precision import Int8Options

app = typer.Typer(
    name="smlp",
    help="Take a trained sMLPNet from its checkpoint to production, with proof at each step.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


_INTERRUPTED = 130  # what typer makes of Ctrl-C


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smlp-deploy {__version__}")
        raise typer.Exit


@app.callback()
def smlp(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Take a trained sMLPNet from its checkpoint to production, with proof at each step."""


@app.command(rich_help_panel="Get")
def models(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """List the paper's variants: parameters, MACs, accuracy, and where their weights are."""
    from smlp_deploy.commands.terminal import show_variants, suggest
    from smlp_deploy.models.variants import VARIANTS, mac_count, parameter_count

    if as_json:
        facts = [
            {
                "name": variant.name,
                "parameters": parameter_count(variant.config),
                "macs": mac_count(variant.config),
                "paper_top1": variant.paper_top1,
                "weights_url": variant.weights_url,
            }
            for variant in VARIANTS.values()
        ]
        typer.echo(json.dumps(facts, indent=2))
        return
    show_variants(VARIANTS)
    suggest("smlp", "download", "smlpnet_small")


@app.command(rich_help_panel="Get", epilog="Example: smlp download smlpnet_small")
def download(
    variant: Annotated[str, typer.Argument(metavar="VARIANT", help="A variant's name; smlp models lists them.")],
    quiet: QuietOption = False,
) -> None:
    """Fetch a variant's official weights into the user's cache directory, or verify those already there."""
    from smlp_deploy.commands.terminal import downloading, suggest
    from smlp_deploy.models.pretrained import fetch_weights
    from smlp_deploy.models.variants import find_variant

    with downloading() as progress:
        path = fetch_weights(find_variant(variant), progress=progress)
    typer.echo(path)
    suggest("smlp", "export", variant)


@app.command(rich_help_panel="Get", epilog="Example: smlp inspect my.pth")
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint, an ONNX file or an engine.")],
    ema: EmaOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show what a file is, from the file itself: configuration, labels, preprocessing, provenance."""
    from smlp_deploy.commands.terminal import show_facts, suggest
    from smlp_deploy.inspect_file import inspect_file

    facts = inspect_file(file, ema=ema)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show_facts(facts)
        suggest(
            *("smlp", "export", file)
            if facts["kind"] == "checkpoint"
            else ("smlp", "predict", "--model", file, "IMAGES")
        )


@app.command(rich_help_panel="Export", epilog="Example: smlp export my.pth --labels names.txt --fp16")
def export(
    source: CheckpointArgument = None,
    format_: Annotated[ExportFormat, typer.Option("--format", help="What to write.")] = ExportFormat.onnx,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Default: in artifacts/, by model and precision.", show_default=False),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Fix the batch size. Default: any size.")] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Of the graph's arithmetic; inputs and outputs stay float32. Default: fp32.",
            rich_help_panel=PRECISION_PANEL,
        ),
    ] = None,
    fp16: Annotated[
        bool,
        typer.Option("--fp16", "--half", help="The same as --precision fp16.", rich_help_panel=PRECISION_PANEL),
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="The same as --precision bf16.", rich_help_panel=PRECISION_PANEL)
    ] = False,
    int8: Int8Option = False,
    calibration_data: CalibrationDataOption = None,
    calibrator: CalibratorOption = Calibrator.minmax,
    calibration_table: CalibrationTableOption = None,
    max_drop: MaxDropOption = None,
    per_channel: Annotated[
        bool,
        typer.Option(
            "--per-channel",
            help="A scale per output channel, for TensorRT, not TensorRT-RTX.",
            rich_help_panel=CALIBRATION_PANEL,
        ),
    ] = False,
    opset: Annotated[int, typer.Option(min=18, max=23, help="ONNX operator set.")] = 20,
    ema: EmaOption = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Class names: a text file with one per line, or a JSON list.", rich_help_panel=PREPROCESSING_PANEL
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Channel means of pixels in 0 to 1.", rich_help_panel=PREPROCESSING_PANEL),
    ] = None,
    std: Annotated[
        str | None,
        typer.Option(metavar="R,G,B", help="Channel standard deviations.", rich_help_panel=PREPROCESSING_PANEL),
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(help="Crop over resized shorter side; 0.875 is 224 of 256.", rich_help_panel=PREPROCESSING_PANEL),
    ] = None,
    interpolation: Annotated[
        str | None,
        typer.Option(help="Resize filter: nearest, bilinear, bicubic or lanczos.", rich_help_panel=PREPROCESSING_PANEL),
    ] = None,
    parity_images: Annotated[
        list[str] | None,
        typer.Option(
            help="Image or folder to compare on; may be repeated. Default: bundled images.",
            rich_help_panel=GATES_PANEL,
        ),
    ] = None,
    min_cosine: MinCosineOption = None,
    max_difference: MaxDifferenceOption = None,
    min_top1: MinTop1Option = None,
    quiet: QuietOption = False,
) -> None:
    """Write a checkpoint as a deployable ONNX file, and prove that the file computes what the network computes."""
    from smlp_deploy.commands.terminal import suggest
    from smlp_deploy.dependencies import require_onnxruntime, require_torch

    require_torch("to export")
    require_onnxruntime()
    from smlp_deploy.artifacts import default_path
    from smlp_deploy.models.description import describe, read_labels

    given_labels = read_labels(labels) if labels else None
    given_preprocessing = choose_preprocessing(mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
    if output is not None and output.suffix != ".onnx":
        raise UsageError("an ONNX file's name ends in .onnx", where=output)
    wanted = choose_precision(precision, fp16=fp16, bf16=bf16, int8=int8)
    quantization = choose_int8(
        wanted,
        data=calibration_data,
        method=calibrator,
        table=calibration_table,
        max_drop=max_drop,
        per_channel=per_channel,
    )
    checkpoint = _load(source, ema=ema)
    metadata = describe(
        checkpoint, labels=given_labels, preprocessing=given_preprocessing, batch=batch, precision=wanted or "fp32"
    )
    target = output or default_path(metadata)
    images = find_given_images(parity_images) if parity_images else None
    bounds = gate_bounds(cosine=min_cosine, difference=max_difference, top1=min_top1)
    path = _export_proven(checkpoint, metadata, target, opset=opset, images=images, bounds=bounds, int8=quantization)
    typer.echo(path)
    suggest("smlp", "predict", "--model", path, "IMAGES")


@app.command("build-engine", rich_help_panel="Build", epilog="Example: smlp build-engine artifacts/my-fp32.onnx --fp16")
def build_engine(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="ONNX|CHECKPOINT|VARIANT",
            help="What to build. Default: the newest fp32 ONNX file in artifacts/; with none there, one is exported.",
        ),
    ] = None,
    fp16: Annotated[
        bool,
        typer.Option("--fp16", "--half", help="Half precision, as a 16-bit graph.", rich_help_panel=PRECISION_PANEL),
    ] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="bfloat16, as a 16-bit graph.", rich_help_panel=PRECISION_PANEL)
    ] = False,
    int8: Int8Option = False,
    fp32: Annotated[
        bool,
        typer.Option("--fp32", help="Single precision. Default: the ONNX file's own.", rich_help_panel=PRECISION_PANEL),
    ] = False,
    calibration_data: CalibrationDataOption = None,
    calibrator: CalibratorOption = Calibrator.minmax,
    calibration_table: CalibrationTableOption = None,
    max_drop: MaxDropOption = None,
    min_batch: Annotated[
        int | None, typer.Option(min=1, help="Smallest batch. Default: 1.", rich_help_panel=BATCH_PANEL)
    ] = None,
    opt_batch: Annotated[
        int | None, typer.Option(min=1, help="Batch to be fastest at. Default: 8.", rich_help_panel=BATCH_PANEL)
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Largest batch. Default: 32.", rich_help_panel=BATCH_PANEL)
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Exactly this batch.", rich_help_panel=BATCH_PANEL)] = None,
    target: Annotated[
        EngineTarget,
        typer.Option(
            metavar="BACKEND",
            help="tensorrt, tensorrt-rtx, or auto: tensorrt if it and a GPU are there.",
            rich_help_panel=TENSORRT_PANEL,
        ),
    ] = EngineTarget.auto,
    gpu_arch: Annotated[
        str | None,
        typer.Option(
            metavar="SM,SM",
            help="Ahead of time, for which GPUs. Default: sm80,sm86,sm89,sm120.",
            rich_help_panel=TENSORRT_PANEL,
        ),
    ] = None,
    workspace: Annotated[
        float | None,
        typer.Option(metavar="GIB", min=0.0, help="Bound on scratch memory.", rich_help_panel=TENSORRT_PANEL),
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="Timing cache to start from and to update.", rich_help_panel=TENSORRT_PANEL)
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(min=0, max=5, help="TensorRT's own by default.", rich_help_panel=TENSORRT_PANEL)
    ] = None,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="Loadable by later TensorRT versions.", rich_help_panel=TENSORRT_PANEL
        ),
    ] = False,
    hardware_compatible: Annotated[
        bool,
        typer.Option(
            "--hardware-compatible",
            help="For every GPU from Ampere on; tensorrt only.",
            rich_help_panel=TENSORRT_PANEL,
        ),
    ] = False,
    min_cosine: MinCosineOption = None,
    max_difference: MaxDifferenceOption = None,
    min_top1: MinTop1Option = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Default: in artifacts/, by model and precision.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Build a TensorRT engine and list what is inside: kernels by precision, bytes moved."""
    from smlp_deploy.artifacts import engine_path
    from smlp_deploy.commands.terminal import building, say, show_kernels, show_parity, show_sensitivity, suggest
    from smlp_deploy.dependencies import require, require_onnxruntime
    from smlp_deploy.exporters.tensorrt import BuildOptions, find_backend
    from smlp_deploy.files import write_bytes

    if output is not None and output.suffix != ".engine":
        raise UsageError("an engine's name ends in .engine", where=output)
    precision = choose_precision(None, fp16=fp16, bf16=bf16, int8=int8, fp32=fp32)
    profile = choose_batch_profile(batch, min=min_batch, opt=opt_batch, max=max_batch)
    backend = find_backend(target)
    if hardware_compatible and backend != "tensorrt":
        raise UsageError(f"{backend} builds for the architectures of --gpu-arch", where="--hardware-compatible")
    options = BuildOptions(
        profile=profile,
        architectures=choose_architectures(gpu_arch, backend),
        workspace_gib=workspace,
        optimization_level=optimization_level,
        timing_cache=read_timing_cache(timing_cache, backend),
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
    )
    require("ml_dtypes", "onnx", purpose="to convert graphs", extra="export")
    require_onnxruntime()
    from smlp_deploy.pipeline.build import build_engine as build
    from smlp_deploy.pipeline.build import prepare_graph

    quantization = choose_int8(
        precision,
        data=calibration_data,
        method=calibrator,
        table=calibration_table,
        max_drop=max_drop,
        per_channel=backend == "tensorrt",
    )
    bounds = gate_bounds(cosine=min_cosine, difference=max_difference, top1=min_top1)
    onnx_file = _onnx_file(source)
    with building("reading the graph") as progress:
        graph = prepare_graph(onnx_file, precision, bounds=bounds, int8=quantization, progress=progress)
    if graph.sensitivity is not None:
        show_sensitivity(graph.sensitivity)
    path = output or engine_path(graph.metadata)
    with building("building") as progress:
        result = build(graph, path, options, backend=backend, bounds=bounds, progress=progress)
    if timing_cache is not None and result.timing_cache is not None:
        write_bytes(timing_cache, result.timing_cache)
    show_kernels(result.summary)
    typer.echo(result.path)
    if result.parity is not None:
        show_parity(result.parity, stderr=True)
    how = f"built ahead of time by {backend} for {', '.join(options.architectures)}" if options.architectures else ""
    ran = "run here and compared with its ONNX file" if result.parity else "it was not run here"
    say(f"{how or f'built by {backend} for this GPU'}; {ran}")
    suggest("smlp", "predict", "--model", result.path, "IMAGES")


@app.command(rich_help_panel="Build", epilog="Example: smlp profile artifacts/my-fp16.onnx --gpu-arch sm89")
def profile(
    file: Annotated[Path, typer.Argument(metavar="ONNX", help="An ONNX file that smlp export wrote.")],
    batch: Annotated[int, typer.Option(min=1, help="Images per run.")] = 8,
    gpu_arch: Annotated[str, typer.Option(metavar="SM", help="Architecture to compile for.")] = "sm89",
    top: Annotated[int, typer.Option(min=0, help="How many kernels to list, those that move most bytes first.")] = 20,
    compare: Annotated[Path | None, typer.Option(help="Another ONNX file to put beside it.")] = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the kernels TensorRT makes of an ONNX file, their bytes, and a roofline estimate; needs no GPU."""
    from dataclasses import asdict

    from smlp_deploy.commands.terminal import show_comparison, show_profile, suggest, working
    from smlp_deploy.dependencies import require

    require("onnx", purpose="to read an ONNX file", extra="cpu")
    from smlp_deploy.evaluation.profile import profile_graph
    from smlp_deploy.reports import profile_page

    check_html(html)
    if html is not None and compare is not None:
        raise UsageError("a page is about one file", where="--html", fix="leave out --compare")

    with working("compiling"):
        profiles = [
            profile_graph(path, batch=batch, architecture=gpu_arch) for path in (file, compare) if path is not None
        ]
    with _page(html, lambda: profile_page(profiles[0])):
        if as_json:
            typer.echo(json.dumps([asdict(found) for found in profiles], indent=2, default=str))
        elif compare is not None:
            show_comparison(profiles[0], profiles[1])
        else:
            show_profile(profiles[0], top=top)
    suggest("smlp", "build-engine", file)


@app.command(rich_help_panel="Run", epilog="Example: smlp predict photos/ -o predictions.jsonl")
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="IMAGES", help="Images, folders, @FILE with a path per line, or - for such a list."),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", help="Artifact or checkpoint. Default: the newest in artifacts/, else the bundled model."
        ),
    ] = None,
    provider: Annotated[
        Provider | None,
        typer.Option(help="Where ONNX Runtime runs an ONNX file; never another than asked for. Default: cpu."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per run of the network.")] = 32,
    topk: Annotated[int | None, typer.Option(min=1, help="Classes per image. Default: 5, or all of fewer.")] = None,
    format_: Annotated[
        RecordFormat | None,
        typer.Option("--format", help="Default: by the output file's suffix, else table."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write records here, not to stdout.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the same -o, or begin it.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads. Default: one per core.")] = None,
    allow_errors: Annotated[bool, typer.Option("--allow-errors", help="Exit 0 even if some images failed.")] = False,
    html: HtmlOption = None,
    quiet: QuietOption = False,
) -> None:
    """Classify images; labels and preprocessing are those inside the model. One record per image, in order.

    With -o the records are in FILE.partial until all are there; whatever stops the run, --resume continues it.
    """
    from smlp_deploy.commands.terminal import say, suggest
    from smlp_deploy.images.find import find_images
    from smlp_deploy.inference.classify import Classifier
    from smlp_deploy.interrupts import put_off
    from smlp_deploy.reports import IMAGES_SHOWN, predictions_page

    kind = choose_format(format_, output)
    if resume and (output is None or kind is RecordFormat.table):
        raise UsageError("only JSONL and CSV in a file can be continued", where="--resume", fix="add -o records.jsonl")
    check_html(html, beside=output)
    if html is not None and resume:
        raise UsageError("a page shows the images of one run", where="--html", fix="leave out --resume")
    images = find_images(inputs, standard_input())
    path = _model(model, provider)
    first: list[Prediction] = []
    with Classifier.open(path, provider=provider) as classifier, put_off(again=True) as stop:
        topk = classifier.resolve_topk(topk)

        def identity() -> RunIdentity:
            return _run_identity(path, classifier, kind=kind, topk=topk, batch_size=batch_size, provider=provider)

        with _record_sink(output, identity, kind=kind, topk=topk, resume=resume) as sink:
            sink.skip(images)
            predictions = classifier.classify(stop.before(images), batch_size=batch_size, topk=topk, workers=workers)
            if html is not None:
                predictions = _remembering(predictions, first, IMAGES_SHOWN)
            done, failed = _write_records(predictions, sink, stop, batch_size=batch_size, on_terminal=output is None)
        if html is not None:
            _write_html(html, predictions_page(first, model=classifier.runner.name, total=done, failed=failed))
    say(f"{done} {'image' if done == 1 else 'images'}, {failed} failed" + (f", written to {output}" if output else ""))
    if failed and not allow_errors:
        raise typer.Exit(1)
    suggest("smlp", "verify", path)


@app.command(rich_help_panel="Prove", epilog="Example: smlp verify artifacts/my-int8.onnx --reference my.pth --layers")
def verify(
    candidate: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT",
            help="The artifact to check; with --layers also a checkpoint, or what --save wrote. Engines need a GPU.",
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(
            help="What it was made from: the checkpoint; for an engine with --layers, the ONNX file. "
            "Default: found by the artifact's own sha256 of it."
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(help="Image or folder to compare on; may be repeated. Default: bundled images."),
    ] = None,
    min_cosine: MinCosineOption = None,
    max_difference: MaxDifferenceOption = None,
    min_top1: MinTop1Option = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare block by block, and name the first that is over the gate.")
    ] = False,
    max_error: Annotated[
        float | None,
        typer.Option(min=0, metavar="RATIO", help="--layers: gate on the relative error. Default: by precision."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="--layers: write the figures here, to judge them later.")] = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Compare an artifact with its trained network again, on real images and seeded noise."""
    check_html(html, beside=save)
    bounds = gate_bounds(cosine=min_cosine, difference=max_difference, top1=min_top1)
    if layers and bounds:
        raise UsageError("the gate of --layers is --max-error", where=f"the bound on {next(iter(bounds))}")
    if layers:
        _verify_layers(candidate, reference, images, max_error=max_error, save=save, html=html, as_json=as_json)
        return
    if max_error is not None or save is not None:
        raise UsageError("is for --layers", where="--save" if save else "--max-error", fix="add --layers")
    from smlp_deploy.commands.terminal import show_parity, suggest, working
    from smlp_deploy.dependencies import require_proof

    require_proof("to run the trained network")
    from smlp_deploy.pipeline.export import verify_artifact
    from smlp_deploy.reports import parity_page

    paths = find_given_images(images) if images else None
    with working(f"comparing {candidate} with the trained network"):
        report = verify_artifact(candidate, reference=reference, images=paths, bounds=bounds)
    with _page(html, lambda: parity_page(report)):
        if as_json:
            typer.echo(report.to_json(), nl=False)
        else:
            show_parity(report, stderr=False)
    if not report.passed:
        raise SmlpError(
            f"parity failed: {', '.join(gate.name for gate in report.failures)}",
            where=candidate,
            fix="smlp verify --layers finds where they part",
        )
    suggest("smlp", "benchmark", candidate)


@app.command(
    "eval",
    rich_help_panel="Prove",
    epilog="Example: smlp eval val/ -m artifacts/my-fp32.onnx -m artifacts/my-int8.onnx",
)
def evaluate(
    dataset: Annotated[
        Path,
        typer.Argument(
            metavar="DATASET", help="A folder with one folder per class, or a CSV file with the columns path and label."
        ),
    ],
    model: Annotated[
        list[Path] | None,
        typer.Option(
            "--model", "-m", help="Artifact or checkpoint; repeat it to compare. Default: as in smlp predict."
        ),
    ] = None,
    mapping: Annotated[
        Path | None, typer.Option(help="What the dataset calls its classes: JSON, or CSV of folder and label.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per run of a network.")] = 32,
    workers: Annotated[int | None, typer.Option(min=1, help="Decoding threads. Default: one per core.")] = None,
    min_top1: Annotated[
        float | None, typer.Option(metavar="PERCENT", min=0, max=100, help="Fail if a model's top-1 is below it.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON report here.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run with the same -o, or begin it.")
    ] = False,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure accuracy on labelled images, of several models on the very same decoded images.

    With -o each image's answers are in FILE.partial until the report is there; whatever stops the run, --resume
    continues it.
    """
    from smlp_deploy.commands.terminal import building, show_evaluation, suggest
    from smlp_deploy.evaluation.accuracy import EvaluationIdentity
    from smlp_deploy.evaluation.accuracy import evaluate as measure
    from smlp_deploy.images.dataset import find_labelled_images, imagenet_synsets, read_mapping
    from smlp_deploy.inference.resume import RecordFile
    from smlp_deploy.interrupts import StopRequest, put_off
    from smlp_deploy.reports import evaluation_page
    from smlp_deploy.runners import open_runner

    check_html(html, beside=output)
    if resume and output is None:
        raise UsageError("only a report in a file can be continued", where="--resume", fix="add -o report.json")
    names = read_mapping(mapping) if mapping else None
    paths = model or [_model(None, None)]
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(open_runner(path)) for path in paths]
        metadata = runners[0].metadata
        synsets = imagenet_synsets(metadata.labels)
        samples = find_labelled_images(dataset, metadata.labels, synsets=synsets, mapping=names)
        stop, kept = StopRequest(), None
        if output is not None:
            identity = EvaluationIdentity.of(paths, metadata, samples, batch_size=batch_size)
            stop = stack.enter_context(put_off(again=True))
            kept = stack.enter_context(RecordFile.open(output, identity, resume=resume))
        progress = stack.enter_context(building("evaluating"))
        report = measure(
            runners,
            samples,
            batch_size=batch_size,
            workers=workers,
            progress=lambda done, total: progress("images", done, total),
            kept=kept,
            stop=stop,
        )
        if kept is not None:
            kept.conclude(report.to_json())
    with _page(html, lambda: evaluation_page(report)):
        if as_json:
            typer.echo(report.to_json(), nl=False)
        else:
            show_evaluation(report)
    below = [found for found in report.models if min_top1 is not None and 100 * found.top1.value < min_top1]
    if below:
        raise SmlpError(f"top-1 is {below[0].top1.value:.2%}, below {min_top1:g}%", where=below[0].name)
    suggest("smlp", "benchmark", *paths)


@app.command(
    rich_help_panel="Prove", epilog="Example: smlp benchmark artifacts/my-fp32.onnx --baseline --reference my.pth"
)
def benchmark(
    artifacts: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ARTIFACT",
            help="Artifacts and checkpoints; ratios are to the first. Default: as in smlp predict.",
        ),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(metavar="N,N", help="Images per run, each size timed.")] = "1,8,32",
    rounds: Annotated[
        int,
        typer.Option(
            min=1, help="Turns of each model at each batch size; up to three times as many for unsure ratios."
        ),
    ] = 10,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline", help="Also PyTorch, torch.compile and the unlowered baseline of the same checkpoint."
        ),
    ] = False,
    reference: Annotated[
        Path | None,
        typer.Option(help="--baseline: the checkpoint. Default: found by the first artifact's own sha256 of it."),
    ] = None,
    provider: Annotated[Provider | None, typer.Option(help="Where ONNX Runtime runs ONNX files. Default: cpu.")] = None,
    end_to_end: Annotated[
        list[str] | None,
        typer.Option(metavar="IMAGES", help="Also time image files to records; a folder or image, may be repeated."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="--end-to-end: decoding threads. Default: one per core.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON report here.")] = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Time models side by side, in turns: A B A B, each in a process of its own."""
    from tempfile import TemporaryDirectory

    from smlp_deploy.commands.terminal import building, show_benchmark, suggest
    from smlp_deploy.evaluation.benchmark import Files, run_benchmark
    from smlp_deploy.evaluation.worker import Target
    from smlp_deploy.files import check_writable, write_text
    from smlp_deploy.images.batches import available_cores
    from smlp_deploy.pipeline.baselines import baselines_of
    from smlp_deploy.reports import benchmark_page

    check_html(html, beside=output)
    sizes = parse_batch_sizes(batch_sizes)
    if reference is not None and not baseline:
        raise UsageError("is for --baseline", where="--reference", fix="add --baseline")
    if workers is not None and not end_to_end:
        raise UsageError("is for --end-to-end", where="--workers", fix="add --end-to-end IMAGES")
    if output is not None:
        check_writable(output)
    files = None
    if end_to_end:
        files = Files(
            paths=tuple(find_given_images(end_to_end)), batch=max(sizes), workers=workers or available_cores()
        )
    where = provider.value if provider else None
    paths = artifacts or [_model(None, provider)]
    targets = [Target(path=path, provider=where if path.suffix.lower() == ".onnx" else None) for path in paths]
    with TemporaryDirectory() as folder, building("loading") as progress:
        if baseline:
            progress("exporting the network as it is", 0, 1)
        others = baselines_of(paths[0], Path(folder), reference=reference, provider=where) if baseline else ()
        report = run_benchmark(
            targets, baselines=others, batch_sizes=sizes, rounds=rounds, files=files, progress=progress
        )
    if output is not None:
        write_text(output, report.to_json())
    with _page(html, lambda: benchmark_page(report)):
        if as_json:
            typer.echo(report.to_json(), nl=False)
        else:
            show_benchmark(report)
    if not as_json:
        suggest("smlp", "profile", next((path for path in paths if path.suffix.lower() == ".onnx"), "ONNX"))


@app.command(rich_help_panel="Prove")
def doctor(as_json: JsonOption = False, quiet: QuietOption = False) -> None:
    """Tell what works on this machine, and what to do about the rest."""
    from smlp_deploy.commands.terminal import show_findings, suggest, working
    from smlp_deploy.doctor import examine, to_json

    with working("looking"):
        findings = examine()
    if as_json:
        typer.echo(to_json(findings), nl=False)
    else:
        show_findings(findings)
    if any(finding.status == "error" for finding in findings):
        raise typer.Exit(1)
    suggest("smlp", "export")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line.

    Exit code 0; 1 for an error of ours or a failed check; 2 for wrong usage; 130 after Ctrl-C, 143 after SIGTERM.
    """
    logging.getLogger("smlp_deploy").addHandler(_LazyNotes(logging.WARNING))
    handle_sigterm()
    try:
        code = app(args=arguments, prog_name="smlp", standalone_mode=False)
    except SmlpError as error:
        _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        _fail(_usage_message(error), error.exit_code)
    except Terminated as stop:
        _fail("stopped by SIGTERM; nothing is left half-made", int(stop.code or 1))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # What Python still holds for standard output would fail again on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"cannot write: {error.strerror} · standard output", 1)
    if code == _INTERRUPTED:
        _fail("stopped by Ctrl-C; nothing is left half-made", _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_message(error: typer.TyperException) -> str:
    """What typer has to say, in the form of our own errors."""
    context = getattr(error, "ctx", None)
    fix = f"{context.command_path if context else 'smlp'} --help"
    # With no verb at all the help was shown and the message is empty.
    message = printable(error.format_message()) or "no verb given"
    if similar := getattr(error, "possibilities", None):
        option = error.option_name  # type: ignore[attr-defined]
        message = f"No such option: {printable(option)}"
        fix = f"did you mean {get_close_matches(option, similar, n=1, cutoff=0)[0]}? · {fix}"
    return f"{message} · {fix}"


def _verify_layers(
    candidate: Path,
    reference: Path | None,
    images: list[str] | None,
    *,
    max_error: float | None,
    save: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show the error at each point, and fail if one is over the gate."""
    from smlp_deploy.commands.terminal import show_divergence, suggest, working
    from smlp_deploy.evaluation.layers import DivergenceReport
    from smlp_deploy.files import read_text, write_text
    from smlp_deploy.reports import divergence_page

    if max_error is not None and not math.isfinite(max_error):
        raise UsageError("is no number to compare with", where="--max-error")
    if candidate.suffix == ".json":
        if reference is not None or images:
            raise UsageError(
                "is a report, for which nothing is run", where=candidate, fix="leave out --reference and --images"
            )
        text = read_text(candidate, error=UsageError, fix="smlp verify --layers --save makes one")
        report = DivergenceReport.from_json(text, where=candidate)
        report = report if max_error is None else report.judged_by(max_error)
    else:
        from smlp_deploy.dependencies import require, require_onnxruntime, require_proof

        if candidate.suffix.lower() == ".engine":
            require("onnx", "ml_dtypes", purpose="to read its graph", extra="export")
            require_onnxruntime()
            from smlp_deploy.pipeline.build import verify_engine_layers as compare
        else:
            require_proof("to compare block by block")
            from smlp_deploy.pipeline.export import verify_layers as compare

        with working(f"comparing {candidate} block by block"):
            report = compare(
                candidate,
                reference=reference,
                images=find_given_images(images) if images else None,
                max_error=max_error,
            )
    if save is not None:
        write_text(save, report.to_json())
    with _page(html, lambda: divergence_page(report)):
        if as_json:
            typer.echo(report.to_json(), nl=False)
        else:
            show_divergence(report)
    if (over := report.first_over) is not None:
        raise SmlpError(
            f"parts from {report.reference} at {over.name}: error {over.error:.2g}, allowed {report.max_error:g}",
            where=candidate,
        )
    suggest("smlp", "eval", "DATASET", "--model", "ARTIFACT" if candidate.suffix == ".json" else candidate)


class _LazyNotes(logging.Handler):
    """Shows the library's warnings on stderr; imports what draws them only when there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from smlp_deploy.commands.terminal import note

        note(record.getMessage())


def _fail(message: str, code: int) -> NoReturn:
    from smlp_deploy.commands.terminal import show_error

    show_error(message)
    sys.exit(code)


def _load(source: str | None, *, ema: bool) -> Checkpoint:
    """The checkpoint an argument means; the bundled one, with a note, where none is given."""
    from smlp_deploy.commands.terminal import downloading, note
    from smlp_deploy.files import BUNDLED_CHECKPOINT
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.pretrained import find_checkpoint

    if source is None:
        note("no checkpoint given; using the bundled digits model")
        return load_checkpoint(BUNDLED_CHECKPOINT, ema=ema)
    with downloading() as progress:
        path = find_checkpoint(source, progress=progress)
    return load_checkpoint(path, ema=ema)


def _export_proven(
    checkpoint: Checkpoint,
    metadata: ModelMetadata,
    target: Path,
    *,
    opset: int = 20,
    images: list[Path] | None = None,
    bounds: dict[str, float] | None = None,
    int8: Int8Options | None = None,
) -> Path:
    """Export, show the parity report, and fail if it does."""
    from smlp_deploy.commands.terminal import building, show_parity, show_sensitivity
    from smlp_deploy.pipeline.export import export_checkpoint

    with building(f"exporting {metadata.name} and comparing the file with the trained network") as progress:
        result = export_checkpoint(
            checkpoint, metadata, target, opset=opset, images=images, bounds=bounds, int8=int8, progress=progress
        )
    if result.sensitivity is not None:
        show_sensitivity(result.sensitivity)
    show_parity(result.report, stderr=True)
    if not result.report.passed:
        raise SmlpError(
            f"parity failed: {', '.join(gate.name for gate in result.report.failures)}",
            where=result.path,
            fix=f"the report is {result.report_path}",
        )
    return result.path


@contextlib.contextmanager
def _page(path: Path | None, make: Callable[[], str]) -> Iterator[None]:
    """Write a page before the block shows the results, which may meet a closed pipe; its failure waits for them."""
    failure: SmlpError | None = None
    if path is not None:
        try:
            _write_html(path, make())
        except SmlpError as error:
            failure = error
    yield
    if failure is not None:
        raise failure


def _write_html(path: Path, page: str) -> None:
    from smlp_deploy.commands.terminal import say
    from smlp_deploy.files import write_text

    write_text(path, page)
    say(f"page written to {path}")


def _remembering(predictions: Iterable[Prediction], first: list[Prediction], most: int) -> Iterator[Prediction]:
    """`predictions`, of which the first are put into a list on the way."""
    for prediction in predictions:
        if len(first) < most:
            first.append(prediction)
        yield prediction


def _onnx_file(source: str | None) -> Path:
    """The ONNX file a build starts from; says so where it was found or had to be made."""
    from smlp_deploy.artifacts import default_path, newest_artifact
    from smlp_deploy.commands.terminal import note

    if source is None and (newest := newest_artifact("*-fp32*.onnx")) is not None:
        note(f"no source given; using {newest}, the newest fp32 file in artifacts/")
        return newest
    if source is not None and source.endswith(".onnx"):
        return Path(source)
    from smlp_deploy.dependencies import require_torch

    require_torch("to export")
    from smlp_deploy.models.description import describe

    checkpoint = _load(source, ema=False)
    metadata = describe(checkpoint)
    note(f"exporting {default_path(metadata)} first")
    return _export_proven(checkpoint, metadata, default_path(metadata))


def _model(given: Path | None, provider: Provider | None) -> Path:
    """The model to predict with; says which, where none is given. A provider asks for an ONNX file."""
    from smlp_deploy.artifacts import newest_artifact
    from smlp_deploy.commands.terminal import note
    from smlp_deploy.files import BUNDLED_CHECKPOINT

    if given is not None:
        return given
    engine = newest_artifact("*.engine")
    if engine is not None and provider is None and _fits(engine):
        note(f"no model given; using {engine}, the newest engine in artifacts/")
        return engine
    newest = newest_artifact()
    if newest is not None:
        note(f"no model given; using {newest}, the newest in artifacts/")
        return newest
    note("no model given and none in artifacts/; using the bundled digits model")
    return BUNDLED_CHECKPOINT


def _fits(engine: Path) -> bool:
    """Whether an engine can run here; says why not."""
    from smlp_deploy.commands.terminal import note
    from smlp_deploy.runners.tensorrt import check_machine, read_manifest

    try:
        check_machine(engine, read_manifest(engine))
    except SmlpError as error:
        note(f"not using an engine: {error}")
        return False
    return True


def _run_identity(
    path: Path, classifier: Classifier, *, kind: RecordFormat, topk: int, batch_size: int, provider: Provider | None
) -> RunIdentity:
    """What the records depend on."""
    from dataclasses import asdict

    from smlp_deploy.files import sha256_of
    from smlp_deploy.inference.records import RunIdentity
    from smlp_deploy.inference.resume import run_versions, sha256_of_json

    metadata = classifier.runner.metadata
    return RunIdentity(
        versions=run_versions(),
        model=sha256_of(path),
        labels=sha256_of_json(metadata.labels),
        preprocessing=asdict(metadata.preprocessing),
        provider=provider.value if provider else Provider.cpu.value,
        format=kind.value,
        topk=topk,
        batch_size=batch_size,
    )


@contextlib.contextmanager
def _record_sink(
    output: Path | None, identity: Callable[[], RunIdentity], *, kind: RecordFormat, topk: int, resume: bool
) -> Iterator[RecordFile[Prediction] | RecordStream]:
    """Where records go: standard output, or a file. Undecodable bytes of file names survive.

    What they depend on is asked only where it is kept, because it takes the hash of the whole model.
    """
    from smlp_deploy.commands.terminal import predictions_writer
    from smlp_deploy.files import replacing
    from smlp_deploy.inference.records import FORMATS, RecordStream
    from smlp_deploy.inference.resume import RecordFile

    if output is None:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        if kind is RecordFormat.table:
            yield RecordStream(sys.stdout, predictions_writer(sys.stdout))
        else:
            yield RecordStream(sys.stdout, FORMATS[kind].writer(sys.stdout, topk=topk))
    elif kind is RecordFormat.table:
        with replacing(output) as temporary, temporary.open("w", encoding="utf-8", errors="surrogateescape") as stream:
            yield RecordStream(stream, predictions_writer(stream))
    else:
        with RecordFile.open(output, identity(), resume=resume) as records:
            yield records


def _write_records(
    predictions: Iterable[Prediction],
    sink: RecordFile[Prediction] | RecordStream,
    stop: StopRequest,
    *,
    batch_size: int,
    on_terminal: bool,
) -> tuple[int, int]:
    """Write predictions in whole batches, until there are no more or a signal came; how many there are, and failed."""
    from smlp_deploy.commands.terminal import counting

    done, failed = sink.done, sink.failed
    with counting("images", done=done, records_on_terminal=on_terminal and sys.stdout.isatty()) as advance:
        for prediction in predictions:
            sink.write(prediction)
            advance()
            done += 1
            failed += prediction.error is not None
            if done % batch_size == 0:
                sink.flush()
                if stop:
                    break
        sink.flush()
    stop.report(done, partial=sink.partial)
    return done, failed
