"""Notes, progress and errors on stderr, and the console for results on stdout."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from smlp_deploy.errors import printable

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
    stderr().print(Text(f"note: {printable(message)}", style="yellow"), soft_wrap=True)


def say(message: str) -> None:
    stderr().print(Text(printable(message)), soft_wrap=True)


def suggest(*command: object) -> None:
    """Show the next useful command, ready to paste, if stderr is a terminal."""
    console = stderr()
    if console.is_terminal:
        console.print(Text(f"next: {printable(shlex.join(map(str, command)))}", style="dim"), soft_wrap=True)


def show_error(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(Text(f"error: {message}", style="red"))


def stderr() -> Console:
    """The console for notes and progress; silent after `be_quiet`."""
    return _unbounded_in_a_pipe(Console(stderr=True, highlight=False, quiet=_Settings.quiet))


@contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner while something slow runs."""
    with _progress(SpinnerColumn(), _description(), TimeElapsedColumn()) as progress:
        progress.add_task(what)
        yield


@contextmanager
def building(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for the current phase of a long task."""
    with _progress(SpinnerColumn(), _description(), BarColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda phase, done, total: progress.update(task, description=phase, completed=done, total=total)


@contextmanager
def downloading() -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar for bytes, shown once there are any."""
    with _progress(TextColumn("downloading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


@contextmanager
def counting(what: str, *, done: int, records_on_terminal: bool) -> Iterator[Callable[[], None]]:
    """A running count from `done` on, unless the records themselves go to the terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:.0f} {task.description}"), TimeElapsedColumn())
    with _progress(*columns, enabled=not records_on_terminal) as progress:
        task = progress.add_task(what, total=None, completed=done)
        yield lambda: progress.advance(task)


def _description() -> TextColumn:
    return TextColumn("{task.description}", markup=False)  # it may contain file names


def _progress(*columns: ProgressColumn, enabled: bool = True) -> Progress:
    console = stderr()
    wanted = enabled and console.is_terminal and not console.is_dumb_terminal and not _Settings.quiet
    return Progress(*columns, console=console, transient=True, disable=not wanted)


def stdout() -> Console:
    """The console for results."""
    return _unbounded_in_a_pipe(Console(highlight=False))


def _unbounded_in_a_pipe(console: Console) -> Console:
    if not console.file.isatty():
        console.width = _UNBOUNDED
    return console
