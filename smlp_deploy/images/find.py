"""Which image files a list of arguments names: files, folders, `@list.txt`, and `-` for a list on standard input."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from smlp_deploy.errors import UsageError

IMAGE_SUFFIXES = tuple(
    f".{suffix}"
    for suffix in (
        *("apng", "avif", "bmp", "gif", "heic", "heif", "ico", "j2c", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpf"),
        *("jpg", "jpx", "mpo", "pbm", "pgm", "png", "pnm", "ppm", "tga", "tif", "tiff", "webp"),
    )
)


def find_images(arguments: Iterable[str], stdin: Iterable[str]) -> Iterator[Path]:
    """Every image path that the arguments name, in their order, listed lazily.

    A file is taken whatever its name. A folder yields the files below it with an image suffix, sorted, not following
    links to folders; a folder without any is yielded itself, so that it is reported rather than lost. `@FILE` and `-`
    give one path per line, relative to the current folder; blank lines are skipped.

    Raises:
        UsageError: an `@FILE` cannot be read. Raised by the call itself, or later if the file disappears after it.
    """
    arguments = list(arguments)
    for argument in arguments:
        if argument.startswith("@") and not _is_readable_file(argument[1:]):
            raise _unreadable(argument)
    return _expand(arguments, stdin)


def _is_readable_file(name: str) -> bool:
    try:
        return os.access(name, os.R_OK) and not os.path.isdir(name)  # noqa: PTH112 - as in _below
    except ValueError:  # a null character, or one that file names cannot encode
        return False


def _opened(argument: str) -> TextIO:
    try:  # a lone carriage return may be part of a name
        return Path(argument[1:]).open(encoding="utf-8", errors="surrogateescape", newline="\n")
    except OSError:
        raise _unreadable(argument) from None


def _unreadable(argument: str) -> UsageError:
    return UsageError("cannot read the list of images", where=argument, fix="give a file with one path per line")


def _expand(arguments: Iterable[str], stdin: Iterable[str]) -> Iterator[Path]:
    for argument in arguments:
        if argument == "-":
            yield from _lines(stdin)
        elif argument.startswith("@"):
            with _opened(argument) as lines:
                yield from _lines(lines)
        else:
            yield from _below(Path(argument))


def _lines(lines: Iterable[str]) -> Iterator[Path]:
    for line in lines:
        if path := line.removesuffix("\n").removesuffix("\r"):
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
    """The images below `folder`, sorted part by part; an unreadable folder is yielded itself."""
    pending = [_sorted_entries(folder)]  # no recursion: folders can nest deeper than Python's stack
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
        elif isinstance(entry, Path):
            yield entry
        elif entry.is_dir(follow_symlinks=False):
            pending.append(_sorted_entries(Path(entry.path)))
        elif entry.name.lower().endswith(IMAGE_SUFFIXES):
            yield Path(entry.path)


def _sorted_entries(folder: Path) -> Iterator[os.DirEntry[str] | Path]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError:
        return iter([folder])
