"""Where two forms of a network diverge: the values between their blocks, compared on real images.

The measure at each point is the relative error over all images, the L2 norm of the differences over that of the
values; in decibels it is the signal-to-quantization-noise ratio (SQNR) of int8. For each int8 layer the SQNR at its
output is measured twice: inside the int8 network, including the noise of all layers before it, and given the fp32
network's values, which leaves only the layer's own noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from smlp_deploy import strictjson
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.images.batches import FloatArray, available_cores, decoded_batches
from smlp_deploy.runners.base import LayerOutput, LayerTracer, TracingRunner, arithmetic_of

MAX_ERROR = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 5e-2, "int8": 0.2}
"""The gate of each precision: about ten times the bundled model's error, for int8 three times."""

_BATCH = 8
_NUMBERS = {"error", "worst_error", "max_abs", "growth", "sqnr_db", "own_sqnr_db"}


@dataclass(frozen=True, kw_only=True)
class PointReport:
    """The difference at one point.

    Attributes:
        name: for example `stage 1 block 2`.
        error: relative error; NaN if a value is not finite.
        worst_error: the largest relative error of one image.
        worst_image: the name of that image.
        max_abs: largest absolute difference of a value.
        growth: `error` over that of the previous point; None at the first point, or if that is zero.
    """

    name: str
    error: float
    worst_error: float
    worst_image: str
    max_abs: float
    growth: float | None

    def __post_init__(self) -> None:
        if any(value < 0 for value in (self.error, self.worst_error, self.max_abs)):
            raise ValueError("an error is never negative")

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio, in decibels."""
        return -20 * math.log10(self.error) if self.error else math.inf


@dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """The noise of one int8 layer: 10 log10(Σ x² / Σ (x - y)²) over all images, x its output in the fp32 network.

    Both ratios are infinite without noise, and NaN if a value is not finite.

    Attributes:
        name: of the layer, as in the sensitivity report.
        sqnr_db: y is its output in the int8 network, including the noise of all layers before it.
        own_sqnr_db: y is its output in int8 for its input in the fp32 network.
    """

    name: str
    sqnr_db: float
    own_sqnr_db: float


@dataclass(frozen=True, kw_only=True)
class DivergenceReport:
    """The difference at each point, in execution order.

    Attributes:
        reference: name of the runner taken as the truth.
        candidate: name of the runner under test.
        precision: of the candidate.
        images: number compared.
        unreadable: images left out, with the reason.
        max_error: the gate.
        points: every point.
        layers: int8 layers, the one with the most noise of its own first; empty if not measured.
    """

    reference: str
    candidate: str
    precision: str
    images: int
    unreadable: tuple[str, ...]
    max_error: float
    points: tuple[PointReport, ...]
    layers: tuple[LayerNoise, ...] = ()

    @property
    def first_over(self) -> PointReport | None:
        """The first point whose error is NaN or over the gate."""
        return next((point for point in self.points if not point.error <= self.max_error), None)

    def judged_by(self, max_error: float) -> DivergenceReport:
        """The same report with another gate."""
        return replace(self, max_error=max_error)

    def to_json(self) -> str:
        """A JSON object for `from_json`; NaN is null, and infinity the text "inf"."""
        document = asdict(self)
        for key in ("points", "layers"):
            document[key] = [{k: _plain(v) for k, v in entry.items()} for entry in document[key]]
        return json.dumps(document, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, where: object) -> DivergenceReport:
        """Read the JSON form; `where` is its file, for messages.

        Raises:
            ArtifactError: it is not such a report.
        """
        try:
            return strictjson.read(text, cls, prepare=_restored)
        except (ValueError, TypeError, AttributeError):
            raise ArtifactError(
                "is not a report of smlp verify --layers", where=where, fix="make one with --layers --save"
            ) from None


def find_divergence(
    reference: TracingRunner,
    candidate: TracingRunner,
    image_paths: Sequence[Path],
    *,
    max_error: float | None = None,
    layers: LayerTracer | None = None,
) -> DivergenceReport:
    """Run real images through both networks and compare the values at each point.

    Args:
        reference: the truth.
        candidate: the network under test.
        image_paths: real images; unreadable ones are left out and reported.
        max_error: the gate; by default that of the candidate's precision.
        layers: to also measure the noise of the candidate's int8 layers.

    Raises:
        UsageError: the networks have different shapes, or no image can be read.
    """
    if reference.metadata.config != candidate.metadata.config:
        raise UsageError("the two networks have different shapes, so their blocks cannot be compared")
    names: list[str] = []
    unreadable: list[str] = []
    totals: dict[str, _Total] = {}
    noise: dict[str, _Noise] = {}
    for images in decoded_batches(image_paths, candidate.metadata, batch_size=_BATCH, workers=available_cores()):
        names += [Path(path).name for row, path in enumerate(images.paths) if row not in images.errors]
        unreadable += [f"{images.paths[row]}: {error}" for row, error in images.errors.items()]
        batch = images.inputs
        if not len(batch):
            continue
        found = candidate.trace(batch)
        for name, values in reference.trace(batch).items():
            totals.setdefault(name, _Total()).add(values, found[name])
        for output in layers.trace_layers(batch) if layers is not None else ():
            noise.setdefault(output.name, _Noise()).add(output)
    if not names:
        raise UsageError("no image can be read", where=unreadable[0] if unreadable else None, fix="give other images")
    return DivergenceReport(
        reference=reference.name,
        candidate=candidate.name,
        precision=arithmetic_of(candidate),
        images=len(names),
        unreadable=tuple(unreadable),
        max_error=MAX_ERROR[arithmetic_of(candidate)] if max_error is None else max_error,
        points=_reports(totals, names),
        layers=_worst_first(noise),
    )


def _plain(value: Any) -> Any:
    """A value as JSON can hold it."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _restored(document: dict[str, Any]) -> dict[str, Any]:
    """The report's fields, with the numbers that `_plain` replaced."""
    for key in ("points", "layers"):
        for entry in document.get(key, ()):
            for name in _NUMBERS & entry.keys():
                if entry[name] is None and name != "growth":
                    entry[name] = math.nan
                elif entry[name] in ("inf", "-inf"):
                    entry[name] = float(entry[name])
    return document


class _Noise:
    """Squared values of one int8 layer in fp32, and squared differences: in the int8 network, and alone."""

    def __init__(self) -> None:
        self._signal = self._deployed = self._own = 0.0

    def add(self, output: LayerOutput) -> None:
        with np.errstate(all="ignore"):
            signal = output.reference.astype(np.float64)
            self._signal += float(np.square(signal).sum())
            self._deployed += float(np.square(signal - output.deployed).sum())
            self._own += float(np.square(signal - output.alone).sum())

    def report(self, name: str) -> LayerNoise:
        return LayerNoise(name=name, sqnr_db=self._decibels(self._deployed), own_sqnr_db=self._decibels(self._own))

    def _decibels(self, noise: float) -> float:
        with np.errstate(all="ignore"):
            return float(10 * np.log10(np.float64(self._signal) / noise)) if noise else math.inf


def _worst_first(noise: dict[str, _Noise]) -> tuple[LayerNoise, ...]:
    """By their own noise, the most first; NaN before all others."""
    reports = [total.report(name) for name, total in noise.items()]
    return tuple(sorted(reports, key=lambda layer: (not math.isnan(layer.own_sqnr_db), layer.own_sqnr_db)))


class _Total:
    """Squared values and squared differences of each image at one point."""

    def __init__(self) -> None:
        self.signal: list[float] = []
        self.noise: list[float] = []
        self.max_abs = 0.0

    def add(self, reference: FloatArray, candidate: FloatArray) -> None:
        with np.errstate(all="ignore"):  # NaN and infinities give NaN, which fails every gate
            difference = candidate.astype(np.float64) - reference
            self.signal += np.square(reference, dtype=np.float64).sum(axis=(1, 2, 3)).tolist()
            self.noise += np.square(difference).sum(axis=(1, 2, 3)).tolist()
            self.max_abs = float(np.maximum(self.max_abs, np.abs(difference).max()))


def _reports(totals: dict[str, _Total], names: Sequence[str]) -> tuple[PointReport, ...]:
    reports: list[PointReport] = []
    for name, total in totals.items():
        signal, noise = np.array(total.signal), np.array(total.noise)
        with np.errstate(all="ignore"):
            each = np.sqrt(noise / signal)
            error = float(np.sqrt(noise.sum() / signal.sum()))
        worst = int(each.argmax())  # the first NaN, if there is one
        before = reports[-1].error if reports else 0.0
        reports.append(
            PointReport(
                name=name,
                error=error,
                worst_error=float(each[worst]),
                worst_image=names[worst],
                max_abs=total.max_abs,
                growth=error / before if before else None,
            )
        )
    return tuple(reports)
