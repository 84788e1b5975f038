"""Untrusted JSON: unique keys, finite numbers, valid Unicode, bounded nesting and memory, fields of the right type.

An empty list takes two bytes of text and about sixty of memory, so containers are counted before they are built.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import msgspec

MAX_NESTING = 32
MAX_CONTAINERS = 1 << 18
"""Lists and objects in one text; the header of a safetensors file has three for each tensor."""

T = TypeVar("T")


class SchemaError(ValueError):
    """A JSON object with a schema that this version cannot read."""


def loads(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, or it is refused.
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if content.count(b"[") + content.count(b"{") > MAX_CONTAINERS:
        raise ValueError(f"more than {MAX_CONTAINERS} lists and objects")
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        _check_nesting(value, MAX_NESTING)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"nested more than {MAX_NESTING} deep") from None
    except UnicodeEncodeError:
        raise ValueError("it has half a character (a lone surrogate)") from None
    return value


def read(
    text: str,
    form: type[T],
    *,
    schema: int | None = None,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> T:
    """A dataclass instance from a JSON object, with every field of its declared type.

    Errors raised by a `__post_init__` pass through.

    Args:
        text: the JSON object.
        form: the dataclass.
        schema: the number that the object's `schema` must be; None if it has no such field.
        prepare: turns the object into the fields of the dataclass, and `schema`.

    Raises:
        SchemaError: it has another schema.
        ValueError: it is not a JSON object, or is refused; or a field is missing, unknown or of another type.
    """
    document = loads(text)
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    document = prepare(document)
    if schema is not None:
        found = document.pop("schema", None)
        if type(found) is not int or found != schema:
            raise SchemaError(f"schema {_shortened(repr(found))} is not {schema}, the one this version reads")
    built = msgspec.convert(document, form)
    _check_known(document, built)
    return built


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


def _check_known(document: Any, built: object) -> None:
    """Refuse fields that the dataclass does not have, because msgspec ignores them."""
    if is_dataclass(built):
        names = {field.name for field in fields(built)}
        for name, value in document.items():
            if name not in names:
                raise ValueError(f"unknown field {_shortened(repr(name))}")
            _check_known(value, getattr(built, name))
    elif isinstance(built, tuple):
        for item, member in zip(document, built, strict=True):
            _check_known(item, member)


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."
