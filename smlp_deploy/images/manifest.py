"""Listings of images as Parquet files: the column `path`, and `path_bytes` for names that are not UTF-8.

The files that `smlp predict --format parquet` writes are such listings, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from smlp_deploy.dependencies import require
from smlp_deploy.errors import UsageError

_ROWS = 1 << 14
"""Rows that are in memory at a time."""


def read_manifest(path: str) -> Iterator[str]:
    """The names in a listing, read as they are needed.

    Raises:
        MissingDependencyError: the package that reads Parquet is missing.
        UsageError: the file is damaged, or has no column of names. Both are raised when the first name is asked for,
            damage further on when it is reached.
    """
    require("pyarrow", purpose="to read Parquet files", extra="parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as stream:  # noqa: PTH123 - as find.py opens listings
            file = pq.ParquetFile(stream)
            columns = [name for name in ("path", "path_bytes") if name in file.schema_arrow.names]
            if "path" not in columns or not pa.types.is_string(file.schema_arrow.field("path").type):
                raise UsageError("has no column `path` of strings", where=path, fix="name the column of images `path`")
            for batch in file.iter_batches(batch_size=_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield _name(row)
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot be read as a Parquet file: {reason}", where=path) from None


def _name(row: dict[str, str | bytes | None]) -> str:
    raw, text = row.get("path_bytes"), row["path"]
    return os.fsdecode(raw) if isinstance(raw, bytes) else str(text or "")
