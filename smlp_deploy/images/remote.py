"""Images in object stores, `s3://bucket/photos/a.jpg` or `gs://bucket/a.jpg`, through pyarrow's filesystems.

Names are written as fsspec writes them: a key stands in them as it is, without percent encoding. Credentials, regions
and endpoints come from where each store's own tools look for them, `AWS_PROFILE` and `AWS_ENDPOINT_URL` for example.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from smlp_deploy.dependencies import require
from smlp_deploy.errors import ImageError, UsageError
from smlp_deploy.images.decode import MAX_FILE_SIZE

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSystem

_NAME = re.compile(r"(?P<root>(?:s3|gs|gcs|abfs|abfss)://[^/]+)/*(?P<key>.*)", re.DOTALL)


def is_remote(name: str) -> bool:
    """Whether a name is that of an object, or of a folder, in an object store."""
    return _NAME.fullmatch(name) is not None


def require_remote() -> None:
    """Check that the package that reads from object stores is installed.

    Raises:
        MissingDependencyError: it is missing.
    """
    require("pyarrow", purpose="to read from object stores", extra="parquet")


def read_object(name: str) -> bytes:
    """The content of an object.

    Raises:
        ImageError: it cannot be read, or is too large for an image.
    """
    try:
        filesystem, path = _located(name)
        with filesystem.open_input_file(path) as file:
            if file.size() > MAX_FILE_SIZE:
                raise ImageError(f"larger than {MAX_FILE_SIZE} bytes")
            return bytes(file.read())
    except FileNotFoundError:
        raise ImageError("no such object") from None
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds, too
        raise ImageError(_one_line(error)) from None


def is_folder(name: str) -> bool:
    """Whether there are objects below a name.

    Raises:
        UsageError: the store does not answer, or refuses to.
    """
    require_remote()
    from pyarrow.fs import FileType

    return bool(_asked(name, _info).type == FileType.Directory)


def walk(name: str) -> Iterator[tuple[str, str]]:
    """The objects below a folder, and the last part of each one's name, sorted part by part.

    Raises:
        UsageError: the store does not answer, or refuses to.
    """
    require_remote()
    from pyarrow.fs import FileType

    pending = [iter(_asked(name, _entries))]
    root, base = name.rstrip("/"), _located(name)[1].rstrip("/")
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
            continue
        found = root + entry.path.removeprefix(base)
        if entry.type == FileType.Directory:
            pending.append(iter(_asked(found, _entries)))
        elif entry.type == FileType.File:
            yield found, entry.base_name


def _info(filesystem: FileSystem, path: str) -> FileInfo:
    return filesystem.get_file_info(path)


def _entries(filesystem: FileSystem, path: str) -> list[FileInfo]:
    from pyarrow.fs import FileSelector

    return sorted(filesystem.get_file_info(FileSelector(path)), key=lambda entry: entry.base_name)


def _asked(name: str, ask: Any) -> Any:
    try:
        return ask(*_located(name))
    except (OSError, ValueError) as error:
        raise UsageError(_one_line(error), where=name, fix="check the name, the credentials and the network") from None


def _located(name: str) -> tuple[FileSystem, str]:
    match = _NAME.fullmatch(name)
    assert match is not None, "is_remote was asked"
    filesystem, base = _filesystem(match["root"])
    return filesystem, f"{base}/{match['key']}".rstrip("/")


@cache
def _filesystem(root: str) -> tuple[FileSystem, str]:
    """The filesystem of a bucket, which keeps connections, and the bucket's path in it."""
    from pyarrow.fs import FileSystem

    filesystem, base = FileSystem.from_uri(root + _at_endpoint() if root.startswith("s3:") else root)
    return filesystem, base.rstrip("/")


def _at_endpoint() -> str:
    """What a URI of pyarrow's says of another S3 endpoint than Amazon's: pyarrow reads no environment variable."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not endpoint:
        return ""
    scheme, _, address = endpoint.rstrip("/").rpartition("://")
    return "?" + urlencode({"scheme": scheme or "https", "endpoint_override": address})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
