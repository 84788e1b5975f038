"""Notes, progress and errors on stderr, and the console for results on stdout.

Where stderr is no terminal, plain text is written, and rich is not imported.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

import typer

from smlp_deploy.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

_UNBOUNDED = 100_000
"""Columns where the output is no terminal: nothing is wrapped or cut."""


class _Settings:
    """The settings that every verb's options share.

    Attributes:
        quiet: show only errors on stderr.
    """

    quiet = False


def be_quiet() -> None:
    """From now on, show only errors on stderr."""
    _Settings.quiet = True


def note(message: str) -> None:
    if not _Settings.quiet:
        _print(f"note: {printable(message)}", "yellow")


def say(message: str) -> None:
    if not _Settings.quiet:
        _print(printable(message), "")


def suggest(*command: object) -> None:
    """Show the next useful command, ready to paste, if stderr is a terminal."""
    if is_terminal(sys.stderr) and not _Settings.quiet:
        _print(f"next: {printable(shlex.join(map(str, command)))}", "dim")


def show_error(message: str) -> None:
    _print(f"error: {message}", "red")


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal, or is to be treated as one."""
    return stream.isatty() or bool(os.environ.get("FORCE_COLOR")) or os.environ.get("TTY_COMPATIBLE") == "1"


def _print(text: str, style: str) -> None:
    if not is_terminal(sys.stderr):
        typer.echo(text, err=True)
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(text, style=style))


def stderr() -> Console:
    """The console for tables and progress on stderr; silent after `be_quiet`."""
    from rich.console import Console

    return _unbounded_in_a_pipe(Console(stderr=True, highlight=False, quiet=_Settings.quiet))


def stdout() -> Console:
    """The console for results."""
    from rich.console import Console

    return _unbounded_in_a_pipe(Console(highlight=False))


def _unbounded_in_a_pipe(console: Console) -> Console:
    if not console.file.isatty():
        console.width = _UNBOUNDED
    return console


def _shows_progress() -> bool:
    dumb = os.environ.get("TERM", "").lower() in ("dumb", "unknown")
    return is_terminal(sys.stderr) and not dumb and not _Settings.quiet


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner while something slow runs."""
    if not _shows_progress():
        yield
        return
    from smlp_deploy.commands import progress

    with progress.working(what):
        yield


@contextmanager
def building(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for the current phase of a long task."""
    if not _shows_progress():
        yield lambda phase, done, total: None
        return
    from smlp_deploy.commands import progress

    with progress.building(what) as show:
        yield show


@contextmanager
def downloading() -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar for bytes, shown once there are any."""
    if not _shows_progress():
        yield lambda done, total: None
        return
    from smlp_deploy.commands import progress

    with progress.downloading() as show:
        yield show


@contextmanager
def counting(
    what: str, *, done: int, records_on_terminal: bool, total: Callable[[], int | None]
) -> Iterator[Callable[[], None]]:
    """A running count from `done` on with its rate, unless the records themselves go to the terminal.

    Args:
        what: is counted.
        done: before.
        records_on_terminal: show nothing.
        total: finds how many there will be, in a thread of its own because folders may be large; None if it cannot.
            Once it is there, the total and the time left are shown.
    """
    if records_on_terminal or not _shows_progress():
        yield lambda: None
        return
    from smlp_deploy.commands import progress

    with progress.counting(what, done=done, total=total) as advance:
        yield advance
