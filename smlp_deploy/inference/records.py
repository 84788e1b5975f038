"""Predictions as machine-readable records: one JSON object or CSV row per input.

Both preserve unusual file names.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from smlp_deploy.errors import GpuError
from smlp_deploy.files import sha256_of
from smlp_deploy.inference.classify import Prediction
from smlp_deploy.inference.resume import RecordFile, Written, read_lines, run_versions, sha256_of_json
from smlp_deploy.interrupts import StopRequest
from smlp_deploy.metadata import ModelMetadata

Write = Callable[[Prediction], None]


def jsonl_writer(stream: TextIO, *, topk: int, header: bool = True) -> Write:
    """Writes `{"path", "predictions": [{"index", "label", "probability"}]}` or `{"path", "error"}`, one per line.

    Those of a run with `--decode gpu` also have `"decode": "gpu"`.
    """

    def write(prediction: Prediction) -> None:
        stream.write(json.dumps(record_of(prediction)) + "\n")

    return write


def record_of(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON values."""
    record: dict[str, Any] = {"path": prediction.path}
    if prediction.error is None:
        record["predictions"] = [vars(score) for score in prediction.scores]
    else:
        record["error"] = prediction.error
    if prediction.decode is not None:
        record["decode"] = prediction.decode
    return record


def csv_writer(stream: TextIO, *, topk: int, header: bool = True) -> Write:
    """Writes a header, then the path, the error, and the index, label and probability of each of the `topk` classes."""
    rows = csv.writer(stream, lineterminator="\n")
    columns = _csv_columns(topk)
    if header:
        rows.writerow(columns)

    def write(prediction: Prediction) -> None:
        values = [value for score in prediction.scores for value in (score.index, score.label, score.probability)]
        rows.writerow([prediction.path, prediction.error or "", *(values or [""] * (len(columns) - 2))])

    return write


def read_jsonl(lines: Iterable[bytes], *, topk: int) -> Iterator[Written[Prediction]]:
    """The records of a file, without their scores, up to the first incomplete one."""
    return read_lines(lines, lambda document: Prediction(document["path"], error=document.get("error")))


def read_csv(lines: Iterable[bytes], *, topk: int) -> Iterator[Written[Prediction]]:
    """The records of a file, up to the first incomplete one."""
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
            # A row cut off inside quotes lacks columns, because the last column is never quoted.
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
class Codec:
    """How predictions are written, and read again from a file that may end in the middle of one."""

    writer: _Writer
    reader: _Reader


FORMATS = {
    "jsonl": Codec(jsonl_writer, read_jsonl),
    "csv": Codec(csv_writer, read_csv),
    "parquet": Codec(jsonl_writer, read_jsonl),  # during the run; see parquet.py
}


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What the content of a predictions file depends on.

    Attributes:
        versions: of smlp-deploy and of the packages that decode and compute.
        model: sha256 of the model's file.
        labels: sha256 of its class names.
        preprocessing: from image to network input.
        provider: what the model runs on; "openvino" for that runtime on the CPU.
        decode: the library that decodes ordinary JPEG files on a GPU, with its version; None for Pillow.
        format: "jsonl", "csv" or "parquet".
        topk: classes per record.
        batch_size: images per run of the network.
    """

    versions: Mapping[str, str | None]
    model: str
    labels: str
    preprocessing: Mapping[str, Any]
    provider: str
    format: str
    topk: int
    batch_size: int
    decode: str | None = None

    @classmethod
    def of(
        cls,
        model: Path,
        metadata: ModelMetadata,
        *,
        provider: str,
        kind: str,
        topk: int,
        batch_size: int,
        decode: str | None = None,
    ) -> RunIdentity:
        """The identity of a run of the model file `model`, which is read for its hash."""
        return cls(
            versions=run_versions(),
            model=sha256_of(model),
            labels=sha256_of_json(metadata.labels),
            preprocessing=asdict(metadata.preprocessing),
            provider=provider,
            format=kind,
            topk=topk,
            batch_size=batch_size,
            decode=decode,
        )

    def writer(self, stream: TextIO, *, header: bool) -> Callable[[Prediction], None]:
        return FORMATS[self.format].writer(stream, topk=self.topk, header=header)

    def reader(self, lines: Iterable[bytes]) -> Iterator[Written[Prediction]]:
        return FORMATS[self.format].reader(lines, topk=self.topk)


class RecordStream:
    """Records written straight to a stream; an interrupted run cannot be continued.

    Args:
        stream: the target.
        write: writes one record.
    """

    partial = None
    done = failed = 0

    def __init__(self, stream: TextIO, write: Write) -> None:
        self.write = write
        self.flush = stream.flush

    def skip(self, paths: Iterator[str | Path]) -> None:
        """Does nothing: a stream always starts empty."""


def write_records(
    predictions: Iterable[Prediction],
    sink: RecordFile[Prediction] | RecordStream,
    stop: StopRequest,
    *,
    batch_size: int,
    advance: Callable[[], None],
) -> tuple[int, int]:
    """Write predictions in whole batches, to the end or until a signal arrives.

    Args:
        predictions: to write.
        sink: the target.
        stop: checked after each batch.
        batch_size: predictions per batch.
        advance: called after each prediction.

    Returns:
        The number of records, including those of an interrupted run, and how many of them failed.

    Raises:
        StoppedError: a signal arrived.
        GpuError: the GPU cannot go on; whole batches that were done are kept.
    """
    done, failed = sink.done, sink.failed
    try:
        for prediction in predictions:
            sink.write(prediction)
            advance()
            done += 1
            failed += prediction.error is not None
            if done % batch_size == 0:
                sink.flush()
                if stop:
                    break
    except GpuError as error:
        fix = "the same command with --resume continues" if sink.partial else error.fix
        raise GpuError(f"{error.what}, after {done} images", where=sink.partial or error.where, fix=fix) from error
    sink.flush()
    stop.report(done, partial=sink.partial)
    return done, failed
