"""Reads the text format of Protocol Buffers, as much of it as a model's configuration uses."""

from __future__ import annotations

import json
import re
from typing import Any

_TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[A-Za-z_][A-Za-z0-9_]*|-?\d+|[{}\[\]:,])')


def parse(text: str) -> dict[str, list[Any]]:
    """The fields of a message, each with all of its values in order; messages are of the same form."""
    assert not _TOKEN.sub("", text).strip(), "there is something else in it"
    fields, rest = _fields(_TOKEN.findall(text))
    assert not rest, rest
    return fields


def _fields(tokens: list[str]) -> tuple[dict[str, list[Any]], list[str]]:
    fields: dict[str, list[Any]] = {}
    while tokens and tokens[0] != "}":
        name, *tokens = tokens
        values = fields.setdefault(name, [])
        if tokens[0] == "{":
            message, tokens = _fields(tokens[1:])
            assert tokens[0] == "}", f"{name} has no end"
            values.append(message)
            tokens = tokens[1:]
        elif tokens[:2] == [":", "["]:
            end = tokens.index("]")
            values.extend(_value(token) for token in tokens[2:end] if token != ",")
            tokens = tokens[end + 1 :]
        else:
            assert tokens[0] == ":", f"{name} has no value"
            values.append(_value(tokens[1]))
            tokens = tokens[2:]
    return fields, tokens


def _value(token: str) -> str | int:
    if token.startswith('"'):
        return str(json.loads(token))
    return int(token) if token.lstrip("-").isdigit() else token
