"""Mutated files through the public entry points, in child processes; whatever is not a one-line refusal is a finding.

python scripts/fuzz.py --minutes 20                            all kinds, on two processes
python scripts/fuzz.py --inputs 5000 --kind png --kind onnx    so many inputs, of these kinds only
python scripts/fuzz.py --replay 0:1234 --kind png              make input 1234 of seed 0 again, examine it, save it
python scripts/fuzz.py --check artifacts/fuzz/png/*.png        examine files; the folder's name is the kind

An input is made from the seed, its kind and its index alone (and the installed libraries, which write the files that
are mutated). Two thirds of them are edited along their format, so that checksums and lengths still fit and what lies
behind the first check is reached; the rest, and some of these, are damaged as bytes. Each is given to

    images                      load_image; every eighth with the seven after it and a good one to Classifier.classify
    pth, safetensors, card      load_checkpoint, describe, one inference (card: the JSON beside a good .pth)
    onnx, metadata              inspect_file, open_runner, infer, classify (metadata: only what smlp wrote inside)
    engine                      read_card, inspect_file, for a stand-in engine that every second JSON is about
    table                       read_table

What is read must also be writable again. Findings are:

    traceback   an exception that is not an SmlpError
    crash       the child died
    hang        one input took longer than --limit seconds
    memory      the resident set grew by more than the kind's bound, in MiB: see KINDS
    records     another number of records than inputs, another order, or a good image without its result
    message     an error that is empty, longer than 2,000 characters or has control characters in it

They are told apart by kind, exception and the innermost line in smlp_deploy. The smallest input of each is saved under
--output as KIND/SEED-INDEX.SUFFIX; tests/data/fuzz holds those found so far, and test_fuzz.py examines them again.
The exit code is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import math
import multiprocessing
import os
import pickletools
import re
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from onnx import helper
from PIL import Image, ImageCms
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import smlp_deploy
from smlp_deploy.classify import Classifier, Prediction
from smlp_deploy.errors import SmlpError
from smlp_deploy.exporters.graph import load_graph, save_graph
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.int8 import CalibrationTable, read_table
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.files import DATA_FOLDER, sha256_of
from smlp_deploy.inspection import inspect_file
from smlp_deploy.metadata import METADATA_KEY, BatchProfile, EngineCard, ModelCard, Preprocessing, SMLPNetConfig
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.preprocessing import load_image
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.tensorrt import read_card

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = str(Path(smlp_deploy.__file__).parent)
# Four copies of the largest image that is read: 89.5 million pixels of four bytes.
IMAGE_MIB = 1400
BATCH = 8
CHUNK = 40
LONGEST_MESSAGE = 2000
LARGEST_INPUT = 1 << 20
HEADROOM = 3 << 30  # bytes that a child may allocate beyond what it starts with
INPUTS_PER_CHILD = 20_000
START_S = 120.0
GRACE_S = 15.0
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


def _card() -> ModelCard:
    return ModelCard(labels=LABELS, preprocessing=Preprocessing(image_size=16), training={"epochs": 3, "loss": 0.5})


def _safetensors(network: SMLPNet, *, half: bool) -> bytes:
    tensors = {key: value.half() if half else value for key, value in network.state_dict().items() if value.ndim}
    return safetensors.torch.save(tensors, {METADATA_KEY: _card().to_json()})


def _graphs(network: SMLPNet, checkpoint: Path) -> list[bytes]:
    """The network's graph in fp32, for any batch size, in fp16 and in bf16."""
    facts = describe(load_checkpoint(checkpoint), labels=LABELS, preprocessing=asdict(Preprocessing(image_size=16)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        facts = export_onnx(network, facts, path)
        files = [path.read_bytes()]
        for precision in ("fp16", "bf16"):
            save_graph(to_half(load_graph(path), precision), replace(facts, precision=precision), path)
            files.append(path.read_bytes())
            path.write_bytes(files[0])
    return files


def _table() -> bytes:
    ranges = {"images": 2.64, "gelu": 3.5, "mul_4": 0.25, "bytes": 0.0}
    return CalibrationTable(ranges=ranges, method="minmax", images=12, checkpoint_sha256="0" * 64).to_json().encode()


def _engine_card(checkpoint: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "x.engine"
        engine.write_bytes(STAND_IN_ENGINE)
        sha256 = sha256_of(engine)
    card = EngineCard(
        engine_sha256=sha256,
        metadata=describe(
            load_checkpoint(checkpoint), labels=LABELS, preprocessing=asdict(Preprocessing(image_size=16))
        ),
        onnx_file="nano-fp16.onnx",
        onnx_sha256="1" * 64,
        flavour="tensorrt-rtx",
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
            value = value * rng.choice((0, 2, 1000))
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


# -------------------------------------------------------------------------------------------------- in a child process


@dataclass(frozen=True)
class Verdict:
    """What became of one input.

    Attributes:
        what: "accepted", "refused", or the finding.
        detail: the error's text, for a person.
        exception: its type.
        where: the innermost line in smlp_deploy, as file:line.
        grew: MiB by which the resident set grew.
    """

    what: str
    detail: str = ""
    exception: str = ""
    where: str = ""
    grew: int = 0

    @property
    def is_finding(self) -> bool:
        return self.what not in ("accepted", "refused")


class Broken(Exception):  # noqa: N818
    """The package did something it never may."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(detail)
        self.what = what


class Examiner:
    """Drives the entry points with one file at a time, and watches.

    Args:
        folder: with the corpus; a folder of its own in there takes the inputs.
        kinds: those that will be asked for.
        seed: of the inputs.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], seed: int) -> None:
        self.seed = seed
        self.corpus = read_corpus(folder, kinds)
        self.beside = folder / "beside"
        self.good_image = self.beside / "good.png"
        self.work = Path(tempfile.mkdtemp(dir=folder, prefix="work"))
        self.classifier = Classifier.open(self.beside / "good.pth")
        for kind in kinds:  # so that what is loaded or kept once is not the first input's
            for content in self.corpus[kind]:
                self.examine(kind, content)

    def examine_made(self, kind: str, index: int) -> Verdict:
        """Examine input `index`."""
        neighbours = range(index + 1, index + BATCH) if kind in IMAGES and index % BATCH == 0 else ()
        others = [make_input(self.corpus, kind, self.seed, other) for other in neighbours]
        return self.examine(kind, make_input(self.corpus, kind, self.seed, index), others)

    def examine(self, kind: str, content: bytes, others: Sequence[bytes] = ()) -> Verdict:
        """Give `content` to everything that takes its kind; for an image with `others` in one batch, if there are."""
        path = self._written(f"input{KINDS[kind].suffix}", content)
        paths = [self._written(f"other{i}{KINDS[kind].suffix}", other) for i, other in enumerate(others)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        verdict = Verdict("accepted")
        for step in self.steps(kind, path, paths):
            verdict = _judged(step, verdict)
            if verdict.is_finding:
                break
        grew = (memory("VmHWM") - before) >> 20
        if grew > KINDS[kind].memory and not verdict.is_finding:
            verdict = Verdict("memory", f"grew by {grew} MiB, then was {verdict.what}: {verdict.detail}")
        return replace(verdict, grew=grew)

    def _written(self, name: str, content: bytes) -> Path:
        path = self.work / name
        path.unlink(missing_ok=True)  # the last one of this name may still be mapped
        path.write_bytes(content)
        return path

    def steps(self, kind: str, path: Path, others: Sequence[Path]) -> tuple[Callable[[], object], ...]:
        """What is called, one after the other, whether or not the one before refused."""
        if kind in IMAGES:
            return (lambda: self._load_image(path), *((lambda: self._classify(path, others),) if others else ()))
        if kind in ("onnx", "metadata"):
            return (lambda: _facts(path), lambda: self._run_graph(path))
        if kind == "engine":
            engine = self._written(path.name.removesuffix(".json"), STAND_IN_ENGINE)
            return (lambda: read_card(engine).to_json().encode(), lambda: _facts(engine))
        if kind == "table":
            return (lambda: read_table(path).to_json().encode(),)
        if kind == "card":
            path = self._written(path.with_suffix(".pth").name, (self.beside / "good.pth").read_bytes())
        return (lambda: self._run_checkpoint(path), lambda: _facts(path))

    def _load_image(self, path: Path) -> None:
        preprocessing = self.classifier.runner.metadata.preprocessing
        image = load_image(path, preprocessing)
        wanted = (3, preprocessing.image_size, preprocessing.image_size)
        if image.shape != wanted or image.dtype != np.float32 or not np.isfinite(image).all():
            raise Broken("records", f"an image became {image.dtype} {image.shape}")

    def _classify(self, path: Path, others: Sequence[Path]) -> None:
        paths = [path, *others[: BATCH // 2], self.good_image, *others[BATCH // 2 :]]
        records = list(self.classifier.classify(paths, batch_size=BATCH, workers=1))
        _check_records(records, paths)
        if records[paths.index(self.good_image)].error is not None:
            raise Broken("records", f"a good image got {records[paths.index(self.good_image)].error}")

    def _run_graph(self, path: Path) -> None:
        with open_runner(path) as runner:
            size, classes = runner.metadata.preprocessing.image_size, len(runner.metadata.labels)
            runner.metadata.to_json().encode()
            if size <= 256:  # else the next lines see to it
                logits = runner.infer(np.zeros((2, 3, size, size), np.float32))
                if logits.shape != (2, classes) or logits.dtype != np.float32:
                    raise Broken("records", f"logits are {logits.dtype} {logits.shape}, labels {classes}")
            _check_records(list(Classifier(runner).classify([self.good_image], workers=1)), [self.good_image])

    def _run_checkpoint(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        size = checkpoint.config.image_size
        with torch.inference_mode():
            checkpoint.network()(torch.zeros(1, 3, size, size))
        describe(checkpoint).to_json().encode()


def _facts(path: Path) -> None:
    json.dumps(inspect_file(path)).encode()


def _check_records(records: Sequence[Prediction], paths: Sequence[Path]) -> None:
    if [record.path for record in records] != [str(path) for path in paths]:
        raise Broken("records", f"{len(records)} records for {len(paths)} inputs, or in another order")
    for record in records:
        if record.error is not None:
            _check_message(record.error)


def _check_message(message: str) -> None:
    odd = [c for c in message if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    if odd or not message or len(message) > LONGEST_MESSAGE:
        raise Broken("message", f"{len(message)} characters, {len(odd)} of them odd: {message[:200]!r}")


def _judged(step: Callable[[], object], before: Verdict) -> Verdict:
    try:
        step()
    except KeyboardInterrupt:
        raise
    # Rust's panics are no Exceptions.
    except BaseException as error:
        return _verdict_of(error)
    return before


def _verdict_of(error: BaseException) -> Verdict:
    what, cause = "traceback", error
    if isinstance(error, SmlpError):
        try:
            _check_message(str(error))
            return Verdict("refused", str(error), type(error).__name__)
        except Broken as broken:
            cause = broken
    if isinstance(cause, Broken):
        what = cause.what
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
    where = f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else ""
    text = "".join(traceback.format_exception(error)) if what == "traceback" else str(cause)
    return Verdict(what, text[-4000:], type(error).__name__, where)


def memory(name: str) -> int:
    """Bytes of this process, as the kernel counts them: VmRSS, VmHWM, VmData."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(name)


@dataclass(frozen=True)
class Task:
    """Inputs `first` to `first + count` of a kind; or the content of a file."""

    kind: str
    first: int = 0
    count: int = 1
    content: bytes | None = None


@dataclass(frozen=True)
class Setup:
    """What a child is told at its start."""

    folder: Path
    kinds: tuple[str, ...]
    seed: int = 0
    limit: float = 10.0
    examiner: type[Examiner] = Examiner


def serve(connection: Connection, setup: Setup, core: int, log: Path) -> None:
    """A child's life: examine what the connection asks for until it closes. Its output goes to `log`."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        faulthandler.enable(output)
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        examiner = setup.examiner(setup.folder, setup.kinds, setup.seed)
        limits = {resource.RLIMIT_DATA: memory("VmData") + HEADROOM, resource.RLIMIT_FSIZE: 64 << 20}
        for number, limit in {**limits, resource.RLIMIT_CORE: 0}.items():
            resource.setrlimit(number, (limit, limit))
        connection.send(Verdict("accepted"))
        while True:
            try:
                task: Task = connection.recv()
            except EOFError:
                return
            for index in range(task.first, task.first + task.count):
                faulthandler.dump_traceback_later(setup.limit, exit=True, file=output)
                if task.content is None:
                    verdict = examiner.examine_made(task.kind, index)
                else:
                    verdict = examiner.examine(task.kind, task.content)
                faulthandler.cancel_dump_traceback_later()
                connection.send(verdict)


# ------------------------------------------------------------------------------------------------ around the children


class Child:
    """A process that examines inputs, started anew whenever one kills it.

    Args:
        setup: what it is told.
        number: of this child, which decides its core.
    """

    def __init__(self, setup: Setup, number: int = 0) -> None:
        self._setup = setup
        cores = sorted(os.sched_getaffinity(0))
        self._core = cores[number % len(cores)]
        self._log = setup.folder / f"child-{number}.log"
        self._process: multiprocessing.process.BaseProcess | None = None
        self._served = 0

    def verdicts(self, task: Task) -> Iterator[Verdict]:
        """One verdict per input of `task`, in their order."""
        done = 0
        while done < task.count:
            self._ensure()
            self._connection.send(replace(task, first=task.first + done, count=task.count - done))
            while done < task.count:
                verdict = self._received(self._setup.limit + GRACE_S)
                done += 1
                self._served += 1
                yield verdict
                if self._process is None:
                    break

    def _ensure(self) -> None:
        if self._served >= INPUTS_PER_CHILD:
            self.close()
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, self._setup, self._core, self._log), daemon=True)
        self._process.start()
        other.close()
        self._served = 0
        if self._received(START_S).is_finding:
            raise RuntimeError(f"a child does not start:\n{self._log.read_text()}")

    def _received(self, seconds: float) -> Verdict:
        try:
            if self._connection.poll(seconds):
                verdict: Verdict = self._connection.recv()
                return verdict
        except (EOFError, ConnectionResetError):
            pass
        return self._post_mortem()

    def _post_mortem(self) -> Verdict:
        """What the log of a child that died or hangs says; the child is gone then."""
        assert self._process is not None
        self._process.join(2)
        code = self._process.exitcode
        self.close()
        log = self._log.read_text(errors="replace")[-4000:]
        hung = code is None or "Timeout (" in log
        frame = re.search(rf'File "{re.escape(PACKAGE)}/([^"]+)", line (\d+)', log)
        where = f"{frame[1]}:{frame[2]}" if frame else ""
        return Verdict("hang" if hung else "crash", f"exit code {code}\n{log}", "" if hung else f"exit {code}", where)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._connection.close()
            self._process.join(1)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None


class Schedule:
    """Hands out inputs to whoever asks, each kind by its weight, until they or the time are used up."""

    def __init__(self, kinds: Sequence[str], *, inputs: int | None, seconds: float | None) -> None:
        self.handed = dict.fromkeys(kinds, 0)
        self._left = math.inf if inputs is None else inputs
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._lock = threading.Lock()

    def next(self) -> Task | None:
        with self._lock:
            count = int(min(self._left, CHUNK, max(1, self._left // len(self.handed))))
            if count == 0 or time.monotonic() > self._end:
                return None
            kind = min(self.handed, key=lambda kind: self.handed[kind] / KINDS[kind].weight)
            task = Task(kind, self.handed[kind], count)
            self.handed[kind] += count
            self._left -= count
            return task

    def stop(self) -> None:
        """No more after what was handed out."""
        self._left = 0


@dataclass
class Count:
    """Inputs of one kind by what became of them, and the most MiB that one took."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    findings: int = 0
    most_mib: int = 0


@dataclass(frozen=True)
class Finding:
    """One way to break the package: its smallest input so far, and how many there were."""

    kind: str
    verdict: Verdict
    path: Path
    size: int
    replay: str
    times: int = 1


@dataclass
class Tally:
    """What was found; threads write to it one at a time."""

    kinds: Sequence[str]
    output: Path
    counts: dict[str, Count] = field(init=False)
    findings: dict[tuple[str, ...], Finding] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.counts = {kind: Count() for kind in self.kinds}

    def add(self, kind: str, name: str, verdict: Verdict, content: Callable[[], bytes]) -> None:
        """Count a verdict; of a finding, keep the input if it is the smallest."""
        with self.lock:
            count = self.counts[kind]
            count.inputs += 1
            count.accepted += verdict.what == "accepted"
            count.refused += verdict.what == "refused"
            count.findings += verdict.is_finding
            count.most_mib = max(count.most_mib, verdict.grew)
            if verdict.is_finding:
                self._keep(kind, name, verdict, content())

    def _keep(self, kind: str, name: str, verdict: Verdict, content: bytes) -> None:
        key = (kind, verdict.what, verdict.exception, verdict.where)
        known = self.findings.get(key)
        if known is not None:
            self.findings[key] = replace(known, times=known.times + 1)
            if known.size <= len(content):
                return
            known.path.unlink(missing_ok=True)
        path = self.output / kind / f"{name.replace(':', '-')}{KINDS[kind].suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        replay = f"python scripts/fuzz.py --replay {name} --kind {kind}"
        self.findings[key] = Finding(kind, verdict, path, len(content), replay, known.times + 1 if known else 1)


def fuzz(setup: Setup, schedule: Schedule, tally: Tally, *, jobs: int) -> None:
    """Have `jobs` children examine what `schedule` hands out. Ctrl-C ends it early and well."""
    corpus = read_corpus(setup.folder, setup.kinds)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        child = Child(setup, number)
        try:
            while task := schedule.next():
                for index, verdict in enumerate(child.verdicts(task), task.first):
                    content = partial(make_input, corpus, task.kind, setup.seed, index)
                    tally.add(task.kind, f"{setup.seed}:{index}", verdict, content)
        except BaseException as error:  # given to the main thread
            failures.append(error)
            schedule.stop()
        finally:
            child.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(jobs)]
    for thread in threads:
        thread.start()
    try:
        _watch(threads, tally)
    except KeyboardInterrupt:
        schedule.stop()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _watch(threads: Sequence[threading.Thread], tally: Tally) -> None:
    console = Console(stderr=True)
    text = TextColumn("{task.completed} inputs, {task.fields[findings]} findings")
    with Progress(BarColumn(), text, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("fuzzing", total=None, findings=0)
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.5) if threads[0].is_alive() else time.sleep(0.1)
            done = sum(count.inputs for count in tally.counts.values())
            progress.update(bar, completed=done, findings=len(tally.findings))


def check_files(setup: Setup, files: Sequence[tuple[str, Path]]) -> list[Verdict]:
    """Verdicts on files of these kinds, from one child."""
    child = Child(setup)
    try:
        return [v for kind, path in files for v in child.verdicts(Task(kind, content=path.read_bytes()))]
    finally:
        child.close()


def replay(setup: Setup, kind: str, index: int) -> Verdict:
    """The verdict on input `index`, from a child of its own."""
    child = Child(setup)
    try:
        return next(child.verdicts(Task(kind, index)))
    finally:
        child.close()


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    kinds = tuple(options.kind or KINDS)
    with tempfile.TemporaryDirectory(prefix="smlp-fuzz-") as name:
        build_corpus(Path(name), kinds)
        seed = options.replay[0] if options.replay else options.seed
        setup = Setup(Path(name), kinds, seed, options.limit)
        if options.check:
            return _show(options.check, check_files(setup, [(path.parent.name, path) for path in options.check]))
        if options.replay:
            return _replay(setup, options.replay[1], options.output)
        started = time.monotonic()
        seconds = None if options.minutes is None else 60 * options.minutes
        tally = Tally(kinds, options.output)
        fuzz(setup, Schedule(kinds, inputs=options.inputs, seconds=seconds), tally, jobs=options.jobs)
    _report(tally, seed, time.monotonic() - started, options.json)
    return 1 if tally.findings else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after these (20, if there is no --inputs)")
    parser.add_argument("--inputs", type=int, help="stop after so many")
    parser.add_argument("--jobs", type=int, default=2, help="child processes (2)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this one; may be given again")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that one input may take (10)")
    parser.add_argument("--output", type=Path, default=Path("artifacts/fuzz"), help="where findings are saved")
    parser.add_argument("--json", type=Path, help="write the counts and findings to this file, too")
    parser.add_argument(
        "--replay", type=_seed_and_index, metavar="SEED:INDEX", help="one input again; needs one --kind"
    )
    parser.add_argument("--check", type=Path, nargs="+", metavar="KIND/FILE", help="examine these files")
    options = parser.parse_args(arguments)
    if options.replay and len(options.kind or ()) != 1:
        parser.error("--replay needs one --kind")
    if options.check:
        unknown = {path.parent.name for path in options.check} - set(KINDS)
        if unknown:
            parser.error(f"--check takes files in folders named like their kind, not {', '.join(sorted(unknown))}")
        options.kind = sorted({path.parent.name for path in options.check})
    if options.minutes is None and options.inputs is None:
        options.minutes = 20.0
    return options


def _seed_and_index(text: str) -> tuple[int, int]:
    seed, _, index = text.partition(":")
    return int(seed), int(index)


def _replay(setup: Setup, index: int, output: Path) -> int:
    (kind,) = setup.kinds
    path = output / kind / f"{setup.seed}-{index}{KINDS[kind].suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_input(read_corpus(setup.folder, setup.kinds), kind, setup.seed, index))
    return _show([path], [replay(setup, kind, index)])


def _show(paths: Sequence[Path], verdicts: Sequence[Verdict]) -> int:
    for path, verdict in zip(paths, verdicts, strict=True):
        print(f"{path}: {verdict.what} {verdict.exception} {verdict.where} (+{verdict.grew} MiB)\n{verdict.detail}")
    return 1 if any(verdict.is_finding for verdict in verdicts) else 0


def _report(tally: Tally, seed: int, seconds: float, target: Path | None) -> None:
    counts = {kind: asdict(count) for kind, count in tally.counts.items()}
    names = list(asdict(Count()))
    total = {name: (max if name == "most_mib" else sum)(count[name] for count in counts.values()) for name in names}
    table = Table("kind", *names, title=f"seed {seed}, {seconds:.0f} s")
    for kind, count in {**counts, "all": total}.items():
        table.add_row(kind, *(str(count[name]) for name in names))
    Console().print(table)
    for finding in tally.findings.values():
        verdict = finding.verdict
        print(f"\n{finding.kind}: {verdict.what} {verdict.exception} {verdict.where}, {finding.times} times")
        print(f"{verdict.detail}\n  {finding.path}\n  {finding.replay}")
    if target is not None:
        findings = [{**asdict(finding), "path": str(finding.path)} for finding in tally.findings.values()]
        document = {"seed": seed, "seconds": round(seconds), "kinds": counts, "all": total, "findings": findings}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
