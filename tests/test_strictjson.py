from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlp_deploy.strictjson import MAX_CONTAINERS, MAX_NESTING, loads

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
