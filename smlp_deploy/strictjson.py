"""JSON from anybody: no key twice, no NaN, no number beyond a float, no deep nesting, and no more memory than it needs.

A list takes two bytes of text and some sixty of memory, so containers are counted before they are made.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_NESTING = 32
MAX_CONTAINERS = 1 << 18
"""Lists and objects of one text; the header of a safetensors file has three for each tensor."""


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, or one that is refused.
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"nested more than {MAX_NESTING} deep") from None
    _check_nesting(value, MAX_NESTING)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key occurs twice")
    return document


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is not a finite number")
    return number


def _check_nesting(value: Any, left: int) -> None:
    if isinstance(value, (dict, list)):
        if left == 0:
            raise ValueError(f"nested more than {MAX_NESTING} deep")
        for item in value.values() if isinstance(value, dict) else value:
            _check_nesting(item, left - 1)
