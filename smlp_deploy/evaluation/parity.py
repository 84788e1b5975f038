"""Proof that two runners compute the same function: both run real images and seeded noise, and gates judge the result.

`prove` measures and judges; it never prints. Differences are relative to the standard deviation of the reference's
logits, because they mean little without that scale.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.images.batches import FloatArray, ImageArray, available_cores, decoded_batches
from smlp_deploy.images.decode import give_memory_back
from smlp_deploy.interrupts import Progress, no_progress
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.runners.base import Runner, arithmetic_of, batch_size_of, common_input, input_of

LARGEST_BATCH = 32
ODD_BATCH = 7
_DECODED = 8
"""Images decoded at a time: three times as many are kept in memory."""
MIN_NOISE = 4
NOISE_SEED = 2109

PERMUTATION_BOUND = 1e-2
FP16_RANGE = 65504.0
FP16_SHARE_OF_RANGE = 0.5
HALF_IMAGES = 2

_NOISE = "noise "
_Doubles = NDArray[np.float64]
_Sample = tuple[str, ImageArray]


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Bounds that a candidate has to meet.

    Attributes:
        cosine: minimum cosine between the two logit vectors of one image.
        difference: maximum logit difference, over the standard deviation of the reference's logits; None for no bound.
        top1: minimum share of images with the same best class, among those whose reference margin exceeds `difference`,
            or the measured difference if that is None.
    """

    cosine: float
    difference: float | None = None
    top1: float = 1.0


Bounds = Mapping[str, float]
"""Bounds that replace those of the precision: any of the attributes of `Gates`."""

GATES = {
    "fp32": Gates(cosine=0.99999, difference=1e-4),
    "tf32": Gates(cosine=0.9999, difference=1e-2),
    "fp16": Gates(cosine=0.9999),
    "bf16": Gates(cosine=0.999),
    "int8": Gates(cosine=0.99, top1=0.99),
}


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One gate's verdict; `measured` is NaN if there was nothing to measure."""

    name: str
    passed: bool
    limit: str
    measured: float
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class HalfReport:
    """The error of true fp16 arithmetic, and how close activations come to the limit of fp16.

    Attributes:
        images: inputs run in fp16 arithmetic.
        max_relative: largest logit difference to the reference, over the standard deviation of the reference's logits.
        min_cosine: smallest cosine between the logit vectors of one input.
        largest_activation: largest absolute value over all parity images, in fp32.
        layer: where it occurs.
        range: the largest finite fp16 number.
    """

    images: int
    max_relative: float
    min_cosine: float
    largest_activation: float
    layer: str
    range: float = FP16_RANGE


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The result of a comparison.

    Attributes:
        reference: name of the runner taken as the truth.
        candidate: name of the runner under test.
        precision: of the candidate, or "tf32"; it selects the gates.
        images: real images compared.
        noise: seeded noise inputs compared.
        unreadable: images left out, with the reason.
        batch_sizes: sizes of the batches that the candidate was given; on a CPU runners run large ones in pieces.
        logit_scale: standard deviation of the reference's logits.
        max_abs: largest absolute logit difference.
        max_relative: `max_abs` over `logit_scale`.
        min_cosine: smallest cosine between the logit vectors of one input.
        top1_agreement: share of inputs with the same best class.
        top5_agreement: mean share of the five best classes in common.
        nan_count: NaN logits of the candidate.
        inf_count: infinite logits of the candidate.
        bounds: of the numeric gates.
        gates: every gate's verdict.
        artifact_sha256: of the candidate's file.
        half: for fp16 and int8, the measured error of fp16 arithmetic and the range of activations.
    """

    reference: str
    candidate: str
    precision: str
    images: int
    noise: int
    unreadable: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    logit_scale: float
    max_abs: float
    max_relative: float
    min_cosine: float
    top1_agreement: float
    top5_agreement: float
    nan_count: int
    inf_count: int
    bounds: Gates
    gates: tuple[GateResult, ...]
    artifact_sha256: str
    half: HalfReport | None = None

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    @property
    def failures(self) -> tuple[GateResult, ...]:
        return tuple(gate for gate in self.gates if not gate.passed)

    def to_json(self) -> str:
        """A JSON object; values that could not be measured are null."""
        return json.dumps(_without_nan({"passed": self.passed, **asdict(self)}), indent=2, allow_nan=False) + "\n"


def prove(
    reference: Runner,
    candidate: Runner,
    image_paths: Sequence[Path],
    *,
    bounds: Bounds | None = None,
    artifact_sha256: str = "",
    progress: Progress = no_progress,
) -> ParityReport:
    """Run real images, then seeded noise, through both runners and judge the difference.

    The candidate runs every input at a large batch size (the one its file fixes, or 32, or more if it is used with
    more), and the first ones again alone and in an odd batch. Images are read with the candidate's preprocessing. If
    one runner takes pixels, noise is of pixels too, and a runner that takes float32 gets the same pixels normalized.
    Memory holds one batch at a time.

    Args:
        reference: the truth.
        candidate: the runner under test.
        image_paths: real images; unreadable ones are left out and reported.
        bounds: replace those of the candidate's precision.
        artifact_sha256: of the candidate's file, for the report.
        progress: told of the inputs that are compared, after each batch.
    """
    metadata, arithmetic = candidate.metadata, arithmetic_of(candidate)
    gates = replace(GATES[arithmetic], **(bounds or {}))
    common = replace(metadata, input=common_input(reference, candidate))
    samples = _Samples(image_paths, common, fill=metadata.batch or max(LARGEST_BATCH, batch_size_of(candidate)))
    parts = list(_run(reference, candidate, samples, progress))
    mismatch = _shape_mismatch(parts)
    spread = judged = _Spread.nothing() if mismatch else _Spread.between(parts)
    if metadata.precision == "int8" and samples.images and not mismatch:
        # Noise exceeds the ranges that an int8 graph was calibrated for.
        judged = _Spread.between([part.real() for part in parts])
    return ParityReport(
        reference=reference.name,
        candidate=candidate.name,
        precision=arithmetic,
        images=samples.images,
        noise=samples.noise,
        unreadable=tuple(samples.unreadable),
        batch_sizes=tuple(sorted({part.batch_size for part in parts})),
        logit_scale=spread.scale,
        max_abs=spread.scale * _worst(spread.difference),
        max_relative=_worst(spread.difference),
        min_cosine=-_worst(-spread.cosine),
        top1_agreement=_mean(spread.top1_agrees),
        top5_agreement=_mean(spread.top5_overlap),
        nan_count=sum(int(np.isnan(part.candidate).sum()) for part in parts),
        inf_count=sum(int(np.isinf(part.candidate).sum()) for part in parts),
        bounds=gates,
        gates=(
            _images_gate(samples),
            _gate("shape", not mismatch, "the reference's", math.nan, mismatch),
            _finite_gate(parts),
            _class_order_gate(spread, reference.metadata.labels, metadata.labels, gates),
            *(() if mismatch else _numeric_gates(judged, gates)),
        ),
        artifact_sha256=artifact_sha256,
    )


def check_half_range(
    report: ParityReport,
    reference: Runner,
    half: Runner,
    recorder: ActivationRecorder,
    image_paths: Sequence[Path],
    *,
    largest: tuple[str, float] | None = None,
    progress: Progress = no_progress,
) -> ParityReport:
    """Add to `report` what running an fp16 graph on the CPU cannot show, because ONNX Runtime computes it in fp32.

    The lowered network runs a few images in true fp16 arithmetic, and all of them in fp32 while its activations are
    recorded. Their bound is half of the fp16 range, because other images may have larger ones.

    Args:
        report: of the fp16 or int8 artifact.
        reference: the trained network.
        half: the lowered network in fp16 arithmetic.
        recorder: the lowered network in fp32, recording its activations.
        image_paths: the parity images.
        largest: the largest activation on them, as from `recorder`, if they ran before; then only noise is recorded.
        progress: told of the inputs that are recorded, after each batch.
    """
    known = largest is not None
    paths, fill = (image_paths[:HALF_IMAGES], HALF_IMAGES) if known else (image_paths, LARGEST_BATCH)
    samples = _Samples(paths, reference.metadata, fill=fill)
    iterator = iter(samples)
    progress("checking the range of fp16", done := 0, samples.expected)
    first = [_stacked(itertools.islice(iterator, HALF_IMAGES))]
    names, batch = first[0]
    spread = _Spread.between([_Part(names, reference.infer(batch), half.infer(batch), len(batch))])
    for _, inputs in itertools.chain(first, _chunks(iterator, samples.largest_batch)):
        recorder.infer(inputs)
        done += len(inputs)
        progress("checking the range of fp16", done, max(done, samples.expected))
    layer, value = max(filter(None, (recorder.largest(), largest)), key=itemgetter(1))
    found = HalfReport(
        images=len(batch),
        max_relative=_worst(spread.difference),
        min_cosine=-_worst(-spread.cosine),
        largest_activation=value,
        layer=layer,
    )
    # The int8 bound is wide because of int8 layers, which do not run here.
    cosine = report.bounds.cosine if report.precision == "fp16" else GATES["fp16"].cosine
    bound = FP16_SHARE_OF_RANGE * FP16_RANGE
    gates = (
        _gate("fp16 arithmetic", found.min_cosine >= cosine, f"cosine at least {cosine:g}", found.min_cosine),
        _gate("fp16 range", value <= bound, f"activations at most {bound:g}", value, f"largest in {layer}"),
    )
    return replace(report, half=found, gates=(*report.gates, *gates))


class ActivationRecorder(Runner, Protocol):
    """A runner that records its largest absolute activation."""

    def largest(self) -> tuple[str, float]:
        """The layer's name and the value."""
        ...


class _Samples:
    """Named inputs: the readable images, then noise to fill up a batch; counted during iteration."""

    def __init__(self, paths: Sequence[Path], metadata: ModelMetadata, *, fill: int) -> None:
        self._paths = paths
        self._metadata = metadata
        self.largest_batch = fill
        self.images = 0
        self.noise = 0
        self.unreadable: list[str] = []

    @property
    def expected(self) -> int:
        """How many there are, as far as is known: less than all if some images cannot be read."""
        images = len(self._paths) - len(self.unreadable)
        return images + max(MIN_NOISE, self.largest_batch - images)

    def __iter__(self) -> Iterator[_Sample]:
        batches = decoded_batches(self._paths, self._metadata, batch_size=_DECODED, workers=available_cores())
        for batch in batches:
            for path, image in batch.with_each(batch.inputs.copy()):
                if isinstance(image, str):
                    self.unreadable.append(f"{path}: {image}")
                    continue
                self.images += 1
                yield Path(path).name, image
        rng = np.random.default_rng(NOISE_SEED)
        size = self._metadata.config.image_size
        for _ in range(max(MIN_NOISE, self.largest_batch - self.images)):
            self.noise += 1
            if self._metadata.input == "uint8":
                yield f"{_NOISE}{self.noise}", rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            else:
                yield f"{_NOISE}{self.noise}", rng.standard_normal((3, size, size), dtype=np.float32)


@dataclass(frozen=True)
class _Part:
    """Both runners' logits for some inputs, run by the candidate in batches of one size."""

    names: list[str]
    reference: FloatArray
    candidate: FloatArray
    batch_size: int

    def real(self) -> _Part:
        """This part without the noise inputs."""
        rows = [row for row, name in enumerate(self.names) if not name.startswith(_NOISE)]
        names = [self.names[row] for row in rows]
        return _Part(names, self.reference[rows], self.candidate[rows], self.batch_size)


def _run(reference: Runner, candidate: Runner, samples: _Samples, progress: Progress) -> Iterator[_Part]:
    preprocessing = candidate.metadata.preprocessing
    progress("comparing", done := 0, samples.expected)
    for index, (names, images) in enumerate(_chunks(iter(samples), samples.largest_batch)):
        expected = reference.infer(input_of(reference, images, preprocessing))
        give_memory_back()  # what the reference needed
        batch = input_of(candidate, images, preprocessing)
        # First all at once: ONNX Runtime's TensorRT provider then builds one engine in place of three.
        whole = _Part(names, expected, candidate.infer(batch), len(batch))
        for size in (1, min(ODD_BATCH, len(batch))) if index == 0 else ():
            some = max(size, min(MIN_NOISE, len(batch)))
            found = np.concatenate([candidate.infer(batch[at : at + size]) for at in range(0, some, size)])
            yield _Part([f"{name} in a batch of {size}" for name in names[:some]], expected[:some], found, size)
        yield whole
        done += len(names)
        progress("comparing", done, max(done, samples.expected))


def _chunks(samples: Iterator[_Sample], size: int) -> Iterator[tuple[list[str], ImageArray]]:
    while chunk := list(itertools.islice(samples, size)):
        yield _stacked(chunk)


def _stacked(samples: Iterable[_Sample]) -> tuple[list[str], ImageArray]:
    names, inputs = zip(*samples, strict=True)
    return list(names), np.stack(inputs)


def _shape_mismatch(parts: Sequence[_Part]) -> str:
    for part in parts:
        if part.reference.shape != part.candidate.shape:
            return f"logits of shape {part.candidate.shape}, the reference's are {part.reference.shape}"
    return ""


@dataclass(frozen=True)
class _Spread:
    """The differences between the logits of candidate and reference, for each of n rows.

    `scale` is the standard deviation of the reference's logits, and the unit of the others. `difference` is the largest
    of a row; `margin` is the reference's best logit minus its second best; `sorted_difference` is `difference` after
    sorting both rows, so that it does not depend on the order of classes.
    """

    names: list[str]
    scale: float
    difference: _Doubles
    sorted_difference: _Doubles
    cosine: _Doubles
    margin: _Doubles
    top1_agrees: _Doubles
    top5_overlap: _Doubles

    @classmethod
    def nothing(cls) -> _Spread:
        return cls([""], math.nan, *(np.full(1, math.nan) for _ in range(6)))

    @classmethod
    def between(cls, parts: Sequence[_Part]) -> _Spread:
        a = np.concatenate([part.reference for part in parts]).astype(np.float64)
        b = np.concatenate([part.candidate for part in parts]).astype(np.float64)
        best = np.sort(a, axis=1)[:, ::-1]
        with np.errstate(all="ignore"):  # NaN and division by a scale of zero give NaN, which fails every gate
            scale = np.std(a)
            return cls(
                names=[name for part in parts for name in part.names],
                scale=float(scale),
                difference=np.abs(a - b).max(axis=1) / scale,
                sorted_difference=np.abs(best - np.sort(b, axis=1)[:, ::-1]).max(axis=1) / scale,
                cosine=(a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)),
                margin=(best[:, 0] - best[:, min(1, best.shape[1] - 1)]) / scale,
                top1_agrees=(a.argmax(axis=1) == b.argmax(axis=1)).astype(np.float64),
                top5_overlap=_top_overlap(a, b, count=min(5, a.shape[1])),
            )


def _top_overlap(a: _Doubles, b: _Doubles, *, count: int) -> _Doubles:
    best_a, best_b = (np.argsort(-logits, axis=1, kind="stable")[:, :count] for logits in (a, b))
    overlap: _Doubles = (best_a[:, :, None] == best_b[:, None, :]).any(axis=2).mean(axis=1)
    return overlap


def _worst(values: _Doubles) -> float:
    return float(np.max(values))  # NaN if any is, unlike Python's max


def _mean(values: _Doubles) -> float:
    return float(np.mean(values))


def _gate(name: str, passed: bool, limit: str, measured: float, detail: str = "") -> GateResult:
    return GateResult(name=name, passed=bool(passed), limit=limit, measured=measured, detail=detail)


def _images_gate(samples: _Samples) -> GateResult:
    detail = ""
    if not samples.images:
        unread = f"; {samples.unreadable[0]}" if samples.unreadable else ""
        detail = f"no real image was compared{unread}"
    return _gate("images", samples.images > 0, "at least 1", samples.images, detail)


def _finite_gate(parts: Sequence[_Part]) -> GateResult:
    """NaN and infinities of either runner."""
    bad: list[str] = []
    count = 0
    for part in parts:
        for logits in (part.reference, part.candidate):
            wrong = ~np.isfinite(logits)
            count += int(wrong.sum())
            bad += [part.names[row] for row in np.flatnonzero(wrong.any(axis=1)) if row < len(part.names)]
    return _gate("finite", not count, "no NaN, no infinity", count, f"first at {bad[0]}" if bad else "")


def _class_order_gate(
    spread: _Spread, reference_labels: Sequence[str], candidate_labels: Sequence[str], gates: Gates
) -> GateResult:
    """Whether classes are permuted, in the labels or in the logits.

    Logits that differ beyond the bound, but hardly differ once both are sorted, are the same values in another order.
    """
    detail = ""
    pairs = list(enumerate(zip(reference_labels, candidate_labels, strict=False)))
    if sorted(reference_labels) == sorted(candidate_labels):
        moved_labels = [
            f"label {i} is {found!r}, the reference's is {label!r}" for i, (label, found) in pairs if label != found
        ]
        detail = moved_labels[0] if moved_labels else ""
    bound = PERMUTATION_BOUND if gates.difference is None else min(gates.difference, PERMUTATION_BOUND)
    moved = (spread.difference > bound) & (spread.sorted_difference < spread.difference / 10)
    if moved.mean() > 0.5:
        detail = f"the logits are the reference's in another order; first at {spread.names[int(moved.argmax())]}"
    return _gate("class order", not detail, "the reference's", math.nan, detail)


def _numeric_gates(spread: _Spread, gates: Gates) -> Iterator[GateResult]:
    """The gates of the precision; NaN fails each of them."""
    difference = _worst(spread.difference)
    if gates.difference is not None:
        worst = spread.names[int(spread.difference.argmax())]
        limit = f"at most {gates.difference:g} of the logit scale"
        yield _gate("difference", difference <= gates.difference, limit, difference, f"worst at {worst}")

    worst = spread.names[int((-spread.cosine).argmax())]
    cosine = -_worst(-spread.cosine)
    yield _gate("cosine", cosine >= gates.cosine, f"at least {gates.cosine:g}", cosine, f"worst at {worst}")

    decided = ~(spread.margin <= (difference if gates.difference is None else gates.difference))
    agrees = spread.top1_agrees[decided]
    agreement = _mean(agrees) if len(agrees) else 1.0
    limit = f"at least {gates.top1:.2%} of {len(agrees)} inputs whose margin exceeds the difference"
    wrong = np.flatnonzero(decided & (spread.top1_agrees == 0))
    detail = f"first at {spread.names[wrong[0]]}" if len(wrong) else ""
    yield _gate("top-1", agreement >= gates.top1, limit, agreement, detail)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
