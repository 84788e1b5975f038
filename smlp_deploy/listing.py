"""Which files a list of arguments means: files, folders, `@list.txt`, and `-` for a list on standard input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from smlp_deploy.errors import UsageError

IMAGE_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("avif", "bmp", "gif", "heic", "heif", "ico", "jfif", "jp2", "jpe", "jpeg"),
        *("jpg", "pbm", "pgm", "png", "ppm", "tga", "tif", "tiff", "webp"),
    )
)


def find_images(arguments: Iterable[str], stdin: Iterable[str]) -> Iterator[Path]:
    """Every image path the arguments mean, in their order; listed lazily.

    A file is taken whatever its name. A folder gives the files below it that are named like images, sorted, links to
    folders not followed; one that gives none stands for itself, so that it is reported rather than lost. `@FILE` and
    `-` give one path per line, relative to the current folder; blank lines are skipped.

    Raises:
        UsageError: an `@FILE` cannot be read. Raised by the call itself, not later.
    """
    arguments = list(arguments)
    for argument in arguments:
        if argument.startswith("@") and not os.access(argument[1:], os.R_OK):
            raise UsageError("cannot read the list of images", where=argument, fix="one path per line")
    return _expand(arguments, stdin)


def _expand(arguments: Iterable[str], stdin: Iterable[str]) -> Iterator[Path]:
    for argument in arguments:
        if argument == "-":
            yield from _lines(stdin)
        elif argument.startswith("@"):
            with Path(argument[1:]).open(encoding="utf-8", errors="surrogateescape") as lines:
                yield from _lines(lines)
        else:
            yield from _below(Path(argument))


def _lines(lines: Iterable[str]) -> Iterator[Path]:
    for line in lines:
        if path := line.rstrip("\r\n"):
            yield from _below(Path(path))


def _below(path: Path) -> Iterator[Path]:
    if not os.path.isdir(path):  # noqa: PTH112 - unlike Path.is_dir, it raises nothing on forbidden paths
        yield path
        return
    found = False
    for found_path in _walk(path):
        found = True
        yield found_path
    if not found:
        yield path


def _walk(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield folder
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            yield Path(entry.path)
