"""From an fp32 graph to another precision; for int8, with as few layers left in half precision as accuracy requires."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import UsageError
from smlp_deploy.evaluation.sensitivity import SensitivityReport, choose, measure_sensitivity
from smlp_deploy.exporters.calibration import CalibrationTable
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.int8 import CalibrationResult, calibrate, quantize, quantized_layers
from smlp_deploy.exporters.pixels import take_pixels
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.batches import FloatArray, available_cores, decoded_batches
from smlp_deploy.images.defaults import calibration_images
from smlp_deploy.interrupts import Progress, no_progress
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

logger = logging.getLogger(__name__)

ENOUGH_IMAGES = 128
MOST_IMAGES = 1024
"""All are in memory at once, 0.6 MB each at 224 pixels; beyond a few hundred, ranges hardly change."""

_BATCH = 32
_MINMAX_BATCH = 2
"""Images that "minmax" runs at once: at 32 one of smlpnet_tiny took twice as long on two cores, and most of the values
inside are in memory at the same time. The other methods see one batch's range first, so theirs are larger."""


@dataclass(frozen=True, kw_only=True)
class Int8Options:
    """How to quantize.

    Attributes:
        images: to calibrate and measure sensitivity on; empty for the bundled model's training digits.
        table: an earlier calibration, which needs no images.
        method: "minmax", "entropy" or "percentile".
        max_drop: percentage points of top-1 that may be lost on the images; None to quantize every layer.
        per_channel: one scale per output channel of a convolution's weight, for TensorRT; the kernels of TensorRT-RTX
            that write fp16 support only one scale per weight.
    """

    images: tuple[Path, ...] = ()
    table: CalibrationTable | None = None
    method: str = "minmax"
    max_drop: float | None = None
    per_channel: bool = False


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How to turn one fp32 graph into an int8 graph.

    Attributes:
        table: the ranges of its tensors.
        per_channel: see `Int8Options`.
        sensitivity: each layer's sensitivity and chosen precision, if requested.
        images: the calibration images.
        largest: the largest activation on them; see `CalibrationResult`.
    """

    table: CalibrationTable
    per_channel: bool
    sensitivity: SensitivityReport | None = None
    images: tuple[Path, ...] = ()
    largest: tuple[str, float] | None = None

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the layers that stay in half precision."""
        return self.sensitivity.left_out if self.sensitivity else ()

    @property
    def facts(self) -> dict[str, Any]:
        """How the graph was made, for its metadata."""
        return {
            "method": self.table.method,
            "images": self.table.images,
            "weights": "per channel" if self.per_channel else "per tensor",
            "layers_in_half": list(self.left_out),
        }


def to_precision(
    graph: Graph, precision: str, *, quantization: Quantization | None = None, path: Path | None = None
) -> Graph:
    """A graph in another precision, or the graph itself if it already has that precision.

    Args:
        graph: in fp32 and of float32 input, or already in `precision`.
        precision: "fp32", "fp16", "bf16" or "int8".
        quantization: for int8, from `plan_quantization` on the same graph.
        path: of the new graph; by default that of `graph`.

    Raises:
        UsageError: the graph is already in a different precision than fp32, or takes uint8.
        ArtifactError: a weight exceeds the range of the precision, or the calibration table does not match the graph.
    """
    if precision == graph.metadata.precision:
        return graph
    if graph.metadata.precision != "fp32":
        raise UsageError(
            f"the graph is {graph.metadata.precision} and sets the precision of its engine, but {precision} was "
            "requested",
            where=graph.path,
            fix="give the fp32 file",
        )
    _check_float(graph, f"be converted to {precision}")
    metadata = replace(graph.metadata, precision=precision)
    model = graph.model()
    if precision == "int8":
        assert quantization is not None, "int8 needs a quantization"
        metadata = replace(metadata, quantization=quantization.facts)
        model = quantize(model, quantization.table, per_channel=quantization.per_channel, exclude=quantization.left_out)
    half = to_half(model, "fp16" if precision == "int8" else precision)
    return Graph.of(half, metadata, path=path or graph.path)


def to_input(graph: Graph, wanted: str, *, path: Path | None = None) -> Graph:
    """A graph that takes another input, or the graph itself if it takes that already; the last step of a conversion.

    Args:
        graph: in any precision.
        wanted: "float32", normalized images, or "uint8", pixels, which the graph normalizes itself.
        path: of the new graph; by default that of `graph`.

    Raises:
        UsageError: the graph takes uint8, and float32 is wanted.
    """
    if wanted == graph.metadata.input:
        return graph
    _check_float(graph, f"take {wanted} again")
    model = take_pixels(graph.model(), graph.metadata.preprocessing)
    return Graph.of(model, replace(graph.metadata, input=wanted), path=path or graph.path)


def _check_float(graph: Graph, what: str) -> None:
    if graph.metadata.input != "float32":
        raise UsageError(
            f"the graph takes {graph.metadata.input} and cannot {what}",
            where=graph.path,
            fix="give the float32-input file",
        )


def plan_quantization(graph: Graph, options: Int8Options, *, progress: Progress = no_progress) -> Quantization:
    """Calibrate an fp32 graph and, if `max_drop` is set, choose the layers to leave in half precision.

    Args:
        graph: in fp32 and of float32 input.
        options: how to quantize.
        progress: told of each step.

    Raises:
        UsageError: the graph takes uint8, there are no images to calibrate on, or `max_drop` cannot be met.
        ArtifactError: the calibration table does not match the graph.
    """
    _check_float(graph, "be calibrated")
    images = options.images or calibration_images(graph.metadata)
    samples: FloatArray | None = None
    table, largest = options.table, None
    if table is None or options.max_drop is not None:
        samples, images = _load(images, graph.metadata, progress)
    if table is None:
        assert samples is not None
        table, largest = _calibrate(graph, samples, options.method, progress)
    found = Quantization(table=table, per_channel=options.per_channel, images=images, largest=largest)
    if options.max_drop is None:
        return found
    assert samples is not None
    labels = _labels(images, graph.metadata)
    return replace(found, sensitivity=_measure(graph, found, options.max_drop, samples, labels, progress))


def _calibrate(graph: Graph, samples: FloatArray, method: str, progress: Progress) -> CalibrationResult:
    batch = graph.metadata.batch
    size = batch or (_MINMAX_BATCH if method == "minmax" else _BATCH)
    # A graph with a fixed batch size is calibrated on whole batches, because padding would distort the ranges.
    total = len(samples) // size * size if batch else len(samples)
    batches = (samples[at : at + size] for at in range(0, total, size))
    found = calibrate(graph.model(), batches, method=method, progress=lambda done: progress("calibrating", done, total))
    return found if total == len(samples) else found._replace(largest=None)  # which is for all images


def _load(images: Sequence[Path], metadata: ModelMetadata, progress: Progress) -> tuple[FloatArray, tuple[Path, ...]]:
    """The readable images after the model's preprocessing."""
    if not images:
        raise UsageError(
            "int8 needs images to calibrate on",
            where="--calibration-data",
            fix=f"give at least {ENOUGH_IMAGES} images like those the model will see",
        )
    if len(images) > MOST_IMAGES:
        logger.warning("using %d of the %d calibration images, evenly spaced", MOST_IMAGES, len(images))
        images = [images[i * len(images) // MOST_IMAGES] for i in range(MOST_IMAGES)]
    samples, readable = [], []
    for done, (path, content) in enumerate(_decoded(images, metadata), start=1):
        progress("reading calibration images", done, len(images))
        if isinstance(content, str):
            logger.warning("calibration skips %s: %s", path, content)
        else:
            samples.append(content)
            readable.append(path)
    if not samples:
        raise UsageError("none of the calibration images can be read", where="--calibration-data")
    if len(samples) < ENOUGH_IMAGES:
        logger.warning("only %d calibration images; %d or more are better", len(samples), ENOUGH_IMAGES)
    return np.stack(samples), tuple(readable)


def _decoded(images: Sequence[Path], metadata: ModelMetadata) -> Iterator[tuple[Path, FloatArray | str]]:
    batches = decoded_batches(images, metadata, batch_size=_BATCH, workers=available_cores())
    contents = (content for batch in batches for _, content in batch.with_each(batch.inputs.copy()))
    return zip(images, contents, strict=True)


def _labels(images: Sequence[Path], metadata: ModelMetadata) -> NDArray[np.int64] | None:
    """The true classes, if every image is in a folder named after a class."""
    index = {label: i for i, label in enumerate(metadata.labels)}
    names = [path.parent.name for path in images]
    return np.array([index[name] for name in names]) if all(name in index for name in names) else None


def _measure(
    graph: Graph,
    quantization: Quantization,
    max_drop: float,
    samples: FloatArray,
    labels: NDArray[np.int64] | None,
    progress: Progress,
) -> SensitivityReport:
    """Each layer's sensitivity, and which layers to leave out."""
    model = graph.model()
    layers = quantized_layers(model)

    def run_without(left_out: Collection[str]) -> FloatArray:
        # Narrowed as in the shipped graph; otherwise ONNX Runtime cannot run its axial products on some CPUs.
        int8 = quantize(model, quantization.table, per_channel=quantization.per_channel, exclude=left_out)
        return _logits(Graph.of(to_half(int8, "fp16"), graph.metadata, path=graph.path), samples)

    def run_with_only(layer: str) -> FloatArray:
        return run_without([name for name in layers if name != layer])

    progress("running the fp32 graph", 0, 0)
    reference = _logits(graph, samples)
    report = measure_sensitivity(
        layers,
        run_with_only,
        reference,
        labels=labels,
        progress=lambda done: progress("measuring each layer", done, len(layers)),
    )
    progress("choosing the layers to leave in half precision", 0, 0)
    return choose(report, max_drop, run_without, reference_logits=reference, labels=labels)


def _logits(graph: Graph, samples: FloatArray) -> FloatArray:
    with OnnxRuntimeRunner(graph) as runner:
        return np.concatenate([runner.infer(samples[at : at + _BATCH]) for at in range(0, len(samples), _BATCH)])
