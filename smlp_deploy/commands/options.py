"""The options that verbs have, as types; and what is made of those that several verbs share."""

from __future__ import annotations

import sys
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from smlp_deploy.errors import UsageError

if TYPE_CHECKING:
    from smlp_deploy.pipeline.precision import Int8Options

PRECISION_PANEL = "Precision"
CALIBRATION_PANEL = "Calibration of int8"
GATES_PANEL = "Gates of the proof"
PREPROCESSING_PANEL = "Labels and preprocessing, where the checkpoint states none"
BATCH_PANEL = "Batch sizes"
TENSORRT_PANEL = "TensorRT"
LAYERS_PANEL = "Block by block (--layers)"
BASELINE_PANEL = "Baselines (--baseline)"
FILES_PANEL = "Files to records (--end-to-end)"


class ExportFormat(StrEnum):
    onnx = "onnx"


class Precision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"


class Calibrator(StrEnum):
    minmax = "minmax"
    entropy = "entropy"
    percentile = "percentile"


class Provider(StrEnum):
    cpu = "cpu"
    cuda = "cuda"
    tensorrt = "tensorrt"


class EngineTarget(StrEnum):
    auto = "auto"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class RecordFormat(StrEnum):
    table = "table"
    jsonl = "jsonl"
    csv = "csv"


# What a verb works on.

CheckpointArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CHECKPOINT|VARIANT",
        help="A .pth or .safetensors file, or a variant's name for its official weights. "
        "Default: the bundled digits model.",
    ),
]
BuildSourceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ONNX|CHECKPOINT|VARIANT",
        help="What to build. Default: the newest fp32 ONNX file in artifacts/; with none there, one is exported.",
    ),
]
CandidateArgument = Annotated[
    Path,
    typer.Argument(
        metavar="ARTIFACT",
        help="The artifact to check; with --layers also a checkpoint, or what --save wrote. Engines need a GPU.",
    ),
]
ArtifactsArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="ARTIFACT",
        help="Artifacts and checkpoints; ratios are to the first. Default: as in smlp predict.",
    ),
]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(metavar="IMAGES", help="Images, folders, @FILE with a path per line, or - for such a list."),
]
DatasetArgument = Annotated[
    Path,
    typer.Argument(
        metavar="DATASET", help="A folder with one folder per class, or a CSV file with the columns path and label."
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", help="Artifact or checkpoint. Default: the newest in artifacts/, else the bundled model."
    ),
]
ModelsOption = Annotated[
    list[Path] | None,
    typer.Option("--model", "-m", help="Artifact or checkpoint; repeat it to compare. Default: as in smlp predict."),
]
EmaOption = Annotated[bool, typer.Option("--ema", help="Take the moving-average weights of a training checkpoint.")]

# Precision and calibration.

PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        help="Of the graph's arithmetic; inputs and outputs stay float32. Default: fp32.",
        rich_help_panel=PRECISION_PANEL,
    ),
]
Fp16Option = Annotated[
    bool, typer.Option("--fp16", "--half", help="The same as --precision fp16.", rich_help_panel=PRECISION_PANEL)
]
Bf16Option = Annotated[
    bool, typer.Option("--bf16", help="The same as --precision bf16.", rich_help_panel=PRECISION_PANEL)
]
EngineFp16Option = Annotated[
    bool, typer.Option("--fp16", "--half", help="Half precision, as a 16-bit graph.", rich_help_panel=PRECISION_PANEL)
]
EngineBf16Option = Annotated[
    bool, typer.Option("--bf16", help="bfloat16, as a 16-bit graph.", rich_help_panel=PRECISION_PANEL)
]
EngineFp32Option = Annotated[
    bool,
    typer.Option("--fp32", help="Single precision. Default: the ONNX file's own.", rich_help_panel=PRECISION_PANEL),
]
Int8Option = Annotated[
    bool,
    typer.Option(
        "--int8", help="int8 layers inside an fp16 graph; needs calibration.", rich_help_panel=PRECISION_PANEL
    ),
]
CalibrationDataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Image or folder to calibrate int8 on; may be repeated. Folders named like classes give labels. "
        "Default: training digits, for the bundled model alone.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
CalibratorOption = Annotated[
    Calibrator,
    typer.Option(
        metavar="METHOD",
        help="How ranges are chosen: minmax, entropy or percentile.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
CalibrationTableOption = Annotated[
    Path | None,
    typer.Option(
        help="Ranges of an earlier int8 export (x.calibration.json); needs no images.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
MaxDropOption = Annotated[
    float | None,
    typer.Option(
        metavar="POINTS",
        min=0.0,
        max=100.0,
        help="Measure each int8 layer and leave as few in fp16 as keep top-1 within this many percentage points.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
PerChannelOption = Annotated[
    bool,
    typer.Option(
        "--per-channel",
        help="A scale per output channel, for TensorRT, not TensorRT-RTX.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]

# Labels and preprocessing.

LabelsOption = Annotated[
    Path | None,
    typer.Option(
        help="Class names: a text file with one per line, or a JSON list.", rich_help_panel=PREPROCESSING_PANEL
    ),
]
MeanOption = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Channel means of pixels in 0 to 1.", rich_help_panel=PREPROCESSING_PANEL),
]
StdOption = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Channel standard deviations.", rich_help_panel=PREPROCESSING_PANEL),
]
CropPctOption = Annotated[
    float | None,
    typer.Option(help="Crop over resized shorter side; 0.875 is 224 of 256.", rich_help_panel=PREPROCESSING_PANEL),
]
InterpolationOption = Annotated[
    str | None,
    typer.Option(help="Resize filter: nearest, bilinear, bicubic or lanczos.", rich_help_panel=PREPROCESSING_PANEL),
]

# The proof.

ParityImagesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Image or folder to compare on; may be repeated. Default: bundled images.", rich_help_panel=GATES_PANEL
    ),
]
VerifyImagesOption = Annotated[
    list[str] | None, typer.Option(help="Image or folder to compare on; may be repeated. Default: bundled images.")
]
VerifyReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="What it was made from: the checkpoint; for an engine with --layers, the ONNX file. "
        "Default: found by the artifact's own sha256 of it."
    ),
]
MinCosineOption = Annotated[
    float | None,
    typer.Option(
        metavar="COSINE",
        min=-1,
        max=1,
        help="Smallest cosine of two logit vectors. Default: the precision's own.",
        rich_help_panel=GATES_PANEL,
    ),
]
MaxDifferenceOption = Annotated[
    float | None,
    typer.Option(
        metavar="SCALE",
        min=0,
        help="Largest difference of a logit, in standard deviations of the logits.",
        rich_help_panel=GATES_PANEL,
    ),
]
MinTop1Option = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", min=0, max=1, help="Share of images with the same top-1.", rich_help_panel=GATES_PANEL
    ),
]
LayersOption = Annotated[
    bool,
    typer.Option(
        "--layers",
        help="Compare block by block, and name the first that is over the gate.",
        rich_help_panel=LAYERS_PANEL,
    ),
]
MaxErrorOption = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="RATIO", help="Gate on the relative error. Default: by precision.", rich_help_panel=LAYERS_PANEL
    ),
]
SaveOption = Annotated[
    Path | None, typer.Option(help="Write the figures here, to judge them later.", rich_help_panel=LAYERS_PANEL)
]
MinAccuracyOption = Annotated[
    float | None, typer.Option(metavar="PERCENT", min=0, max=100, help="Fail if a model's top-1 is below it.")
]
MappingOption = Annotated[
    Path | None, typer.Option(help="What the dataset calls its classes: JSON, or CSV of folder and label.")
]

# Graphs and engines.

FormatOption = Annotated[ExportFormat, typer.Option("--format", help="What to write.")]
OnnxOutputOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Default: in artifacts/, by model and precision.", show_default=False),
]
EngineOutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Default: in artifacts/, by model and precision.")
]
FixedBatchOption = Annotated[int | None, typer.Option(min=1, help="Fix the batch size. Default: any size.")]
OpsetOption = Annotated[int, typer.Option(min=18, max=23, help="ONNX operator set.")]
MinBatchOption = Annotated[
    int | None, typer.Option(min=1, help="Smallest batch. Default: 1.", rich_help_panel=BATCH_PANEL)
]
OptBatchOption = Annotated[
    int | None, typer.Option(min=1, help="Batch to be fastest at. Default: 8.", rich_help_panel=BATCH_PANEL)
]
MaxBatchOption = Annotated[
    int | None, typer.Option(min=1, help="Largest batch. Default: 32.", rich_help_panel=BATCH_PANEL)
]
ExactBatchOption = Annotated[int | None, typer.Option(min=1, help="Exactly this batch.", rich_help_panel=BATCH_PANEL)]
EngineTargetOption = Annotated[
    EngineTarget,
    typer.Option(
        metavar="BACKEND",
        help="tensorrt, tensorrt-rtx, or auto: tensorrt if it and a GPU are there.",
        rich_help_panel=TENSORRT_PANEL,
    ),
]
GpuArchOption = Annotated[
    str | None,
    typer.Option(
        metavar="SM,SM",
        help="Ahead of time, for which GPUs. Default: sm80,sm86,sm89,sm120.",
        rich_help_panel=TENSORRT_PANEL,
    ),
]
WorkspaceOption = Annotated[
    float | None, typer.Option(metavar="GIB", min=0.0, help="Bound on scratch memory.", rich_help_panel=TENSORRT_PANEL)
]
TimingCacheOption = Annotated[
    Path | None, typer.Option(help="Timing cache to start from and to update.", rich_help_panel=TENSORRT_PANEL)
]
OptimizationLevelOption = Annotated[
    int | None, typer.Option(min=0, max=5, help="TensorRT's own by default.", rich_help_panel=TENSORRT_PANEL)
]
VersionCompatibleOption = Annotated[
    bool,
    typer.Option("--version-compatible", help="Loadable by later TensorRT versions.", rich_help_panel=TENSORRT_PANEL),
]
HardwareCompatibleOption = Annotated[
    bool,
    typer.Option(
        "--hardware-compatible", help="For every GPU from Ampere on; tensorrt only.", rich_help_panel=TENSORRT_PANEL
    ),
]
ProfileBatchOption = Annotated[int, typer.Option(min=1, help="Images per run.")]
ProfileArchOption = Annotated[str, typer.Option(metavar="SM", help="Architecture to compile for.")]
TopOption = Annotated[int, typer.Option(min=0, help="How many kernels to list, those that move most bytes first.")]
CompareOption = Annotated[Path | None, typer.Option(help="Another ONNX file to put beside it.")]

# Runs over images, and timings.

ProviderOption = Annotated[
    Provider | None,
    typer.Option(help="Where ONNX Runtime runs ONNX files; never another than asked for. Default: cpu."),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images per run of the network.")]
TopkOption = Annotated[int | None, typer.Option(min=1, help="Classes per image. Default: 5, or all of fewer.")]
RecordFormatOption = Annotated[
    RecordFormat | None, typer.Option("--format", help="Default: by the output file's suffix, else table.")
]
RecordsOutputOption = Annotated[Path | None, typer.Option("-o", "--output", help="Write records here, not to stdout.")]
ReportOutputOption = Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON report here.")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue an interrupted run with the same -o, or begin it.")
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Decoding threads. Default: one per core.")]
AllowErrorsOption = Annotated[bool, typer.Option("--allow-errors", help="Exit 0 even if some images failed.")]
BatchSizesOption = Annotated[str, typer.Option(metavar="N,N", help="Images per run, each size timed.")]
RoundsOption = Annotated[
    int,
    typer.Option(min=1, help="Turns of each model at each batch size; up to three times as many for unsure ratios."),
]
BaselineOption = Annotated[
    bool,
    typer.Option(
        "--baseline",
        help="Also PyTorch, torch.compile and the unlowered baseline of the same checkpoint.",
        rich_help_panel=BASELINE_PANEL,
    ),
]
BaselineReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="The checkpoint. Default: found by the first artifact's own sha256 of it.", rich_help_panel=BASELINE_PANEL
    ),
]
EndToEndOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="IMAGES",
        help="Also time image files to records; a folder or image, may be repeated.",
        rich_help_panel=FILES_PANEL,
    ),
]
EndToEndWorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Decoding threads. Default: one per core.", rich_help_panel=FILES_PANEL)
]

# What every verb has.

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write a page to look at: one file, nothing loaded.")
]


def _set_quiet(wanted: bool) -> None:
    if wanted:
        from smlp_deploy.commands import terminal

        terminal.be_quiet()


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.", callback=_set_quiet)]


def choose_precision(given: Precision | None, **flags: bool) -> str | None:
    """The precision that the options name, if they do not contradict each other; None if they name none."""
    wanted = {name for name, flag in flags.items() if flag} | ({given.value} if given else set())
    if len(wanted) > 1:
        raise UsageError(f"{' and '.join(sorted(wanted))} contradict each other", fix="choose one precision")
    return wanted.pop() if wanted else None


def choose_int8(
    precision: str | None,
    data: list[str] | None,
    method: Calibrator,
    table: Path | None,
    *,
    max_drop: float | None,
    per_channel: bool,
) -> Int8Options | None:
    """How to quantize, or None for another precision, to which these options mean nothing."""
    if precision != "int8":
        if data or table or max_drop is not None:
            raise UsageError("calibration is for int8", fix="add --int8")
        return None
    from smlp_deploy.exporters.calibration import read_table
    from smlp_deploy.pipeline.precision import Int8Options

    return Int8Options(
        images=tuple(find_given_images(data)) if data else (),
        table=read_table(table) if table else None,
        method=method.value,
        max_drop=max_drop,
        per_channel=per_channel,
    )


def gate_bounds(**given: float | None) -> dict[str, float]:
    """The gates' bounds that the options give."""
    return {name: bound for name, bound in given.items() if bound is not None}


def find_given_images(arguments: list[str]) -> list[Path]:
    """Every image that arguments name.

    Raises:
        UsageError: there is none.
    """
    from smlp_deploy.images.find import find_images

    found = list(find_images(arguments, standard_input()))
    if not found:
        raise UsageError("there is no image", where=", ".join(arguments), fix="name image files or folders of them")
    return found


def standard_input() -> TextIO:
    """Standard input, in which undecodable bytes of file names survive."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin
