"""Files of records that survive an interruption: a stopped run can be continued without loss.

During a run, `x.jsonl` is called `x.jsonl.partial`; records are appended in whole batches, and `x.jsonl.partial.json`
states what they depend on. When complete, the file is renamed, or replaced by a result computed from the records. A
continued run starts after the last whole batch, because the last digits of a network's output may depend on which
images share a batch: the finished file has the same bytes as that of an uninterrupted run.
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
from smlp_deploy.errors import RecordsError, SmlpError, UsageError
from smlp_deploy.files import alone, check_writable, replacing, write_text


class Record(Protocol):
    """The result of one image; `error` is the reason if it failed."""

    @property
    def path(self) -> str: ...

    @property
    def error(self) -> str | None: ...


R = TypeVar("R", bound=Record)
T = TypeVar("T")


class Written(NamedTuple, Generic[T]):
    """A record in a file, and the file offset of its end."""

    record: T
    end: int


class Identity(Protocol[R]):
    """What the bytes of a file of records depend on, besides the images, and how they are written.

    A dataclass of JSON values; a run can be continued only with equal ones.
    """

    @property
    def batch_size(self) -> int: ...

    def writer(self, stream: TextIO, *, header: bool) -> Callable[[R], None]:
        """A function that writes a record; `header` for a new file."""
        ...

    def reader(self, lines: Iterable[bytes]) -> Iterator[Written[R]]:
        """The records of a file, up to the first incomplete one."""
        ...


def read_lines(lines: Iterable[bytes], parse: Callable[[dict[str, Any]], T]) -> Iterator[Written[T]]:
    """The records of a JSON Lines file, up to the first incomplete one."""
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
    """Versions on which the last digits of an output may depend."""
    names = ("smlp-deploy", "pillow", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch")
    return {name: installed_version(name) for name in names}


def sha256_of_json(value: Any) -> str:
    """The sha256 of a value's JSON text, with its keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def partial_path(target: Path) -> Path:
    """What a file of records is called until it is complete."""
    return target.with_name(target.name + ".partial")


class RecordFile(Generic[R]):
    """A file of records while it is written.

    Args:
        target: its name once complete.
        identity: what the records depend on.

    Attributes:
        partial: its name until then.
        done: records kept from an interrupted run.
        failed: those of them that have an error.
    """

    def __init__(self, target: Path, identity: Identity[R]) -> None:
        self.partial = partial_path(target)
        self.done = self.failed = 0
        self._target = target
        self._identity = identity
        self._identity_path = target.with_name(target.name + ".partial.json")
        self._text = io.StringIO(newline="")
        self._result: Callable[[Path], object] | None = None
        self._file: io.FileIO | None = None

    @classmethod
    @contextmanager
    def open(cls, target: Path, identity: Identity[R], *, resume: bool) -> Iterator[Self]:
        """Start the file or continue it; it is renamed to `target` when the block ends without an error.

        Args:
            target: the file.
            identity: what the records depend on.
            resume: continue an interrupted run, if there is one.

        Raises:
            UsageError: there is an interrupted run and `resume` is false, or its identity differs.
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
                    "found an interrupted run", where=records.partial, fix="add --resume, or delete it to start over"
                )
            try:
                yield records
                records._finish()
            finally:
                records._close()

    def skip(self, paths: Iterator[str | Path]) -> None:
        """Consume from `paths` those that already have records.

        Raises:
            UsageError: the records are of other paths.
        """
        for number, record in enumerate(self.read(), start=1):
            path = next(paths, None)
            if path is None or os.fspath(path) != record.path:
                now = "missing" if path is None else os.fspath(path)
                raise UsageError(
                    f"cannot continue it: image {number} was {record.path}, now it is {now}",
                    where=self.partial,
                    fix="give the same images, or delete it to start over",
                )

    def read(self) -> Iterator[R]:
        """The records of the interrupted run."""
        with self.partial.open("rb") as lines:
            for written in islice(self._identity.reader(lines), self.done):
                yield written.record

    def write(self, record: R) -> None:
        """Buffer a record until `flush`."""
        self._write(record)

    def flush(self) -> None:
        """Write the buffer to the file, so that it outlives this process; called after each whole batch.

        Raises:
            SmlpError: it cannot be written, for example because the disk is full.
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
                f"cannot write: {error.strerror}",
                where=self.partial,
                fix="free disk space, then continue with --resume",
            ) from None

    def conclude(self, text: str) -> None:
        """Write `text` to the target instead of the records when the block ends without an error."""
        content = text.encode()
        self.conclude_with(lambda target: target.write_bytes(content))

    def conclude_with(self, write: Callable[[Path], object]) -> None:
        """Let `write` make the target from the records in `partial` when the block ends without an error.

        It gets the path of a temporary file, which then becomes the target.
        """
        self._result = write

    def discard(self) -> None:
        """Delete all records, because they are not worth continuing from."""
        assert self._file is not None, "the file is closed"
        self._file.truncate(0)

    def _begin(self) -> None:
        write_text(self._identity_path, json.dumps(vars(self._identity), indent=2) + "\n")
        self._file = io.FileIO(self.partial, "w")
        self._write = self._identity.writer(self._text, header=True)

    def _continue(self) -> None:
        """Open the file at the end of its last whole batch."""
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
            different = next(differences(then, now), None)
        except (OSError, ValueError, KeyError, TypeError):
            raise RecordsError(
                f"cannot continue it: {self._identity_path.name}, which records its settings, is missing or damaged",
                where=self.partial,
                fix="delete both to start over",
            ) from None
        if different:
            raise UsageError(
                f"cannot continue it: {different}",
                where=self.partial,
                fix="use the same settings, or delete it to start over",
            )

    def _finish(self) -> None:
        assert self._file is not None
        self.flush()
        if self._result is None:
            os.fsync(self._file.fileno())
            self.partial.replace(self._target)
        else:
            with replacing(self._target) as temporary:
                self._result(temporary)
                with temporary.open("rb") as written:
                    os.fsync(written.fileno())
            self.partial.unlink()
        self._identity_path.unlink()

    def _close(self) -> None:
        """Close the file, and delete it if nothing was written."""
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        self._file.close()
        if not size and self.partial.exists():
            self.partial.unlink()
            self._identity_path.unlink()


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A description of each value that changed.

    Raises:
        KeyError, TypeError: `then` lacks one.
    """
    for key, value in now.items():
        if isinstance(value, dict):
            yield from (f"{key} {text}" for text in differences(then[key], value))
        elif then[key] != value:
            yield f"{key.replace('_', ' ')} was {then[key]}, now it is {value}"
