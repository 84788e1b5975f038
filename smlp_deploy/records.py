"""Predictions as machine-readable records: one JSON object or CSV row per input. Odd file names survive both."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TextIO

from smlp_deploy.classify import Prediction

Write = Callable[[Prediction], None]


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


class Written(NamedTuple):
    """A record in a file: the image's path, whether it failed, and the number of bytes up to the record's end."""

    path: str
    failed: bool
    end: int


def read_jsonl(lines: Iterable[bytes], *, topk: int) -> Iterator[Written]:
    """The records of a file, up to the first that is not whole."""
    end = 0
    for line in lines:
        end += len(line)
        try:
            record = json.loads(line)
            path = record["path"]
        except (ValueError, KeyError, TypeError):
            return
        if not isinstance(path, str) or not line.endswith(b"\n"):
            return
        yield Written(path, "error" in record, end)


def read_csv(lines: Iterable[bytes], *, topk: int) -> Iterator[Written]:
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
            yield Written(row[0], bool(row[1]), end)
    except csv.Error:
        return


def _csv_columns(topk: int) -> list[str]:
    ranked = [f"{name}_{rank}" for rank in range(1, topk + 1) for name in ("index", "label", "probability")]
    return ["path", "error", *ranked]


class _Writer(Protocol):
    def __call__(self, stream: TextIO, *, topk: int, header: bool = True) -> Write: ...


class _Reader(Protocol):
    def __call__(self, lines: Iterable[bytes], *, topk: int) -> Iterator[Written]: ...


@dataclass(frozen=True)
class RecordFormat:
    """How records of one kind are written, and found again in a file that may end in the middle of one."""

    writer: _Writer
    reader: _Reader


FORMATS = {"jsonl": RecordFormat(jsonl_writer, read_jsonl), "csv": RecordFormat(csv_writer, read_csv)}
