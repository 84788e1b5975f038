"""A self-contained HTML page: no scripts, no external resources, images and charts embedded.

A page has facts, sections of text, charts, tables and images, and its origin; `templates/` lays them out. All text
passes through jinja2's escaping and `errors.printable`, so that file names and labels stay text.
"""

from __future__ import annotations

import base64
import io
import math
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

from smlp_deploy import __version__
from smlp_deploy.dependencies import TENSORRT_DISTRIBUTIONS, installed_version, require
from smlp_deploy.errors import printable
from smlp_deploy.files import sha256_of
from smlp_deploy.images.decode import open_image
from smlp_deploy.images.preprocessing import resize_and_crop
from smlp_deploy.inference.resume import run_versions
from smlp_deploy.metadata import Preprocessing

if TYPE_CHECKING:
    from smlp_deploy.evaluation.accuracy import ModelResult
    from smlp_deploy.evaluation.benchmark import ModelTiming

THUMBNAIL = 96
"""Maximum side of a thumbnail, in pixels."""

ROWS_SHOWN = 200
"""The most rows of a table that may be long."""

_Model = TypeVar("_Model", "ModelResult", "ModelTiming")


class Verdict(NamedTuple):
    """A table cell shown by a sign and a word, not by colour alone."""

    good: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; columns whose heads are not in `words` are numbers, and a `folded` table is collapsed."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str | Verdict]]
    words: Sequence[str] = ()
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A class and its probability; `good` if known to be right or wrong, `by` to tell several models apart."""

    label: str
    probability: float | None
    good: bool | None = None
    by: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    path: str
    picture: str | None
    text: str = ""
    error: str | None = None
    bars: tuple[Bar, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    name: str
    title: str
    text: Sequence[str] = ()
    charts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    cards: Sequence[Card] = ()


class Fact(NamedTuple):
    """A headline of the page: a number or a verdict, and its meaning."""

    value: str | Verdict
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Origin:
    """When, how and of what a page was made.

    Attributes:
        date: to the minute, in UTC.
        command: the command line.
        models: the sha256 of each file, by its path as given.
        versions: of Python, smlp-deploy and the packages that decode and compute.
    """

    date: str
    command: str
    models: Mapping[str, str]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, arguments: Sequence[str], models: Sequence[Path]) -> Self:
        """The origin of a page that is made now, by `smlp` with the given arguments; reads the files."""
        tensorrt = {name: installed_version(name) for name in sum(TENSORRT_DISTRIBUTIONS.values(), ())}
        versions = {"python": platform.python_version()} | run_versions() | tensorrt
        return cls(
            date=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            command=shlex.join(["smlp", *arguments]),
            models={str(path): sha256_of(path) for path in models},
            versions={name: version for name, version in versions.items() if version},
        )


def require_report() -> None:
    """Check that the packages that write pages are installed.

    Raises:
        MissingDependencyError: one is missing.
    """
    require("jinja2", "matplotlib", purpose="to write HTML reports", extra="report")


def thumbnail(path: str | Path) -> str | None:
    """The centre square of an image, upright and at most 96 pixels wide, as a `data:` URL; None if unreadable."""
    try:
        with open_image(Path(path)) as image:
            image.draft(None, (2 * THUMBNAIL, 2 * THUMBNAIL))  # a large JPEG is decoded at a fraction of its size
            side = min(THUMBNAIL, *image.size)
            small = resize_and_crop(image, Preprocessing(image_size=side, crop_pct=1.0))
        enlarged = THUMBNAIL // side * side
        content = io.BytesIO()
        small.resize((enlarged, enlarged), resample=0).save(content, "JPEG", quality=80)  # 0: whole pixels
    # Decoders raise almost anything for damaged files. The page states elsewhere why an image is unreadable.
    except Exception:
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def facts_table(facts: Mapping[str, str]) -> Table:
    return Table(caption="", heads=("what", "value"), words=("what", "value"), rows=list(facts.items()))


def numbered(models: Sequence[_Model]) -> list[tuple[str, _Model]]:
    """Each model with its label, its name after the number that other tables use."""
    return [(f"{number} {model.name}", model) for number, model in enumerate(models, start=1)]


def percent(value: float) -> str:
    return number(100 * value, ".2f", " %")


def number(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "not finite"


def four_digits(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{float(f'{value:.4g}'):,.10g}"


def plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def shown(things: Sequence[object], most: int) -> str:
    return f"the first {most:,} of {len(things):,}" if len(things) > most else f"all {len(things):,}"


def render(title: str, subtitle: str, origin: Origin, *, facts: Sequence[Fact], sections: Sequence[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_on_one_line,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html")
    every = [*sections, _origin_section(origin)]
    return template.render(title=title, subtitle=subtitle, facts=facts, sections=every, version=__version__)


def _origin_section(origin: Origin) -> Section:
    made = {"date": origin.date, "command": origin.command}
    models = {f"sha256 of {name}": sha256 for name, sha256 in origin.models.items()}
    return Section(name="origin", title="This run", tables=[facts_table({**made, **models, **origin.versions})])


def _on_one_line(value: Any) -> Any:
    """Plain text through `errors.printable`; markup is left unchanged."""
    return printable(value) if type(value) is str else value
