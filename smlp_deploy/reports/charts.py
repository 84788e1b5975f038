"""Charts as SVG for a page: drawn by matplotlib, coloured by the page's CSS variables, reproducible to the byte.

matplotlib draws in placeholder colours, each of which becomes a CSS variable, so that charts follow light and dark
mode. Text stays text, in the page's font; ids are prefixed with the chart's name, so that a page can hold several
charts.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from smlp_deploy.errors import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

WIDTH = 760
"""Of every chart, in CSS pixels; narrower on small screens."""

_INK, _MUTED, _LINE, _ACCENT, _BAD = (f"#01010{digit}" for digit in range(5))
_SERIES = tuple(f"#02020{digit}" for digit in range(6))
_MARKERS = "osD^vP"
_VARIABLES = {
    "#000000": "var(--ink)",
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
    _ACCENT: "var(--accent)",
    _BAD: "var(--bad)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(_SERIES, start=1)},
}
_COLOUR = re.compile("#[0-9a-f]{6}")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may contain dollar signs
    "font.size": 12,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _LINE,
    "legend.frameon": False,
}
_NAME_SHOWN = 40
_TICKS = 60
_ROW = 30
_WIDE = 10
_DARKEST = 0.55  # opacity of a cell; its number has to stay readable


def interval_chart(
    rows: Sequence[tuple[str, float, float, float]], *, name: str, title: str, unit: str, reference: float | None = None
) -> str:
    """A point with its interval for each row of name, value, low and high; a dashed line at `reference`."""

    def draw(axes: Axes) -> None:
        for row, (_, value, low, high) in enumerate(rows):
            axes.plot([low, high], [row, row], color=_MUTED, linewidth=2)
            axes.plot([value], [row], marker="o", markersize=8, color=_ACCENT)
        if reference is not None:
            axes.axvline(reference, color=_MUTED, linestyle="--", linewidth=1)
        _name_rows(axes, [row[0] for row in rows])
        axes.set_xlabel(unit)

    return _svg(draw, name=name, title=title, height=80 + _ROW * len(rows))


def heat_map(
    labels: Sequence[str], counts: Sequence[Sequence[int]], *, name: str, title: str, axes_names: tuple[str, str]
) -> str:
    """Counts by row and column, darker for higher counts; the diagonal, which is much larger, in grey."""
    size = len(labels)
    largest = max((counts[i][j] for i in range(size) for j in range(size) if i != j), default=0)

    def draw(axes: Axes) -> None:
        for row in range(size):
            for column in range(size):
                if count := counts[row][column]:
                    colour = _LINE if row == column else _ACCENT
                    alpha = 0.5 if row == column else 0.1 + (_DARKEST - 0.1) * count / largest
                    axes.bar([column], [1], width=1, bottom=row - 0.5, color=colour, alpha=alpha, linewidth=0)
                    axes.text(column, row, str(count), ha="center", va="center", fontsize=9 if size > 12 else 12)
        ticks = range(size)
        shown = [_shortened(label, 18) for label in labels]
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), aspect="equal")
        axes.set_yticks(ticks, shown)
        axes.set_xticks(ticks, shown, rotation=90 if max(map(len, shown)) > 2 else 0)
        axes.set_ylabel(axes_names[0])
        axes.set_xlabel(axes_names[1])
        edges = np.arange(size + 1) - 0.5
        axes.hlines(edges, -0.5, size - 0.5, color=_LINE, linewidth=0.5)
        axes.vlines(edges, -0.5, size - 0.5, color=_LINE, linewidth=0.5)
        axes.tick_params(length=0)

    return _svg(draw, name=name, title=title, height=min(WIDTH, 200 + 34 * size))


def growth_chart(points: Sequence[tuple[str, float]], *, gate: float, name: str, title: str, unit: str) -> str:
    """A value at each named point on a logarithmic axis, the gate as a line, and the first point over it marked.

    Zero is drawn at the lower end of the axis; a value that is not finite at the upper end, as a cross.
    """
    values = np.array([value for _, value in points], dtype=np.float64)
    positive = [*values[np.isfinite(values) & (values > 0)].tolist(), *([gate] if gate > 0 else [])] or [1.0]
    low, high = min(positive) / 3, max(positive) * 3
    finite = np.isfinite(values)
    heights = np.where(finite, np.clip(values, low, high), high)
    over = [position for position, value in enumerate(values) if not value <= gate]

    def draw(axes: Axes) -> None:
        axes.set(yscale="log", ylim=(low / 1.5, high * 1.5), xlim=(-0.7, len(points) - 0.3))
        axes.axhline(gate, color=_BAD, linestyle="--", linewidth=1)
        axes.text(-0.6, gate * 1.08, f"gate {gate:g}", fontsize=11, color=_BAD, va="bottom")
        axes.plot(heights, color=_ACCENT, linewidth=1.5, marker="o", markersize=4)
        axes.plot(np.flatnonzero(~finite), heights[~finite], "x", color=_BAD, markersize=8)
        if over:
            _mark(axes, over[0], float(heights[over[0]]), f"first over: {points[over[0]][0]}", count=len(points))
        step = max(1, math.ceil(len(points) / _TICKS))
        shown = range(0, len(points), step)
        axes.set_xticks(shown, [_shortened(points[position][0], 32) for position in shown], rotation=90, fontsize=10)
        axes.set_ylabel(unit)
        _plain_powers(axes.yaxis)
        axes.grid(axis="y", linewidth=0.5)

    return _svg(draw, name=name, title=title, height=420)


def distribution_chart(
    rows: Sequence[tuple[str, Sequence[Sequence[float]]]], *, name: str, title: str, unit: str
) -> str:
    """For each row of values in rounds: a box over the middle half, whiskers from 1 to 99 %, each round's median.

    The axis is logarithmic if one row's median is more than ten times another's.
    """

    every = [np.concatenate([np.asarray(one, dtype=np.float64) for one in rounds]) for _, rounds in rows]
    medians = [float(np.median(values)) for values in every]
    wide = min(medians) > 0 and max(medians) > _WIDE * min(medians)

    def draw(axes: Axes) -> None:
        for row, ((_, rounds), values) in enumerate(zip(rows, every, strict=True)):
            p1, p25, p75, p99 = np.percentile(values, (1, 25, 75, 99))
            colour = _SERIES[row % len(_SERIES)]
            axes.plot([p1, p99], [row, row], color=_MUTED, linewidth=1)
            axes.barh([row], [p75 - p25], left=p25, height=0.5, color=colour, alpha=0.35)
            axes.plot([medians[row]] * 2, [row - 0.3, row + 0.3], color=_INK, linewidth=2)
            ticks = [float(np.median(one)) for one in rounds if len(one)]
            axes.plot(ticks, [row + 0.38] * len(ticks), linestyle="none", marker="|", color=colour, markersize=6)
        _name_rows(axes, [row[0] for row in rows])
        axes.set_xlabel(f"{unit}, logarithmic" if wide else unit)
        if wide:
            axes.set_xscale("log")
            _plain_powers(axes.xaxis)
        else:
            axes.set_xlim(left=0)

    return _svg(draw, name=name, title=title, height=80 + 40 * len(rows))


def line_chart(
    lines: Sequence[tuple[str, Sequence[float]]],
    *,
    ticks: Sequence[str],
    name: str,
    title: str,
    units: tuple[str, str],
) -> str:
    """Lines over named, evenly spaced positions, from zero up; each line has its own marker."""

    def draw(axes: Axes) -> None:
        for number, (label, values) in enumerate(lines):
            colour, marker = _SERIES[number % len(_SERIES)], _MARKERS[number % len(_MARKERS)]
            axes.plot(values, color=colour, marker=marker, label=_shortened(label))
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(xlabel=units[0], ylabel=units[1], xlim=(-0.3, len(ticks) - 0.7))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", linewidth=0.5)
        _legend(axes)

    return _svg(draw, name=name, title=title, height=320 + 20 * len(lines))


def stacked_chart(
    rows: Sequence[tuple[str, Mapping[str, float]]], *, parts: Sequence[str], name: str, title: str, unit: str
) -> str:
    """A stacked bar for each row, in the order of `parts`."""

    def draw(axes: Axes) -> None:
        ends = np.zeros(len(rows))
        for number, part in enumerate(parts):
            widths = np.array([of.get(part, 0.0) for _, of in rows])
            colour = _SERIES[number % len(_SERIES)]
            axes.barh(range(len(rows)), widths, left=ends, height=0.7, color=colour, alpha=0.8, label=_shortened(part))
            ends += widths
        _name_rows(axes, [row[0] for row in rows])
        axes.set_xlabel(unit)
        _legend(axes)

    return _svg(draw, name=name, title=title, height=110 + 24 * len(rows))


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=1 if axes.lines else 4)


def _mark(axes: Axes, position: int, height: float, text: str, *, count: int) -> None:
    right = position > count / 2
    axes.plot([position], [height], marker="D", markersize=10, markerfacecolor="none", color=_BAD, markeredgewidth=2)
    where = (-12 if right else 12, 0)
    side = "right" if right else "left"
    axes.annotate(_shortened(text, 60), (position, height), where, textcoords="offset points", ha=side, va="bottom")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.5)


def _plain_powers(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis; matplotlib's default labels are formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(numticks=8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _shortened(text: str, length: int = _NAME_SHOWN) -> str:
    """`text` on one line, its middle replaced by an ellipsis if longer than `length`."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-(length - length // 2) :]}"


def _svg(draw: Callable[[Axes], None], *, name: str, title: str, height: int) -> str:
    from matplotlib.figure import Figure

    with _drawing(name):
        figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
        figure.suptitle(_shortened(title, 100), x=0, ha="left", fontsize=12)
        draw(figure.subplots())
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inline(written.getvalue(), name=name, title=printable(title))


@contextmanager
def _drawing(salt: str) -> Iterator[None]:
    """matplotlib with our settings, independent of the user's, which are restored afterwards."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph ", category=UserWarning
        )  # the browser renders text in its own fonts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        yield


def _inline(svg: str, *, name: str, title: str) -> str:
    """matplotlib's SVG document as an element of a page."""
    root = ET.fromstring(svg)  # noqa: S314 - matplotlib has just written it
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _attribute(key, text, name) for key, text in element.attrib.items()}
    for child in list(root):
        if child.tag == "metadata" or (child.tag == "defs" and child.find("style") is not None):
            root.remove(child)
    root.attrib = {"viewBox": root.attrib["viewBox"], "width": str(WIDTH), "class": "chart", "role": "img"}
    root.attrib["aria-labelledby"] = f"{name}-title"
    heading = ET.Element("title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, text: str, prefix: str) -> str:
    if key == "id":
        return f"{prefix}-{text}"
    if key.endswith("href"):
        return f"#{prefix}-{text.removeprefix('#')}"
    if key == "style":
        text = re.sub(r"font-family:[^;]*;?", "", text)
        return _COLOUR.sub(lambda match: _VARIABLES.get(match[0], match[0]), text)
    return text.replace("url(#", f"url(#{prefix}-")
