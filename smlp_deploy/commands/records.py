"""Predictions as lines that people read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

import typer

from smlp_deploy.commands.terminal import is_terminal
from smlp_deploy.errors import printable

if TYPE_CHECKING:
    from smlp_deploy.inference.classify import Prediction

Piece = tuple[str, str]
"""Text and its style."""


def predictions_writer(stream: TextIO) -> Callable[[Prediction], None]:
    """Writes one line per prediction as it arrives: the file, its best class, and the runners-up.

    In a terminal lines are coloured and cut to its width; elsewhere they are whole.
    """
    in_terminal = is_terminal(stream)
    write = _terminal_writer(stream) if in_terminal else _plain_writer(stream)
    path_width = max(20, min(44, shutil.get_terminal_size().columns // 2 - 2))
    write((f"{'image':<{path_width}}  best classes", "bold"))

    def write_prediction(prediction: Prediction) -> None:
        path = printable(prediction.path)
        if len(path) > path_width and in_terminal:
            path = "…" + path[1 - path_width :]
        beginning = (f"{path:<{path_width}}  ", "")
        if prediction.error is not None:
            write(beginning, (f"error: {printable(prediction.error)}", "red"), wrap=True)
            return
        best, *others = prediction.scores
        rest = "".join(f"  {printable(score.label)} {score.probability:.1%}" for score in others)
        write(beginning, (f"{printable(best.label)} {best.probability:.1%}", "bold"), (rest, "dim"))

    return write_prediction


def _plain_writer(stream: TextIO) -> Callable[..., None]:
    def write(*pieces: Piece, wrap: bool = False) -> None:
        typer.echo("".join(text for text, _ in pieces), file=stream)

    return write


def _terminal_writer(stream: TextIO) -> Callable[..., None]:
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)

    def write(*pieces: Piece, wrap: bool = False) -> None:
        line = Text.assemble(*pieces)
        if wrap:
            console.print(line, soft_wrap=True)
        else:
            console.print(line, no_wrap=True, overflow="ellipsis", crop=True)

    return write
