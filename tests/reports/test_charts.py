from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest

from smlp_deploy.reports import charts

HOSTILE = '<script>$x$ & "#010101" id="a" \x1b\udcff 漢</script>'
SHOWN = '<script>$x$ & "#010101" id="a" \\x1b\\udcff 漢</script>'


def intervals(name: str = "a") -> str:
    rows = [(HOSTILE[:20], 3.0, 2.0, 5.0), ("b", 1.0, 1.0, 1.0)]
    return charts.interval_chart(rows, name=name, title=HOSTILE, unit="times", reference=1)


def confusions() -> str:
    return charts.heat_map(["cat", "dog"], [[90, 7], [0, 99]], name="h", title=HOSTILE, axes_names=("label", "answer"))


def growth(*values: float, gate: float = 0.1) -> str:
    points = [(f"point {i}", value) for i, value in enumerate(values)]
    return charts.growth_chart(points, gate=gate, name="g", title=HOSTILE, unit="error")


def distributions(scale: float = 2) -> str:
    rows = [("a", [[1.0, 2.0, 3.0], [2.0, 2.5]]), (HOSTILE[:20], [[scale], [scale]])]
    return charts.distribution_chart(rows, name="d", title=HOSTILE, unit="ms")


def lines() -> str:
    rows = [(f"model {i}", [1.0, 2.0 * i]) for i in range(1, 9)]
    return charts.line_chart(rows, ticks=["1", "8"], name="l", title=HOSTILE, units=("batch", "images/s"))


def stacks() -> str:
    rows = [("blocks.0", {"Half": 2.0}), (HOSTILE[:20], {"Float": 1.0, "Half": 0.5})]
    return charts.stacked_chart(rows, parts=["Half", "Float"], name="s", title=HOSTILE, unit="MB")


EVERY: list[Callable[[], str]] = [intervals, confusions, lambda: growth(0.01, 0.2), distributions, lines, stacks]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter("text")]


@pytest.mark.parametrize("draw", EVERY)
class TestEveryChart:
    def test_is_the_same_each_time(self, draw: Callable[[], str]) -> None:
        assert draw() == draw()

    def test_has_a_name_and_text_stays_text(self, draw: Callable[[], str]) -> None:
        root = ET.fromstring(draw())
        title = root[0]
        assert (root.tag, root.get("role"), title.tag, title.text) == ("svg", "img", "title", SHOWN)
        assert root.get("aria-labelledby") == title.get("id")
        assert not list(root.iter("script"))
        assert not list(root.iter("style"))
        assert SHOWN in texts(draw())

    def test_has_no_colour_of_its_own(self, draw: Callable[[], str]) -> None:
        for element in ET.fromstring(draw()).iter():
            for key, value in element.attrib.items():
                assert not re.search(r"#[0-9a-f]{6}|font-family|https?:", value), (element.tag, key)

    def test_leaves_the_users_settings_alone(self, draw: Callable[[], str], tmp_path: Path) -> None:
        plain = draw()
        with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "svg.fonttype": "path"}):
            before = dict(matplotlib.rcParams)
            assert draw() == plain
            assert dict(matplotlib.rcParams) == before


def test_ids_of_two_charts_differ_and_references_lead_to_them() -> None:
    ids = []
    for svg in (intervals("a"), intervals("b")):
        elements = list(ET.fromstring(svg).iter())
        own = [element.get("id") for element in elements if element.get("id")]
        assert {(element.get("href") or "#")[1:] for element in elements} - {""} <= set(own)
        assert {match for element in elements for match in re.findall(r"#(.+)\)", element.get("clip-path", ""))} <= set(
            own
        )
        ids += own
    assert len(ids) == len(set(ids))


def test_a_cell_is_darker_the_more_it_counts_and_empty_ones_are_not_drawn() -> None:
    svg = confusions()
    assert {"90", "7", "99", "cat", "dog", "label", "answer"} <= set(texts(svg))
    assert "0" not in texts(svg)
    assert svg.count("fill: var(--accent)") == 1
    assert charts.heat_map(["a"], [[0]], name="h", title="t", axes_names=("x", "y"))


class TestGrowth:
    def test_the_first_over_the_gate_is_named(self) -> None:
        assert "first over: point 1" in texts(growth(0.01, 0.2, 0.3))
        assert "gate 0.1" in texts(growth(0.01))
        assert not [text for text in texts(growth(0.01, 0.1)) if "first over" in text]

    @pytest.mark.parametrize("values", [(0.0, 0.0), (math.nan, math.inf), (0.0, math.nan, 1e-7), (1e30,)])
    def test_what_no_logarithm_takes_is_drawn_all_the_same(self, values: tuple[float, ...]) -> None:
        svg = growth(*values)
        assert "nan" not in svg
        assert ("first over: point" in svg) == any(not value <= 0.1 for value in values)

    def test_a_gate_of_zero(self) -> None:
        assert "first over: point 1" in texts(growth(0.0, 0.2, gate=0.0))

    def test_powers_are_numbers(self) -> None:
        assert {"0.01", "0.001"} <= set(texts(growth(0.001, 0.02)))


def test_distributions_far_apart_are_on_a_logarithmic_axis() -> None:
    assert "ms" in texts(distributions())
    assert "ms, logarithmic" in texts(distributions(scale=300))


def test_long_names_lose_their_middle() -> None:
    (shown,) = (
        text
        for text in texts(charts.interval_chart([("x" * 50 + "end", 1, 0, 2)], name="a", title="t", unit="u"))
        if "…" in text
    )
    assert len(shown) == 40
    assert shown.endswith("end")
