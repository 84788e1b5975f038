"""The inputs of `fuzz.py`: real files of every kind, and ways to change them so that most of each stays in order.

`KINDS` names them; `make_input` makes one from a seed and an index.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import pickletools
import re
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import helper
from PIL import Image, ImageCms

from smlp_deploy.exporters.calibration import CalibrationTable
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.files import DATA_FOLDER, sha256_of
from smlp_deploy.metadata import (
    METADATA_KEY,
    BatchProfile,
    CheckpointMetadata,
    EngineManifest,
    Preprocessing,
    SMLPNetConfig,
)
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.pipeline.precision import to_precision

ROOT = Path(__file__).resolve().parent.parent
# Four copies of the largest image that is read: 89.5 million pixels of four bytes.
IMAGE_MIB = 1400
LARGEST_INPUT = 1 << 20
STAND_IN_ENGINE = b"not really an engine"
CONFIG = SMLPNetConfig(dim=8, depths=(1, 1), expansion=2, patch_size=4, image_size=16, num_classes=4)
LABELS = ("cat", "dog", "größe", "line one")


# ---------------------------------------------------------------------------------------------- files to start from


def build_corpus(folder: Path, kinds: Sequence[str]) -> None:
    """Write the files that the kinds' inputs are made from, as folder/KIND/NN.SUFFIX, and the ones they stand beside.

    The same libraries write the same files each time.
    """
    torch.manual_seed(0)
    network = SMLPNet(CONFIG).eval()
    beside = folder / "beside"
    beside.mkdir(parents=True)
    _save(network, beside / "good.pth")
    (beside / "good.png").write_bytes(_encoded(_photo((24, 16)), "PNG"))
    makers: dict[str, Callable[[], list[bytes]]] = {
        "jpeg": _jpegs,
        "png": _pngs,
        "webp": _webps,
        "gif": _gifs,
        "tiff": _tiffs,
        "bmp": lambda: [_encoded(_photo((24, 16)).convert(mode), "BMP") for mode in ("RGB", "L", "P", "1", "RGBA")],
        "pth": lambda: _pths(network),
        "safetensors": lambda: [_safetensors(network, half=half) for half in (False, True)],
        "card": lambda: [_card().to_json().encode()],
        "table": lambda: [_table()],
        "engine": lambda: [_engine_card(beside / "good.pth")],
    }
    if {"onnx", "metadata"} & set(kinds):
        graphs = _graphs(network, beside / "good.pth")
        makers |= {"onnx": lambda: graphs, "metadata": lambda: graphs[:1]}
    for kind in kinds:
        (folder / kind).mkdir()
        for number, content in enumerate(makers[kind]()):
            (folder / kind / f"{number:02}{KINDS[kind].suffix}").write_bytes(content)


def _save(network: SMLPNet, path: Path) -> None:
    torch.save({"model": network.state_dict()}, path)


def _photo(size: tuple[int, int]) -> Image.Image:
    with Image.open(DATA_FOLDER / "parity" / "chelsea.jpg") as image:
        return image.convert("RGB").resize(size)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _profile() -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the time of day
    return bytes(profile)


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010F] = "a camera"
    exif.get_ifd(0x8769)[0x9003] = "2022:09:04 12:00:00"
    return exif


def _jpegs() -> list[bytes]:
    small, exif, icc = _photo((48, 32)), _exif(), _profile()
    real = [*sorted((ROOT / "images").glob("*.jpg"))[:2], DATA_FOLDER / "parity" / "retina.jpg"]
    return [
        *(path.read_bytes() for path in real),
        *(_encoded(small.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")),
        _encoded(small, "JPEG", progressive=True, exif=exif, icc_profile=icc),
        _encoded(small, "JPEG", restart_marker_blocks=2, subsampling=0, exif=exif, comment=b"a comment"),
    ]


def _pngs() -> list[bytes]:
    small, frames = _photo((24, 16)), [_photo((16, 16)), _photo((16, 16)).rotate(90)]
    wide = Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * 170)
    return [
        *(_encoded(small.convert(mode), "PNG") for mode in ("RGB", "L", "P", "1", "RGBA", "LA")),
        _encoded(small.convert("P"), "PNG", transparency=3, bits=8),
        _encoded(wide, "PNG"),
        _encoded(small, "PNG", exif=_exif(), icc_profile=_profile(), dpi=(72, 72)),
        _encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
    ]


def _webps() -> list[bytes]:
    small, frames = _photo((24, 16)), [_photo((16, 16)), _photo((16, 16)).rotate(90)]
    return [
        _encoded(small, "WEBP"),
        _encoded(small, "WEBP", lossless=True),
        _encoded(small.convert("RGBA"), "WEBP", exif=_exif(), icc_profile=_profile()),
        _encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
    ]


def _gifs() -> list[bytes]:
    small, frames = _photo((24, 16)).convert("P"), [_photo((16, 16)), _photo((16, 16)).rotate(90)]
    return [
        _encoded(small, "GIF"),
        _encoded(small, "GIF", transparency=3, interlace=0),
        _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"a comment"),
    ]


def _tiffs() -> list[bytes]:
    small = _photo((24, 16))
    codecs = ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    return [
        *(_encoded(small, "TIFF", compression=codec) for codec in codecs),
        *(_encoded(small.convert(mode), "TIFF") for mode in ("L", "P", "1", "RGBA", "CMYK", "I;16", "F")),
        _encoded(small.convert("1"), "TIFF", compression="group4"),
        _encoded(small, "TIFF", save_all=True, append_images=[small], icc_profile=_profile()),
    ]


def _pths(network: SMLPNet) -> list[bytes]:
    state = network.state_dict()
    arguments = argparse.Namespace(lr=0.1, model="nano", crop=None)
    training = {"model": state, "model_ema": state, "epoch": 3, "args": arguments, "lrs": [0.1, 1e-4]}
    contents = (state, training, {f"module.{key}": value.half() for key, value in state.items()})
    return [_torch_bytes(content) for content in contents]


def _torch_bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _card() -> CheckpointMetadata:
    return CheckpointMetadata(
        labels=LABELS, preprocessing=Preprocessing(image_size=16), training={"epochs": 3, "loss": 0.5}
    )


def _safetensors(network: SMLPNet, *, half: bool) -> bytes:
    tensors = {key: value.half() if half else value for key, value in network.state_dict().items() if value.ndim}
    return safetensors.torch.save(tensors, {METADATA_KEY: _card().to_json()})


def _graphs(network: SMLPNet, checkpoint: Path) -> list[bytes]:
    """The network's graph in fp32, for any batch size, in fp16 and in bf16."""
    facts = describe(load_checkpoint(checkpoint), labels=LABELS, preprocessing=asdict(Preprocessing(image_size=16)))
    graph = export_onnx(network, facts, path=Path("graph.onnx"))
    return [to_precision(graph, precision).content for precision in ("fp32", "fp16", "bf16")]


def _table() -> bytes:
    ranges = {"images": 2.64, "gelu": 3.5, "mul_4": 0.25, "bytes": 0.0}
    return CalibrationTable(ranges=ranges, method="minmax", images=12, checkpoint_sha256="0" * 64).to_json().encode()


def _engine_card(checkpoint: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "x.engine"
        engine.write_bytes(STAND_IN_ENGINE)
        sha256 = sha256_of(engine)
    card = EngineManifest(
        engine_sha256=sha256,
        metadata=describe(
            load_checkpoint(checkpoint), labels=LABELS, preprocessing=asdict(Preprocessing(image_size=16))
        ),
        onnx_file="nano-fp16.onnx",
        onnx_sha256="1" * 64,
        backend="tensorrt-rtx",
        version="1.5.0.97",
        profile=BatchProfile(),
        architectures=("sm90",),
        ran_here=True,
        options={"strongly_typed": True, "workspace": 0},
        memory=("12 MiB of weights",),
        kernels={"compute_by_precision": {"fp16": 12}},
    )
    return card.to_json().encode()


# ------------------------------------------------------------------------------------------------ damage, as bytes

_INTEGERS = (
    *(0, 1, 2, 3, 4, 8, 15, 16, 17, 32, 64, 100, 127, 128, 255, 256, 1000, 4096, 10_000, 32767, 32768, 65535, 65536),
    *(10**6, 2**24, 10**9, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**34, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31)),
    -(2**63),
)

Edit = Callable[[Random, bytes], bytes]


def _span(rng: Random, data: bytes, most: int = 64) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, rng.randint(1, most))))


def _flip(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(rng: Random, data: bytes) -> bytes:
    start, stop = _span(rng, data)
    run = rng.choice((bytes(stop - start), b"\xff" * (stop - start), rng.randbytes(stop - start)))
    return data[:start] + run + data[stop:]


def _truncate(rng: Random, data: bytes) -> bytes:
    return data[: rng.choice((rng.randrange(len(data) + 1), max(0, len(data) - rng.randint(1, 16))))]


def _insert(rng: Random, data: bytes) -> bytes:
    start, _ = _span(rng, data)
    return data[:start] + rng.randbytes(rng.choice((1, 4, 16, 300))) + data[start:]


def _duplicate(rng: Random, data: bytes) -> bytes:
    start, stop = _span(rng, data, 4096)
    return data[:stop] + data[start:stop] * rng.choice((1, 1, 2, 20)) + data[stop:]


def _delete(rng: Random, data: bytes) -> bytes:
    start, stop = _span(rng, data, 4096)
    return data[:start] + data[stop:]


def _swap(rng: Random, data: bytes) -> bytes:
    (a, b), (c, d) = sorted((_span(rng, data, 512), _span(rng, data, 512)))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:] if b <= c else data


def _integer(rng: Random, data: bytes, within: int | None = None) -> bytes:
    """One of the numbers that programs get wrong, in any of the usual widths and in either byte order."""
    width = rng.choice((1, 2, 4, 8))
    start = rng.randrange(min(len(data), within or len(data)) + 1)
    number = rng.choice(_INTEGERS) % (1 << 8 * width)
    return data[:start] + number.to_bytes(width, rng.choice(("little", "big"))) + data[start + width :]


def _header_integer(rng: Random, data: bytes) -> bytes:
    return _integer(rng, data, within=64)


_DAMAGES: tuple[Edit, ...] = (
    *(_flip, _overwrite, _truncate, _insert, _duplicate, _delete, _swap, _integer, _header_integer),
)


def damaged(rng: Random, data: bytes) -> bytes:
    """`data` after one to three kinds of damage that know nothing of its format."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_DAMAGES)(rng, data)
    return data


def _spliced(rng: Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _rearranged(rng: Random, parts: list[Any]) -> None:
    """Take away, double, swap or move one of the parts a file is made of."""
    if not parts:
        return
    i, j = rng.randrange(len(parts)), rng.randrange(len(parts))
    match rng.randrange(4):
        case 0:
            del parts[i]
        case 1:
            parts.insert(j, parts[i])
        case 2:
            parts[i], parts[j] = parts[j], parts[i]
        case _:
            parts.insert(j, parts.pop(i))


# -------------------------------------------------------------------------------------------- edits along a format


def _edit_png(rng: Random, data: bytes) -> bytes:
    """Chunks changed, with checksums that fit."""
    chunks: list[tuple[bytes, bytes]] = []
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = rng.randrange(len(chunks))
    match rng.randrange(6):
        case 0:
            _rearranged(rng, chunks)
        case 1:
            chunks[0] = (b"IHDR", _png_header(rng, chunks[0][1]))
        case 2:
            chunks = _with_pixels_damaged(rng, chunks)
        case 3:
            chunks.insert(rng.randrange(len(chunks) + 1), _png_chunk(rng, chunks[i][1]))
        case _:
            chunks[i] = (chunks[i][0], _edited_exif(rng, chunks[i][1]))
    body = [struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks]
    return data[:8] + b"".join(body)


def _png_header(rng: Random, header: bytes) -> bytes:
    numbers = list(struct.unpack(">IIBBBBB", header))
    i = rng.randrange(7)
    numbers[i] = rng.choice(_INTEGERS) % (1 << 32) if i < 2 else rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    return struct.pack(">IIBBBBB", *numbers)


def _with_pixels_damaged(rng: Random, chunks: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    pixels = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
    first = next(i for i, (kind, _) in enumerate(chunks) if kind == b"IDAT")
    others = [chunk for chunk in chunks if chunk[0] != b"IDAT"]
    return [*others[:first], (b"IDAT", zlib.compress(damaged(rng, pixels))), *others[first:]]


@cache
def _deflated_zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


def _png_chunk(rng: Random, content: bytes) -> tuple[bytes, bytes]:
    bomb = _deflated_zeros(rng.choice((1 << 12, 1 << 20, 1 << 26)))
    kinds = (b"tRNS", b"PLTE", b"eXIf", b"iCCP", b"acTL", b"fcTL", b"fdAT", b"gAMA", b"pHYs", b"IEND", b"cHRM", b"IHDR")
    return rng.choice(
        (
            (rng.choice((b"zTXt", b"iCCP")), b"name\0\0" + bomb),
            (b"iTXt", b"name\0\1\0\0\0" + bomb),
            (rng.choice(kinds), content),
            (rng.choice(kinds), rng.randbytes(rng.choice((0, 1, 4, 26, 300)))),
        )
    )


def _edit_jpeg(rng: Random, data: bytes) -> bytes:
    """Segments changed, with lengths that fit."""
    segments, at = [], 2
    while data[at] == 0xFF and data[at + 1] != 0xDA:
        length = int.from_bytes(data[at + 2 : at + 4])
        segments.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    scan = data[at:]
    frame = next(i for i, (marker, _) in enumerate(segments) if marker in (0xC0, 0xC1, 0xC2))
    i = rng.randrange(len(segments))
    match rng.randrange(7):
        case 0:
            _rearranged(rng, segments)
        case 1:  # height and width
            size = struct.pack(">HH", *(rng.choice(_INTEGERS) % (1 << 16) for _ in range(2)))
            segments[frame] = (segments[frame][0], segments[frame][1][:1] + size + segments[frame][1][5:])
        case 2:
            segments[frame] = (rng.randrange(0xC0, 0xD0), segments[frame][1])
        case 3:
            segments.insert(i, (rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDD)), segments[i][1]))
        case 4:
            scan = damaged(rng, scan)
        case _:
            segments[i] = (segments[i][0], _edited_exif(rng, segments[i][1]))
    body = (bytes((0xFF, marker)) + (len(c[:65533]) + 2).to_bytes(2) + c[:65533] for marker, c in segments)
    return data[:2] + b"".join(body) + scan


def _edit_webp(rng: Random, data: bytes) -> bytes:
    """RIFF chunks changed, with lengths that fit."""
    chunks, at = [], 12
    while at + 8 <= len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        chunks.append((data[at : at + 4], data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    i = rng.randrange(len(chunks))
    if rng.random() < 0.3:
        _rearranged(rng, chunks)
    else:
        chunks[i] = (chunks[i][0], _edited_exif(rng, chunks[i][1]))
    body = b"".join(k + len(c).to_bytes(4, "little") + c + bytes(len(c) % 2) for k, c in chunks)
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body


def _edited_exif(rng: Random, content: bytes) -> bytes:
    """A TIFF directory changed where there is one, else damage."""
    found = re.search(rb"II\*\0|MM\0\*", content)
    if found is None or rng.random() < 0.3:
        return damaged(rng, content) if rng.random() < 0.7 else _header_integer(rng, content)
    return content[: found.start()] + _edit_tiff(rng, content[found.start() :])


def _edit_tiff(rng: Random, data: bytes) -> bytes:
    """Entries of the first directory changed: tag, type, count, value, or where the next directory stands."""
    order: Any = "little" if data[:2] == b"II" else "big"
    changed = bytearray(data)
    directory = int.from_bytes(data[4:8], order)
    count = int.from_bytes(data[directory : directory + 2], order)
    if directory + 2 + count * 12 + 4 > len(data) or rng.random() < 0.1:
        return damaged(rng, data)
    for _ in range(rng.choice((1, 1, 2))):
        entry = directory + 2 + 12 * rng.randrange(count)
        at, width = rng.choice(((entry, 2), (entry + 2, 2), (entry + 4, 4), (entry + 8, 4), (entry + 8, 2)))
        at, width = rng.choice(((at, width), (at, width), (at, width), (directory, 2), (directory + 2 + 12 * count, 4)))
        number = rng.choice((rng.choice(_INTEGERS), rng.randrange(1, 20), directory, rng.randrange(254, 340)))
        changed[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, order)
    return bytes(changed)


_WORDS = ("", "fp32", "bicubic", "a\nb", "\x1b[31mred", "\ud800", "a\0b", "../../x", "é", "x" * 5000, "1e999", "\u2028")
_NUMBERS = (*_INTEGERS, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.5, -0.5, 1e-320, 1e308, 3.5e38, math.inf, -math.inf)
_ODDITIES: tuple[Any, ...] = (
    None,
    True,
    False,
    math.nan,
    [],
    {},
    [[]],
    [1, 2, 3],
    ["a", "b", "c", "d"],
    {"a": 1},
    "mean",
)


def _odd_value(rng: Random) -> Any:
    deep: Any = 1
    for _ in range(rng.choice((5, 300))):
        deep = [deep]
    odd = rng.choice((rng.choice(_WORDS), rng.choice(_NUMBERS), rng.choice(_ODDITIES), rng.choice(_ODDITIES), deep))
    return deepcopy(odd)  # so that a later edit does not change what is chosen from


def _edit_value(rng: Random, value: Any) -> Any:
    """A JSON value with something inside it changed, mostly to a value of its own type."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        return _edit_object(rng, value)
    if isinstance(value, list) and value and rng.random() < 0.85:
        return _edit_array(rng, value)
    same = {str: _WORDS, int: _NUMBERS, float: _NUMBERS}.get(type(value))
    return rng.choice(same) if same and rng.random() < 0.6 else _odd_value(rng)


def _edit_object(rng: Random, value: dict[str, Any]) -> dict[str, Any]:
    key = rng.choice(list(value))
    match rng.randrange(12):
        case 0:
            del value[key]
        case 1:
            value[rng.choice((*_WORDS, *value))] = value.pop(key)
        case 2:
            value[rng.choice(_WORDS)] = _odd_value(rng)
        case _:
            value[key] = _edit_value(rng, value[key])
    return value


def _edit_array(rng: Random, value: list[Any]) -> list[Any]:
    i = rng.randrange(len(value))
    match rng.randrange(12):
        case 0:
            del value[i]
        case 1:
            times = rng.choice((0, 2, 1000))
            times = times if len(json.dumps(value)) * times < LARGEST_INPUT else 2
            value = [deepcopy(item) for _ in range(times) for item in value]  # so that one edit changes one of them
        case 2:
            value.append(_odd_value(rng))
        case _:
            value[i] = _edit_value(rng, value[i])
    return value


def _edit_text(rng: Random, text: str) -> str:
    """JSON text with values changed, or with something only a parser sees."""
    if rng.random() < 0.05:
        return rng.choice(("\ufeff" + text, text + "{}", "[" * 100_000, text.replace("{", '{"schema": 1, ', 1), "null"))
    if rng.random() < 0.05:
        return re.sub(r"\d+", lambda _: rng.choice(("9" * 5000, "1e999", "-0", "1.0")), text, count=1)
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        document = _edit_value(rng, document)
    return json.dumps(document, ensure_ascii=rng.random() < 0.7)


def _edit_json(rng: Random, data: bytes) -> bytes:
    return _edit_text(rng, data.decode()).encode("utf-8", "surrogatepass")


def _edit_engine_card(rng: Random, data: bytes) -> bytes:
    """Half of the cards are about the stand-in engine, as long as the change does not hit that very field."""
    if rng.random() < 0.5:
        data = re.sub(rb'("engine_sha256": ")\w', rb"\g<1>x", data)
    return _edit_json(rng, data)


def _edit_pth(rng: Random, data: bytes) -> bytes:
    match rng.randrange(3):
        case 0:
            return _torch_bytes(_edit_content(rng, data))
        case 1:
            return _edit_zip(rng, data, _edit_pickle)
        case _:
            return _edit_zip(rng, data, damaged)


def _edit_zip(rng: Random, data: bytes, edit_pickle: Edit) -> bytes:
    """Members changed, with checksums and sizes that fit."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(member.filename, archive.read(member)) for member in archive.infolist()]
    i = rng.choice((next(i for i, (name, _) in enumerate(members) if name.endswith("data.pkl")),) * 3 + (0, -1, 1))
    name, content = members[i]
    compression = zipfile.ZIP_STORED
    match rng.randrange(12):
        case 0:
            _rearranged(rng, members)
        case 1:
            members[i] = (rng.choice((members[0][0], "../x", "/etc/x", "x/data.pkl", "x" * 300, "")), content)
        case 2:
            compression = zipfile.ZIP_DEFLATED
        case _:
            members[i] = (name, edit_pickle(rng, content) if name.endswith("data.pkl") else damaged(rng, content))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that occur twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def _edit_pickle(rng: Random, data: bytes) -> bytes:
    """Opcodes changed, each of them still whole."""
    places = [position or 0 for _, _, position in pickletools.genops(data)]
    codes = [data[start:stop] for start, stop in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        i = rng.randrange(len(codes))
        codes[i] = _edit_opcode(rng, codes[i])
        if rng.random() < 0.3:
            _rearranged(rng, codes)
    return b"".join(codes)


def _edit_opcode(rng: Random, code: bytes) -> bytes:
    number = rng.choice(_INTEGERS)
    match code[:1]:
        case b"K" | b"M" | b"J":
            return rng.choice((b"J" + struct.pack("<I", number % (1 << 32)), pickled_long(number), b"N", b"]", b"}"))
        case b"X":
            text = rng.choice((b"", b"cpu", b"cuda:0", b"meta", b"0", b"999", b"\xff", b"a\nb", b"x" * 3000))
            return b"X" + struct.pack("<I", len(text)) + text
        case b"c":
            names = b"torch FloatStorage,torch LongStorage,torch BoolStorage,torch ByteStorage,torch Size,torch device,"
            names += b"collections OrderedDict,collections Counter,argparse Namespace,torch._utils _rebuild_parameter,"
            names += b"torch._utils _rebuild_tensor_v2,os system,torch complex64,torch._utils _rebuild_sparse_tensor"
            return b"c" + b"\n".join(rng.choice(names.split(b",")).split()) + b"\n"
        case b"h" | b"q":
            return code[:1] + bytes((rng.randrange(256),))
    return rng.choice((b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"t", b"R", b"b", b"Q", b"u", b"s", b"0", b"."))


def pickled_long(number: int) -> bytes:
    """The opcode that puts a number of any size."""
    content = number.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes((len(content),)) + content


def _edit_content(rng: Random, data: bytes) -> Any:
    """What a checkpoint holds, with a tensor, a name or the structure around them changed."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(io.BytesIO(data), weights_only=True)
    state = dict(content.get("model", content))
    for _ in range(rng.choice((1, 1, 2))):
        _edit_state(rng, state)
    wraps: tuple[Any, ...] = (state, {"model": state}, {"state_dict": state, "epoch": 1}, {"model": {"model": state}})
    return rng.choice((*wraps, *wraps, [state], {**state, 3: 4}, {"model": None, **state}, {"model": list(state)}))


def _edit_state(rng: Random, state: dict[str, Any]) -> None:
    if not state:
        return
    key = rng.choice(list(state))
    match rng.randrange(6):
        case 0:
            del state[key]
        case 1:
            state[rng.choice((rng.choice(_WORDS[:5]), _renumbered(rng, key)))] = state.pop(key)
        case 2:
            state[_renumbered(rng, key)] = state[key]
        case 3:
            odd: tuple[Any, ...] = (
                None,
                3,
                "text",
                [],
                {},
                (1, 2),
                torch.Size([2]),
                argparse.Namespace(a=1),
                [[[]]],
                math.nan,
            )
            state[key] = rng.choice(odd)
        case _:
            value = state[key]
            if isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel() < 10**6:
                state[key] = _edit_tensor(rng, value)


def _renumbered(rng: Random, key: str) -> str:
    """The same name with another number in it, so that there seems to be another block or stage."""
    return re.sub(r"\d+", lambda _: str(rng.choice((0, 1, 2, 3, 9, 10**9))), key, count=1)


_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.complex64)


def _edit_tensor(rng: Random, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().clone()
    match rng.randrange(9):
        case 0:
            return tensor.to(rng.choice(_DTYPES))
        case 1:
            return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype) * rng.choice((1e30, 1e300))
        case 2:
            return tensor.flatten()[: rng.choice((0, 1, 2))].clone()
        case 3:
            return tensor.reshape(rng.choice(((-1,), (1, -1), (-1, 1, 1), (1, 1, 1, -1), (1, 1, 1, 1, -1))))
        case 4:
            return tensor.flatten()[:1].expand(rng.choice((2, 1000, 10**9, 2**40)))
        case 5:
            return tensor.transpose(0, -1) if tensor.ndim else tensor
        case 6:
            return tensor.to_sparse() if tensor.ndim and tensor.is_floating_point() else tensor.new_zeros(3)
        case 7:
            return torch.cat([tensor, tensor]) if tensor.ndim else tensor
    tensor.view(-1)[rng.randrange(max(1, tensor.numel())) :] = rng.choice((0, -1, 10**9))
    return tensor if not tensor.is_floating_point() else tensor * rng.choice((1, math.nan, math.inf, -1, 1e-45, 65504))


def _edit_safetensors(rng: Random, data: bytes) -> bytes:
    """The header changed, with a length that fits; or other tensors, written by the library."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    match rng.randrange(5):
        case 0:
            state: dict[str, Any] = dict(sorted(safetensors.torch.load(data).items()))  # it gives them in any order
            _edit_state(rng, state)
            dense = {k: v for k, v in state.items() if type(v) is torch.Tensor and v.layout == torch.strided}
            named = {k.encode("utf-8", "replace").decode(): v for k, v in dense.items() if v.numel() < 10**6}
            return safetensors.torch.save({k: v.clone().contiguous() for k, v in named.items()})
        case 1:
            document = json.loads(header)
            document["__metadata__"][METADATA_KEY] = _edit_text(rng, document["__metadata__"][METADATA_KEY])
            header = json.dumps(document).encode()
        case 2:
            header = _edit_entry(rng, header)
        case 3:
            header = _edit_json(rng, header)
        case _:
            header, body = rng.choice(((damaged(rng, header), body), (header, damaged(rng, body))))
    header += b" " * (-len(header) % 8)
    length = len(header) if rng.random() < 0.9 else rng.choice(_INTEGERS) % (1 << 64)
    return length.to_bytes(8, "little") + header + body


def _edit_entry(rng: Random, header: bytes) -> bytes:
    """One tensor's type, shape or place in the file changed."""
    document = json.loads(header)
    entry = document[rng.choice([key for key in document if key != "__metadata__"])]
    match rng.randrange(3):
        case 0:
            entry["dtype"] = rng.choice(("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X", "F4"))
        case 1:
            entry["shape"] = [rng.choice((*entry["shape"], *_INTEGERS)) for _ in range(rng.choice((0, 1, 2, 4, 4, 9)))]
        case _:
            place = entry["data_offsets"]
            place[rng.randrange(2)] = rng.choice((*_INTEGERS, place[0], place[1], place[1] + 4))
    return json.dumps(document).encode()


_OPERATORS = (
    *("Loop", "If", "Scan", "ConstantOfShape", "Expand", "Tile", "Resize", "Pad", "Range", "Add", "MatMul", "Gemm"),
    *("Conv", "ConvTranspose", "Reshape", "Transpose", "Slice", "Gather", "GatherND", "Concat", "Split", "ReduceMean"),
    *("Softmax", "Einsum", "OneHot", "NonZero", "Shape", "Unsqueeze", "Cast", "Identity", "Pow", "Erf", "RandomNormal"),
    *("MaxPool", "CumSum", "StringConcat", "SequenceConstruct", "Optional", "QuantizeLinear", "TopK", "DFT", "Blub"),
)


def _edit_onnx(rng: Random, data: bytes) -> bytes:
    """Fields of the protobuf changed: it still parses."""
    model = onnx.ModelProto.FromString(data)
    names = tuple(name for node in model.graph.node for name in (*node.input, *node.output))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _edit_model(rng, model, names)
    if rng.random() < 0.05:  # whoever parses merges the two
        return data + bytes(_part_of(rng, model).SerializeToString(deterministic=True))
    return bytes(model.SerializeToString(deterministic=True))


def _edit_model(rng: Random, model: onnx.ModelProto, names: Sequence[str]) -> None:
    match rng.randrange(10):
        case 0:
            _insert_node(rng, model.graph, names)
        case 1:
            _edit_metadata_of(rng, model)
        case 2:
            _edit_message(rng, model, names)
        case 3 if model.graph.initializer:
            _edit_message(rng, rng.choice(model.graph.initializer), names)
        case 4 | 5 if model.graph.node:
            _edit_message(rng, rng.choice(model.graph.node), names)
        case _:
            _edit_message(rng, model.graph, names)


def _part_of(rng: Random, model: onnx.ModelProto) -> onnx.ModelProto:
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for message in (part, part.graph):
        for descriptor, _ in message.ListFields():
            if descriptor.name != "graph" and rng.random() < 0.8:
                message.ClearField(descriptor.name)
    return part


def _edit_metadata(rng: Random, data: bytes) -> bytes:
    model = onnx.ModelProto.FromString(data)
    _edit_metadata_of(rng, model)
    return bytes(model.SerializeToString(deterministic=True))


def _edit_metadata_of(rng: Random, model: onnx.ModelProto) -> None:
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY and entry.value.startswith("{"):
            try:
                text = _edit_text(rng, entry.value)
            except ValueError:  # changed before, and no longer JSON
                continue
            entry.value = text.encode("utf-8", "replace").decode()


def _insert_node(rng: Random, graph: Any, names: Sequence[str]) -> None:
    """A node of another operator between a tensor and its reader."""
    if not graph.node or not names:
        return
    reader = rng.choice(graph.node)
    inputs = [rng.choice(names) for _ in range(rng.choice((1, 1, 2, 3)))]
    domain = rng.choice(("", "", "com.microsoft", "x"))
    node = helper.make_node(rng.choice(_OPERATORS), inputs, ["added"], domain=domain)
    if rng.random() < 0.5:
        value = rng.choice((rng.choice(_INTEGERS[:30]), [1, 2], 0.5, "text"))
        node.attribute.append(helper.make_attribute(rng.choice(("axis", "to", "perm", "value_ints", "body")), value))
    if reader.input:
        reader.input[rng.randrange(len(reader.input))] = "added"
    graph.node.insert(list(graph.node).index(reader), node)


def _edit_message(rng: Random, message: Any, names: Sequence[str]) -> None:
    """Somewhere below `message`, a field is changed."""
    present = [descriptor for descriptor, _ in message.ListFields()]
    every = list(message.DESCRIPTOR.fields)
    descriptor = rng.choice(present if present and rng.random() < 0.93 else every)
    holder = getattr(message, descriptor.name)
    if hasattr(holder, "append") or hasattr(holder, "add"):
        _edit_repeated(rng, descriptor, holder, names)
    elif descriptor.message_type is None:
        setattr(message, descriptor.name, _scalar(rng, descriptor, holder, names))
    elif rng.random() < 0.05:
        message.ClearField(descriptor.name)
    else:
        _edit_message(rng, holder, names)


def _edit_repeated(rng: Random, descriptor: Any, values: Any, names: Sequence[str]) -> None:
    if not values:
        if descriptor.message_type is None:
            values.append(_scalar(rng, descriptor, 0, names))
        else:
            values.add()
        return
    i = rng.randrange(len(values))
    if rng.random() < 0.25:
        items = list(values)
        _rearranged(rng, items)
        if descriptor.message_type is not None:  # they live in what is about to be cleared
            items = [type(item).FromString(item.SerializeToString()) for item in items]
        del values[:]
        values.extend(items)
    elif descriptor.message_type is None:
        values[i] = _scalar(rng, descriptor, values[i], names)
    else:
        _edit_message(rng, values[i], names)


def _scalar(rng: Random, descriptor: Any, old: Any, names: Sequence[str]) -> Any:
    """Another value for a field of this type."""
    if descriptor.enum_type is not None:
        return rng.choice([value.number for value in descriptor.enum_type.values])
    match descriptor.cpp_type:
        case descriptor.CPPTYPE_STRING if descriptor.type == descriptor.TYPE_BYTES:
            return damaged(rng, old or b"\0")
        case descriptor.CPPTYPE_STRING:
            words = [word for word in _WORDS if word.isascii()]
            operators = _OPERATORS * 3 if descriptor.name == "op_type" else _OPERATORS[:3]
            return rng.choice((rng.choice(words), rng.choice(operators), rng.choice(names or words)))
        case descriptor.CPPTYPE_FLOAT | descriptor.CPPTYPE_DOUBLE:
            return rng.choice((0.0, -1.0, 1e-40, 3e38, math.nan, math.inf))
        case descriptor.CPPTYPE_UINT64:
            return rng.choice(_INTEGERS) % (1 << 64)
        case descriptor.CPPTYPE_INT32:
            return (rng.choice((*_INTEGERS, *range(24))) + (1 << 31)) % (1 << 32) - (1 << 31)
    return (rng.choice((*_INTEGERS, *range(24))) + (1 << 63)) % (1 << 64) - (1 << 63)


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        suffix: of its files.
        weight: its share of the inputs, against the others' weights.
        edit: changes a file along its format.
        memory: MiB by which the resident set may grow for one input.
        edited: how many of its inputs are edited; the rest is only damaged.
    """

    suffix: str
    weight: float
    edit: Edit
    memory: int
    edited: float = 0.67


KINDS = {
    "jpeg": Kind(".jpg", 2, _edit_jpeg, IMAGE_MIB),
    "png": Kind(".png", 2, _edit_png, IMAGE_MIB),
    "webp": Kind(".webp", 1.5, _edit_webp, IMAGE_MIB),
    "gif": Kind(".gif", 1, _header_integer, IMAGE_MIB),
    "tiff": Kind(".tiff", 2, _edit_tiff, IMAGE_MIB),
    "bmp": Kind(".bmp", 1, _header_integer, IMAGE_MIB),
    "pth": Kind(".pth", 2, _edit_pth, 64),
    "safetensors": Kind(".safetensors", 2, _edit_safetensors, 64),
    "card": Kind(".json", 1, _edit_json, 64, 0.9),
    "onnx": Kind(".onnx", 2.5, _edit_onnx, 64, 0.9),
    "metadata": Kind(".onnx", 1, _edit_metadata, 64, 1),
    "engine": Kind(".engine.json", 1, _edit_engine_card, 64, 0.9),
    "table": Kind(".json", 1, _edit_json, 64, 0.9),
}
IMAGES = ("jpeg", "png", "webp", "gif", "tiff", "bmp")


def make_input(corpus: Mapping[str, Sequence[bytes]], kind: str, seed: int, index: int) -> bytes:
    """Input `index` of `kind`: the same for the same corpus and seed."""
    rng = Random(f"{seed} {kind} {index}")  # noqa: S311
    data, other = rng.choice(corpus[kind]), rng.choice(corpus[kind])
    if rng.random() < KINDS[kind].edited:
        data = KINDS[kind].edit(rng, data)
        if rng.random() < 0.9:
            return data[:LARGEST_INPUT]
    elif rng.random() < 0.05:
        data = _spliced(rng, data, other)
    return damaged(rng, data)[:LARGEST_INPUT]


def read_corpus(folder: Path, kinds: Sequence[str]) -> dict[str, list[bytes]]:
    """The files that `build_corpus` wrote."""
    return {kind: [path.read_bytes() for path in sorted((folder / kind).iterdir())] for kind in kinds}
