"""Records on their way into a file: a run that is stopped, however, can be continued and loses nothing.

While a run goes on, `x.jsonl` is `x.jsonl.partial`, to which records are added in whole batches, and what they depend
on stands in `x.jsonl.partial.json`. When all are there the file gets its name, or makes way for what was made of them.
A run that continues starts again at the last whole batch, because the last digits of a network's output may depend on
which images it sees together: the finished file has the same bytes as that of a run never stopped.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, Self, TextIO, TypeVar

from smlp_deploy.dependencies import installed_version
from smlp_deploy.errors import SmlpError, UsageError
from smlp_deploy.files import alone, check_writable, write_text


class Record(Protocol):
    """What became of one image; `error` says why nothing did."""

    @property
    def path(self) -> str: ...

    @property
    def error(self) -> str | None: ...


R = TypeVar("R", bound=Record)
T = TypeVar("T")


class Written(NamedTuple, Generic[T]):
    """A record in a file, and the number of bytes up to its end."""

    record: T
    end: int


class Identity(Protocol[R]):
    """What the bytes of a file of records depend on, beside the images, and how they are written.

    A dataclass of JSON values: a run is only continued with the same.
    """

    @property
    def batch_size(self) -> int: ...

    def writer(self, stream: TextIO, *, header: bool) -> Callable[[R], None]:
        """What writes a record; `header` where the file is new."""
        ...

    def reader(self, lines: Iterable[bytes]) -> Iterator[Written[R]]:
        """The records of a file, up to the first that is not whole."""
        ...


def read_lines(lines: Iterable[bytes], parse: Callable[[dict[str, Any]], T]) -> Iterator[Written[T]]:
    """The records of a file of JSON lines, up to the first that is not whole."""
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


def run_versions() -> dict[str, str | None]:
    """Versions on which the last digits of an answer may depend."""
    names = ("smlp-deploy", "pillow", "numpy", "onnxruntime", "onnxruntime-gpu", "torch")
    return {name: installed_version(name) for name in names}


def sha256_of_json(value: Any) -> str:
    """The sha256 of a value's JSON text."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class RecordFile(Generic[R]):
    """A file of records in the making.

    Args:
        target: the name it gets when all are there.
        identity: what they depend on.

    Attributes:
        partial: its name until then.
        done: records of an interrupted run that it already has.
        failed: those of them that say why there is nothing else.
    """

    def __init__(self, target: Path, identity: Identity[R]) -> None:
        self.partial = target.with_name(target.name + ".partial")
        self.done = self.failed = 0
        self._target = target
        self._identity = identity
        self._identity_path = target.with_name(target.name + ".partial.json")
        self._text = io.StringIO(newline="")
        self._result: str | None = None
        self._file: io.FileIO | None = None

    @classmethod
    @contextmanager
    def open(cls, target: Path, identity: Identity[R], *, resume: bool) -> Iterator[Self]:
        """Begin the file, or continue it; it gets its name when the block ends well.

        Args:
            target: the file.
            identity: what the records depend on.
            resume: continue an interrupted run, if there is one.

        Raises:
            UsageError: an interrupted run is there and `resume` is false, or it was made with something else.
            SmlpError: the file cannot be written, or another process is writing it.
        """
        check_writable(target)
        records = cls(target, identity)
        with alone(target):
            if not records.partial.exists() or not records.partial.stat().st_size:
                records._begin()
            elif resume:
                records._continue()
            else:
                raise UsageError(
                    "an interrupted run is there", where=records.partial, fix="add --resume, or delete it to start over"
                )
            try:
                yield records
                records._finish()
            finally:
                records._close()

    def skip(self, paths: Iterator[Path]) -> None:
        """Take from `paths` those whose records are there already.

        Raises:
            UsageError: they are others.
        """
        for number, record in enumerate(self.read(), start=1):
            path = next(paths, None)
            if path is None or os.fspath(path) != record.path:
                now = "there is none" if path is None else f"it is {os.fspath(path)}"
                raise UsageError(
                    f"cannot continue it: image {number} was {record.path}, now {now}",
                    where=self.partial,
                    fix="give the same images, or delete it to start over",
                )

    def read(self) -> Iterator[R]:
        """The records of the interrupted run."""
        with self.partial.open("rb") as lines:
            for written in islice(self._identity.reader(lines), self.done):
                yield written.record

    def write(self, record: R) -> None:
        """Take a record, which `flush` puts into the file."""
        self._write(record)

    def flush(self) -> None:
        """Hand over to the operating system, which keeps it whatever becomes of this process; after each whole batch.

        Raises:
            SmlpError: there is no room for it.
        """
        assert self._file is not None, "the file is closed"
        remaining = self._text.getvalue().encode("utf-8", "surrogateescape")
        self._text.seek(0)
        self._text.truncate()
        try:
            while remaining:
                remaining = remaining[self._file.write(remaining) :]
        except OSError as error:
            raise SmlpError(
                f"cannot write: {error.strerror}", where=self.partial, fix="make room, then continue with --resume"
            ) from None

    def conclude(self, text: str) -> None:
        """When the block ends well, the file shall have `text` in place of the records."""
        self._result = text

    def discard(self) -> None:
        """Forget all records, because nobody would continue from them."""
        assert self._file is not None, "the file is closed"
        self._file.truncate(0)

    def _begin(self) -> None:
        write_text(self._identity_path, json.dumps(vars(self._identity), indent=2) + "\n")
        self._file = io.FileIO(self.partial, "w")
        self._write = self._identity.writer(self._text, header=True)

    def _continue(self) -> None:
        """Open the file behind its last whole batch."""
        self._check_identity()
        end = 0
        with self.partial.open("rb") as lines:
            failed = 0
            for number, (record, so_far) in enumerate(self._identity.reader(lines), start=1):
                failed += record.error is not None
                if number % self._identity.batch_size == 0:
                    self.done, self.failed, end = number, failed, so_far
        self._file = io.FileIO(self.partial, "r+")
        self._file.truncate(end)
        self._file.seek(end)
        self._write = self._identity.writer(self._text, header=not self.done)

    def _check_identity(self) -> None:
        now = json.loads(json.dumps(vars(self._identity)))
        try:
            then = json.loads(self._identity_path.read_text(encoding="utf-8"))
            different = next(_differences(then, now), None)
        except (OSError, ValueError, KeyError, TypeError):
            raise SmlpError(
                f"cannot continue it: {self._identity_path.name}, which says how it was made, is missing or damaged",
                where=self.partial,
                fix="delete both to start over",
            ) from None
        if different:
            raise UsageError(
                f"cannot continue it: {different}",
                where=self.partial,
                fix="give the same, or delete it to start over",
            )

    def _finish(self) -> None:
        assert self._file is not None
        self.flush()
        if self._result is None:
            os.fsync(self._file.fileno())
            self.partial.replace(self._target)
        else:
            write_text(self._target, self._result)
            self.partial.unlink()
        self._identity_path.unlink()

    def _close(self) -> None:
        """Where nothing was written there is nothing to continue, either."""
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        self._file.close()
        if not size and self.partial.exists():
            self.partial.unlink()
            self._identity_path.unlink()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What changed, one text for each value."""
    for key, value in now.items():
        if isinstance(value, dict):
            yield from (f"{key} {text}" for text in _differences(then[key], value))
        elif then[key] != value:
            yield f"{key.replace('_', ' ')} was {then[key]}, now it is {value}"
