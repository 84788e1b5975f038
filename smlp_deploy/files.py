"""Files are written whole or not at all, and identified by their sha256."""

from __future__ import annotations

import errno
import hashlib
import logging
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_cache_path

from smlp_deploy.errors import SmlpError

DATA_FOLDER = Path(__file__).parent / "data"
"""Data shipped with the package."""

BUNDLED_CHECKPOINT = DATA_FOLDER / "smlpnet_digits.safetensors"
"""The small trained model that commands use when none is given."""

BUNDLED_MODEL = DATA_FOLDER / "smlpnet_digits.onnx"
"""The same as an ONNX file, which runs without PyTorch."""

MAX_TEXT_BYTES = 4 << 20
"""Limit for JSON files and lists of names."""

logger = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, and move it onto `target` if the block succeeds.

    If the block raises, or moves or removes the temporary file itself, `target` is untouched.

    Raises:
        SmlpError: the folder cannot be created or written to, or there is no space left.
    """
    _check_target(target)
    # The name is chosen before the file is created, so that a signal in between cannot leave the file behind.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _explained(target):
            temporary.touch(exist_ok=False)
        with _explained(target, only=_NO_ROOM):
            yield temporary
        if temporary.exists():
            _check_target(target)
            temporary.replace(target)
    finally:
        if temporary.exists():  # on a read-only file system even removing a file that is not there is an error
            temporary.unlink()


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, from which the block moves what is finished; it is removed afterwards.

    Raises:
        SmlpError: it cannot be made or written to, or the move leads to another file system.
    """
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder)


def check_writable(target: Path) -> None:
    """Create the folder of `target`, and check that files can be created in it and only a regular one is replaced.

    Raises:
        SmlpError: `target` cannot be written.
    """
    _check_target(target)
    with _explained(target):
        tempfile.TemporaryFile(dir=target.parent).close()


def _check_target(target: Path) -> None:
    """`check_writable`, but for whether files can be created there."""
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise SmlpError("cannot write: it is a directory", where=target, fix="name a file with -o")
        if target.exists() and not target.is_file():
            raise SmlpError("cannot write: it is not a regular file", where=target, fix="name a file with -o")


@contextmanager
def _explained(target: Path, *, only: Collection[int] | None = None) -> Iterator[None]:
    """Report errors of the operating system in one line: those in `only`, or all."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        fix = "make room" if error.errno in _NO_ROOM else "choose another path with -o"
        raise SmlpError(f"cannot write: {error.strerror}", where=target, fix=fix) from None


@contextmanager
def alone(target: Path, *, waiting_for: str | None = None) -> Iterator[None]:
    """Keep other processes from writing the same file, with a lock beside it that the system frees if its owner dies.

    Args:
        target: the file.
        waiting_for: message to log while waiting for another process's lock; None to fail instead.

    Raises:
        SmlpError: another process holds the lock, and `waiting_for` is None.
    """
    from filelock import FileLock, Timeout  # which imports asyncio

    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    with _explained(target):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting_for is None:
                raise SmlpError(
                    "another run is writing it", where=target, fix="wait for it, or choose another -o"
                ) from None
            logger.warning("%s", waiting_for)
            lock.acquire()
    try:
        yield
    finally:
        if waiting_for is None:  # else another process may be waiting for this lock file
            path.unlink(missing_ok=True)
        lock.release()


def cache_folder(name: str) -> Path:
    """A folder in the user's cache directory, which need not exist yet.

    Raises:
        SmlpError: there is no home directory, as in a container whose user has no entry in /etc/passwd.
    """
    with suppress(RuntimeError):  # older versions return a relative path instead
        folder = user_cache_path("smlp-deploy") / name
        if folder.is_absolute():
            return folder
    raise SmlpError("no home directory for the cache", fix="set HOME or XDG_CACHE_HOME")


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8 to `target`, whole or not at all."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, content: bytes) -> None:
    """Write `content` to `target`, whole or not at all."""
    with replacing(target) as temporary:
        temporary.write_bytes(content)


def check_regular(path: Path, *, error: type[SmlpError], fix: str, limit: int | None = None) -> int:
    """The size of a file, after checking that it is a regular one: opening a FIFO would block forever.

    Raises:
        SmlpError: it is not a regular file, or has more than `limit` bytes; of the type `error`.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise error("no such file", where=path, fix=fix) from None
    except (OSError, ValueError) as reason:
        raise error(f"cannot read it: {getattr(reason, 'strerror', reason)}", where=path, fix=fix) from None
    if not stat.S_ISREG(status.st_mode):
        what = "is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
        raise error(what, where=path, fix=fix)
    if limit is not None and status.st_size > limit:
        raise error(f"is larger than {limit} bytes", where=path, fix=fix)
    return status.st_size


def read_file(path: Path, *, limit: int, error: type[SmlpError], fix: str) -> bytes:
    """The bytes of a regular file.

    Raises:
        SmlpError: it cannot be read, or has more than `limit` bytes; of the type `error`.
    """
    size = check_regular(path, error=error, fix=fix, limit=limit)
    try:
        with path.open("rb") as file:
            content = file.read(size + 1)
    except OSError as reason:
        raise error(f"cannot read it: {reason.strerror}", where=path, fix=fix) from None
    if len(content) != size:
        raise error("changed while it was read", where=path, fix="try again")
    return content


def read_text(path: Path, *, error: type[SmlpError], fix: str) -> str:
    """The text of a UTF-8 file of at most 4 MiB; otherwise like `read_file`."""
    try:
        return read_file(path, limit=MAX_TEXT_BYTES, error=error, fix=fix).decode()
    except UnicodeDecodeError:
        raise error("is not UTF-8 text", where=path, fix=fix) from None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
