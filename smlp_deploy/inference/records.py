"""Predictions and evaluated images as machine-readable records: one JSON object or CSV row per input.

Odd file names survive both.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, NamedTuple, Protocol, TextIO, TypeVar

from smlp_deploy.evaluation.accuracy import Answer, ImageRecord
from smlp_deploy.inference.classify import Prediction

Write = Callable[[Prediction], None]
T = TypeVar("T")


def jsonl_writer(stream: TextIO, *, topk: int, header: bool = True) -> Write:
    """Writes `{"path", "predictions": [{"index", "label", "probability"}]}` or `{"path", "error"}`, one per line."""

    def write(prediction: Prediction) -> None:
        record: dict[str, object] = {"path": prediction.path}
        if prediction.error is None:
            record["predictions"] = [vars(score) for score in prediction.scores]
        else:
            record["error"] = prediction.error
        stream.write(json.dumps(record) + "\n")

    return write


def csv_writer(stream: TextIO, *, topk: int, header: bool = True) -> Write:
    """Writes a header, then path, error, and index, label and probability of each of the `topk` classes."""
    rows = csv.writer(stream, lineterminator="\n")
    columns = _csv_columns(topk)
    if header:
        rows.writerow(columns)

    def write(prediction: Prediction) -> None:
        values = [value for score in prediction.scores for value in (score.index, score.label, score.probability)]
        rows.writerow([prediction.path, prediction.error or "", *(values or [""] * (len(columns) - 2))])

    return write


def image_writer(stream: TextIO) -> Callable[[ImageRecord], None]:
    """Writes each image of an evaluation as a JSON object with the fields of `ImageRecord`, one per line."""

    def write(record: ImageRecord) -> None:
        stream.write(json.dumps(asdict(record), allow_nan=False) + "\n")

    return write


class Written(NamedTuple, Generic[T]):
    """A record in a file, and the number of bytes up to its end; a prediction is read without its scores."""

    record: T
    end: int


def read_jsonl(lines: Iterable[bytes], *, topk: int) -> Iterator[Written[Prediction]]:
    """The records of a file, up to the first that is not whole."""
    return _read_lines(lines, lambda document: Prediction(document["path"], error=document.get("error")))


def read_images(lines: Iterable[bytes]) -> Iterator[Written[ImageRecord]]:
    """What `image_writer` wrote, up to the first record that is not whole; every number is the one written."""

    def parse(document: dict[str, Any]) -> ImageRecord:
        answers = tuple(Answer(**answer) for answer in document["answers"])
        return ImageRecord(**{**document, "answers": answers})

    return _read_lines(lines, parse)


def _read_lines(lines: Iterable[bytes], parse: Callable[[dict[str, Any]], T]) -> Iterator[Written[T]]:
    end = 0
    for line in lines:
        end += len(line)
        try:
            document = json.loads(line)
            record = parse(document)
            whole = isinstance(document["path"], str) and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError):
            return
        if not whole:
            return
        yield Written(record, end)


def read_csv(lines: Iterable[bytes], *, topk: int) -> Iterator[Written[Prediction]]:
    """The records of a file, up to the first that is not whole."""
    end = 0
    last = b""

    def counted() -> Iterator[str]:
        nonlocal end, last
        for last in lines:
            end += len(last)
            yield last.decode("utf-8", "surrogateescape")

    rows = csv.reader(counted(), strict=True)
    columns = _csv_columns(topk)
    try:
        if next(rows, None) != columns:
            return
        for row in rows:
            # A row torn within quotes lacks columns: the last one is never quoted.
            if len(row) != len(columns) or not last.endswith(b"\n"):
                return
            yield Written(Prediction(row[0], error=row[1] or None), end)
    except csv.Error:
        return


def _csv_columns(topk: int) -> list[str]:
    ranked = [f"{name}_{rank}" for rank in range(1, topk + 1) for name in ("index", "label", "probability")]
    return ["path", "error", *ranked]


class _Writer(Protocol):
    def __call__(self, stream: TextIO, *, topk: int, header: bool = True) -> Write: ...


class _Reader(Protocol):
    def __call__(self, lines: Iterable[bytes], *, topk: int) -> Iterator[Written[Prediction]]: ...


@dataclass(frozen=True)
class RecordFormat:
    """How predictions are written, and found again in a file that may end in the middle of one."""

    writer: _Writer
    reader: _Reader


FORMATS = {"jsonl": RecordFormat(jsonl_writer, read_jsonl), "csv": RecordFormat(csv_writer, read_csv)}
