"""Where artifacts are written and found: `artifacts/<model>-<precision>.onnx`, with its reports beside it."""

from __future__ import annotations

import stat
import struct
import zipfile
from contextlib import suppress
from pathlib import Path

from smlp_deploy.metadata import ModelMetadata

ARTIFACTS_FOLDER = Path("artifacts")
CHECKPOINT_SUFFIXES = (".pth", ".pt", ".ckpt", ".tar", ".bin", ".safetensors")
"""By which a checkpoint is told from an artifact; what is in it decides how it is read."""


def checkpoint_format(path: Path) -> str | None:
    """What a file's content says it is: "safetensors" or "torch", the zip archive of torch.save; None for neither."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
            return "safetensors"
        return "torch" if zipfile.is_zipfile(path) else None
    except OSError:
        return None
    except (zipfile.BadZipFile, ValueError, struct.error):  # an archive, and damaged
        return "torch"


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one by its name or, if that is not an artifact's, by its content."""
    suffix = path.suffix.lower()
    if suffix in CHECKPOINT_SUFFIXES or suffix in (".onnx", ".engine"):
        return suffix in CHECKPOINT_SUFFIXES
    return path.is_file() and checkpoint_format(path) is not None


def checkpoint_stem(path: Path) -> str:
    """A checkpoint's name without its suffix; `.pth.tar` is one."""
    name = path.name
    return Path(name[: -len(".tar")] if name.lower().endswith(".pth.tar") else name).stem


def default_path(metadata: ModelMetadata) -> Path:
    """Where an ONNX file goes when no path is given; its name says if it takes uint8, and if it is for CPUs."""
    form = "-cpu" if metadata.form == "cpu" else ""
    return ARTIFACTS_FOLDER / f"{_stem(metadata, usual_input='float32')}{form}.onnx"


def engine_path(metadata: ModelMetadata) -> Path:
    """Where an engine goes when no path is given; its name says if it takes float32."""
    return ARTIFACTS_FOLDER / f"{_stem(metadata, usual_input='uint8')}.engine"


def _stem(metadata: ModelMetadata, *, usual_input: str) -> str:
    batch = f"-batch{metadata.batch}" if metadata.batch else ""
    taken = f"-{metadata.input}" if metadata.input != usual_input else ""
    return f"{metadata.name}-{metadata.precision}{taken}{batch}"


def engine_manifest_path(engine: Path) -> Path:
    """Where an engine's manifest goes: `x.engine.json`. The engine's bytes stay as TensorRT wrote them."""
    return engine.with_name(engine.name + ".json")


def calibration_path(artifact: Path) -> Path:
    """Where an int8 artifact's calibration table goes, for later exports to reuse: `x.calibration.json`."""
    return artifact.with_suffix(".calibration.json")


def sensitivity_path(artifact: Path) -> Path:
    """Where the int8 sensitivity of each layer goes: `x.sensitivity.json`."""
    return artifact.with_suffix(".sensitivity.json")


def parity_path(artifact: Path) -> Path:
    """Where an artifact's parity report goes: `x.onnx` has `x.parity.json`."""
    return artifact.with_suffix(".parity.json")


def failed_path(artifact: Path) -> Path:
    """The name under which an artifact that failed parity is kept; no command picks it up on its own."""
    return artifact.with_name(artifact.name + ".failed")


def untried_path(engine: Path) -> Path:
    """The name under which an engine is kept while it is tried on this GPU, and afterwards if that ends the process."""
    return engine.with_name(engine.name + ".untried")


def newest_artifact(pattern: str = "*.onnx", *, without: str = "") -> Path | None:
    """The first of `artifacts_by_age`, or None."""
    return next(iter(artifacts_by_age(pattern, without=without)), None)


def artifacts_by_age(pattern: str = "*.onnx", *, without: str = "") -> list[Path]:
    """The files in the artifacts folder that match the pattern `pattern` and not `without`, the newest first.

    Only regular files inside that folder count; a link to a file elsewhere is never picked, because an engine is code.
    """
    folder = ARTIFACTS_FOLDER.resolve()
    times: dict[Path, int] = {}
    for path in ARTIFACTS_FOLDER.glob(pattern):
        # A symlink loop raises RuntimeError, a file that has just vanished OSError.
        with suppress(OSError, RuntimeError):
            status = path.stat()
            inside = path.resolve(strict=True).is_relative_to(folder)
            left_out = path.name.startswith(".") or (without and path.match(without))
            if inside and stat.S_ISREG(status.st_mode) and not left_out:
                times[path] = status.st_mtime_ns
    return sorted(times, key=lambda path: times[path], reverse=True)
