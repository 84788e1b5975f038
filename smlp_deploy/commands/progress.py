"""Progress in a terminal, drawn by rich; imported only where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

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

from smlp_deploy.commands.terminal import stderr


@contextmanager
def working(what: str) -> Iterator[None]:
    """See `terminal.working`."""
    with _progress(SpinnerColumn(), _description(), TimeElapsedColumn()) as progress:
        progress.add_task(what)
        yield


@contextmanager
def building(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """See `terminal.building`."""
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
    """See `terminal.downloading`."""
    with _progress(TextColumn("downloading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=None, visible=False)
        yield lambda done, total: progress.update(task, completed=done, total=total, visible=True)


@contextmanager
def counting(what: str, *, done: int, total: Callable[[], int | None]) -> Iterator[Callable[[], None]]:
    """See `terminal.counting`."""
    with _progress(SpinnerColumn(), _Count(), BarColumn(), TimeElapsedColumn(), _TimeLeft()) as progress:
        task = progress.add_task(what, total=None, completed=done)
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


def _progress(*columns: ProgressColumn) -> Progress:
    return Progress(*columns, console=stderr(), transient=True)
