"""Protobuf's wire format: where the fields of a message lie in a file, found without creating objects for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _FIXED64, BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types; the two others of protobuf, for groups, are not used in ONNX."""
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_LONGEST_VARINT = 10


class TooManyFieldsError(Exception):
    """A file has more fields than its reader allows."""


class Field(NamedTuple):
    """Number and wire type of a field, and the offsets in the file where it starts, its value starts, and it ends."""

    number: int
    kind: int
    start: int
    value: int
    end: int


class WireReader:
    """Finds the fields of messages in `content`, at most `limit` of them in all; this bounds time and memory.

    Args:
        content: a protobuf file.
        limit: the largest number of fields, over all calls of `fields`.
    """

    def __init__(self, content: bytes, *, limit: int) -> None:
        self.content = content
        self._left = limit

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message that lies from `start` to `end`, in the order of the file.

        Raises:
            ValueError: the bytes there are not a protobuf message.
            TooManyFieldsError: the limit is reached.
        """
        while start < end:
            if self._left == 0:
                raise TooManyFieldsError
            self._left -= 1
            field = self._field(start, end)
            if field.end > end:
                raise ValueError("a field reaches beyond its message")
            yield field
            start = field.end

    def _field(self, start: int, end: int) -> Field:
        key, value = self._varint(start, end)
        kind = key & 7
        if kind == BYTES:
            length, value = self._varint(value, end)
            stop = value + length
        elif kind == _VARINT:
            stop = self._varint(value, end)[1]
        elif kind in _FIXED_SIZES:
            stop = value + _FIXED_SIZES[kind]
        else:
            raise ValueError("a wire type that ONNX does not use")
        return Field(key >> 3, kind, start, value, stop)

    def _varint(self, start: int, end: int) -> tuple[int, int]:
        """An integer of seven bits per byte, lowest first, and where it ends."""
        value = 0
        for at in range(start, min(end, start + _LONGEST_VARINT)):
            byte = self.content[at]
            value |= (byte & 0x7F) << 7 * (at - start)
            if byte < 0x80:
                return value, at + 1
        raise ValueError("an integer does not end")
