from __future__ import annotations

import pytest
from onnx import ModelProto, TensorProto

from smlp_deploy.graphs.wire import BYTES, Field, TooManyFieldsError, WireReader


def fields(content: bytes, *, limit: int = 100) -> list[Field]:
    return list(WireReader(content, limit=limit).fields(0, len(content)))


def test_every_wire_type_is_found() -> None:
    # varint 300, eight bytes, a string, four bytes
    content = b"\x08\xac\x02" + b"\x11" + bytes(8) + b"\x1a\x02hi" + b"\x25" + bytes(4)
    assert fields(content) == [(1, 0, 0, 1, 3), (2, 1, 3, 4, 12), (3, BYTES, 12, 14, 16), (4, 5, 16, 17, 21)]


def test_fields_lie_where_protobuf_wrote_them() -> None:
    tensor = TensorProto(name="w" * 200, dims=[3, 1 << 40], data_type=TensorProto.FLOAT, raw_data=bytes(70_000))
    model = ModelProto(ir_version=10)
    model.graph.initializer.append(tensor)
    content = model.SerializeToString()
    reader = WireReader(content, limit=100)
    (graph,) = [field for field in reader.fields(0, len(content)) if field.number == 7]
    (weight,) = reader.fields(graph.value, graph.end)
    assert content[weight.value : weight.end] == tensor.SerializeToString()
    assert (weight.number, weight.kind, weight.end) == (5, BYTES, graph.end)
    found = {field.number: content[field.value : field.end] for field in reader.fields(weight.value, weight.end)}
    assert found == {1: b"\x80" * 5 + b"\x20", 2: b"\x01", 8: b"w" * 200, 9: bytes(70_000)}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x08", "an integer does not end"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "an integer does not end"),
        (b"\x0a\x03hi", "reaches beyond its message"),
        (b"\x0d" + bytes(3), "reaches beyond its message"),
        (b"\x09" + bytes(7), "reaches beyond its message"),
        (b"\x0b\x0c", "a wire type that ONNX does not use"),
        (b"\x0e", "a wire type that ONNX does not use"),
    ],
)
def test_what_is_not_a_message_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fields(content)


def test_a_field_may_not_reach_beyond_the_message_it_is_in() -> None:
    content = b"\x0a\x02\x0a\x05" + bytes(5)
    with pytest.raises(ValueError, match="reaches beyond its message"):
        list(WireReader(content, limit=100).fields(2, 4))


def test_the_limit_holds_over_all_messages() -> None:
    content = b"\x08\x01" * 4
    reader = WireReader(content, limit=6)
    assert len(list(reader.fields(0, 8))) == 4
    assert len(list(reader.fields(0, 4))) == 2
    assert list(reader.fields(0, 0)) == []
    with pytest.raises(TooManyFieldsError):
        next(reader.fields(0, 8))
