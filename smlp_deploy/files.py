"""Files: written whole or not at all, and known by their sha256."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smlp_deploy.errors import SmlpError

DATA_FOLDER = Path(__file__).parent / "data"
"""What ships inside the package."""

BUNDLED_CHECKPOINT = DATA_FOLDER / "smlpnet_digits.safetensors"
"""The small trained model that commands use when no other is given."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a temporary path beside `target`; when the block ends well, move it onto `target`.

    When the block raises, or has moved or removed the temporary file itself, `target` is untouched.

    Raises:
        SmlpError: the folder cannot be made or written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    except OSError as error:
        raise SmlpError(f"cannot write: {error.strerror}", where=target, fix="choose another path with -o") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if temporary.exists():
            if target.is_dir():
                raise SmlpError("cannot write: it is a directory", where=target, fix="name a file with -o")
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
