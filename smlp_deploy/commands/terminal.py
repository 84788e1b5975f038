"""Notes, progress and errors on stderr, and the console for results on stdout."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
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
        (shown,) = progress.tasks

        def show(phase: str, done: int, total: int) -> None:
            if phase != shown.description:
                progress.reset(task, description=phase)  # its rate too
            shown.total = total or None  # which update() cannot set to None
            progress.update(task, completed=done)

        yield show


@contextmanager
def downloading() -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar for bytes, shown once there are any."""
    with _progress(TextColumn("downloading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


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
    columns = (SpinnerColumn(), _Count(), BarColumn(), TimeElapsedColumn(), _TimeLeft())
    with _progress(*columns, enabled=not records_on_terminal) as progress:
        task = progress.add_task(what, total=None, completed=done)
        if not progress.disable:
            Thread(target=lambda: progress.update(task, total=total()), daemon=True).start()
        yield lambda: progress.advance(task)


class _Count(ProgressColumn):
    """How many are done, of how many, and how many a second."""

    def render(self, task: Task) -> Text:
        of = "" if task.total is None else f" of {task.total:.0f}"
        rate = "" if task.speed is None else f", {task.speed:.3g}/s"
        return Text(f"{task.completed:.0f}{of} {task.description}{rate}")


class _TimeLeft(TimeRemainingColumn):
    """The time left, once it can be known."""

    def render(self, task: Task) -> Text:
        return Text("") if task.time_remaining is None else Text("left: ") + super().render(task)


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
