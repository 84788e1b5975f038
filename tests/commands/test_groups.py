from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from smlp_deploy.commands.groups import Gates, StatedPreprocessing, with_groups
from smlp_deploy.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Size:
    width: Annotated[int, typer.Option("--width", "-w", help="In pixels.")] = 3
    height: Annotated[int | None, typer.Option()] = None


@pytest.fixture
def seen() -> list[tuple[str, Size, bool]]:
    return []


@pytest.fixture
def app(seen: list[tuple[str, Size, bool]]) -> typer.Typer:
    """An app of one verb, which keeps what it gets."""

    def verb(
        *,
        name: Annotated[str, typer.Argument()],
        size: Size,
        deep: Annotated[bool, typer.Option("--deep")] = False,
    ) -> None:
        """What it does."""
        seen.append((name, size, deep))

    app = typer.Typer()
    app.command()(with_groups(verb))
    return app


def test_a_verb_gets_groups_of_the_options_in_their_place(app: typer.Typer, seen: list[tuple[str, Size, bool]]) -> None:
    for arguments in (["a"], ["b", "-w", "5", "--height", "7", "--deep"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == [("a", Size(), False), ("b", Size(width=5, height=7), True)]


def test_help_shows_the_options_where_the_group_stands(app: typer.Typer) -> None:
    text = CliRunner().invoke(app, ["--help"]).output
    at = [text.index(part) for part in ("What it does.", "--width", "In pixels.", "--height", "--deep")]
    assert at == sorted(at)


def test_an_option_of_a_group_is_checked(app: typer.Typer, seen: list[tuple[str, Size, bool]]) -> None:
    assert CliRunner().invoke(app, ["a", "--width", "wide"]).exit_code == 2
    assert seen == []


def test_the_name_and_the_text_of_a_verb_stay() -> None:
    @with_groups
    def verb(*, gates: Gates) -> None:
        """What it does."""

    assert (verb.__name__, verb.__doc__) == ("verb", "What it does.")
    assert list(inspect.signature(verb).parameters) == ["min_cosine", "max_difference", "min_top1"]


def test_bounds_are_those_that_were_given() -> None:
    assert Gates().bounds == {}
    assert Gates(min_cosine=0.0, min_top1=0.5).bounds == {"cosine": 0.0, "top1": 0.5}


def test_preprocessing_is_what_was_given() -> None:
    assert StatedPreprocessing().fields == {}
    stated = StatedPreprocessing(mean="0.5,0.4, 0.3", crop_pct=1.0)
    assert stated.fields == {"mean": (0.5, 0.4, 0.3), "crop_pct": 1.0}
    with pytest.raises(UsageError, match=r"'0\.5' is not three numbers · --std · for example 0\.5,0\.5,0\.5"):
        assert StatedPreprocessing(std="0.5").fields
