"""The options of all verbs, as types, and the interpretation of those that several verbs share."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from smlp_deploy.errors import ArtifactError, CheckpointError, UsageError
from smlp_deploy.files import check_regular

if TYPE_CHECKING:
    from smlp_deploy.runners.placement import Placement

PRECISION_PANEL = "Precision"
CALIBRATION_PANEL = "int8 calibration"
GATES_PANEL = "Parity gates"
PREPROCESSING_PANEL = "Labels and preprocessing, if the checkpoint has none"
BATCH_PANEL = "Batch sizes"
TENSORRT_PANEL = "TensorRT"
LAYERS_PANEL = "Block by block (--layers)"
BASELINE_PANEL = "Baselines (--baseline)"
RAY_PANEL = "On a Ray cluster (--ray)"
FILES_PANEL = "From image files to records (--end-to-end)"
AGREEMENT_PANEL = "Agreement"


class ExportFormat(StrEnum):
    onnx = "onnx"
    triton = "triton"


class Form(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


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


class Runtime(StrEnum):
    auto = "auto"
    onnxruntime = "onnxruntime"
    openvino = "openvino"


class DecodeOn(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


class EngineTarget(StrEnum):
    auto = "auto"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


class RecordFormat(StrEnum):
    table = "table"
    jsonl = "jsonl"
    csv = "csv"
    parquet = "parquet"


# Inputs.

CheckpointArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CHECKPOINT|VARIANT",
        help="Weights as torch.save, Lightning, timm or safetensors write them, or a variant name for its official "
        "weights. Default: the bundled digits model. For --format triton: an ONNX file or engine; default: the newest "
        "ONNX file in artifacts/.",
    ),
]
BuildSourceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="ONNX|CHECKPOINT|VARIANT",
        help="What to build. Default: the newest fp32 ONNX file in artifacts/, exported first if missing.",
    ),
]
CandidateArgument = Annotated[
    Path,
    typer.Argument(
        metavar="ARTIFACT",
        help="The artifact to check; with --layers also a checkpoint or a saved report. Engines need a GPU.",
    ),
]
ArtifactsArgument = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="ARTIFACT",
        help="Artifacts and checkpoints; ratios are relative to the first. Default: as in smlp predict.",
    ),
]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="IMAGES",
        help="Images, folders, quoted patterns, s3:// and gs:// names, @FILE with a path per line or @FILE.parquet; "
        "- for a list or an image on stdin.",
    ),
]
DatasetArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATASET", help="A folder with one subfolder per class, or a CSV file with columns path and label."
    ),
]
ModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model", "-m", help="Artifact or checkpoint. Default: newest in artifacts/, else the bundled model."
    ),
]
ModelsOption = Annotated[
    list[Path] | None,
    typer.Option("--model", "-m", help="Artifact or checkpoint; repeat to compare. Default: as in smlp predict."),
]
EmaOption = Annotated[bool, typer.Option("--ema", help="Use the moving-average weights of a training checkpoint.")]

# Precision and calibration.

PrecisionOption = Annotated[
    Precision | None,
    typer.Option(
        help="Arithmetic of the graph; the logits stay float32. Default: fp32.",
        rich_help_panel=PRECISION_PANEL,
    ),
]
Fp16Option = Annotated[
    bool, typer.Option("--fp16", "--half", help="Same as --precision fp16.", rich_help_panel=PRECISION_PANEL)
]
Bf16Option = Annotated[bool, typer.Option("--bf16", help="Same as --precision bf16.", rich_help_panel=PRECISION_PANEL)]
EngineFp16Option = Annotated[
    bool,
    typer.Option("--fp16", "--half", help="Build from the graph converted to fp16.", rich_help_panel=PRECISION_PANEL),
]
EngineBf16Option = Annotated[
    bool, typer.Option("--bf16", help="Build from the graph converted to bf16.", rich_help_panel=PRECISION_PANEL)
]
EngineFp32Option = Annotated[
    bool,
    typer.Option("--fp32", help="Build in fp32. Default: the ONNX file's precision.", rich_help_panel=PRECISION_PANEL),
]
Int8Option = Annotated[
    bool,
    typer.Option("--int8", help="int8 layers in an fp16 graph; needs calibration.", rich_help_panel=PRECISION_PANEL),
]
CalibrationDataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Image or folder to calibrate on; repeatable. Folders named after classes give the labels. "
        "Default, for the bundled model only: training digits.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
CalibratorOption = Annotated[
    Calibrator,
    typer.Option(
        metavar="METHOD",
        help="How to choose ranges: minmax, entropy or percentile.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
CalibrationTableOption = Annotated[
    Path | None,
    typer.Option(
        help="Reuse the ranges of an earlier int8 export (x.calibration.json); needs no images.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
MaxDropOption = Annotated[
    float | None,
    typer.Option(
        metavar="POINTS",
        min=0.0,
        max=100.0,
        help="Measure each layer's sensitivity; keep in fp16 the fewest that limit the top-1 drop to POINTS points.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]
PerChannelOption = Annotated[
    bool,
    typer.Option(
        "--per-channel",
        help="One weight scale per output channel; for TensorRT, not TensorRT-RTX.",
        rich_help_panel=CALIBRATION_PANEL,
    ),
]

# Labels and preprocessing.

LabelsOption = Annotated[
    Path | None,
    typer.Option(
        help="Class names: a text file, one per line, JSON, or a folder of class folders.",
        rich_help_panel=PREPROCESSING_PANEL,
    ),
]
MeanOption = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Channel means, for pixels from 0 to 1.", rich_help_panel=PREPROCESSING_PANEL),
]
StdOption = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="Channel standard deviations.", rich_help_panel=PREPROCESSING_PANEL),
]
CropPctOption = Annotated[
    float | None,
    typer.Option(help="Crop size over resized shorter side; 224/256 is 0.875.", rich_help_panel=PREPROCESSING_PANEL),
]
InterpolationOption = Annotated[
    str | None,
    typer.Option(help="Resize filter: nearest, bilinear, bicubic or lanczos.", rich_help_panel=PREPROCESSING_PANEL),
]

# The proof.

ParityImagesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Image or folder to compare on; repeatable. Default: bundled images.", rich_help_panel=GATES_PANEL
    ),
]
VerifyImagesOption = Annotated[
    list[str] | None, typer.Option(help="Image or folder to compare on; repeatable. Default: bundled images.")
]
VerifyReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="The checkpoint it was made from; for an engine with --layers, the ONNX file. "
        "Default: found by the sha256 in the artifact."
    ),
]
MinCosineOption = Annotated[
    float | None,
    typer.Option(
        metavar="COSINE",
        min=-1,
        max=1,
        help="Minimum cosine of two logit vectors. Default: by precision.",
        rich_help_panel=GATES_PANEL,
    ),
]
MaxDifferenceOption = Annotated[
    float | None,
    typer.Option(
        metavar="SCALE",
        min=0,
        help="Maximum logit difference, in standard deviations of the logits.",
        rich_help_panel=GATES_PANEL,
    ),
]


def _check_share(value: float | None) -> float | None:
    """A share from 0 to 1.

    Raises:
        UsageError: it is none; for a percentage with the share to write.
    """
    if value is None or 0 <= value <= 1:
        return value
    if 1 < value <= 100:
        raise UsageError(f"{value:g} is a percentage", where="--min-top1", fix=f"write {value / 100:g}")
    raise UsageError(f"{value:g} is not a share from 0 to 1", where="--min-top1", fix="for example 0.97")


MinTop1Option = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        callback=_check_share,
        help="Minimum share of images with the same top-1, from 0 to 1.",
        rich_help_panel=GATES_PANEL,
    ),
]
MinSameOption = Annotated[
    float,
    typer.Option(
        "--min-top1",
        metavar="SHARE",
        callback=_check_share,
        help="Minimum share of images with the same top-1, from 0 to 1.",
        rich_help_panel=AGREEMENT_PANEL,
    ),
]
LayersOption = Annotated[
    bool,
    typer.Option(
        "--layers",
        help="Compare block by block, and name the first one over the gate.",
        rich_help_panel=LAYERS_PANEL,
    ),
]
MaxErrorOption = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="RATIO", help="Maximum relative error. Default: by precision.", rich_help_panel=LAYERS_PANEL
    ),
]
SaveOption = Annotated[
    Path | None, typer.Option(help="Save the report, to judge it again later.", rich_help_panel=LAYERS_PANEL)
]
MinAccuracyOption = Annotated[
    float | None,
    typer.Option(metavar="SHARE", callback=_check_share, help="Fail if a model's top-1 is below this, from 0 to 1."),
]
MappingOption = Annotated[
    Path | None, typer.Option(help="The dataset's class names: JSON, or CSV of folder and label.")
]
ClassOrderOption = Annotated[
    Path | None,
    typer.Option(help="The dataset's class names in the order of the model's classes; the same forms as --labels."),
]

# Graphs and engines.


def _export_format(name: str) -> ExportFormat:
    """What to write.

    Raises:
        UsageError: an engine, which another verb builds.
        BadParameter: an unknown format.
    """
    if name in ("engine", "trt", "tensorrt", "plan"):
        raise UsageError(
            "an engine is built from an ONNX file or a checkpoint",
            where=f"--format {name}",
            fix="smlp build-engine [ONNX|CHECKPOINT]",
        )
    try:
        return ExportFormat(name)
    except ValueError:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(ExportFormat)}") from None


FormatOption = Annotated[
    ExportFormat,
    typer.Option(
        "--format",
        metavar="FORMAT",
        parser=_export_format,
        help="What to write: onnx, or triton for a model repository.",
        show_default=False,
    ),
]
OnnxOutputOption = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Default: artifacts/, named by model and precision; for triton model_repository/.",
        show_default=False,
    ),
]
EngineOutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Default: artifacts/, named by model and precision.")
]
Uint8InputOption = Annotated[
    bool, typer.Option("--uint8-input", help="Take uint8 pixels N x H x W x 3, normalized inside the graph.")
]
FormOption = Annotated[
    Form, typer.Option("--for", metavar="gpu|cpu", help="The form of the graph: fewest kernels, or fewest operations.")
]
FloatInputOption = Annotated[
    bool, typer.Option("--float-input", help="Take normalized float32 images. Default: uint8 pixels.")
]
FixedBatchOption = Annotated[int | None, typer.Option(min=1, help="Fixed batch size. Default: any.")]
OpsetOption = Annotated[int, typer.Option(min=18, max=23, help="ONNX opset version.")]
MinBatchOption = Annotated[
    int | None, typer.Option(min=1, help="Smallest batch size. Default: 1.", rich_help_panel=BATCH_PANEL)
]
OptBatchOption = Annotated[
    int | None,
    typer.Option(min=1, help="Size to optimize for and predict with. Default: 64.", rich_help_panel=BATCH_PANEL),
]
MaxBatchOption = Annotated[
    int | None, typer.Option(min=1, help="Largest batch size. Default: 64.", rich_help_panel=BATCH_PANEL)
]
ExactBatchOption = Annotated[int | None, typer.Option(min=1, help="Fixed batch size.", rich_help_panel=BATCH_PANEL)]
EngineTargetOption = Annotated[
    EngineTarget,
    typer.Option(
        metavar="BACKEND",
        help="tensorrt, tensorrt-rtx, or auto: tensorrt if it and a GPU are available.",
        rich_help_panel=TENSORRT_PANEL,
    ),
]
GpuArchOption = Annotated[
    str | None,
    typer.Option(
        metavar="SM,SM",
        help="GPUs to build for ahead of time. Default: sm80,sm86,sm89,sm120.",
        rich_help_panel=TENSORRT_PANEL,
    ),
]
WorkspaceOption = Annotated[
    float | None, typer.Option(metavar="GIB", min=0.0, help="Limit on scratch memory.", rich_help_panel=TENSORRT_PANEL)
]
TimingCacheOption = Annotated[
    Path | None, typer.Option(help="Timing cache to read and update.", rich_help_panel=TENSORRT_PANEL)
]
OptimizationLevelOption = Annotated[
    int | None,
    typer.Option(min=0, max=5, help="Builder optimization level. Default: TensorRT's.", rich_help_panel=TENSORRT_PANEL),
]
VersionCompatibleOption = Annotated[
    bool,
    typer.Option("--version-compatible", help="Loads in later TensorRT versions.", rich_help_panel=TENSORRT_PANEL),
]
Tf32Option = Annotated[
    bool,
    typer.Option(
        "--tf32", help="Multiply fp32 in TF32: faster from Ampere on, 10 binary digits.", rich_help_panel=TENSORRT_PANEL
    ),
]
HardwareCompatibleOption = Annotated[
    bool,
    typer.Option(
        "--hardware-compatible", help="Runs on Ampere and later GPUs; tensorrt only.", rich_help_panel=TENSORRT_PANEL
    ),
]
SameCapabilityOption = Annotated[
    bool,
    typer.Option(
        "--same-capability",
        help="Runs on all GPUs of this one's compute capability; tensorrt only.",
        rich_help_panel=TENSORRT_PANEL,
    ),
]
ProfileBatchOption = Annotated[int, typer.Option(min=1, help="Images per run.")]
ProfileArchOption = Annotated[str, typer.Option(metavar="SM", help="Architecture to compile for.")]
TopOption = Annotated[int, typer.Option(min=0, help="Number of kernels to list, most bytes moved first.")]
CompareOption = Annotated[Path | None, typer.Option(help="A second ONNX file, to compare totals.")]

# Runs over images, and timings.

ProviderOption = Annotated[
    Provider | None,
    typer.Option(
        help="Where ONNX Runtime runs ONNX files; never falls back. Default: cuda if --device is a GPU, otherwise cpu."
    ),
]
RuntimeOption = Annotated[
    Runtime,
    typer.Option(
        metavar="RUNTIME",
        help="What runs ONNX files: onnxruntime, openvino (on the CPU), or auto: on the CPU openvino for fp16, bf16 "
        "and int8 if it is installed, otherwise onnxruntime.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="cpu, or a GPU: cuda for the first, its number in CUDA (1 or cuda:1), or its UUID. "
        "Default: a GPU for engines, otherwise cpu.",
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE,DEVICE",
        help="Share the images among several, in a process each: 0,1 for two GPUs.",
    ),
]
BuildDeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="The GPU to build on and to try the engine on: its number in CUDA, or its UUID. Default: the first.",
        rich_help_panel=TENSORRT_PANEL,
    ),
]
BatchSizeOption = Annotated[
    int | None,
    typer.Option(
        "--batch",
        "--batch-size",
        min=1,
        help="Images per batch. Default: what an engine is optimized for, 64 on a GPU, else 32.",
    ),
]
TopkOption = Annotated[int | None, typer.Option(min=1, help="Classes per image. Default: 5, or all if fewer.")]
RecordFormatOption = Annotated[
    RecordFormat | None, typer.Option("--format", help="Default: from the output file's suffix, else table.")
]
RecordsOutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="Write records here instead of to stdout.")
]
ReportOutputOption = Annotated[Path | None, typer.Option("-o", "--output", help="Write the JSON report here.")]
ShardOption = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Run the I-th of N shards of the images, into a file in the folder -o."),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Run on the cluster with its head at HOST:PORT, auto for this machine's, or local for one of this machine "
        "alone; shards go to the folder -o.",
        rich_help_panel=RAY_PANEL,
    ),
]
ActorsOption = Annotated[
    int | None,
    typer.Option(min=1, help="Processes, each with the model. Default: as many as fit.", rich_help_panel=RAY_PANEL),
]
ActorCpusOption = Annotated[
    int | None, typer.Option(min=1, help="Cores of each process. Default: 1.", rich_help_panel=RAY_PANEL)
]
ActorGpusOption = Annotated[
    int | None, typer.Option(min=0, help="GPUs of each process. Default: 0.", rich_help_panel=RAY_PANEL)
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Continue an interrupted run with the same -o, or start one; skip finished shards."),
]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Decoding threads. Default: one per core.")]
DecodeOption = Annotated[
    DecodeOn,
    typer.Option("--decode", help="Where ordinary JPEG files are decoded; gpu changes pixels slightly (nvImageCodec)."),
]
AllowErrorsOption = Annotated[bool, typer.Option("--allow-errors", help="Exit 0 even if some images failed.")]
BatchSizesOption = Annotated[str, typer.Option("--batch", "--batch-sizes", metavar="N,N", help="Batch sizes to time.")]
RoundsOption = Annotated[
    int,
    typer.Option(min=1, help="Rounds per batch size; up to three times as many while ratios are uncertain."),
]
BaselineOption = Annotated[
    bool,
    typer.Option(
        "--baseline",
        help="Also time the checkpoint in PyTorch, in torch.compile, and as the unlowered baseline.",
        rich_help_panel=BASELINE_PANEL,
    ),
]
BaselineReferenceOption = Annotated[
    Path | None,
    typer.Option(
        help="The checkpoint. Default: found by the sha256 in the first artifact.", rich_help_panel=BASELINE_PANEL
    ),
]
EndToEndOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="IMAGES",
        help="Image or folder to time from file to record; repeatable.",
        rich_help_panel=FILES_PANEL,
    ),
]
EndToEndWorkersOption = Annotated[
    int | None, typer.Option(min=1, help="Decoding threads. Default: one per core.", rich_help_panel=FILES_PANEL)
]

# Output.

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecordsJsonOption = Annotated[bool, typer.Option("--json", help="Same as --format jsonl.")]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write an HTML report; one self-contained file.")
]


def _set_quiet(wanted: bool) -> None:
    if wanted:
        from smlp_deploy.commands import terminal

        terminal.be_quiet()


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show only errors on stderr.", callback=_set_quiet)]


def choose_precision(given: Precision | None, **flags: bool) -> str | None:
    """The precision that the options name, or None.

    Raises:
        UsageError: they contradict each other.
    """
    wanted = {name for name, flag in flags.items() if flag} | ({given.value} if given else set())
    if len(wanted) > 1:
        raise UsageError(f"{' and '.join(sorted(wanted))} contradict each other", fix="choose one precision")
    return wanted.pop() if wanted else None


def choose_placement(
    device: str | None, provider: Provider | None, runtime: Runtime = Runtime.auto, files: Sequence[Path | None] = ()
) -> Placement:
    """Where to run the files that are given; of several, only ONNX files take the provider and the runtime.

    Raises:
        UsageError: there is no such GPU, the options contradict each other, or a file cannot run there.
    """
    from smlp_deploy.runners.placement import Placement

    placement = Placement.of(device=device, provider=provider.value if provider else None, runtime=runtime.value)
    given = [file for file in files if file is not None]
    for file in given:
        several = any(other.suffix.lower() == ".onnx" for other in given)
        (placement.for_file(file) if several else placement).check(file)
    return placement


def choose_placements(
    device: str | None, devices: str | None, provider: Provider | None, runtime: Runtime, model: Path | None
) -> list[Placement]:
    """Where to run a model: one placement, or those of --devices.

    Raises:
        UsageError: see `choose_placement`, or both options are given, or a name is missing.
    """
    if devices is None:
        return [choose_placement(device, provider, runtime, [model])]
    if device is not None:
        raise UsageError("contradicts --devices", where=f"--device {device}", fix="give one of them")
    names = devices.split(",")
    if not all(name.strip() for name in names):
        raise UsageError("names no device", where=f"--devices {devices}", fix="for example 0,1")
    return [choose_placement(name, provider, runtime, [model]) for name in names]


def check_files(*files: Path | None) -> None:
    """Check that artifacts and checkpoints exist, before the libraries that read them are loaded.

    Raises:
        ArtifactError, CheckpointError: one does not, or is not a regular file.
    """
    for file in files:
        if file is not None:
            error = ArtifactError if file.suffix.lower() in (".onnx", ".engine") else CheckpointError
            made = "name an ONNX file; smlp export makes one" if file.suffix.lower() == ".onnx" else None
            check_regular(file, error=error, fix=made or "give the path of an artifact or of a weights file")


def check_source(source: str | None) -> None:
    """Check that a checkpoint or a variant's weights can be there, before PyTorch is loaded.

    Raises:
        UsageError: neither a file nor a variant, or one whose weights were never released.
        CheckpointError: no such file.
    """
    from smlp_deploy.models.pretrained import weights_url
    from smlp_deploy.models.variants import VARIANTS, find_variant

    if source in VARIANTS:
        weights_url(VARIANTS[source])
    elif source is not None:
        path = Path(source)
        if not path.suffix and not path.exists():
            find_variant(source)
        check_files(path)


def find_given_images(arguments: list[str], option: str) -> list[Path]:
    """Every image that the values of an option name.

    Raises:
        UsageError: one does not exist, or there are no images.
    """
    from smlp_deploy.images.find import find_images

    found = [Path(path) for path in find_images(arguments, standard_input())]
    if not found:
        raise UsageError(
            "no image found", where=f"{option} {', '.join(arguments)}", fix="name image files or folders of them"
        )
    absent = next((path for path in found if not os.path.lexists(path)), None)  # Path.exists raises on a null character
    if absent is not None:
        raise UsageError("no such file or folder", where=f"{option} {absent}", fix="name image files or folders")
    return found


def standard_input() -> TextIO:
    """Standard input, keeping undecodable bytes of file names."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return sys.stdin


def standard_images(arguments: list[str]) -> TextIO | bytes:
    """What `-` stands for, if it is among the arguments: the bytes of an image on standard input, or its lines."""
    from smlp_deploy.images.decode import MAX_FILE_SIZE
    from smlp_deploy.images.find import SIGNATURE_BYTES, is_image

    lines = standard_input()
    buffer = getattr(lines, "buffer", None)
    if "-" in arguments and isinstance(buffer, BufferedReader) and is_image(buffer.peek(SIGNATURE_BYTES)):
        return buffer.read(MAX_FILE_SIZE + 1)  # one that is larger is refused as every image is
    return lines
