"""Records on their way into a file: a run that is stopped, however, can be continued and loses nothing.

While a run goes on, `x.jsonl` is `x.jsonl.partial`, to which records are added in whole batches, and what they depend
on stands in `x.jsonl.partial.json`. When all are there the file gets its name. A run that continues starts again at
the last whole batch, because the last digits of a network's output may depend on which images it sees together: the
finished file has the same bytes as that of a run never stopped.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self, TextIO

from filelock import FileLock, Timeout

from smlp_deploy.classify import Prediction
from smlp_deploy.errors import SmlpError, UsageError
from smlp_deploy.files import check_writable, write_text
from smlp_deploy.records import FORMATS, Write


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What the bytes of a file of records depend on, beside the images; a run is only continued with the same.

    Attributes:
        version: of smlp-deploy.
        model: sha256 of the model's file.
        labels: sha256 of its class names.
        preprocessing: how an image becomes its input.
        provider: what it runs on.
        format: "jsonl" or "csv".
        topk: classes per record.
        batch_size: images that it sees together.
    """

    version: str
    model: str
    labels: str
    preprocessing: Mapping[str, Any]
    provider: str
    format: str
    topk: int
    batch_size: int


class RecordFile:
    """A file of records in the making.

    Args:
        target: the name it gets when all are there.
        identity: what they depend on.

    Attributes:
        partial: its name until then.
        done: records of an interrupted run that it already has.
        failed: those of them that say why an image could not be classified.
    """

    def __init__(self, target: Path, identity: RunIdentity) -> None:
        self.partial = target.with_name(target.name + ".partial")
        self.done = self.failed = 0
        self._target = target
        self._identity = identity
        self._identity_path = target.with_name(target.name + ".partial.json")
        self._format = FORMATS[identity.format]
        self._text = io.StringIO(newline="")
        self._file: io.FileIO | None = None

    @classmethod
    @contextmanager
    def open(cls, target: Path, identity: RunIdentity, *, resume: bool) -> Iterator[Self]:
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
        with _alone(target):
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
        with self.partial.open("rb") as lines:
            records = self._format.reader(lines, topk=self._identity.topk)
            for number, record in enumerate(islice(records, self.done), start=1):
                path = next(paths, None)
                if path is None or os.fspath(path) != record.path:
                    now = "there is none" if path is None else f"it is {os.fspath(path)}"
                    raise UsageError(
                        f"cannot continue it: image {number} was {record.path}, now {now}",
                        where=self.partial,
                        fix="give the same images, or delete it to start over",
                    )

    def write(self, prediction: Prediction) -> None:
        """Take a record, which `flush` puts into the file."""
        self._write(prediction)

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

    def _begin(self) -> None:
        write_text(self._identity_path, json.dumps(vars(self._identity), indent=2) + "\n")
        self._file = io.FileIO(self.partial, "w")
        self._write = self._format.writer(self._text, topk=self._identity.topk)

    def _continue(self) -> None:
        """Open the file behind its last whole batch."""
        self._check_identity()
        end = 0
        with self.partial.open("rb") as lines:
            records = self._format.reader(lines, topk=self._identity.topk)
            failed = 0
            for number, record in enumerate(records, start=1):
                failed += record.failed
                if number % self._identity.batch_size == 0:
                    self.done, self.failed, end = number, failed, record.end
        self._file = io.FileIO(self.partial, "r+")
        self._file.truncate(end)
        self._file.seek(end)
        self._write = self._format.writer(self._text, topk=self._identity.topk, header=not self.done)

    def _check_identity(self) -> None:
        now = json.loads(json.dumps(vars(self._identity)))
        try:
            then = json.loads(self._identity_path.read_text(encoding="utf-8"))
            different = _differences(then, now)
        except (OSError, ValueError, KeyError, TypeError):
            raise SmlpError(
                f"cannot continue it: {self._identity_path.name}, which says how it was made, is missing or damaged",
                where=self.partial,
                fix="delete both to start over",
            ) from None
        if different:
            raise UsageError(
                f"cannot continue it: {different[0]}",
                where=self.partial,
                fix="give the same, or delete it to start over",
            )

    def _finish(self) -> None:
        assert self._file is not None
        self.flush()
        os.fsync(self._file.fileno())
        self.partial.replace(self._target)
        self._identity_path.unlink()

    def _close(self) -> None:
        """Where nothing was written there is nothing to continue, either."""
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        self._file.close()
        if not size and self.partial.exists():
            self.partial.unlink()
            self._identity_path.unlink()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed, one text for each value."""
    found = []
    for key, value in now.items():
        if isinstance(value, dict):
            found += [f"{key} {text}" for text in _differences(then[key], value)]
        elif then[key] != value:
            found.append(f"{key.replace('_', ' ')} was {then[key]}, now it is {value}")
    return found


class RecordStream:
    """Records that go out as they come; nothing of an interrupted run is there to continue.

    Args:
        stream: where to.
        write: how.
    """

    partial = None
    done = failed = 0

    def __init__(self, stream: TextIO, write: Write) -> None:
        self.write = write
        self.flush = stream.flush

    def skip(self, paths: Iterator[Path]) -> None:
        """There is nothing to skip."""


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Keep other processes from writing the same file."""
    path = target.with_name(f".{target.name}.lock")
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
    except Timeout:
        raise SmlpError("another run is writing it", where=target, fix="wait for it, or choose another -o") from None
