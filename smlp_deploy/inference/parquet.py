"""Predictions as a Parquet file, written at the end of a run from its records, in row groups.

| column | type | null |
|---|---|---|
| path | string; bytes that are not UTF-8 are escaped, `\\xff` | never |
| path_bytes | binary: the name as it is | if `path` has no such escape |
| predictions | list of struct of index int32, label string, probability float64; the best first | if it failed |
| error | string | if it did not fail |

Parquet's strings are UTF-8, and names of files need not be: a string column is what people read and join by, and the
second one keeps what an escape would make ambiguous. The file's key-value metadata says what it is of: `smlp.version`,
`smlp.model_sha256`, `smlp.preprocessing_sha256`, and all else as JSON in `smlp.run` (`facts.Facts`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from smlp_deploy import __version__
from smlp_deploy.dependencies import require
from smlp_deploy.errors import RecordsError
from smlp_deploy.inference.classify import Prediction
from smlp_deploy.inference.facts import Facts, NamesHash, name_bytes
from smlp_deploy.inference.resume import RecordFile, sha256_of_json

ROW_GROUP = 1 << 14
"""Records in a row group, the unit that is in memory at a time."""

_READ = 1 << 10
"""Rows that are decoded, or made of records, at a time; a merge reads all shards at once."""

_FACTS = b"smlp.run"


def require_parquet() -> None:
    """Check that the package that reads and writes Parquet is installed.

    Raises:
        MissingDependencyError: it is missing.
    """
    require("pyarrow", purpose="to write Parquet files", extra="parquet")


def conclude(file: RecordFile[Prediction], facts: Facts) -> None:
    """Write the records to the target as Parquet when the block of `file` ends without an error."""

    def write(target: Path) -> None:
        with file.partial.open("rb") as lines:
            write_batches(target, regroup(_batches(lines), ROW_GROUP), facts)

    file.conclude_with(write)


def table_of(lines: Iterable[str | bytes]) -> Any:
    """The rows of JSON lines, as a pyarrow.Table."""
    import pyarrow as pa

    return pa.Table.from_batches(_batches(lines), schema=_schema())


def write_table(target: Path, table: Any, facts: Facts) -> None:
    """Write rows that `table_of` made, perhaps elsewhere."""
    import pyarrow as pa

    rows = pa.Table.from_arrays([table.column(name) for name in _schema().names], schema=_schema())
    write_batches(target, regroup(rows.to_batches(), ROW_GROUP), facts)


def write_batches(target: Path, batches: Iterable[Any], facts: Facts) -> None:
    """Write a Parquet file.

    Args:
        target: the file.
        batches: of type pyarrow.RecordBatch, each of `ROW_GROUP` rows but the last, and in one piece.
        facts: for the file's metadata.
    """
    import pyarrow.parquet as pq

    with target.open("wb") as stream, pq.ParquetWriter(stream, _schema(facts)) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_facts(path: Path) -> Facts:
    """What a Parquet file is of.

    Raises:
        RecordsError: `smlp predict` did not write it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as stream:
            return Facts.from_json((pq.read_metadata(stream).metadata or {})[_FACTS])
    except (OSError, KeyError, ValueError, pa.ArrowException):
        raise RecordsError(
            "is not a Parquet file of smlp predict", where=path, fix="delete it to run it again"
        ) from None


def read_batches(stream: BinaryIO, path: Path) -> Iterator[Any]:
    """The rows of a file that `smlp predict` wrote, as record batches.

    Raises:
        RecordsError: the file `path` is damaged, or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        if not file.schema_arrow.equals(_schema()):
            raise RecordsError("has other columns", where=path, fix="delete it to run it again")
        yield from file.iter_batches(batch_size=_READ)
    except (OSError, pa.ArrowException) as error:
        raise RecordsError(f"is damaged: {error}", where=path, fix="delete it to run it again") from None


def regroup(batches: Iterable[Any], rows: int) -> Iterator[Any]:
    """Record batches with the same rows, `rows` in each but the last, and each in one piece."""
    import pyarrow as pa

    pending: list[Any] = []
    missing = rows
    for batch in batches:
        while batch.num_rows >= missing:
            pending.append(batch.slice(0, missing))
            yield pa.Table.from_batches(pending).combine_chunks().to_batches()[0]
            batch, pending, missing = batch.slice(missing), [], rows
        if batch.num_rows:
            pending.append(batch)
            missing -= batch.num_rows
    if pending:
        yield pa.Table.from_batches(pending).combine_chunks().to_batches()[0]


def counting_names(batches: Iterable[Any], names: NamesHash) -> Iterator[Any]:
    """Pass record batches through, adding the names of their rows to a hash."""
    for batch in batches:
        for text, name in zip(batch.column("path").to_pylist(), batch.column("path_bytes").to_pylist(), strict=True):
            names.add(text.encode() if name is None else name)
        yield batch


def _batches(lines: Iterable[str | bytes]) -> Iterator[Any]:
    """The rows of JSON lines, as record batches."""
    import pyarrow as pa

    rows = map(_row, lines)
    while group := list(islice(rows, _READ)):  # Python's objects take some ten times the memory of Arrow's
        yield pa.RecordBatch.from_pylist(group, schema=_schema())


def _row(line: str | bytes) -> dict[str, Any]:
    record = json.loads(line)
    path = record["path"]
    scores = record.get("predictions")
    error = record.get("error")
    return {
        "path": _text(path),
        "path_bytes": None if _is_utf8(path) else name_bytes(path),
        "predictions": None if scores is None else [score | {"label": _text(score["label"])} for score in scores],
        "error": None if error is None else _text(error),
    }


def _is_utf8(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _text(text: str) -> str:
    """`text` as Parquet can hold it."""
    return text if _is_utf8(text) else name_bytes(text).decode("utf-8", "backslashreplace")


def _schema(facts: Facts | None = None) -> Any:
    import pyarrow as pa

    score = pa.struct(
        [
            pa.field("index", pa.int32(), nullable=False),
            pa.field("label", pa.string(), nullable=False),
            pa.field("probability", pa.float64(), nullable=False),
        ]
    )
    columns = [
        pa.field("path", pa.string(), nullable=False),
        pa.field("path_bytes", pa.binary()),
        pa.field("predictions", pa.list_(pa.field("element", score, nullable=False))),
        pa.field("error", pa.string()),
    ]
    return pa.schema(columns, metadata=None if facts is None else _metadata(facts))


def _metadata(facts: Facts) -> dict[bytes, str]:
    return {
        b"smlp.version": __version__,
        b"smlp.model_sha256": str(facts.run["model"]),
        b"smlp.preprocessing_sha256": sha256_of_json(facts.run["preprocessing"]),
        _FACTS: facts.to_json(),
    }
