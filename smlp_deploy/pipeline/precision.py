"""From an fp32 graph to an int8 one, with as few layers left in half precision as accuracy asks for."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import ImageError, UsageError
from smlp_deploy.evaluation.sensitivity import SensitivityReport, choose, measure_sensitivity
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.int8 import CalibrationTable, calibrate, quantize, quantized_layers
from smlp_deploy.graphs.file import ModelProto, save_graph
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.defaults import calibration_images
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.interrupts import Progress
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

logger = logging.getLogger(__name__)

ENOUGH_IMAGES = 128
MOST_IMAGES = 1024
"""All are in memory at once, 0.6 MB each at 224 pixels; ranges hardly change beyond a few hundred."""

_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """How to quantize.

    Attributes:
        images: to calibrate on and to measure sensitivity with; empty for the bundled model's training digits.
        table: a calibration made before, which needs no images.
        method: "minmax", "entropy" or "percentile".
        max_drop: percentage points of top-1 that may be lost on the images; None to quantize every layer.
        per_channel: one scale per output channel of a convolution's weight, as TensorRT has it; TensorRT-RTX has
            kernels that write fp16 only for one scale per weight.
    """

    images: tuple[Path, ...] = ()
    table: CalibrationTable | None = None
    method: str = "minmax"
    max_drop: float | None = None
    per_channel: bool = False


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """An int8 graph inside fp16, with what it was made by.

    Attributes:
        model: the graph.
        metadata: what it carries.
        table: the ranges of its tensors.
        sensitivity: each layer's harm and choice, if that was asked for.
        images: those it was calibrated on.
    """

    model: ModelProto
    metadata: ModelMetadata
    table: CalibrationTable
    sensitivity: SensitivityReport | None
    images: tuple[Path, ...]


def quantize_graph(
    model: ModelProto, metadata: ModelMetadata, options: Int8Options, *, progress: Progress | None = None
) -> Quantized:
    """Calibrate, measure which layers to leave in half precision if asked to, quantize, and narrow the rest to fp16.

    Args:
        model: the fp32 graph.
        metadata: of that graph.
        options: how to do it.
        progress: told of each step.

    Raises:
        UsageError: there are no images to calibrate on, or the bound cannot be kept.
        ArtifactError: the calibration table does not fit the graph.
    """
    tell = progress or (lambda what, done, total: None)
    images = options.images or calibration_images(metadata)
    samples: FloatArray | None = None
    table = options.table
    if table is None or options.max_drop is not None:
        samples, images = _load(images, metadata)
    if table is None:
        assert samples is not None
        size = metadata.batch or _BATCH
        # A graph of one batch size is calibrated on whole batches: padding would falsify the ranges.
        total = len(samples) // size * size if metadata.batch else len(samples)
        batches = (samples[at : at + size] for at in range(0, total, size))
        table = calibrate(model, batches, method=options.method, progress=lambda done: tell("calibrating", done, total))
    sensitivity = None
    if options.max_drop is not None:
        assert samples is not None
        sensitivity = _measure(model, metadata, options, table, samples, _labels(images, metadata), tell)
    left_out = sensitivity.left_out if sensitivity else ()
    narrow = to_half(quantize(model, table, per_channel=options.per_channel, exclude=left_out), "fp16")
    made = {
        "method": table.method,
        "images": table.images,
        "weights": "per channel" if options.per_channel else "per tensor",
        "layers_in_half": list(left_out),
    }
    return Quantized(
        model=narrow,
        metadata=replace(metadata, precision="int8", quantization=made),
        table=table,
        sensitivity=sensitivity,
        images=images,
    )


def _load(images: Sequence[Path], metadata: ModelMetadata) -> tuple[FloatArray, tuple[Path, ...]]:
    """The readable images, prepared as the model prepares them."""
    if not images:
        raise UsageError(
            "int8 needs images to calibrate on",
            where="--calibration-data",
            fix=f"give {ENOUGH_IMAGES} or more of the kind that the model will see",
        )
    if len(images) > MOST_IMAGES:
        logger.warning("%d of the %d calibration images are used, evenly chosen", MOST_IMAGES, len(images))
        images = [images[i * len(images) // MOST_IMAGES] for i in range(MOST_IMAGES)]
    samples, readable = [], []
    for path in images:
        try:
            samples.append(load_image(path, metadata.preprocessing))
            readable.append(path)
        except ImageError as error:
            logger.warning("not calibrated on %s: %s", path, error)
    if not samples:
        raise UsageError("none of the calibration images can be read", where="--calibration-data")
    if len(samples) < ENOUGH_IMAGES:
        logger.warning("only %d calibration images; %d or more are better", len(samples), ENOUGH_IMAGES)
    return np.stack(samples), tuple(readable)


def _labels(images: Sequence[Path], metadata: ModelMetadata) -> NDArray[np.int64] | None:
    """The true classes, where each image lies in a folder that is named like one."""
    index = {label: i for i, label in enumerate(metadata.labels)}
    names = [path.parent.name for path in images]
    return np.array([index[name] for name in names]) if all(name in index for name in names) else None


def _measure(
    model: ModelProto,
    metadata: ModelMetadata,
    options: Int8Options,
    table: CalibrationTable,
    samples: FloatArray,
    labels: NDArray[np.int64] | None,
    tell: Progress,
) -> SensitivityReport:
    """Each layer's harm alone, and which layers to leave out."""
    assert options.max_drop is not None
    layers = quantized_layers(model)

    def run_without(left_out: Collection[str]) -> FloatArray:
        # As it is shipped: ONNX Runtime on some CPUs cannot run the axial products of a graph that is not narrowed.
        narrow = to_half(quantize(model, table, per_channel=options.per_channel, exclude=left_out), "fp16")
        return _logits(narrow, metadata, samples)

    def run_with_only(layer: str) -> FloatArray:
        return run_without([name for name in layers if name != layer])

    reference = _logits(model, metadata, samples)
    report = measure_sensitivity(
        layers,
        run_with_only,
        reference,
        labels=labels,
        progress=lambda done: tell("measuring each layer", done, len(layers)),
    )
    return choose(report, options.max_drop, run_without, reference_logits=reference, labels=labels)


def _logits(model: ModelProto, metadata: ModelMetadata, samples: FloatArray) -> FloatArray:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        copy = ModelProto()
        copy.CopyFrom(model)
        save_graph(copy, metadata, path)
        with OnnxRuntimeRunner(path) as runner:
            return np.concatenate([runner.infer(samples[at : at + _BATCH]) for at in range(0, len(samples), _BATCH)])
