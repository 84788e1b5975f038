"""The inputs of `fuzz.py`: real files of every kind, changed so that most of each stays in order.

Hypothesis draws every choice, and so repeats and shrinks them. It has no strategies for files, and one that is made of
anything is refused at its first bytes. A coverage-guided fuzzer needs the same edits to get past checksums and lengths,
and does not see into the native decoders. So the formats' parts with their lengths and checksums, and the fields of a
protobuf, a pickle and a checkpoint, are known here and in `fuzz_edits`.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import onnx
import safetensors.torch
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from scripts.fuzz_corpus import IMAGES, torch_bytes
from scripts.fuzz_edits import (
    INTEGERS,
    WORDS,
    Part,
    below,
    damaged,
    edit_exif,
    edit_json,
    edit_parts,
    edit_png,
    edit_text,
    edit_tiff,
    json_values,
    pick,
    rearrange,
)
from smlp_deploy.metadata import METADATA_KEY

Edit = Callable[[DrawFn, bytes], bytes]

LARGEST_INPUT = 1 << 20


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _edit_pth(draw: DrawFn, data: bytes) -> bytes:
    """Members of the archive changed, with checksums and sizes that fit; or other content, written by torch."""
    if below(draw, 3) == 0:
        return torch_bytes(_edit_content(draw, data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members: list[Part] = [(member.filename, archive.read(member)) for member in archive.infolist()]
    pickled = next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl"))
    if draw(st.booleans()):
        members[pickled] = (members[pickled][0], _edit_pickle(draw, members[pickled][1]))
    else:
        names = (members[pickled][0], members[-1][0], "../x", "/etc/x", "x/data.pkl", "x" * 300, "")
        edit_parts(draw, members, names, lambda draw, _, content: damaged(draw, content))
    compression = zipfile.ZIP_DEFLATED if below(draw, 12) == 11 else zipfile.ZIP_STORED
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
    for _ in range(pick(draw, (1, 1, 2, 4))):
        i = below(draw, len(codes))
        codes[i] = _edit_opcode(draw, codes[i])
        if below(draw, 3) == 0:
            rearrange(draw, codes)
    return b"".join(codes)


_OPCODES = (b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"t", b"R", b"b", b"Q", b"u", b"s", b"0", b".")
_NAMES = (
    *("torch FloatStorage", "torch LongStorage", "torch BoolStorage", "torch ByteStorage", "torch Size", "os system"),
    *("collections OrderedDict", "collections Counter", "argparse Namespace", "torch._utils _rebuild_parameter"),
    *("torch._utils _rebuild_tensor_v2", "torch complex64", "torch._utils _rebuild_sparse_tensor", "torch device"),
    *("pathlib PosixPath", "numpy._core.multiarray scalar"),
)


def _edit_opcode(draw: DrawFn, code: bytes) -> bytes:
    match code[:1]:
        case b"K" | b"M" | b"J":
            number = pick(draw, INTEGERS)
            small, large = struct.pack("<I", number % (1 << 32)), number.to_bytes(9, "little", signed=True)
            return pick(draw, (b"J" + small, b"\x8a\x09" + large, b"N", b"]", b"}"))
        case b"X":
            text = pick(draw, (b"", b"cpu", b"cuda:0", b"meta", b"0", b"999", b"\xff", b"a\nb", b"x" * 3000))
            return b"X" + struct.pack("<I", len(text)) + text
        case b"c":
            return b"c" + pick(draw, _NAMES).replace(" ", "\n").encode() + b"\n"
        case b"h" | b"q":
            return code[:1] + bytes((below(draw, 256),))
    return pick(draw, _OPCODES)


def _edit_content(draw: DrawFn, data: bytes) -> Any:
    """What a checkpoint holds, with a tensor, a name or the structure around them changed."""
    with torch.serialization.safe_globals([argparse.Namespace, PurePosixPath]):
        content = torch.load(io.BytesIO(data), weights_only=True)
    state = dict(content.get("model", content.get("state_dict", content)))
    for _ in range(pick(draw, (1, 1, 2))):
        _edit_state(draw, state)
    prefixed = {f"net.{key}": value for key, value in state.items()}
    wraps: tuple[Any, ...] = (
        *(state, {"model": state}, {"state_dict": state, "epoch": 1}, {"model": {"model": state}}),
        *(
            prefixed,
            {"state_dict": prefixed, "root": PurePosixPath("x")},
            prefixed | state,
            {"net": state, "ema": prefixed},
        ),
    )
    return pick(draw, (*wraps, *wraps, [state], {**state, 3: 4}, {"model": None, **state}, {"model": list(state)}))


_TENSOR_EDITS: tuple[Callable[[Tensor], Tensor], ...] = (
    *(partial(Tensor.to, dtype=dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64)),
    *(partial(Tensor.to, dtype=dtype) for dtype in (torch.int64, torch.int8, torch.bool)),
    *(partial(Tensor.mul, other=factor) for factor in (-1, math.nan, math.inf, 1e-45, 65504.0)),
    lambda tensor: tensor.double() * 1e300,
    lambda tensor: torch.ones_like(tensor) * -(10**9),
    lambda tensor: tensor.flatten()[:0].clone(),
    lambda tensor: tensor.flatten()[:2].clone(),
    lambda tensor: tensor.reshape(1, 1, 1, 1, -1),
    lambda tensor: tensor.flatten()[:1].expand(1000),
    lambda tensor: tensor.flatten()[:1].expand(2**40),
    lambda tensor: tensor.transpose(0, -1) if tensor.ndim else tensor,
    lambda tensor: tensor.to_sparse() if tensor.ndim and tensor.is_floating_point() else tensor.new_zeros(3),
    lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
)


def _edit_state(draw: DrawFn, state: dict[str, Any]) -> None:
    key = pick(draw, list(state) or [""])
    value = state.pop(key, None)
    # The same name with another number in it, so that there seems to be another block or stage.
    renumbered = re.sub(r"\d+", lambda _: str(pick(draw, (0, 1, 2, 3, 9, 10**9))), key, count=1)
    match below(draw, 6):
        case 0:
            pass
        case 1:
            state[pick(draw, (renumbered, *WORDS[:5]))] = value
        case 2:
            state |= {key: value, renumbered: value}
        case 3:
            state[key] = draw(json_values | st.sampled_from((torch.Size([2]), argparse.Namespace(a=1), (1, 2))))
        case _ if isinstance(value, Tensor) and value.layout == torch.strided and value.numel() < 10**6:
            state[key] = pick(draw, _TENSOR_EDITS)(value.detach().clone())


def _edit_safetensors(draw: DrawFn, data: bytes) -> bytes:
    """The header changed, with a length that fits; or other tensors, written by the library."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match below(draw, 5):
        case 0:
            state: dict[str, Any] = dict(sorted(safetensors.torch.load(data).items()))  # it gives them in any order
            _edit_state(draw, state)
            dense = {k: v for k, v in state.items() if type(v) is Tensor and v.layout == torch.strided}
            return safetensors.torch.save({k: v.clone().contiguous() for k, v in dense.items() if v.numel() < 10**6})
        case 1:
            document = json.loads(header)
            document["__metadata__"][METADATA_KEY] = edit_text(draw, document["__metadata__"][METADATA_KEY])
            header = json.dumps(document).encode()
        case 2:
            header, body = pick(draw, ((damaged(draw, header), body), (header, damaged(draw, body))))
        case _:
            header = edit_json(draw, header)
    header += b" " * (-len(header) % 8)
    length = len(header) if below(draw, 10) else pick(draw, INTEGERS) % (1 << 64)
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
    for _ in range(pick(draw, (1, 1, 1, 2, 4))):
        if below(draw, 10) == 0:
            _edit_properties(draw, model)
        else:
            among = pick(draw, ([model], [graph], [graph], [graph], graph.initializer, graph.node, graph.node))
            _edit_message(draw, pick(draw, list(among) or [model]), names)
    whole = bytes(model.SerializeToString(deterministic=True))
    if below(draw, 20) < 19:
        return whole
    for descriptor, _ in graph.ListFields():
        if below(draw, 5):
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
                text = edit_text(draw, entry.value)
            except ValueError:  # changed before, and no longer JSON
                continue
            entry.value = text.encode("utf-8", "replace").decode()


def _edit_message(draw: DrawFn, message: Any, names: Sequence[str]) -> None:
    """Somewhere below `message`, a field is changed."""
    present = [descriptor for descriptor, _ in message.ListFields()]
    descriptor = pick(draw, present if present and below(draw, 14) else list(message.DESCRIPTOR.fields))
    value = getattr(message, descriptor.name)
    if hasattr(value, "append") or hasattr(value, "add"):
        _edit_repeated(draw, descriptor, value, names)
    elif descriptor.message_type is None:
        setattr(message, descriptor.name, draw(_scalars(descriptor, value, names)))
    elif below(draw, 20) == 19:
        message.ClearField(descriptor.name)
    else:
        _edit_message(draw, value, names)


def _edit_repeated(draw: DrawFn, descriptor: Any, values: Any, names: Sequence[str]) -> None:
    plain = descriptor.message_type is None
    if not values:
        values.append(draw(_scalars(descriptor, 0, names))) if plain else values.add()
    elif below(draw, 4) == 0:
        # Messages live in what is about to be cleared.
        items = list(values) if plain else [type(v).FromString(v.SerializeToString()) for v in values]
        rearrange(draw, items)
        del values[:]
        values.extend(items)
    elif plain:
        i = below(draw, len(values))
        values[i] = draw(_scalars(descriptor, values[i], names))
    else:
        _edit_message(draw, values[below(draw, len(values))], names)


def _scalars(descriptor: Any, old: Any, names: Sequence[str]) -> SearchStrategy[Any]:
    """Other values for a field of this type."""
    if descriptor.enum_type is not None:
        return st.sampled_from([value.number for value in descriptor.enum_type.values])
    if descriptor.type == descriptor.TYPE_BYTES:
        return st.composite(damaged)(old or b"\0")
    match descriptor.cpp_type:
        case descriptor.CPPTYPE_STRING:
            words, few = [word for word in WORDS if word.isascii()], _OPERATORS[:3]
            operators = st.sampled_from(_OPERATORS if descriptor.name == "op_type" else few)
            return st.sampled_from(words) | operators | st.sampled_from(names or words)
        case descriptor.CPPTYPE_FLOAT | descriptor.CPPTYPE_DOUBLE:
            return st.floats(width=32)
    bits = 32 if descriptor.cpp_type == descriptor.CPPTYPE_INT32 else 64
    low = 0 if descriptor.cpp_type == descriptor.CPPTYPE_UINT64 else -(1 << bits - 1)
    numbers = st.sampled_from((*INTEGERS, *range(24))).map(lambda number: (number - low) % (1 << bits) + low)
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
    "jpeg": _image(".jpg", 2, edit_exif),
    "png": _image(".png", 2, edit_png),
    "webp": _image(".webp", 1.5, edit_exif),
    "gif": _image(".gif", 1, damaged),
    "tiff": _image(".tiff", 2, edit_tiff),
    "bmp": _image(".bmp", 1, damaged),
    "pth": Kind(".pth", 2, _edit_pth, 64),
    "safetensors": Kind(".safetensors", 2, _edit_safetensors, 64),
    "sidecar": Kind(".json", 1, edit_json, 64, 90),
    "onnx": Kind(".onnx", 2.5, _edit_onnx, 64, 90),
    "metadata": Kind(".onnx", 1, _edit_metadata, 64, 100),
    "engine": Kind(".engine.json", 1, edit_json, 64, 90),
    "table": Kind(".json", 1, edit_json, 64, 90),
}


def inputs(kind: str, files: Sequence[bytes]) -> SearchStrategy[tuple[bytes, ...]]:
    """One input of `kind`, made from `files`; of images, every eighth time up to eight that are to be one batch."""

    @st.composite
    def made(draw: DrawFn) -> bytes:
        data = pick(draw, files)
        if below(draw, 100) < KINDS[kind].edited:
            data = KINDS[kind].edit(draw, data)
            if below(draw, 10) < 9:
                return data[:LARGEST_INPUT]
        elif below(draw, 20) == 19:  # the beginning of one file and the end of another
            other = pick(draw, files)
            data = data[: below(draw, len(data) + 1)] + other[below(draw, len(other) + 1) :]
        return damaged(draw, data)[:LARGEST_INPUT]

    single, batch = st.tuples(made()), st.lists(made(), min_size=1, max_size=8).map(tuple)
    return st.integers(0, 7).flatmap(lambda turn: batch if kind in IMAGES and turn == 7 else single)
