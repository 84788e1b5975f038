"""What the verbs' options are called, and what is made of what they were given; nothing slow is imported or done."""

from __future__ import annotations

import sys
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from smlp_deploy.errors import UsageError

if TYPE_CHECKING:
    from smlp_deploy.metadata import BatchProfile
    from smlp_deploy.pipeline.precision import Int8Options

PRECISION_PANEL = "Precision"
CALIBRATION_PANEL = "Calibration of int8"
GATES_PANEL = "Gates of the proof"
PREPROCESSING_PANEL = "Labels and preprocessing, where the checkpoint states none"
BATCH_PANEL = "Batch sizes"
TENSORRT_PANEL = "TensorRT"


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


CheckpointArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="CHECKPOINT|VARIANT",
        help="A .pth or .safetensors file, or a variant's name for its official weights. "
        "Default: the bundled digits model.",
    ),
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

EmaOption = Annotated[bool, typer.Option("--ema", help="Take the moving-average weights of a training checkpoint.")]

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
    *,
    data: list[str] | None,
    method: Calibrator,
    table: Path | None,
    max_drop: float | None,
    per_channel: bool,
) -> Int8Options | None:
    """How to quantize, or None for another precision, to which these options mean nothing."""
    if precision != "int8":
        if data or table or max_drop is not None:
            raise UsageError("calibration is for int8", fix="add --int8")
        return None
    from smlp_deploy.exporters.int8 import read_table
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


def choose_preprocessing(
    *, mean: str | None, std: str | None, crop_pct: float | None, interpolation: str | None
) -> dict[str, Any]:
    """The options that were given, as fields of Preprocessing."""
    given: dict[str, Any] = {"crop_pct": crop_pct, "interpolation": interpolation}
    for name, text in (("mean", mean), ("std", std)):
        if text is not None:
            try:
                red, green, blue = (float(part) for part in text.split(","))
            except ValueError:
                raise UsageError(f"{text!r} is not three numbers", where=f"--{name}", fix="as 0.5,0.5,0.5") from None
            given[name] = (red, green, blue)
    return {name: value for name, value in given.items() if value is not None}


def parse_batch_sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"{text!r} is not a list of batch sizes", where="--batch-sizes", fix="as 1,8,32")
    return sizes


def choose_batch_profile(batch: int | None, **given: int | None) -> BatchProfile:
    """The batch profile that the options name."""
    from smlp_deploy.metadata import BatchProfile

    sizes = {name: size for name, size in given.items() if size is not None}
    if batch is None:
        return BatchProfile(**sizes)
    if sizes:
        raise UsageError(f"--batch contradicts --{next(iter(sizes))}-batch", fix="give one or the other")
    return BatchProfile.fixed(batch)


def choose_architectures(given: str | None, backend: str) -> tuple[str, ...]:
    """The GPU architectures to build for ahead of time; none where TensorRT builds for the GPU at hand."""
    from smlp_deploy.exporters.tensorrt import DEFAULT_ARCHITECTURES, TensorRT

    tensorrt = TensorRT.load(backend)
    if not tensorrt.ahead_of_time:
        if given is not None:
            raise UsageError(f"{backend} builds for the GPU at hand", where="--gpu-arch", fix="--target tensorrt-rtx")
        return ()
    names = tuple(name.strip().lower() for name in given.split(",")) if given else DEFAULT_ARCHITECTURES
    tensorrt.check_architectures(names)
    return names


def read_timing_cache(path: Path | None, backend: str) -> bytes | None:
    """The contents of a timing cache, empty where the file is new."""
    from smlp_deploy.commands.terminal import note
    from smlp_deploy.exporters.tensorrt import TensorRT

    if path is None:
        return None
    if TensorRT.load(backend).ahead_of_time:
        note(f"{backend} takes no timings, so the timing cache changes nothing")
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UsageError(f"cannot read the timing cache: {error.strerror}", where=path) from None


def choose_format(given: RecordFormat | None, output: Path | None) -> RecordFormat:
    if given is not None:
        return given
    if output is None:
        return RecordFormat.table
    try:
        return RecordFormat(output.suffix.removeprefix("."))
    except ValueError:
        raise UsageError(
            "no format has this suffix", where=output, fix="end it in .jsonl or .csv, or add --format"
        ) from None


def check_html(path: Path | None, *, beside: Path | None = None) -> None:
    """Check that a page can be written before anything slow is done, and not over the file `beside` it."""
    if path is None:
        return
    from smlp_deploy.files import check_writable
    from smlp_deploy.reports import require_report

    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError("a page's name ends in .html", where=path)
    if path == beside:
        raise UsageError("is to be two files at once", where=path, fix="give the page another name")
    require_report()
    check_writable(path)


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
