"""How every verb shows its result: a table or JSON on stdout, and an HTML page on request."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from smlp_deploy.errors import SmlpError, UsageError

if TYPE_CHECKING:
    from smlp_deploy.reports import Origin

_arguments: Sequence[str] = ()
"""Of the command line that runs; pages show it."""


def remember(arguments: Sequence[str]) -> None:
    """Keep the command line's arguments for pages."""
    global _arguments
    _arguments = arguments


def page_origin(models: Iterable[Path | None]) -> Origin:
    """What a page says of its making: this command, and those models that are not None."""
    from smlp_deploy.reports import Origin

    return Origin.of(_arguments, list(dict.fromkeys(path for path in models if path is not None)))


def show(
    *,
    as_json: bool,
    json_text: Callable[[], str],
    table: Callable[[], None],
    html: Path | None = None,
    page: Callable[[], str] | None = None,
) -> None:
    """Show a result in the form that the options request.

    The page is written before anything goes to stdout, which may be a closed pipe; an error in writing it is raised
    after the output.

    Args:
        as_json: print JSON instead of the table.
        json_text: makes the JSON.
        table: prints the table.
        html: the file to write a page to.
        page: makes the page, if the verb has one.
    """
    failure: SmlpError | None = None
    if html is not None and page is not None:
        try:
            write_page(html, page())
        except SmlpError as error:
            failure = error
    if as_json:
        typer.echo(json_text().rstrip("\n"))
    else:
        table()
    if failure is not None:
        raise failure


def is_finished(target: Path) -> bool:
    """Whether a run that is to be continued is complete; says so."""
    from smlp_deploy.commands.terminal import say
    from smlp_deploy.inference.resume import partial_path

    partial = partial_path(target)
    finished = target.is_file() and not (partial.exists() and partial.stat().st_size)
    if finished:
        say(f"{target} is complete, so there is nothing to resume; delete it to run again")
    return finished


def write_page(path: Path, page: str) -> None:
    """Write a page, and say where it is."""
    from smlp_deploy.commands.terminal import say
    from smlp_deploy.files import write_text

    write_text(path, page)
    say(f"page written to {path}")


def check_html(path: Path | None, *, beside: Path | None = None) -> None:
    """Check before any slow work that a page can be written, and not over the file `beside` it.

    Raises:
        UsageError: the name does not end in .html, or is that of `beside`.
        SmlpError: the page cannot be written.
    """
    if path is None:
        return
    from smlp_deploy.files import check_writable
    from smlp_deploy.reports import require_report

    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError("a page's name ends in .html", where=path)
    if path == beside:
        raise UsageError("given for two outputs", where=path, fix="give the page another name")
    require_report()
    check_writable(path)
