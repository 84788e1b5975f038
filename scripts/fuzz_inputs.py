"""The inputs of `fuzz.py`: strategies that change real files so that most of each stays in order.

Hypothesis draws every choice, and so repeats and shrinks them. It has no strategies for files, and one that is made of
anything is refused at its first bytes: hence the parts of the formats here, with their lengths and checksums, and the
fields of a protobuf, a pickle and a checkpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import onnx
import safetensors.torch
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from scripts.fuzz_corpus import IMAGES, torch_bytes
from smlp_deploy.metadata import METADATA_KEY

T = TypeVar("T")
Edit = Callable[[DrawFn, bytes], bytes]
Part = tuple[Any, bytes]

LARGEST_INPUT = 1 << 20


# -------------------------------------------------------------------------------------------- bytes, and parts of files

_INTEGERS = (
    *(0, 1, 2, 3, 4, 8, 15, 16, 17, 32, 64, 100, 127, 128, 255, 256, 1000, 4096, 10_000, 32767, 32768, 65535, 65536),
    *(10**6, 2**24, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**34, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31)),
    -(2**63),
)


def _pick(draw: DrawFn, options: Sequence[T]) -> T:
    return draw(st.sampled_from(options))


def _below(draw: DrawFn, count: int) -> int:
    return draw(st.integers(0, count - 1))


def _damaged(draw: DrawFn, data: bytes) -> bytes:
    """`data` with one to three spans, often in its first bytes, changed without regard for its format."""
    for _ in range(_pick(draw, (1, 1, 1, 2, 3))):
        start = _below(draw, min(len(data), _pick(draw, (1 << 30, 64))) + 1)
        span = data[start : start + _pick(draw, (1, 2, 4, 8, 64, 512, 1 << 30))]
        new = b""
        match _below(draw, 8):
            case 0:
                new = bytes(byte ^ 1 << _below(draw, 8) for byte in span[:1])
                span = span[:1]
            case 1 | 2:
                width, number = _pick(draw, (1, 2, 4, 8)), _pick(draw, _INTEGERS)
                new = (number % (1 << 8 * width)).to_bytes(width, _pick(draw, ("little", "big")))
                span = data[start : start + width]
            case 3:
                new = span * _pick(draw, (2, 3, 20))
            case 4:
                new, span = draw(st.binary(min_size=1, max_size=16)), _pick(draw, (b"", span))
            case 5:
                new = _pick(draw, (b"\0", b"\xff")) * len(span)
            case 6:
                other = _below(draw, len(data) + 1)
                new = data[other : other + len(span)]
        data = data[:start] + new + data[start + len(span) :]
    return data


def _rearrange(draw: DrawFn, parts: list[Any]) -> None:
    """Move one of the parts a file is made of, take it away or double it."""
    part = parts.pop(_below(draw, len(parts)))
    at = _below(draw, len(parts) + 1)
    parts[at:at] = _pick(draw, ([part], [part, part], []))


def _edit_parts(
    draw: DrawFn, parts: list[Part], names: Sequence[Any], edit: Callable[[DrawFn, Any, bytes], bytes]
) -> None:
    """Change the order, the name or the content of the parts of a file, or add one."""
    i = _below(draw, len(parts))
    name, content = parts[i]
    match _below(draw, 10):
        case 0:
            _rearrange(draw, parts)
        case 1:
            parts[i] = (_pick(draw, names), content)
        case 2:
            new = _pick(draw, (content, b"name\0\0" + _deflated(1 << 26), b"name\0\1\0\0\0" + _deflated(1 << 20)))
            parts.insert(i, (_pick(draw, names), new))
        case _:
            parts[i] = (name, edit(draw, name, content))


@cache
def _deflated(zeros: int) -> bytes:
    return zlib.compress(bytes(zeros), 9)


# --------------------------------------------------------------------------------------------------------------- images


def _edit_png(draw: DrawFn, data: bytes) -> bytes:
    """Chunks changed, with checksums that fit."""
    chunks: list[Part] = []
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    names = b"IDAT tRNS PLTE eXIf iCCP zTXt iTXt acTL fcTL fdAT gAMA pHYs IEND cHRM IHDR".split()
    _edit_parts(draw, chunks, names, _edit_png_chunk)
    body = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
    return data[:8] + b"".join(body)


def _edit_png_chunk(draw: DrawFn, name: bytes, content: bytes) -> bytes:
    if name == b"IDAT" and draw(st.booleans()):
        return zlib.compress(_damaged(draw, zlib.decompress(content)))
    return _edit_exif(draw, content)


def _edit_exif(draw: DrawFn, data: bytes) -> bytes:
    """The TIFF directory inside changed where there is one, else damage."""
    found = re.search(rb"II\*\0|MM\0\*", data)
    if found is None or draw(st.booleans()):
        return _damaged(draw, data)
    return data[: found.start()] + _edit_tiff(draw, data[found.start() :])


def _edit_tiff(draw: DrawFn, data: bytes) -> bytes:
    """Entries of the first directory changed: tag, type, count, value, or where the next directory stands."""
    order: Any = "little" if data[:2] == b"II" else "big"
    changed = bytearray(data)
    directory = int.from_bytes(data[4:8], order)
    count = int.from_bytes(data[directory : directory + 2], order)
    if not count or directory + 2 + count * 12 + 4 > len(data) or _below(draw, 10) == 0:
        return _damaged(draw, data)
    for _ in range(_pick(draw, (1, 1, 2))):
        entry = directory + 2 + 12 * _below(draw, count)
        fields = ((entry + 8, 4), (entry + 8, 2), (entry, 2), (entry + 2, 2), (entry + 4, 4))
        at, width = _pick(draw, (*fields, *fields, (directory, 2), (directory + 2 + 12 * count, 4)))
        number = draw(st.sampled_from(_INTEGERS) | st.integers(1, 19) | st.just(directory) | st.integers(254, 339))
        changed[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)
    return bytes(changed)


# ----------------------------------------------------------------------------------------------------------------- JSON

_WORDS = ("", "fp32", "bicubic", "a\nb", "\x1b[31mred", "\ud800", "a\0b", "../../x", "é", "x" * 5000, "1e999", "\u2028")
_NUMBERS = (*_INTEGERS, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.5, -0.5, 1e-320, 1e308, 3.5e38, math.inf, -math.inf)
_words = st.sampled_from(_WORDS) | st.text(st.characters(exclude_categories=()), max_size=20)
_numbers: SearchStrategy[Any] = st.sampled_from(_NUMBERS) | st.integers() | st.floats()
_odd = ("null", "true", "NaN", "[]", "{}", "[[]]", "[1, 2, 3]", '["a", "b", "c", "d"]', '{"a": 1}', '"mean"')
_nested = tuple("[" * depth + "1" + "]" * depth for depth in (5, 300))
_values: SearchStrategy[Any] = _words | _numbers | st.sampled_from((*_odd, *_odd, *_nested)).map(json.loads)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every list or object inside a JSON value, with each of its indices or keys."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


def _edit_value(draw: DrawFn, value: Any) -> Any:
    """A JSON value with something inside it changed, mostly to a value of its own type."""
    root = [value]
    holder, key = _pick(draw, list(_places(root)))
    kind, is_list = type(holder[key]), isinstance(holder, list)
    match _below(draw, 12):
        case 0:
            del holder[key]
        case 1 if is_list:
            holder[key + 1 : key + 1] = holder[:100] * _pick(draw, (1, 250))
        case 1:
            holder[draw(_words | st.sampled_from(list(holder)))] = holder.pop(key)
        case 2 if is_list:
            holder.append(draw(_values))
        case 2:
            holder[draw(_words)] = draw(_values)
        case 3 | 4 | 5:
            holder[key] = draw(_values)
        case _:
            same = {str: _words, int: _numbers, float: _numbers}.get(kind, _values)
            holder[key] = draw(same)
    return root[0] if root else None


def _edit_text(draw: DrawFn, text: str) -> str:
    """JSON text with values changed, or with something only a parser sees."""
    match _below(draw, 20):
        case 18:
            odd = ("null", "\ufeff" + text, text + "{}", "[" * 100_000, text.replace("{", '{"schema": 1, ', 1))
            return _pick(draw, odd)
        case 19:
            number = _pick(draw, list(re.finditer(r"\d+", text)) or [re.match("", text)])
            assert number is not None
            new = _pick(draw, ("-0", "1.0", "1e999", "9" * 5000))
            return text[: number.start()] + new + text[number.end() :]
    document = json.loads(text)
    for _ in range(_pick(draw, (1, 1, 1, 2, 4))):
        document = _edit_value(draw, document)
    return json.dumps(document, ensure_ascii=draw(st.booleans()))


def _edit_json(draw: DrawFn, data: bytes) -> bytes:
    return _edit_text(draw, data.decode()).encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _edit_pth(draw: DrawFn, data: bytes) -> bytes:
    """Members of the archive changed, with checksums and sizes that fit; or other content, written by torch."""
    if _below(draw, 3) == 0:
        return torch_bytes(_edit_content(draw, data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members: list[Part] = [(member.filename, archive.read(member)) for member in archive.infolist()]
    pickled = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    if draw(st.booleans()):
        members[pickled] = (members[pickled][0], _edit_pickle(draw, members[pickled][1]))
    else:
        names = (members[pickled][0], members[-1][0], "../x", "/etc/x", "x/data.pkl", "x" * 300, "")
        _edit_parts(draw, members, names, lambda draw, _, content: _damaged(draw, content))
    compression = zipfile.ZIP_DEFLATED if _below(draw, 12) == 11 else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that occur twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def _edit_pickle(draw: DrawFn, data: bytes) -> bytes:
    """Opcodes changed, each of them still whole."""
    places = [position or 0 for _, _, position in pickletools.genops(data)]
    codes = [data[start:stop] for start, stop in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(_pick(draw, (1, 1, 2, 4))):
        i = _below(draw, len(codes))
        codes[i] = _edit_opcode(draw, codes[i])
        if _below(draw, 3) == 0:
            _rearrange(draw, codes)
    return b"".join(codes)


_OPCODES = (b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"t", b"R", b"b", b"Q", b"u", b"s", b"0", b".")
_NAMES = (
    *("torch FloatStorage", "torch LongStorage", "torch BoolStorage", "torch ByteStorage", "torch Size", "os system"),
    *("collections OrderedDict", "collections Counter", "argparse Namespace", "torch._utils _rebuild_parameter"),
    *("torch._utils _rebuild_tensor_v2", "torch complex64", "torch._utils _rebuild_sparse_tensor", "torch device"),
)


def _edit_opcode(draw: DrawFn, code: bytes) -> bytes:
    match code[:1]:
        case b"K" | b"M" | b"J":
            number = _pick(draw, _INTEGERS)
            small, large = struct.pack("<I", number % (1 << 32)), number.to_bytes(9, "little", signed=True)
            return _pick(draw, (b"J" + small, b"\x8a\x09" + large, b"N", b"]", b"}"))
        case b"X":
            text = _pick(draw, (b"", b"cpu", b"cuda:0", b"meta", b"0", b"999", b"\xff", b"a\nb", b"x" * 3000))
            return b"X" + struct.pack("<I", len(text)) + text
        case b"c":
            return b"c" + _pick(draw, _NAMES).replace(" ", "\n").encode() + b"\n"
        case b"h" | b"q":
            return code[:1] + bytes((_below(draw, 256),))
    return _pick(draw, _OPCODES)


def _edit_content(draw: DrawFn, data: bytes) -> Any:
    """What a checkpoint holds, with a tensor, a name or the structure around them changed."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(io.BytesIO(data), weights_only=True)
    state = dict(content.get("model", content))
    for _ in range(_pick(draw, (1, 1, 2))):
        _edit_state(draw, state)
    wraps: tuple[Any, ...] = (state, {"model": state}, {"state_dict": state, "epoch": 1}, {"model": {"model": state}})
    return _pick(draw, (*wraps, *wraps, [state], {**state, 3: 4}, {"model": None, **state}, {"model": list(state)}))


_NO_TENSORS: tuple[Any, ...] = (
    *(None, 3, "text", [], {}, (1, 2), torch.Size([2]), argparse.Namespace(a=1), [[[]]], math.nan),
)
_TENSOR_EDITS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(partial(Tensor.to, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64)),
    *(partial(Tensor.to, dtype=dtype) for dtype in (torch.int64, torch.int8, torch.bool)),
    *(partial(Tensor.mul, other=factor) for factor in (-1, math.nan, math.inf, 1e-45, 65504.0)),
    lambda tensor: tensor.double() * 1e300,
    lambda tensor: torch.ones_like(tensor) * -(10**9),
    lambda tensor: tensor.flatten()[:0].clone(),
    lambda tensor: tensor.flatten()[:2].clone(),
    lambda tensor: tensor.reshape(-1),
    lambda tensor: tensor.reshape(1, 1, 1, 1, -1),
    lambda tensor: tensor.flatten()[:1].expand(1000),
    lambda tensor: tensor.flatten()[:1].expand(2**40),
    lambda tensor: tensor.transpose(0, -1) if tensor.ndim else tensor,
    lambda tensor: tensor.to_sparse() if tensor.ndim and tensor.is_floating_point() else tensor.new_zeros(3),
    lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
)


def _edit_state(draw: DrawFn, state: dict[str, Any]) -> None:
    key = _pick(draw, list(state) or [""])
    value = state.pop(key, None)
    # The same name with another number in it, so that there seems to be another block or stage.
    renumbered = re.sub(r"\d+", lambda _: str(_pick(draw, (0, 1, 2, 3, 9, 10**9))), key, count=1)
    match _below(draw, 6):
        case 0:
            pass
        case 1:
            state[_pick(draw, (renumbered, *_WORDS[:5]))] = value
        case 2:
            state |= {key: value, renumbered: value}
        case 3:
            state[key] = _pick(draw, _NO_TENSORS)
        case _ if isinstance(value, Tensor) and value.layout == torch.strided and value.numel() < 10**6:
            state[key] = _pick(draw, _TENSOR_EDITS)(value.detach().clone())


def _edit_safetensors(draw: DrawFn, data: bytes) -> bytes:
    """The header changed, with a length that fits; or other tensors, written by the library."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match _below(draw, 5):
        case 0:
            state: dict[str, Any] = dict(sorted(safetensors.torch.load(data).items()))  # it gives them in any order
            _edit_state(draw, state)
            dense = {k: v for k, v in state.items() if type(v) is Tensor and v.layout == torch.strided}
            return safetensors.torch.save({k: v.clone().contiguous() for k, v in dense.items() if v.numel() < 10**6})
        case 1:
            document = json.loads(header)
            document["__metadata__"][METADATA_KEY] = _edit_text(draw, document["__metadata__"][METADATA_KEY])
            header = json.dumps(document).encode()
        case 2:
            header, body = _pick(draw, ((_damaged(draw, header), body), (header, _damaged(draw, body))))
        case 3:
            header = _edit_json(draw, header)
        case _:  # one tensor's type, shape or place
            document = json.loads(header)
            entry = document[_pick(draw, [key for key in document if key != "__metadata__"])]
            entry["dtype"] = _pick(draw, (entry["dtype"], "F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X"))
            entry = _edit_value(draw, entry)
            header = json.dumps(document).encode()
    header += b" " * (-len(header) % 8)
    length = len(header) if _below(draw, 10) else _pick(draw, _INTEGERS) % (1 << 64)
    return length.to_bytes(8, "little") + header + body


# --------------------------------------------------------------------------------------------------------------- graphs

_OPERATORS = (
    *("Loop", "If", "Scan", "ConstantOfShape", "Expand", "Tile", "Resize", "Pad", "Range", "Add", "MatMul", "Gemm"),
    *("Conv", "ConvTranspose", "Reshape", "Transpose", "Slice", "Gather", "GatherND", "Concat", "Split", "ReduceMean"),
    *("Softmax", "Einsum", "OneHot", "NonZero", "Shape", "Unsqueeze", "Cast", "Identity", "Pow", "Erf", "RandomNormal"),
    *("MaxPool", "CumSum", "StringConcat", "SequenceConstruct", "Optional", "QuantizeLinear", "TopK", "DFT", "Blub"),
)


def _edit_onnx(draw: DrawFn, data: bytes) -> bytes:
    """Fields of the protobuf changed: it still parses."""
    model = onnx.ModelProto.FromString(data)
    graph = model.graph
    names = tuple(name for node in graph.node for name in (*node.input, *node.output))
    for _ in range(_pick(draw, (1, 1, 1, 2, 4))):
        match _below(draw, 10):
            case 0:
                _edit_properties(draw, model)
            case 1:
                _edit_message(draw, model, names)
            case 2 if graph.initializer:
                _edit_message(draw, _pick(draw, list(graph.initializer)), names)
            case 3 | 4 | 5 if graph.node:
                _edit_message(draw, _pick(draw, list(graph.node)), names)
            case _:
                _edit_message(draw, graph, names)
    whole = bytes(model.SerializeToString(deterministic=True))
    if _below(draw, 20) < 19:
        return whole
    for descriptor, _ in graph.ListFields():
        if _below(draw, 5):
            graph.ClearField(descriptor.name)
    return whole + bytes(model.SerializeToString(deterministic=True))  # whoever parses merges the two


def _edit_metadata(draw: DrawFn, data: bytes) -> bytes:
    model = onnx.ModelProto.FromString(data)
    _edit_properties(draw, model)
    return bytes(model.SerializeToString(deterministic=True))


def _edit_properties(draw: DrawFn, model: onnx.ModelProto) -> None:
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY and entry.value.startswith("{"):
            try:
                text = _edit_text(draw, entry.value)
            except ValueError:  # changed before, and no longer JSON
                continue
            entry.value = text.encode("utf-8", "replace").decode()


def _edit_message(draw: DrawFn, message: Any, names: Sequence[str]) -> None:
    """Somewhere below `message`, a field is changed."""
    present = [descriptor for descriptor, _ in message.ListFields()]
    descriptor = _pick(draw, present if present and _below(draw, 14) else list(message.DESCRIPTOR.fields))
    value = getattr(message, descriptor.name)
    if hasattr(value, "append") or hasattr(value, "add"):
        _edit_repeated(draw, descriptor, value, names)
    elif descriptor.message_type is None:
        setattr(message, descriptor.name, draw(_scalars(descriptor, value, names)))
    elif _below(draw, 20) == 19:
        message.ClearField(descriptor.name)
    else:
        _edit_message(draw, value, names)


def _edit_repeated(draw: DrawFn, descriptor: Any, values: Any, names: Sequence[str]) -> None:
    plain = descriptor.message_type is None
    if not values:
        values.append(draw(_scalars(descriptor, 0, names))) if plain else values.add()
    elif _below(draw, 4) == 0:
        # Messages live in what is about to be cleared.
        items = list(values) if plain else [type(v).FromString(v.SerializeToString()) for v in values]
        _rearrange(draw, items)
        del values[:]
        values.extend(items)
    elif plain:
        i = _below(draw, len(values))
        values[i] = draw(_scalars(descriptor, values[i], names))
    else:
        _edit_message(draw, values[_below(draw, len(values))], names)


def _scalars(descriptor: Any, old: Any, names: Sequence[str]) -> SearchStrategy[Any]:
    """Other values for a field of this type."""
    if descriptor.enum_type is not None:
        return st.sampled_from([value.number for value in descriptor.enum_type.values])
    if descriptor.type == descriptor.TYPE_BYTES:
        return st.composite(_damaged)(old or b"\0")
    match descriptor.cpp_type:
        case descriptor.CPPTYPE_STRING:
            words, few = [word for word in _WORDS if word.isascii()], _OPERATORS[:3]
            operators = st.sampled_from(_OPERATORS if descriptor.name == "op_type" else few)
            return st.sampled_from(words) | operators | st.sampled_from(names or words)
        case descriptor.CPPTYPE_FLOAT | descriptor.CPPTYPE_DOUBLE:
            return st.floats(width=32)
    bits = 32 if descriptor.cpp_type == descriptor.CPPTYPE_INT32 else 64
    low = 0 if descriptor.cpp_type == descriptor.CPPTYPE_UINT64 else -(1 << bits - 1)
    numbers = st.sampled_from((*_INTEGERS, *range(24))).map(lambda number: (number - low) % (1 << bits) + low)
    return numbers | st.integers(low, low + (1 << bits) - 1)


# ---------------------------------------------------------------------------------------------------------- the kinds


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        suffix: of its files.
        weight: its share of the inputs, against the others' weights.
        edit: changes a file along its format.
        memory: MiB by which the resident set may grow for one input.
        edited: how many per cent of its inputs are edited; the rest is only damaged.
    """

    suffix: str
    weight: float
    edit: Edit
    memory: int
    edited: int = 67


# Four copies of the largest image that is read: 89.5 million pixels of four bytes.
_image = partial(Kind, memory=1400)
KINDS = {
    "jpeg": _image(".jpg", 2, _edit_exif),
    "png": _image(".png", 2, _edit_png),
    "webp": _image(".webp", 1.5, _edit_exif),
    "gif": _image(".gif", 1, _damaged),
    "tiff": _image(".tiff", 2, _edit_tiff),
    "bmp": _image(".bmp", 1, _damaged),
    "pth": Kind(".pth", 2, _edit_pth, 64),
    "safetensors": Kind(".safetensors", 2, _edit_safetensors, 64),
    "sidecar": Kind(".json", 1, _edit_json, 64, 90),
    "onnx": Kind(".onnx", 2.5, _edit_onnx, 64, 90),
    "metadata": Kind(".onnx", 1, _edit_metadata, 64, 100),
    "engine": Kind(".engine.json", 1, _edit_json, 64, 90),
    "table": Kind(".json", 1, _edit_json, 64, 90),
}


def inputs(kind: str, files: Sequence[bytes]) -> SearchStrategy[tuple[bytes, ...]]:
    """One input of `kind`, made from `files`; of images, every eighth time two to eight that are to be one batch."""

    @st.composite
    def made(draw: DrawFn) -> tuple[bytes, ...]:
        count = _pick(draw, range(2, 9)) if kind in IMAGES and _below(draw, 8) == 7 else 1
        return tuple(_input(draw, KINDS[kind], files) for _ in range(count))

    return made()


def _input(draw: DrawFn, kind: Kind, files: Sequence[bytes]) -> bytes:
    data = _pick(draw, files)
    if _below(draw, 100) < kind.edited:
        data = kind.edit(draw, data)
        if _below(draw, 10) < 9:
            return data[:LARGEST_INPUT]
    elif _below(draw, 20) == 19:  # the beginning of one file and the end of another
        other = _pick(draw, files)
        data = data[: _below(draw, len(data) + 1)] + other[_below(draw, len(other) + 1) :]
    return _damaged(draw, data)[:LARGEST_INPUT]
