"""How sensitive each layer is to int8, and which layers to leave in half precision to preserve accuracy.

Each layer is measured alone: the network with only that layer quantized, against the fp32 network. Then the most
sensitive layers are left out, one by one, until the network with all others quantized is within the allowed drop.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import UsageError
from smlp_deploy.images.batches import FloatArray

logger = logging.getLogger(__name__)

Labels = NDArray[np.int64]

INT8 = "int8"
HALF = "half"


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """The loss from quantizing one layer alone.

    Attributes:
        layer: its name.
        drop: percentage points of top-1 lost against fp32; negative for a gain by chance.
        error: mean squared difference of the logits, over the variance of the reference's; infinite if a logit is not
            finite.
        precision: "int8" or "half", as `choose` decided.
    """

    layer: str
    drop: float
    error: float
    precision: str = INT8


@dataclass(frozen=True, kw_only=True)
class SensitivityReport:
    """Every quantized layer, the most sensitive first.

    Attributes:
        measure: what `drop` counts: "accuracy" on labelled inputs, or "agreement" with the fp32 network's best class.
        inputs: number of inputs measured on.
        layers: by drop, and by error for equal drops.
        max_drop: the drop allowed to `choose`, in percentage points; None before.
        whole_drop: of the network with the chosen precisions, in percentage points; None before.
    """

    measure: str
    inputs: int
    layers: tuple[LayerSensitivity, ...]
    max_drop: float | None = None
    whole_drop: float | None = None

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the layers that stay in half precision, the most sensitive first."""
        return tuple(layer.layer for layer in self.layers if layer.precision == HALF)

    def to_json(self) -> str:
        """A JSON object; an error that is not finite is null."""
        layers = [
            {**asdict(layer), "error": layer.error if math.isfinite(layer.error) else None} for layer in self.layers
        ]
        return json.dumps({**asdict(self), "layers": layers}, indent=2, allow_nan=False) + "\n"


def measure_sensitivity(
    layers: Sequence[str],
    run_with_only: Callable[[str], FloatArray],
    reference_logits: FloatArray,
    *,
    labels: Labels | None = None,
    progress: Callable[[int], None] | None = None,
) -> SensitivityReport:
    """Quantize each layer alone and order the layers by sensitivity.

    Args:
        layers: names of the layers that can be quantized.
        run_with_only: the logits N, classes of the network with only this layer quantized.
        reference_logits: N, classes, of the fp32 network on the same inputs.
        labels: the true class of each input; without them the fp32 network's best class is the truth.
        progress: called with the number of layers done, after each.

    Raises:
        UsageError: there are no inputs, or the numbers of inputs and labels differ.
    """
    scale = _Scale(reference_logits, labels)
    found = []
    for done, layer in enumerate(layers, start=1):
        logits = run_with_only(layer)
        found.append(LayerSensitivity(layer=layer, drop=scale.drop(logits), error=scale.error(logits)))
        logger.debug("%s alone in int8: %.2f points, error %.2e", layer, found[-1].drop, found[-1].error)
        if progress is not None:
            progress(done)
    ordered = sorted(found, key=lambda layer: (layer.drop, layer.error), reverse=True)
    return SensitivityReport(measure=scale.measure, inputs=len(reference_logits), layers=tuple(ordered))


def choose(
    report: SensitivityReport,
    max_drop: float,
    run_without: Callable[[tuple[str, ...]], FloatArray],
    *,
    reference_logits: FloatArray,
    labels: Labels | None = None,
) -> SensitivityReport:
    """Leave out the most sensitive layers, as few as possible, until the whole network loses at most `max_drop`.

    They are left out one by one, each step measured, because the drop need not shrink with every layer; this takes at
    most one run more than there are layers.

    Args:
        report: of `measure_sensitivity`, on the same inputs.
        max_drop: percentage points of top-1 that may be lost.
        run_without: the logits N, classes of the network with all layers but these quantized.
        reference_logits: N, classes, of the fp32 network.
        labels: the true class of each input, if the report was made with them.

    Returns:
        The report with every layer's precision and the drop of the whole network.

    Raises:
        UsageError: `max_drop` is not from 0 to 100, or is exceeded even with every layer left out.
    """
    if not 0 <= max_drop <= 100:
        raise UsageError(f"the allowed drop, {max_drop} percentage points, is not from 0 to 100")
    scale = _Scale(reference_logits, labels)
    names = [layer.layer for layer in report.layers]
    for count in range(len(names) + 1):
        drop = scale.drop(run_without(tuple(names[:count])))
        logger.debug("%d of %d layers left in half: %.2f points lost", count, len(names), drop)
        if drop <= max_drop:
            layers = [replace(layer, precision=HALF if i < count else INT8) for i, layer in enumerate(report.layers)]
            return replace(report, layers=tuple(layers), max_drop=max_drop, whole_drop=drop)
    raise UsageError(
        f"top-1 drops by {drop:.2f} percentage points even with every layer in half precision; allowed: {max_drop:g}",
        fix="allow more, or export in fp16",
    )


class _Scale:
    """Measures logits against the reference."""

    def __init__(self, reference: FloatArray, labels: Labels | None) -> None:
        if not len(reference):
            raise UsageError("there are no inputs to measure sensitivity on", fix="give at least one image")
        if labels is not None and len(labels) != len(reference):
            raise UsageError(f"{len(labels)} labels for {len(reference)} inputs", fix="give one label per input")
        self.measure = "agreement" if labels is None else "accuracy"
        self._reference = reference.astype(np.float64)
        self._truth = reference.argmax(axis=1) if labels is None else labels
        self._hits = int((reference.argmax(axis=1) == self._truth).sum())

    def drop(self, logits: FloatArray) -> float:
        """Percentage points of top-1 lost; a row with a non-finite logit counts as wrong."""
        right = (logits.argmax(axis=1) == self._truth) & np.isfinite(logits).all(axis=1)
        return 100 * (self._hits - int(right.sum())) / len(logits)

    def error(self, logits: FloatArray) -> float:
        """Mean squared difference over the variance of the reference."""
        if not np.isfinite(logits).all():
            return math.inf
        difference = float(np.square(logits - self._reference).mean())
        variance = float(np.var(self._reference))
        return difference / variance if variance else (math.inf if difference else 0.0)
