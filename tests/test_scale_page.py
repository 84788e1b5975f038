"""docs/scale.md: its second table follows from the first."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
IMAGES = 1e9


def tables(section: str) -> list[list[list[str]]]:
    """The cells of each table's rows."""
    found = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    return [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]] for table in found
    ]


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_hours_and_dollars_follow_from_the_rates_and_prices() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## A billion photographs")[2]
    match = re.search(r"A virtual CPU prepares (\d+) images/s", section)
    assert match is not None
    each = int(match[1])
    inputs, results = tables(section)
    assert len(inputs) == len(results) == 3
    for (name, machines, cpus, gpus, network, price), row in zip(inputs, results, strict=True):
        prepared, computed = each * number(cpus), number(network)
        rate = min(prepared, computed) if number(gpus) else 1 / (1 / prepared + 1 / computed)
        hours = IMAGES / (rate * number(machines)) / 3600
        assert row == [
            name,
            f"{prepared * number(machines):,.0f}",
            f"{computed * number(machines):,.0f}",
            f"{round(rate * number(machines), -2):,.0f}",
            f"{hours:.1f}",
            f"{hours * number(machines) * number(price):,.0f}",
            "decoding" if number(gpus) and prepared < computed else "the network",
        ]
