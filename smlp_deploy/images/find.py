"""Which images a list of arguments names: files, folders, objects in a store, `@list.txt`, `-` for standard input.

Paths are passed on as they were given, character by character: pathlib would make `a.jpg` of `./a.jpg`.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import TextIO

from smlp_deploy.errors import UsageError
from smlp_deploy.images import remote
from smlp_deploy.images.manifest import read_manifest

IMAGE_SUFFIXES = tuple(
    f".{suffix}"
    for suffix in (
        *("apng", "avif", "bmp", "gif", "heic", "heif", "ico", "j2c", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpf"),
        *("jpg", "jpx", "mpo", "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)
SIGNATURE_BYTES = 16
"""How much of a file `is_image` looks at."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|\0\0\0.ftyp|\0\0\0\x0cjP  |\xff\x4f\xff\x51"
    rb"|\0\0\x01\0|BM.{4}\0\0\0\0|P[1-6]\s+[0-9#]",
    re.DOTALL,
)
"""How JPEG, PNG, GIF, WebP, TIFF (two byte orders), HEIF and AVIF, JPEG 2000 (two forms), ICO, BMP and PNM begin."""


class InlineImage(str):
    """The name of an image that is not in a file, with its `content`."""

    content: bytes

    @classmethod
    def of(cls, name: str, content: bytes) -> InlineImage:
        image = cls(name)
        image.content = content
        return image


def is_image(head: bytes) -> bool:
    """Whether a file that begins with `head`, of up to `SIGNATURE_BYTES`, is an image by its first bytes."""
    return _SIGNATURES.match(head) is not None


def find_images(arguments: Iterable[str], stdin: Iterable[str] | bytes) -> Iterator[str]:
    """Every image path that the arguments name, in their order, listed lazily, and written as it was given.

    A file is taken whatever its name. A folder yields the files below it with an image suffix, sorted, not following
    links to folders, and without the `._` files that macOS leaves beside others. A pattern that the shell did not
    expand, `photos/*.jpg`, yields what it matches, sorted. `@FILE` and `-` give one path per line, relative to the
    current folder; blank lines are skipped, and a folder among them that has no images is yielded itself, so that it
    is reported rather than lost. An `@FILE.parquet` gives those of its column `path`. `s3://` and `gs://` name objects
    in stores, and folders of them; in a listing such folders end in a slash.

    Args:
        arguments: what the user gave.
        stdin: what `-` stands for: lines, or the bytes of one image, which is yielded as an `InlineImage` called `-`.

    Raises:
        UsageError: an `@FILE` cannot be read, a folder has no images, a pattern matches nothing, or an argument is a
            URL of another kind. Raised by the call itself, or later if an `@FILE` disappears after it.
    """
    given = [name for argument in arguments for name in _matching(argument)]
    for argument in given:
        if argument.startswith("@") and not _is_readable_file(argument[1:]):
            raise _unreadable(argument)
        if not _is_list(argument) and _is_folder(argument) and next(_walk(argument), None) is None:
            raise UsageError("no images in this folder", where=argument, fix="name image files or folders of them")
    return _expand(given, stdin)


def count_images(arguments: Iterable[str]) -> int | None:
    """How many images the arguments name, if that can be known before they are used: not from a pipe."""
    given = list(arguments)
    if any(name == "-" or (name.startswith("@") and not os.path.isfile(name[1:])) for name in given):  # noqa: PTH113
        return None
    try:
        return sum(1 for _ in find_images(given, ()))
    except UsageError:  # a list that has gone
        return None


def images_below(folder: str) -> Iterator[str]:
    """The images below a folder, as `find_images` lists them; the folder itself if it has none."""
    return _below(folder)


def _is_list(argument: str) -> bool:
    return argument == "-" or argument.startswith("@")


def _matching(argument: str) -> list[str]:
    """What an argument stands for: itself, or the files that it matches as a pattern.

    Raises:
        UsageError: it is a URL, or matches nothing.
    """
    if _is_list(argument) or _exists(argument) or remote.is_remote(argument):
        return [argument]
    if _URL.match(argument):
        url = shlex.quote(argument)
        raise UsageError(
            "is a URL, and images are read from files",
            where=argument,
            fix=f"download it first: curl -LO {url}; or pipe it: curl -L {url} | smlp predict -",
        )
    if not glob.has_magic(argument):
        return [argument]
    matching = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 - Path.glob would normalize the names
    if not matching and ("*" in argument or "?" in argument):
        raise UsageError("no file matches this pattern", where=argument, fix="name image files or folders of them")
    return matching or [argument]  # brackets alone are likelier a name


def _exists(name: str) -> bool:
    try:
        return os.path.lexists(name)
    except ValueError:  # a null character, or one that file names cannot encode
        return True  # is reported as an image that cannot be read


def _is_readable_file(name: str) -> bool:
    try:
        return os.access(name, os.R_OK) and not os.path.isdir(name)  # noqa: PTH112 - as in _below
    except ValueError:  # a null character, or one that file names cannot encode
        return False


def _opened(argument: str) -> TextIO:
    try:  # a lone carriage return may be part of a name
        return open(argument[1:], encoding="utf-8", errors="surrogateescape", newline="\n")  # noqa: PTH123
    except OSError:
        raise _unreadable(argument) from None


def _unreadable(argument: str) -> UsageError:
    return UsageError("cannot read the list of images", where=argument, fix="give a file with one path per line")


def _expand(arguments: Iterable[str], stdin: Iterable[str] | bytes) -> Iterator[str]:
    for argument in arguments:
        if argument == "-" and isinstance(stdin, bytes):
            yield InlineImage.of(argument, stdin)
        elif argument == "-":
            assert not isinstance(stdin, bytes)
            yield from _lines(stdin)
        elif argument.startswith("@") and argument.endswith(".parquet"):
            yield from _lines(read_manifest(argument[1:]))
        elif argument.startswith("@"):
            with _opened(argument) as lines:
                yield from _lines(lines)
        else:
            yield from _below(argument)


def _lines(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if not (path := line.removesuffix("\n").removesuffix("\r")):
            continue
        if remote.is_remote(path) and not path.endswith("/"):  # asking for each one's kind would double the requests
            remote.require_remote()
            yield path
        else:
            yield from _below(path)


def _is_folder(path: str) -> bool:
    if remote.is_remote(path):
        return remote.is_folder(path)
    return os.path.isdir(path)  # noqa: PTH112 - unlike Path.is_dir, it raises nothing on forbidden paths


def _below(path: str) -> Iterator[str]:
    if not _is_folder(path):
        yield path
        return
    found = False
    for found_path in _walk(path):
        found = True
        yield found_path
    if not found:
        yield path


def _walk(folder: str) -> Iterator[str]:
    """The images below `folder`, sorted part by part; an unreadable folder is yielded itself."""
    if remote.is_remote(folder):
        yield from (path for path, name in remote.walk(folder) if _is_image_name(name))
        return
    pending = [_sorted_entries(folder)]  # no recursion: folders can nest deeper than Python's stack
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
        elif isinstance(entry, str):
            yield entry
        elif entry.is_dir(follow_symlinks=False):
            pending.append(_sorted_entries(entry.path))
        elif _is_image_name(entry.name):
            yield entry.path


def _is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._")


def _sorted_entries(folder: str) -> Iterator[os.DirEntry[str] | str]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError:
        return iter([folder])
