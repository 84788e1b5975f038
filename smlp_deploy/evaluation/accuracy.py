"""Accuracy on labelled images; all models see the same decoded batches, so that results differ only by the model."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import UsageError
from smlp_deploy.files import sha256_of
from smlp_deploy.images.batches import ImageArray, available_cores, decoded_batches
from smlp_deploy.images.dataset import LabelledImage, find_labelled_images, imagenet_synsets
from smlp_deploy.inference.resume import RecordFile, Written, read_lines, run_versions, sha256_of_json
from smlp_deploy.inference.stream import infer_each
from smlp_deploy.interrupts import Progress, StopRequest, no_progress, put_off
from smlp_deploy.metadata import ModelMetadata, Preprocessing
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.base import Runner, batch_size_of, common_input, input_of
from smlp_deploy.runners.placement import ANYWHERE, Placement

logger = logging.getLogger(__name__)

BINS = 15
"""Confidence bins of the calibration error."""

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
    """How many of a class's `n` images were classified correctly."""

    index: int
    label: str
    n: int
    right: int
    top1: float


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """How many images of class `label` were classified as `predicted`; both are indices."""

    label: int
    predicted: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ModelResult:
    """One model's results on the readable images.

    Attributes:
        name: of its runner.
        precision: of its arithmetic.
        top1: the best class is the label.
        top5: the label is among the five best classes, or among all if there are fewer.
        loss: mean cross-entropy, in nats; None if it answered no image.
        calibration_error: expected calibration error in 15 confidence bins; None if it answered no image.
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
        first: index of one model.
        second: index of the other.
        agreement: both have the same best class, right or wrong.
        only_first: images that only the first classifies correctly.
        only_second: images that only the second classifies correctly.
        p_value: of McNemar's exact test; the null hypothesis is that both are right equally often.
    """

    first: int
    second: int
    agreement: Share
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer to an image.

    Attributes:
        index: the best class.
        probability: its softmax probability.
        error: why there is no answer.
        loss: cross-entropy, in nats.
        top5: the label is among the five best classes.
    """

    index: int | None = None
    probability: float | None = None
    error: str | None = None
    loss: float | None = None
    top5: bool = False


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """An image, its label's index, and each model's answer, or why it could not be read."""

    path: str
    label: int
    answers: tuple[Answer, ...] = ()
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        named_by: how the dataset names its classes: by "label", "synset", "index" or "order".
        labels: of the models.
        evaluated: readable images; the others count neither as right nor as wrong.
        models: in the order given.
        pairs: of all models, in the same order.
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
        """A JSON object with all fields and the number of unreadable images."""
        return json.dumps({**asdict(self), "unreadable": len(self.unreadable)}, indent=2, allow_nan=False) + "\n"


class Kept(Protocol):
    """Stores the records of a running evaluation, and has those of an interrupted one.

    Attributes:
        partial: the file.
    """

    partial: Path

    def read(self) -> Iterator[ImageRecord]:
        """The stored records, in whole batches."""
        ...

    def write(self, record: ImageRecord) -> None:
        """Buffer a record until `flush`."""
        ...

    def flush(self) -> None:
        """Store the buffered records; called after each whole batch."""
        ...

    def discard(self) -> None:
        """Delete all records."""
        ...


def evaluate(
    runners: Sequence[Runner],
    samples: Sequence[LabelledImage],
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    kept: Kept | None = None,
    stop: StopRequest | None = None,
) -> Evaluation:
    """Run every image, decoded once, through every model.

    Memory holds at most three batches of images, and the logits of one.

    Args:
        runners: models with the same labels and preprocessing.
        samples: labelled images.
        batch_size: images per run of a network; by default what the first model is fastest with.
        workers: decoding threads; by default one per core.
        progress: called after each batch with the number of images done and in total.
        kept: has the records of the first samples, which are not run again, and stores the others.
        stop: checked after each batch.

    Raises:
        UsageError: the models differ in labels or preprocessing, a number is out of range, or no image can be read.
        StoppedError: a signal arrived.
    """
    _check(runners, samples, batch_size, workers)
    batch_size = batch_size or batch_size_of(runners[0])
    records = list(kept.read()) if kept is not None else []
    remaining = samples[len(records) :]
    for batch in _measured(runners, remaining, batch_size=batch_size, workers=workers or available_cores()):
        records += batch
        if kept is not None:
            _keep(batch, kept)
        if progress is not None:
            progress(len(records), len(samples))
        if stop:
            break
    if stop is not None:
        stop.report(len(records), partial=kept.partial if kept is not None else None)
    if all(record.error is not None for record in records):
        if kept is not None:
            kept.discard()
        raise UsageError(f"none of the {len(samples)} images can be read: {records[0].error}", where=samples[0].path)
    return _summary(runners, samples, records)


def evaluate_dataset(
    models: Sequence[Path],
    dataset: str | Path,
    *,
    mapping: Mapping[str, str] | None = None,
    class_order: Sequence[str] | None = None,
    placement: Placement = ANYWHERE,
    batch_size: int | None = None,
    workers: int | None = None,
    output: Path | None = None,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Evaluation:
    """Open models, find a dataset's images, and evaluate; see `evaluate`.

    Args:
        models: artifacts and checkpoints with the same labels and preprocessing.
        dataset: a folder with one subfolder per class, or a CSV file; see `find_labelled_images`.
        mapping: the dataset's name of a class -> its label.
        class_order: the dataset's names in the order of the models' classes.
        placement: where the models run.
        batch_size: images per run of a network; by default what the first model is fastest with.
        workers: decoding threads; by default one per core.
        output: the JSON report; until it is complete each image's answers are stored beside it, and Ctrl-C and SIGTERM
            stop after a whole batch. None to write nothing.
        resume: continue an interrupted run with the same output, if there is one.
        progress: told of the images done.

    Raises:
        UsageError: the models, the dataset, the mapping or an interrupted run do not match.
        StoppedError: a signal arrived.
        SmlpError: a file cannot be used.
    """
    with ExitStack() as stack:
        runners = [stack.enter_context(open_runner(path, placement=placement.for_file(path))) for path in models]
        labels = runners[0].metadata.labels
        synsets = imagenet_synsets(labels)
        samples = find_labelled_images(dataset, labels, synsets=synsets, mapping=mapping, class_order=class_order)
        stop, kept = None, None
        if output is not None:
            batch_size = batch_size or batch_size_of(runners[0])
            opened = zip(models, runners, strict=True)
            kinds = [placement.for_file(path).kind_of(path, runner.metadata) for path, runner in opened]
            identity = EvaluationIdentity.of(
                models, runners[0].metadata, samples, batch_size=batch_size, provider=kinds
            )
            stop = stack.enter_context(put_off(again=True))
            kept = stack.enter_context(RecordFile[ImageRecord].open(output, identity, resume=resume))
        report = evaluate(
            runners,
            samples,
            batch_size=batch_size,
            workers=workers,
            progress=lambda done, total: progress("images", done, total),
            kept=kept,
            stop=stop,
        )
        if kept is not None:
            kept.conclude(report.to_json())
    return report


def _keep(batch: Iterable[ImageRecord], kept: Kept) -> None:
    for record in batch:
        kept.write(record)
    kept.flush()


def _measured(
    runners: Sequence[Runner], samples: Sequence[LabelledImage], *, batch_size: int, workers: int
) -> Iterator[list[ImageRecord]]:
    """The records of each batch."""
    remaining = iter(samples)
    paths = (sample.path for sample in samples)
    metadata = replace(runners[0].metadata, input=common_input(*runners))
    for batch in decoded_batches(paths, metadata, batch_size=batch_size, workers=workers):
        of_batch = list(islice(remaining, len(batch.paths)))
        labels = [sample.label for row, sample in enumerate(of_batch) if row not in batch.errors]
        answers = zip(*(list(_answers(runner, batch.inputs, labels)) for runner in runners), strict=True)
        yield [
            ImageRecord(path, sample.label, error=found)
            if isinstance(found, str)
            else ImageRecord(path, sample.label, found)
            for sample, (path, found) in zip(of_batch, batch.with_each(answers), strict=True)
        ]


def _answers(runner: Runner, images: ImageArray, labels: Sequence[int]) -> Iterator[Answer]:
    """One model's answer to each image: a few numbers instead of its logits."""
    inputs = input_of(runner, images, runner.metadata.preprocessing)
    for logits, label in zip(infer_each(runner, inputs), labels, strict=True):
        if isinstance(logits, str):
            yield Answer(error=logits)
        else:
            yield _answer(logits.astype(np.float64), label)


def _answer(logits: NDArray[np.float64], label: int) -> Answer:
    log_probabilities = logits - logits.max()
    log_probabilities -= np.log(np.exp(log_probabilities).sum())
    best = np.argsort(-logits, kind="stable")[:5]
    return Answer(
        index=int(best[0]),
        probability=float(np.exp(log_probabilities[best[0]])),
        loss=-float(log_probabilities[label]),
        top5=bool(label in best),
    )


def _check(
    runners: Sequence[Runner], samples: Sequence[LabelledImage], batch_size: int | None, workers: int | None
) -> None:
    if not runners or not samples:
        raise UsageError("there is nothing to evaluate", fix="give at least one model and one image")
    if any(number is not None and number < 1 for number in (batch_size, workers)):
        raise UsageError("batch size and workers must be at least 1", where="--batch, --workers")
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


def _summary(runners: Sequence[Runner], samples: Sequence[LabelledImage], records: Sequence[ImageRecord]) -> Evaluation:
    read = [record for record in records if record.error is None]
    truth = np.array([record.label for record in read])
    answers = [[record.answers[i] for record in read] for i in range(len(runners))]
    best = [_best(of_one) for of_one in answers]
    return Evaluation(
        named_by=", ".join(sorted({sample.named_by for sample in samples})),
        labels=runners[0].metadata.labels,
        evaluated=len(read),
        models=tuple(_result(runner, of_one, truth) for runner, of_one in zip(runners, answers, strict=True)),
        pairs=tuple(_compared(a, b, best[a], best[b], truth) for a, b in itertools.combinations(range(len(best)), 2)),
        records=tuple(records),
    )


def _best(answers: Sequence[Answer]) -> _Ints:
    """The best class of each image, -1 for no answer."""
    return np.array([_NO_ANSWER if answer.index is None else answer.index for answer in answers])


def _result(runner: Runner, answers: Sequence[Answer], truth: _Ints) -> ModelResult:
    best, metadata = _best(answers), runner.metadata
    right, answered = best == truth, best != _NO_ANSWER
    confidence = np.array([answer.probability for answer in answers if answer.probability is not None])
    losses = [answer.loss for answer in answers if answer.loss is not None]
    images_of, right_of = Counter(truth.tolist()), Counter(truth[right].tolist())
    wrong = answered & ~right
    confused = Counter(zip(truth[wrong].tolist(), best[wrong].tolist(), strict=True))
    return ModelResult(
        name=runner.name,
        precision=metadata.precision,
        top1=Share.of(int(right.sum()), len(truth)),
        top5=Share.of(sum(answer.top5 for answer in answers), len(truth)),
        loss=float(np.mean(losses)) if losses else None,
        calibration_error=calibration_error(confidence, right[answered]) if losses else None,
        unanswered=len(truth) - len(losses),
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
        right: n booleans; whether that class is the label.
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return float(np.abs(np.bincount(bins, weights=right - confidence)).sum() / len(right))


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test (Psychometrika 12, 1947; exact: Fagerland et al., BMC 13:91, 2013).

    Under the null hypothesis, each of the n discordant images falls to either model with probability 1/2, so
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
    """Two models by their best classes; a missing answer never agrees."""
    only_first, only_second = int(((a == truth) & (b != truth)).sum()), int(((a != truth) & (b == truth)).sum())
    return PairResult(
        first=first,
        second=second,
        agreement=Share.of(int(((a == b) & (a != _NO_ANSWER)).sum()), len(truth)),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationIdentity:
    """What the results of an evaluation depend on.

    Attributes:
        versions: of smlp-deploy and of the packages that decode and compute.
        model: the number of models, and the sha256 of each one's file by its number.
        provider: what each one runs on, by its number.
        labels: sha256 of their class names.
        preprocessing: from image to network input.
        samples: the number of samples, and the sha256 of their paths, labels and `named_by`.
        batch_size: images per run of a network.
    """

    versions: Mapping[str, str | None]
    model: Mapping[str, Any]
    provider: Mapping[str, str]
    labels: str
    preprocessing: Mapping[str, Any]
    samples: Mapping[str, Any]
    batch_size: int

    @classmethod
    def of(
        cls,
        models: Sequence[Path],
        metadata: ModelMetadata,
        samples: Sequence[LabelledImage],
        *,
        batch_size: int,
        provider: Sequence[str] | None = None,
    ) -> EvaluationIdentity:
        """The identity for models that share the labels and preprocessing in `metadata`; hashes their files.

        `provider` is what each of them runs on, see `Placement.kind_of`; by default the CPU.
        """
        facts = [(os.fspath(sample.path), sample.label, sample.named_by) for sample in samples]
        return cls(
            versions=run_versions(),
            model={"count": len(models)} | {str(i): sha256_of(path) for i, path in enumerate(models, start=1)},
            provider={str(i): kind for i, kind in enumerate(provider or ["cpu"] * len(models), start=1)},
            labels=sha256_of_json(metadata.labels),
            preprocessing=asdict(metadata.preprocessing),
            samples={"count": len(samples), "sha256": sha256_of_json(facts)},
            batch_size=batch_size,
        )

    def writer(self, stream: TextIO, *, header: bool) -> Callable[[ImageRecord], None]:
        return image_writer(stream)

    def reader(self, lines: Iterable[bytes]) -> Iterator[Written[ImageRecord]]:
        return read_images(lines)


def image_writer(stream: TextIO) -> Callable[[ImageRecord], None]:
    """Writes each image of an evaluation as a JSON object with the fields of `ImageRecord`, one per line."""

    def write(record: ImageRecord) -> None:
        stream.write(json.dumps(asdict(record), allow_nan=False) + "\n")

    return write


def read_images(lines: Iterable[bytes]) -> Iterator[Written[ImageRecord]]:
    """What `image_writer` wrote, up to the first incomplete record; numbers are restored exactly."""

    def parse(document: dict[str, Any]) -> ImageRecord:
        answers = tuple(Answer(**answer) for answer in document["answers"])
        return ImageRecord(**{**document, "answers": answers})

    return read_lines(lines, parse)
