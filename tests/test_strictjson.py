from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlp_deploy.strictjson import MAX_CONTAINERS, MAX_NESTING, SchemaError, loads, read


@dataclass(frozen=True)
class Inner:
    number: int


@dataclass(frozen=True)
class Outer:
    inner: tuple[Inner, ...]
    ratio: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ratio < 0:
            raise ArithmeticError("a ratio is never negative")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(VALUES)
def test_what_json_writes_is_read(value: object) -> None:
    assert loads(json.dumps(value)) == value
    assert loads(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "a key occurs twice"),
        ('[{"b": {"a": 1, "a": 2}}]', "a key occurs twice"),
        ("NaN", "NaN is not a finite number"),
        ("[-Infinity]", "-Infinity is not a finite number"),
        ("1e999", "1e999 is not a finite number"),
        ("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), "nested more than 32 deep"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 32 deep"),
        ("[" + "[]," * MAX_CONTAINERS + "1]", "more than 262144 lists and objects"),
        ("[1", "delimiter"),
        (b"\xff", "decode"),
        ('{"a": ["\\ud800"]}', "half a character"),
        ('{"\\udfff": 1}', "half a character"),
        ('"\udcff"', "half a character"),
        ("", "Expecting value"),
    ],
)
def test_what_is_refused(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        loads(text)


def test_containers_are_counted_before_they_take_memory() -> None:
    text = b"[" + b"[]," * (1 << 20) + b"1]"
    tracemalloc.start()
    with pytest.raises(ValueError, match="lists and objects"):
        loads(text)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_an_object_becomes_a_dataclass() -> None:
    text = '{"inner": [{"number": 1}, {"number": 2}], "ratio": 2, "extra": {"big": 1000000000000000000000000}}'
    assert read(text, Outer) == Outer((Inner(1), Inner(2)), 2.0, {"big": 10**24})
    assert read('{"schema": 3, "inner": []}', Outer, schema=3) == Outer(())
    assert read("{}", Outer, prepare=lambda found: {"inner": [], **found}) == Outer(())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        ("{}", "missing required field `inner`"),
        ('{"inner": [{"number": true}]}', r"Expected `int`, got `bool` - at `\$\.inner\[0\]\.number`"),
        ('{"inner": [{"number": 1.5}]}', "Expected `int`, got `float`"),
        ('{"inner": [{"number": "1"}]}', "Expected `int`, got `str`"),
        ('{"inner": [], "ratio": "1"}', "Expected `float`, got `str`"),
        ('{"inner": [], "ratio": 1' + "0" * 400 + "}", "out of range"),
        ('{"inner": [], "extra": {"a": [NaN]}}', "NaN is not a finite number"),
        ('{"inner": [], "surprise": 1}', "unknown field 'surprise'"),
        ('{"inner": [{"number": 1}, {"number": 1, "surprise": 1}]}', "unknown field 'surprise'"),
        ('{"inner": [], "' + "x" * 5000 + '": 1}', r"^unknown field 'x{299}\.\.\.$"),
    ],
)
def test_what_does_not_fit_the_dataclass_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(text, Outer)


@pytest.mark.parametrize(
    ("schema", "shown"), [("4", "4"), ("true", "True"), ("3.0", "3.0"), ("null", "None"), ("9" * 4000, r"9{300}\.\.\.")]
)
def test_another_schema_has_an_error_of_its_own(schema: str, shown: str) -> None:
    with pytest.raises(SchemaError, match=f"schema {shown} is not 3, the one this version reads"):
        read(f'{{"schema": {schema}, "other": 1}}', Outer, schema=3)


def test_the_errors_of_a_dataclass_come_through() -> None:
    with pytest.raises(ArithmeticError, match="never negative"):
        read('{"inner": [], "ratio": -1}', Outer)
