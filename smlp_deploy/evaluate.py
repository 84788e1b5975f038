"""Accuracy on labelled images: several models on the same decoded batches, so that they differ by the model alone."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.classify import DEFAULT_BATCH_SIZE, available_cores, decoded_batches, infer_each
from smlp_deploy.dataset import Sample
from smlp_deploy.errors import UsageError
from smlp_deploy.metadata import Preprocessing
from smlp_deploy.runners.base import FloatArray, Runner

logger = logging.getLogger(__name__)

BINS = 15
"""Of the calibration error."""

_Z = NormalDist().inv_cdf(0.975)
_NO_ANSWER = -1
_Bools = NDArray[np.bool_]
_Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Share:
    """`count` of `n`, at least 1, with the 95% Wilson interval `low` to `high`; all three from 0 to 1."""

    count: int
    n: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, n: int) -> Share:
        """Wilson's score interval (J. Am. Stat. Assoc. 22, 1927): centre ± half, with z = 1.96."""
        value, spread = count / n, _Z * _Z / n
        centre = (value + spread / 2) / (1 + spread)
        half = math.sqrt(spread * (value * (1 - value) + spread / 4)) / (1 + spread)
        return cls(count=count, n=n, value=value, low=max(0.0, centre - half), high=min(1.0, centre + half))


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """How many of a class's `n` images were answered right."""

    index: int
    label: str
    n: int
    right: int
    top1: float


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How many images of class `label` were taken for `predicted`; both are indices."""

    label: int
    predicted: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """What one model made of the images that could be read.

    Attributes:
        name: of its runner.
        precision: of its arithmetic.
        top1: the best class is the label.
        top5: the label is among the five best classes, or among all where there are fewer.
        loss: mean cross-entropy, in nats; None where it answered nothing.
        calibration_error: expected, in 15 bins of confidence; None where it answered nothing.
        unanswered: images on which it failed or gave NaN; they count as wrong, but not in the two means.
        classes: those that have images, by index.
        confusions: the most frequent first.
    """

    name: str
    precision: str
    top1: Share
    top5: Share
    loss: float | None
    calibration_error: float | None
    unanswered: int
    classes: tuple[ClassResult, ...]
    confusions: tuple[Confusion, ...]


@dataclass(frozen=True, kw_only=True)
class PairResult:
    """Two models on the same images.

    Attributes:
        first: position of one among the models.
        second: position of the other.
        agreement: both have the same best class, right or wrong.
        only_first: images that the first alone has right.
        only_second: images that the second alone has right.
        p_value: of McNemar's exact test that neither is right more often.
    """

    first: int
    second: int
    agreement: Share
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's best class and its softmax probability, or the reason why there is none."""

    index: int | None = None
    probability: float | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image, its label's index, and each model's answer; or the reason why it could not be read."""

    path: str
    label: int
    answers: tuple[Answer, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        named_by: how the dataset named its classes: by "label", "synset" or "index".
        labels: of the models.
        evaluated: images that could be read; the others are neither right nor wrong.
        models: in the order given.
        pairs: of all models, in that order.
        records: every image, in the order given.
    """

    named_by: str
    labels: tuple[str, ...]
    evaluated: int
    models: tuple[ModelResult, ...]
    pairs: tuple[PairResult, ...]
    records: tuple[ImageRecord, ...]

    @property
    def unreadable(self) -> tuple[ImageRecord, ...]:
        return tuple(record for record in self.records if record.error is not None)

    def to_json(self) -> str:
        """A JSON object with all of it, and how many images were unreadable."""
        return json.dumps({**asdict(self), "unreadable": len(self.unreadable)}, indent=2, allow_nan=False) + "\n"


def evaluate(
    runners: Sequence[Runner],
    samples: Sequence[Sample],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run every image, decoded once, through every model.

    Three batches are in memory at once, and the logits of one.

    Args:
        runners: models with the same labels and preprocessing.
        samples: labelled images.
        batch_size: images per run of a network.
        workers: decoding threads; by default one per core.
        progress: called after each batch with the images done and their number.

    Raises:
        UsageError: the models differ in more than the network, a number is out of range, or no image can be read.
    """
    _check(runners, samples, batch_size, workers)
    models = [_Answers(runner) for runner in runners]
    errors: list[str | None] = []
    truth: list[int] = []
    paths = [sample.path for sample in samples]
    preprocessing = runners[0].metadata.preprocessing
    for batch in decoded_batches(paths, preprocessing, batch_size=batch_size, workers=workers or available_cores()):
        contents = [content for _, content in batch]
        images = [content for content in contents if not isinstance(content, str)]
        read = [i for i, content in enumerate(contents, start=len(errors)) if not isinstance(content, str)]
        for model in models:
            model.run(images, [samples[i].label for i in read])
        errors += [content if isinstance(content, str) else None for content in contents]
        truth += [samples[i].label for i in read]
        if progress is not None:
            progress(len(errors), len(samples))
    if not truth:
        raise UsageError(f"none of the {len(samples)} images can be read: {errors[0]}", where=samples[0].path)
    return Evaluation(
        named_by=", ".join(sorted({sample.named_by for sample in samples})),
        labels=runners[0].metadata.labels,
        evaluated=len(truth),
        models=tuple(model.result(np.array(truth)) for model in models),
        pairs=tuple(
            _compared(a, b, models[a].best, models[b].best, np.array(truth))
            for a, b in itertools.combinations(range(len(models)), 2)
        ),
        records=tuple(_records(samples, errors, zip(*(model.answers for model in models), strict=True))),
    )


def _records(
    samples: Sequence[Sample], errors: Sequence[str | None], answers: Iterator[tuple[Answer, ...]]
) -> Iterator[ImageRecord]:
    for sample, error in zip(samples, errors, strict=True):
        given = next(answers) if error is None else ()
        yield ImageRecord(os.fspath(sample.path), sample.label, given, error)


def _check(runners: Sequence[Runner], samples: Sequence[Sample], batch_size: int, workers: int | None) -> None:
    if not runners or not samples:
        raise UsageError("there is nothing to evaluate", fix="give at least one model and one image")
    if batch_size < 1 or (workers is not None and workers < 1):
        raise UsageError("batch size and workers must be at least 1", where="--batch-size, --workers")
    first = runners[0]
    for other in runners[1:]:
        ours, theirs = first.metadata, other.metadata
        differs = [
            field.name
            for field in fields(Preprocessing)
            if getattr(ours.preprocessing, field.name) != getattr(theirs.preprocessing, field.name)
        ] + ["labels"] * (ours.labels != theirs.labels)
        if differs:
            raise UsageError(
                f"{first.name} and {other.name} differ in {' and '.join(differs)}",
                where="--model",
                fix="evaluate them one by one",
            )


class _Answers:
    """What one model answers to each image that can be read: a few numbers, not its logits."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.answers: list[Answer] = []
        self._losses: list[float] = []
        self._top5 = 0

    @property
    def best(self) -> _Ints:
        """The best class of each image, -1 where there is none."""
        return np.array([_NO_ANSWER if answer.index is None else answer.index for answer in self.answers])

    def run(self, images: list[FloatArray], labels: Sequence[int]) -> None:
        for logits, label in zip(infer_each(self._runner, images), labels, strict=True):
            if isinstance(logits, str):
                self.answers.append(Answer(error=logits))
            else:
                self._add(logits.astype(np.float64), label)

    def _add(self, logits: NDArray[np.float64], label: int) -> None:
        log_probabilities = logits - logits.max()
        log_probabilities -= np.log(np.exp(log_probabilities).sum())
        best = np.argsort(-logits, kind="stable")[:5]
        self.answers.append(Answer(int(best[0]), float(np.exp(log_probabilities[best[0]]))))
        self._losses.append(-float(log_probabilities[label]))
        self._top5 += int(label in best)

    def result(self, truth: _Ints) -> ModelResult:
        best, metadata = self.best, self._runner.metadata
        right, answered = best == truth, best != _NO_ANSWER
        confidence = np.array([answer.probability for answer in self.answers if answer.probability is not None])
        images_of, right_of = Counter(truth.tolist()), Counter(truth[right].tolist())
        wrong = answered & ~right
        confused = Counter(zip(truth[wrong].tolist(), best[wrong].tolist(), strict=True))
        return ModelResult(
            name=self._runner.name,
            precision=metadata.precision,
            top1=Share.of(int(right.sum()), len(truth)),
            top5=Share.of(self._top5, len(truth)),
            loss=float(np.mean(self._losses)) if self._losses else None,
            calibration_error=calibration_error(confidence, right[answered]) if self._losses else None,
            unanswered=len(truth) - len(self._losses),
            classes=tuple(
                ClassResult(index=i, label=metadata.labels[i], n=n, right=right_of[i], top1=right_of[i] / n)
                for i, n in sorted(images_of.items())
            ),
            confusions=tuple(
                Confusion(label=label, predicted=predicted, count=count)
                for (label, predicted), count in sorted(confused.items(), key=lambda item: (-item[1], item[0]))
            ),
        )


def calibration_error(confidence: NDArray[np.float64], right: _Bools) -> float:
    """The expected calibration error: the mean of |accuracy - mean confidence| of each image's bin.

    Guo et al., arXiv 1706.04599, eq. 3, with bins (0, 1/15] to (14/15, 1].

    Args:
        confidence: n probabilities of the best class, n at least 1.
        right: n; whether it is the label.
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return float(np.abs(np.bincount(bins, weights=right - confidence)).sum() / len(right))


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test (Psychometrika 12, 1947; exact: Fagerland et al., BMC 13:91, 2013).

    If neither is right more often, each of the n discordant images falls to either with probability 1/2, so
    p = min(1, 2 · Σ C(n, i) / 2^n) for i from 0 to the smaller count. The sum is exact, in integers.
    """
    n = only_first + only_second
    total = term = 1
    for i in range(min(only_first, only_second)):
        term = term * (n - i) // (i + 1)
        total += term
    p_value: float = min(1.0, 2 * total / 2**n)
    return p_value


def _compared(first: int, second: int, a: _Ints, b: _Ints, truth: _Ints) -> PairResult:
    """Two models by their best classes; no answer agrees with nothing."""
    only_first, only_second = int(((a == truth) & (b != truth)).sum()), int(((a != truth) & (b == truth)).sum())
    return PairResult(
        first=first,
        second=second,
        agreement=Share.of(int(((a == b) & (a != _NO_ANSWER)).sum()), len(truth)),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )
