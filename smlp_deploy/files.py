"""Files: written whole or not at all, and known by their sha256."""

from __future__ import annotations

import errno
import hashlib
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from smlp_deploy.errors import SmlpError

DATA_FOLDER = Path(__file__).parent / "data"
"""What ships inside the package."""

BUNDLED_CHECKPOINT = DATA_FOLDER / "smlpnet_digits.safetensors"
"""The small trained model that commands use when no other is given."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target`; when the block ends well, move it onto `target`.

    When the block raises, or has moved or removed the temporary file itself, `target` is untouched.

    Raises:
        SmlpError: the folder cannot be made or written to, or there is no room.
    """
    check_writable(target)
    # Its name is chosen before it is made, so that no signal can come between it and its removal.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _explained(target):
            temporary.touch(exist_ok=False)
        with _explained(target, only=_NO_ROOM):
            yield temporary
        if temporary.exists():
            check_writable(target)
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Make the folder of `target`, and check that nothing but a file would be replaced.

    Raises:
        SmlpError: it cannot be written there.
    """
    with _explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            raise SmlpError("cannot write: it is a directory", where=target, fix="name a file with -o")
        if target.exists() and not target.is_file():
            raise SmlpError("cannot write: it is not a regular file", where=target, fix="name a file with -o")


@contextmanager
def _explained(target: Path, *, only: Collection[int] | None = None) -> Iterator[None]:
    """What the operating system refuses, as one line; `only` some of its errors, or all."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        fix = "make room" if error.errno in _NO_ROOM else "choose another path with -o"
        raise SmlpError(f"cannot write: {error.strerror}", where=target, fix=fix) from None


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8 to `target`, whole or not at all."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, content: bytes) -> None:
    """Write `content` to `target`, whole or not at all."""
    with replacing(target) as temporary:
        temporary.write_bytes(content)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
