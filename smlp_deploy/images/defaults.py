"""The images used when none are given, for proving a network and for calibrating int8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from smlp_deploy.files import BUNDLED_CHECKPOINT, DATA_FOLDER, sha256_of
from smlp_deploy.metadata import ModelMetadata


def default_images(metadata: ModelMetadata, calibrated: Sequence[Path] = ()) -> list[Path]:
    """Images to prove a graph on.

    An int8 graph is proven on the kind of images it was calibrated for, because others would measure the mismatch of
    the data: held-out digits for the bundled model, otherwise `calibrated`, the images it was calibrated on.
    """
    if metadata.precision != "int8":
        return bundled_images()
    own = bundled_images("digit-*.jpg") if is_bundled(metadata) else list(calibrated)
    return own or bundled_images()


def calibration_images(metadata: ModelMetadata) -> tuple[Path, ...]:
    """Images to calibrate int8 with: training digits for the bundled model, none for others."""
    return tuple(sorted((DATA_FOLDER / "calibration").glob("*.png"))) if is_bundled(metadata) else ()


def bundled_images(pattern: str = "*.jpg") -> list[Path]:
    """The real images that ship with the package, to prove a network on: ten digits and eight photographs."""
    return sorted((DATA_FOLDER / "parity").glob(pattern))


def is_bundled(metadata: ModelMetadata) -> bool:
    """Whether a graph was made from the bundled model."""
    return metadata.checkpoint_sha256 == sha256_of(BUNDLED_CHECKPOINT)
