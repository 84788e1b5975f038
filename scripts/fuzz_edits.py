"""Changes to bytes, to files that are made of parts, to images and to JSON. Hypothesis draws every choice."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

T = TypeVar("T")
Part = tuple[Any, bytes]
"""Name and content of a chunk or a member."""


# -------------------------------------------------------------------------------------------- bytes, and parts of files

INTEGERS = (
    *(0, 1, 2, 3, 4, 8, 15, 16, 17, 32, 64, 100, 127, 128, 255, 256, 1000, 4096, 10_000, 32767, 32768, 65535, 65536),
    *(
        10**6,
        2**24,
        10**9,
        2**31 - 1,
        2**31,
        2**32 - 1,
        2**32,
        2**34,
        2**63 - 1,
        2**63,
        2**64 - 1,
        -1,
        -(2**31),
        -(2**63),
    ),
)


def pick(draw: DrawFn, options: Sequence[T]) -> T:
    return draw(st.sampled_from(options))


def below(draw: DrawFn, count: int) -> int:
    return draw(st.integers(0, count - 1))


def damaged(draw: DrawFn, data: bytes) -> bytes:
    """`data` with one to three spans, often in its first bytes, changed without regard for its format."""
    for _ in range(pick(draw, (1, 1, 1, 2, 3))):
        start = below(draw, min(len(data), pick(draw, (1 << 30, 64))) + 1)
        span = data[start : start + pick(draw, (1, 2, 4, 8, 64, 512, 1 << 30))]
        new = b""
        match below(draw, 8):
            case 0:
                span = span[:1]
                new = bytes(byte ^ 1 << below(draw, 8) for byte in span)
            case 1 | 2:
                width, number = pick(draw, (1, 2, 4, 8)), pick(draw, INTEGERS)
                new = (number % (1 << 8 * width)).to_bytes(width, pick(draw, ("little", "big")))
                span = data[start : start + width]
            case 3:
                new = span * pick(draw, (2, 3, 20))
            case 4:
                new, span = draw(st.binary(min_size=1, max_size=16)), pick(draw, (b"", span))
            case 5:
                new = pick(draw, (b"\0", b"\xff")) * len(span)
            case 6:
                other = below(draw, len(data) + 1)
                new = data[other : other + len(span)]
        data = data[:start] + new + data[start + len(span) :]
    return data


def rearrange(draw: DrawFn, parts: list[Any]) -> None:
    """Move one of the parts a file is made of, take it away or double it."""
    part = parts.pop(below(draw, len(parts)))
    at = below(draw, len(parts) + 1)
    parts[at:at] = pick(draw, ([part], [part, part], []))


def edit_parts(
    draw: DrawFn, parts: list[Part], names: Sequence[Any], edit: Callable[[DrawFn, Any, bytes], bytes]
) -> None:
    """Change the order, the name or the content of the parts of a file, or add one."""
    i = below(draw, len(parts))
    name, content = parts[i]
    match below(draw, 10):
        case 0:
            rearrange(draw, parts)
        case 1:
            parts[i] = (pick(draw, names), content)
        case 2:
            new = pick(draw, (content, b"name\0\0" + _zeros(), b"name\0\1\0\0\0" + _zeros()))
            parts.insert(i, (pick(draw, names), new))
        case _:
            parts[i] = (name, edit(draw, name, content))


@cache
def _zeros() -> bytes:
    """64 MB of them, compressed, which takes half a second."""
    return zlib.compress(bytes(1 << 26))


# --------------------------------------------------------------------------------------------------------------- images


def edit_png(draw: DrawFn, data: bytes) -> bytes:
    """Chunks changed, with checksums that fit."""
    chunks: list[Part] = []
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    names = b"IDAT tRNS PLTE eXIf iCCP zTXt iTXt acTL fcTL fdAT gAMA pHYs IEND cHRM IHDR".split()
    edit_parts(draw, chunks, names, _edit_png_chunk)
    body = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
    return data[:8] + b"".join(body)


def _edit_png_chunk(draw: DrawFn, name: bytes, content: bytes) -> bytes:
    if name == b"IDAT" and draw(st.booleans()):
        return zlib.compress(damaged(draw, zlib.decompress(content)))
    return edit_exif(draw, content)


def edit_exif(draw: DrawFn, data: bytes) -> bytes:
    """The TIFF directory inside changed where there is one, else damage."""
    found = re.search(rb"II\*\0|MM\0\*", data)
    if found is None or draw(st.booleans()):
        return damaged(draw, data)
    return data[: found.start()] + edit_tiff(draw, data[found.start() :])


def edit_tiff(draw: DrawFn, data: bytes) -> bytes:
    """Entries of the first directory changed: tag, type, count, value, or where the next directory stands."""
    order: Any = "little" if data[:2] == b"II" else "big"
    changed = bytearray(data)
    directory = int.from_bytes(data[4:8], order)
    count = int.from_bytes(data[directory : directory + 2], order)
    if not count or directory + 2 + count * 12 + 4 > len(data) or below(draw, 10) == 0:
        return damaged(draw, data)
    for _ in range(pick(draw, (1, 1, 2))):
        entry = directory + 2 + 12 * below(draw, count)
        fields = ((entry + 8, 4), (entry + 8, 2), (entry, 2), (entry + 2, 2), (entry + 4, 4))
        at, width = pick(draw, (*fields, *fields, (directory, 2), (directory + 2 + 12 * count, 4)))
        number = draw(st.sampled_from(INTEGERS) | st.integers(1, 19) | st.just(directory) | st.integers(254, 339))
        changed[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)
    return bytes(changed)


# ----------------------------------------------------------------------------------------------------------------- JSON

WORDS = ("", "fp32", "bicubic", "a\nb", "\x1b[31mred", "\ud800", "a\0b", "../../x", "é", "x" * 5000, "1e999", "\u2028")
_TYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "F4")
_NUMBERS = (*INTEGERS, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.5, -0.5, 1e-320, 1e308, 3.5e38, math.inf, -math.inf)
_words = st.sampled_from((*WORDS, *_TYPES)) | st.text(st.characters(exclude_categories=()), max_size=20)
_numbers: SearchStrategy[Any] = st.sampled_from(_NUMBERS) | st.integers() | st.floats()
_odd = ("null", "true", "NaN", "[]", "{}", "[[]]", "[1, 2, 3]", '["a", "b", "c", "d"]', '{"a": 1}', '"mean"')
_nested = tuple("[" * depth + "1" + "]" * depth for depth in (5, 300))
json_values: SearchStrategy[Any] = _words | _numbers | st.sampled_from((*_odd, *_odd, *_nested)).map(json.loads)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object inside a JSON value, with each of its indices or keys."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


def _edit_value(draw: DrawFn, value: Any) -> Any:
    """A JSON value with something inside it changed, mostly to a value of its own type."""
    root = [value]
    holder, key = pick(draw, list(_places(root)))
    is_list = isinstance(holder, list)
    match below(draw, 12):
        case 0:
            del holder[key]
        case 1 if is_list:
            holder[key + 1 : key + 1] = holder[:100] * pick(draw, (1, 250))
        case 1:
            name = draw(_words | st.sampled_from([*holder]))
            holder[name] = holder.pop(key)
        case 2 if is_list:
            holder.append(draw(json_values))
        case 2:
            holder[draw(_words)] = draw(json_values)
        case 3 | 4 | 5:
            holder[key] = draw(json_values)
        case _:
            holder[key] = draw({str: _words, int: _numbers, float: _numbers}.get(type(holder[key]), json_values))
    return root[0] if root else None


def edit_text(draw: DrawFn, text: str) -> str:
    """JSON text with values changed, or with something only a parser sees."""
    match below(draw, 20):
        case 18:
            odd = ("null", "\ufeff" + text, text + "{}", "[" * 100_000, text.replace("{", '{"schema": 1, ', 1))
            return pick(draw, odd)
        case 19:
            start, stop = pick(draw, [number.span() for number in re.finditer(r"\d+", text)] or [(0, 0)])
            return text[:start] + pick(draw, ("-0", "1.0", "1e999", "9" * 5000)) + text[stop:]
    document = json.loads(text)
    for _ in range(pick(draw, (1, 1, 1, 2, 4))):
        document = _edit_value(draw, document)
    return json.dumps(document, ensure_ascii=draw(st.booleans()))


def edit_json(draw: DrawFn, data: bytes) -> bytes:
    return edit_text(draw, data.decode()).encode("utf-8", "surrogatepass")
