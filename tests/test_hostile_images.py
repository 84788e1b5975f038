"""Untrusted images: each file is made for real, and gives the right pixels or a one-line reason."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, features

from smlp_deploy.errors import ImageError
from smlp_deploy.images.decode import FORMATS, MAX_FILE_SIZE, MAX_PIXELS
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.inference.classify import Classifier, Prediction
from smlp_deploy.metadata import Preprocessing
from smlp_deploy.pipeline.export import Export

# Outside of tests Pillow's UserWarnings are ignored, as `smlp_deploy.images.decode` says; pytest makes them errors.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Pixels = NDArray[np.uint8]

AS_IS = Preprocessing(image_size=28, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))
DIGIT = Path(__file__).parent.parent / "images" / "digit-3-1507.jpg"
SIDE = 9459  # the largest square below the limit on pixels

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
needs_jpeg2000 = pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")

# images/digit-3-1507.jpg with the same coefficients coded arithmetically.
ARITHMETIC_JPEG = base64.b85decode(
    b"|JeWF01!$>Nk#wx0RR9200961|JwjV00IF40RaI50RaI50s;a81OoyB0s;jD1Oo&H1qKEN1qKEN2MGuU2MGrT1_%oX2?`1d3JL}Y3k(Yi3<(Mf"
    b"3jfIf3kU!l02~1U5di<p00saM5C#9*00;pA002J#{{ZmLK3WP%r!ud5%SD?;uip38N-C(90yiOj`D64Z(tt*cV+_4RxzL-)@!_;qPaCz6lNq<#"
    b"(@WuziqAr>yl-K{l!yu>iVCij>V5wJPzG4z0X&a-gKd=a6H*-EftB+^Ly&0C!O^&bNQ(p#>g@&dC~W2W`NPu%nqb_{5`$)*0^1WfWh{MlwSPY<"
    b"pM545d))WcZ2hV`aw6L-RK1+}=}E;D&C)t|MmC%qJG8>8=LgZi87oGsQ-qKTHdtg00YkxG0Bu;Ny^Rww`~U=VPED_EX1jPK_VlIqVaZyFRAR0S"
    b"qAT@Y&upY@wI|i36xI8#5lS85E+71Lw2CnbNaK{-J0bAkx2hbGrsa9il9VXT!j-se(!Ql?YOuYY+(Re<ayJ-xys0U?q#G~!@0E<KlxRgM**WZ4"
    b"ZV3AEB)C7%D$Gy6{c&=5V-tBx+i|8XCP@#L$eB={)g?YHj12Xa6<unsDBrS3!DY2w=scWpQ5+Z&%~8Ku2bjYrE4)P^$>N=4|Je"
)


@pytest.fixture(scope="module")
def grey() -> Pixels:
    """A digit, 28 x 28."""
    with Image.open(DIGIT) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def colour(grey: Pixels) -> Pixels:
    """The digit, slightly coloured: 28 x 28 x 3."""
    return np.stack([grey, grey - grey // 8, grey - grey // 5], axis=-1)


@pytest.fixture(scope="module")
def classifier(digits_export: Export) -> Iterator[Classifier]:
    with Classifier.open(digits_export.path) as opened:
        yield opened


def loaded(path: Path) -> Pixels:
    """The RGB pixels that the network sees of a 28 x 28 image: height x width x 3."""
    return load_image(path, AS_IS, np.empty((AS_IS.image_size, AS_IS.image_size, 3), np.uint8))


def reason(path: Path) -> str:
    with pytest.raises(ImageError) as raised:
        load_image(path, AS_IS)
    return str(raised.value)


def in_rgb(plane: Pixels) -> Pixels:
    return np.stack([plane] * 3, axis=-1)


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_, **options)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))


def png(rows: NDArray[np.generic], colour_type: int, *chunks: bytes, size: tuple[int, int] | None = None) -> bytes:
    """A PNG of 8 or 16 bits; `size` is what it claims, if not the truth."""
    width, height = size or (rows.shape[1], rows.shape[0])
    data = rows.astype(rows.dtype.newbyteorder(">"))
    lines = b"".join(b"\0" + line.tobytes() for line in data)
    header = struct.pack(">LLBBBBB", width, height, 8 * rows.dtype.itemsize, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(entries: dict[int, tuple[int, int, int]], data: bytes) -> bytes:
    """A TIFF of one directory: tag -> type, count, value; `data` begins at byte 400."""
    lines = b"".join(struct.pack("<HHLL", tag, *entry) for tag, entry in sorted(entries.items()))
    return (b"II*\0" + struct.pack("<LH", 8, len(entries)) + lines + bytes(4)).ljust(400, b"\0") + data


def orientation_exif(kind: int, count: int, value: int) -> bytes:
    """EXIF of nothing but the orientation, with any type (3 is right), count and value."""
    return b"Exif\0\0II*\0" + struct.pack("<LHHHLLL", 8, 1, 0x0112, kind, count, value, 0)


def ico(content: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHLL", 0, 1, 1, 28, 28, 0, 0, 1, 32, len(content), 22) + content


# Content that is right, with exact pixels: name -> the file's bytes and the RGB pixels it stands for.

Exact = Callable[[Pixels, Pixels], tuple[bytes, Pixels]]


def of_colour(format_: str, **options: object) -> Exact:
    return lambda grey, colour: (encoded(Image.fromarray(colour), format_, **options), colour)


def of_grey(mode: str, format_: str, **options: object) -> Exact:
    return lambda grey, colour: (encoded(Image.fromarray(grey).convert(mode), format_, **options), in_rgb(grey))


def frames(format_: str, **options: object) -> Exact:
    """The digit, and its negative as the second frame."""

    def make(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
        second = Image.fromarray(255 - grey)
        content = encoded(Image.fromarray(grey), format_, save_all=True, append_images=[second], **options)
        return content, in_rgb(grey)

    return make


def palette(*, clear: int | bytes | None) -> Exact:
    def make(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
        colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
        image = Image.fromarray(grey).convert("P")
        image.putpalette(colours.tobytes())
        expected = colours[np.asarray(image)]
        if clear is not None:
            opaque = np.array([index != clear if isinstance(clear, int) else clear[index] for index in range(256)])
            expected = np.where(opaque[np.asarray(image)][..., None], expected, np.uint8(255))
        options = {} if clear is None else {"transparency": clear}
        return encoded(image, "PNG", **options), expected

    return make


def one_bit(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
    bits = Image.fromarray(grey).convert("1", dither=Image.Dither.NONE)
    return encoded(bits, "PNG"), in_rgb(np.where(grey >= 128, np.uint8(255), np.uint8(0)))


def clear_where_dark(mode: str, format_: str) -> Exact:
    """An alpha channel of 0 and 255."""

    def make(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
        opaque = Image.fromarray(np.where(grey < 99, np.uint8(0), np.uint8(255)))
        image = Image.fromarray(colour if mode == "RGBA" else grey).convert(mode)
        image.putalpha(opaque)
        pixels = colour if mode == "RGBA" else in_rgb(grey)
        options = {"lossless": True, "exact": True} if format_ == "WEBP" else {}
        return encoded(image, format_, **options), np.where(grey[..., None] < 99, np.uint8(255), pixels)

    return make


def clear_value(plane: str) -> Exact:
    """A PNG in which one value stands for transparent."""

    def make(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
        expected = np.where(grey[..., None] == grey[14, 14], np.uint8(255), in_rgb(grey))
        value = int(grey[14, 14])
        if plane == "grey":
            return png(grey, 0, chunk(b"tRNS", struct.pack(">H", value))), expected
        if plane == "grey 16":
            return png(grey.astype(np.uint16) * 257, 0, chunk(b"tRNS", struct.pack(">H", value * 257))), expected
        return png(in_rgb(grey), 2, chunk(b"tRNS", struct.pack(">HHH", value, value, value))), expected

    return make


def in_16_bits(colour_type: int) -> Exact:
    """A PNG of 16 bits; the low bytes are noise, except in grey, which is scaled."""

    def make(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
        if colour_type == 0:
            return png(grey.astype(np.uint16) * 257, 0), in_rgb(grey)
        low = np.random.default_rng(0).integers(0, 256, (28, 28, 4), dtype=np.uint16)
        if colour_type == 2:
            return png(colour.astype(np.uint16) * 256 + low[..., :3], 2), colour
        opaque = np.full_like(grey, 255)
        both = np.stack([grey, opaque] if colour_type == 4 else [*np.moveaxis(colour, -1, 0), opaque], axis=-1)
        return png(both.astype(np.uint16) * 256 + low[..., : both.shape[-1]], colour_type), (
            in_rgb(grey) if colour_type == 4 else colour
        )

    return make


def pgm_of_16_bits(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
    return b"P5 28 28 65535\n" + (grey.astype(">u2") * 257).tobytes(), in_rgb(grey)


def big_endian_tiff_of_16_bits(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
    tags = {256: 28, 257: 28, 258: 16, 259: 1, 262: 1, 273: 200, 277: 1, 278: 28, 279: 1568}
    lines = b"".join(struct.pack(">HHLL", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"MM\0*" + struct.pack(">LH", 8, len(tags)) + lines + bytes(4)).ljust(200, b"\0")
    return head + (grey.astype(">u2") * 257).tobytes(), in_rgb(grey)


def cmyk_tiff(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
    inks = np.concatenate([255 - colour, np.zeros((28, 28, 1), np.uint8)], axis=-1)
    return encoded(Image.frombytes("CMYK", (28, 28), inks.tobytes()), "TIFF"), colour


def with_bad_profile(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
    return encoded(Image.fromarray(colour), "PNG", icc_profile=b"no profile"), colour


def overlapping_exif(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
    """EXIF of 480 KB whose 40,000 entries each claim all of it: 19 GB."""
    entries = b"".join(struct.pack("<HHLL", tag, 7, 480_000, 8) for tag in range(40_000))
    return png(colour, 2, chunk(b"eXIf", b"II*\0" + struct.pack("<LH", 8, 40_000) + entries + bytes(4))), colour


def inflating_beyond_its_size(grey: Pixels, colour: Pixels) -> tuple[bytes, Pixels]:
    """A PNG of 28 x 28 with 100 MB of pixels."""
    content = np.zeros((1_200_000, 28, 3), np.uint8)
    content[:28] = colour
    return png(content, 2, size=(28, 28)), colour


EXACT: dict[str, Exact] = {
    "RGB PNG": of_colour("PNG"),
    "BMP": of_colour("BMP"),
    "PPM": of_colour("PPM"),
    "TGA": of_colour("TGA"),
    "TGA, compressed": of_colour("TGA", compression="tga_rle"),
    "TIFF": of_colour("TIFF"),
    "TIFF, LZW": of_colour("TIFF", compression="tiff_lzw"),
    "TIFF, deflate": of_colour("TIFF", compression="tiff_adobe_deflate"),
    "lossless WebP": of_colour("WEBP", lossless=True),
    "ICO": of_colour("ICO", sizes=[(28, 28)]),
    "ICO of a bitmap": of_colour("ICO", sizes=[(28, 28)], bitmap_format="bmp"),
    "wide gamut": of_colour("PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
    "damaged profile": with_bad_profile,
    "grey PNG": of_grey("L", "PNG"),
    "grey GIF": of_grey("L", "GIF"),
    "grey BMP": of_grey("L", "BMP"),
    "palette with alpha, PA": of_grey("PA", "TIFF"),
    "1-bit": one_bit,
    "palette": palette(clear=None),
    "palette, one clear": palette(clear=0),
    "palette, some clear": palette(clear=bytes([0, 255, 0] * 85 + [255])),
    "RGBA PNG": clear_where_dark("RGBA", "PNG"),
    "RGBA WebP": clear_where_dark("RGBA", "WEBP"),
    "RGBA TIFF": clear_where_dark("RGBA", "TIFF"),
    "LA": clear_where_dark("LA", "PNG"),
    "RGB PNG, a colour clear": clear_value("rgb"),
    "grey PNG, a value clear": clear_value("grey"),
    "16-bit grey PNG, a value clear": clear_value("grey 16"),
    "16-bit grey PNG": in_16_bits(0),
    "16-bit RGB PNG": in_16_bits(2),
    "16-bit LA PNG": in_16_bits(4),
    "16-bit RGBA PNG": in_16_bits(6),
    "16-bit PGM": pgm_of_16_bits,
    "16-bit big-endian TIFF": big_endian_tiff_of_16_bits,
    "CMYK TIFF": cmyk_tiff,
    "animated GIF": frames("GIF"),
    "animated WebP": frames("WEBP", lossless=True),
    "APNG": frames("PNG"),
    "pages of a TIFF": frames("TIFF"),
    "overlapping EXIF": overlapping_exif,
    "more content than pixels": inflating_beyond_its_size,
}


@pytest.mark.parametrize("name", EXACT)
def test_right_content_gives_its_exact_pixels_whatever_its_name(
    name: str, tmp_path: Path, grey: Pixels, colour: Pixels
) -> None:
    content, expected = EXACT[name](grey, colour)
    for suffix in (".jpg", ".txt", ""):
        path = tmp_path / f"wrong{suffix}"
        path.write_bytes(content)
        np.testing.assert_array_equal(loaded(path), expected)


@needs_jpeg2000
def test_lossless_jpeg_2000(tmp_path: Path, grey: Pixels, colour: Pixels) -> None:
    for no_jp2 in (False, True):
        (tmp_path / "a.jp2").write_bytes(encoded(Image.fromarray(colour), "JPEG2000", no_jp2=no_jp2))
        np.testing.assert_array_equal(loaded(tmp_path / "a.jp2"), colour)


# Content that is right, lossily coded: the digit is still read.


def without_adobe_marker(jpeg: bytes) -> bytes:
    begin = jpeg.index(b"\xff\xee")
    return jpeg[:begin] + jpeg[begin + 2 + struct.unpack_from(">H", jpeg, begin + 2)[0] :]


def cmyk_jpeg(colour: Pixels) -> bytes:
    inks = np.concatenate([255 - colour, np.zeros((28, 28, 1), np.uint8)], axis=-1)
    return encoded(Image.frombytes("CMYK", (28, 28), inks.tobytes()), "JPEG", quality=100)


def ycck_jpeg(colour: Pixels) -> bytes:
    """The inks' complement in Y, Cb and Cr, stored inverted as Adobe does; Pillow inverts what it writes once more."""
    planes = np.asarray(Image.fromarray(255 - colour).convert("YCbCr"))
    stored = np.concatenate([planes, np.full((28, 28, 1), 255, np.uint8)], axis=-1)
    jpeg = encoded(Image.frombytes("CMYK", (28, 28), (255 - stored).tobytes()), "JPEG", quality=100)
    marker = jpeg.index(b"Adobe") + 11
    return jpeg[:marker] + b"\2" + jpeg[marker + 1 :]


LOSSY: dict[str, Callable[[Pixels], bytes]] = {
    "baseline": lambda colour: encoded(Image.fromarray(colour), "JPEG", quality=95),
    "progressive": lambda colour: encoded(Image.fromarray(colour), "JPEG", quality=95, progressive=True),
    "arithmetic": lambda colour: ARITHMETIC_JPEG,
    "CMYK": cmyk_jpeg,
    "CMYK, no Adobe marker": lambda colour: without_adobe_marker(cmyk_jpeg(colour)),
    "YCCK": ycck_jpeg,
    "MPO": lambda colour: encoded(
        Image.fromarray(colour), "MPO", save_all=True, append_images=[Image.fromarray(255 - colour)], quality=95
    ),
    "WebP": lambda colour: encoded(Image.fromarray(colour), "WEBP", quality=95),
    "TIFF of JPEG": lambda colour: encoded(Image.fromarray(colour), "TIFF", compression="jpeg", quality=95),
    "EXIF garbage": lambda colour: encoded(Image.fromarray(colour), "JPEG", exif=b"Exif\0\0garbage", quality=95),
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_content_is_close_and_classified_right(
    name: str, tmp_path: Path, colour: Pixels, grey: Pixels, classifier: Classifier
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(LOSSY[name](colour))
    expected = in_rgb(grey) if name == "arithmetic" else colour
    assert np.abs(loaded(path).astype(int) - expected).mean() < 6
    (prediction,) = classifier.classify([path])
    assert prediction.scores[0].label == "3"


def test_arithmetic_coding_changes_no_pixel(tmp_path: Path, grey: Pixels) -> None:
    (tmp_path / "a.jpg").write_bytes(ARITHMETIC_JPEG)
    np.testing.assert_array_equal(loaded(tmp_path / "a.jpg"), in_rgb(grey))


@needs_avif
def test_avif_is_classified_right_and_turned(tmp_path: Path, colour: Pixels, classifier: Classifier) -> None:
    image, paths = Image.fromarray(colour), [tmp_path / "upright.avif", tmp_path / "turned.avif"]
    paths[0].write_bytes(encoded(image, "AVIF", quality=95))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    paths[1].write_bytes(encoded(turned, "AVIF", quality=95, exif=orientation_exif(3, 1, 6)))
    assert [prediction.scores[0].label for prediction in classifier.classify(paths)] == ["3", "3"]


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(format_: str, orientation: int, tmp_path: Path, colour: Pixels) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if format_ == "WEBP" else {"subsampling": 0} if format_ == "JPEG" else {}
    content = encoded(Image.fromarray(colour), format_, exif=exif, **options)
    (tmp_path / "a").write_bytes(content)
    stored = np.asarray(Image.open(io.BytesIO(content))) if format_ == "JPEG" else colour
    np.testing.assert_array_equal(loaded(tmp_path / "a"), UPRIGHT[orientation](stored))


NO_ORIENTATION = {
    "0": orientation_exif(3, 1, 0),
    "9": orientation_exif(3, 1, 9),
    "65535": orientation_exif(3, 1, 65535),
    "a string": orientation_exif(2, 2, 0x36),
    "a byte": orientation_exif(1, 1, 6),
    "a fraction elsewhere": orientation_exif(5, 1, 0xFFFFFFF0),
    "an unknown type": orientation_exif(99, 1, 6),
    "a huge count": orientation_exif(3, 0xFFFFFFFF, 8),
    "no entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    "a directory beyond the end": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "no header": b"Exif\0\0garbage!",
    "nothing": b"Exif\0\0",
}


@pytest.mark.parametrize("name", NO_ORIENTATION)
def test_an_image_with_damaged_exif_is_taken_as_it_lies(name: str, tmp_path: Path, colour: Pixels) -> None:
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(colour), "PNG", exif=NO_ORIENTATION[name]))
    np.testing.assert_array_equal(loaded(tmp_path / "a.png"), colour)
    jpeg = encoded(Image.fromarray(colour), "JPEG", exif=NO_ORIENTATION[name])
    (tmp_path / "a.jpg").write_bytes(jpeg)
    np.testing.assert_array_equal(loaded(tmp_path / "a.jpg"), np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1)])
def test_thin_images_are_classified(size: tuple[int, int], tmp_path: Path, classifier: Classifier) -> None:
    Image.new("RGB", size, "white").save(tmp_path / "a.png")
    np.testing.assert_array_equal(loaded(tmp_path / "a.png"), np.full((28, 28, 3), 255))
    (prediction,) = classifier.classify([tmp_path / "a.png"])
    assert prediction.scores


# Content that is wrong: name -> bytes and the reason.

BOMB = zlib.compress(bytes(50_000_000), 1)
FTYP = struct.pack(">L", 24) + b"ftyp"
HEIC = FTYP + b"heic\0\0\0\0mif1heic" + bytes(200)
BAD: dict[str, tuple[bytes, str]] = {
    "text": (b"this is no image", "not an image in a supported format"),
    "HTML": (b"<!DOCTYPE html><html><body>404</body></html>", "not an image in a supported format"),
    "NUL bytes": (bytes(1000), "not an image in a supported format"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "not an image in a supported format"),
    "EPS": (encoded(Image.new("RGB", (28, 28)), "EPS"), "not an image in a supported format"),
    "PCX": (encoded(Image.new("RGB", (28, 28)), "PCX"), "not an image in a supported format"),
    "HEIC": (HEIC, r"a HEIF \(HEIC\) image, which Pillow has no codec for; convert it to JPEG or PNG"),
    "JPEG's first bytes": (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "damaged image: Truncated File Read"),
    "JPEG's signature": (b"\xff\xd8\xff", "damaged image: its JPEG header cannot be read"),
    "PNG's signature": (b"\x89PNG\r\n\x1a\n", "damaged image: its PNG header cannot be read"),
    "float TIFF": (encoded(Image.new("F", (28, 28)), "TIFF"), r"32-bit pixels \(mode F\) have no stated range"),
    "32-bit TIFF": (encoded(Image.new("I", (28, 28)), "TIFF"), r"32-bit pixels \(mode I\) have no stated range"),
    "float PFM": (b"Pf\n1 1\n-1.0\n" + bytes(4), r"32-bit pixels \(mode F\) have no stated range"),
    "inflating text": (
        png(np.zeros((8, 8, 3), np.uint8), 2, chunk(b"zTXt", b"a\0\0" + BOMB)),
        "text or a colour profile in it inflates to more than Pillow allows",
    ),
    "inflating profile": (
        png(np.zeros((8, 8, 3), np.uint8), 2, chunk(b"iCCP", b"a\0\0" + BOMB)),
        "text or a colour profile in it inflates to more than Pillow allows",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_content_gives_its_reason(name: str, tmp_path: Path) -> None:
    content, expected = BAD[name]
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=expected):
        load_image(tmp_path / "a.jpg", AS_IS)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Pillow means to drop some of the formats it writes
def test_only_listed_formats_are_read(tmp_path: Path) -> None:
    """Everything Pillow can write, under a name that suggests a JPEG."""
    Image.init()
    read, image = set(), Image.new("RGB", (28, 28), "white")
    for format_ in sorted(Image.SAVE.keys() - {"PDF", "HEIF"}):
        try:
            content = encoded(image, format_)
        except (OSError, ValueError, KeyError):  # this format has no RGB
            continue
        (tmp_path / "a.jpg").write_bytes(content)
        try:
            load_image(tmp_path / "a.jpg", AS_IS)
            read.add(format_)
        except ImageError:
            pass
    assert {"JPEG", "PNG", "BMP", "PPM", "TIFF", "GIF", "TGA", "ICO"} <= read
    assert read <= {*FORMATS, "MPO"}


@pytest.mark.parametrize(
    ("codec", "content", "expected"),
    [
        ("PIL._avif", FTYP + b"avif\0\0\0\0mif1miaf", "a AVIF image, which this Pillow was built without a codec for"),
        ("PIL._webp", b"RIFF\x24\0\0\0WEBPVP8 " + bytes(28), "a WEBP image, which this Pillow was built without"),
    ],
)
def test_a_missing_codec_is_named(codec: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    script = (
        "import sys; from pathlib import Path\n"
        f"sys.modules[{codec!r}] = None\n"  # as where it is not installed
        "from smlp_deploy.errors import ImageError\n"
        "from smlp_deploy.metadata import Preprocessing\n"
        "from smlp_deploy.images.preprocessing import load_image\n"
        f"try: load_image(Path({str(tmp_path / 'a.jpg')!r}), Preprocessing(image_size=28))\n"
        "except ImageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert expected in done.stdout
    assert done.stderr == ""


# Damage at every place.


def small_files(grey: Pixels, colour: Pixels) -> dict[str, bytes]:
    exif = orientation_exif(3, 1, 6)
    files = {
        "jpeg": encoded(Image.fromarray(colour), "JPEG", exif=exif),
        "progressive": encoded(Image.fromarray(colour), "JPEG", progressive=True),
        "arithmetic": ARITHMETIC_JPEG,
        "png": encoded(Image.fromarray(colour), "PNG", exif=exif),
        "gif": encoded(Image.fromarray(grey), "GIF"),
        "webp": encoded(Image.fromarray(colour), "WEBP"),
        "lzw": encoded(Image.fromarray(grey), "TIFF", compression="tiff_lzw"),
        "bmp": encoded(Image.fromarray(grey), "BMP"),
        "tga": encoded(Image.fromarray(grey), "TGA", compression="tga_rle"),
        "ico": ico(encoded(Image.fromarray(grey), "PNG")),
        "pgm": encoded(Image.fromarray(grey), "PPM"),
    }
    if features.check("jpg_2000"):
        files["jp2"] = encoded(Image.fromarray(grey), "JPEG2000")
    if features.check("avif"):
        files["avif"] = encoded(Image.fromarray(colour), "AVIF")
    return files


def pixels_or_reason(path: Path, content: bytes) -> str | None:
    """Write a new file and load it, see that whatever came of it is proper, and return the reason, if any."""
    path.unlink(missing_ok=True)  # ext4 writes a file that was emptied to the disk when it is closed
    path.write_bytes(content)
    try:
        image = load_image(path, AS_IS)
    except ImageError as error:
        text = str(error)
        assert 5 <= len(text) <= 200
        assert text.isprintable()
        assert not any(part in text for part in (str(path), "0x", "<", "Traceback"))
        return text
    assert image.shape == (3, 28, 28)
    assert np.isfinite(image).all()
    return None


def test_files_cut_anywhere(tmp_path: Path, grey: Pixels, colour: Pixels) -> None:
    path, whole = tmp_path / "a.jpg", small_files(grey, colour)
    for name, content in whole.items():
        step = 1 if name == "jpeg" else 3
        for length in range(len(content) - 2, 0, -step):
            found = pixels_or_reason(path, content[:length])
            # Nothing but an end without pixels may be missing. A JPEG 2000 cut between two tiles seems whole.
            assert found or len(content) - length < 30 or name == "jp2", f"{name} cut to {length}"


def test_files_damaged_anywhere(tmp_path: Path, grey: Pixels, colour: Pixels) -> None:
    path, rng = tmp_path / "a.jpg", random.Random(0)
    for name, content in small_files(grey, colour).items():
        reasons = set()
        for _ in range(40 if name in ("avif", "jp2") else 120):
            damaged = bytearray(content)
            for _ in range(rng.choice([1, 3, 10])):
                damaged[rng.randrange(min(len(damaged), rng.choice([64, 10_000])))] = rng.choice(
                    [0, 255, rng.randrange(256)]
                )
            reasons.add(pixels_or_reason(path, bytes(damaged)))
        assert reasons - {None}, f"no damage to {name} was found"


def test_what_pillow_warns_of_is_not_shown(tmp_path: Path, colour: Pixels) -> None:
    for number, exif in enumerate(NO_ORIENTATION.values()):
        (tmp_path / f"{number}.png").write_bytes(encoded(Image.fromarray(colour), "PNG", exif=exif))
    script = (
        "import sys; from pathlib import Path\n"
        "from smlp_deploy.metadata import Preprocessing\n"
        "from smlp_deploy.images.preprocessing import load_image\n"
        "for name in sys.argv[1:]: load_image(Path(name), Preprocessing(image_size=28))\n"
    )
    command = [sys.executable, "-c", script, *map(str, tmp_path.iterdir())]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


# Claims: small files that would take much memory.


def jpeg_of_size(width: int, height: int) -> bytes:
    jpeg = encoded(Image.new("L", (28, 28)), "JPEG")
    start = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :]


def gif_of_size(width: int, height: int) -> bytes:
    """Its frame is larger than its screen, which Pillow then enlarges."""
    gif = encoded(Image.new("L", (28, 28)), "GIF")
    start = gif.index(b",\0\0\0\0") + 5
    return gif[:start] + struct.pack("<HH", width, height) + gif[start + 4 :]


def webp_of_size(width: int, height: int) -> bytes:
    pages = [Image.new("RGBA", (28, 28), colour) for colour in ("red", "blue")]
    webp = encoded(pages[0], "WEBP", save_all=True, append_images=pages[1:])
    return webp[:24] + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little") + webp[30:]


def grey_tiff(**changes: int) -> bytes:
    """A deflated TIFF of 28 x 28 whose tags are changed."""
    tags = {"t256": 28, "t257": 28, "t258": 8, "t259": 8, "t262": 1, "t277": 1} | changes
    data = zlib.compress(bytes(784))
    tags |= {"t325": len(data), "t324": 400} if "t322" in tags else {"t279": len(data), "t273": 400, "t278": 28}
    return tiff({int(tag[1:]): (4, 1, value) for tag, value in tags.items()}, data)


def claims() -> dict[str, bytes]:
    """Small files of more pixels than are allowed, some of them hidden below the surface."""
    wide = Image.new("1", (13_000, 13_000))
    files = {
        "png": png(np.zeros((1, 1), np.uint8), 0, size=(40_000, 40_000)),
        "png just above": png(np.zeros((1, 1), np.uint8), 0, size=(SIDE, SIDE + 1)),
        "png, whole": encoded(wide, "PNG"),
        "jpeg": jpeg_of_size(65_500, 65_500),
        "gif": gif_of_size(65_535, 65_535),
        "bmp": b"BM"
        + struct.pack("<LLL", 100, 0, 54)
        + struct.pack("<LLLHHLLLLLL", 40, 40_000, 40_000, 1, 24, *[0] * 6),
        "ppm": b"P6 99999 99999 255\n" + bytes(99),
        "tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65_535, 65_535, 24, 0) + bytes(99),
        "webp": webp_of_size(16_000, 16_000),
        "ico of a png": ico(encoded(wide, "PNG")),
        "tiff": grey_tiff(t256=40_000, t257=40_000),
        "tiff, tiles": grey_tiff(t322=65_536, t323=16_384),
    }
    if features.check("jpg_2000"):
        jp2 = encoded(Image.new("RGB", (28, 28)), "JPEG2000", no_jp2=True)
        files["j2k"] = jp2[:8] + struct.pack(">LL", 20_000, 20_000) + jp2[16:]
    if features.check("avif"):
        avif = encoded(Image.new("RGB", (28, 28)), "AVIF")
        start = avif.index(b"ispe") + 8
        files["avif"] = avif[:start] + struct.pack(">LL", 16_000, 16_000) + avif[start + 8 :]
    return files


MEASURE = """
import sys
from pathlib import Path
from PIL import Image
from concurrent.futures import ThreadPoolExecutor
from smlp_deploy.errors import ImageError
from smlp_deploy.metadata import Preprocessing
from smlp_deploy.images.preprocessing import load_image

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def reason(path):
    try:
        load_image(Path(path), Preprocessing(image_size=28))
    except ImageError as error:
        return str(error)
    return "no reason"

Image.init()
before = peak()
with ThreadPoolExecutor(int(sys.argv[1])) as pool:
    for text in pool.map(reason, sys.argv[2:]):
        print(text)
print(peak() - before)
"""


def measured(paths: list[Path], *, threads: int) -> tuple[list[str], int]:
    """What a fresh process says about each file, and by how many bytes its memory grew at the most."""
    command = [sys.executable, "-c", MEASURE, str(threads), *map(str, paths)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines[:-1], int(lines[-1])


@needs_proc
def test_claims_are_refused_before_memory_is_spent(tmp_path: Path) -> None:
    files = claims()
    for number, content in enumerate(files.values()):
        (tmp_path / f"{number}.png").write_bytes(content)
    reasons, growth = measured([tmp_path / f"{number}.png" for number in range(len(files))], threads=1)
    for name, text in zip(files, reasons, strict=True):
        assert text == f"more than {MAX_PIXELS} pixels", name
    assert growth < 30_000_000


@needs_proc
def test_all_threads_together_decode_no_more_than_the_largest_image(tmp_path: Path) -> None:
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "a.png")
    reasons, growth = measured([tmp_path / "a.png"] * 3, threads=3)
    assert reasons == ["no reason"] * 3
    assert SIDE * SIDE < growth < 2 * SIDE * SIDE  # one byte per pixel


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.webp").open("wb") as file:
        file.write(b"RIFF\xff\xff\xff\xffWEBPVP8 ")
        file.truncate(MAX_FILE_SIZE + 1)
    assert reason(tmp_path / "a.webp") == f"larger than {MAX_FILE_SIZE} bytes"


# The file system.


def one(classifier: Classifier, path: Path | str) -> Prediction:
    (prediction,) = classifier.classify([path])
    assert prediction.path == os.fspath(path)
    return prediction


def test_odd_names_are_read(tmp_path: Path, classifier: Classifier) -> None:
    odd = (
        "a b.jpg",
        "line\nbreak.jpg",
        "tab\t.jpg",
        "\x1b[31m.jpg",
        "ünï — 数字.jpg",
        "-.jpg",
        "@x.jpg",
        "😀",
        "a'\"`$.jpg",
    )
    for name in (*odd, os.fsdecode(b"\xff\xfe.jpg"), "x" * 255):
        path = tmp_path / name
        path.write_bytes(DIGIT.read_bytes())
        assert one(classifier, path).scores[0].label == "3"


def test_names_that_no_file_can_have(tmp_path: Path, classifier: Classifier) -> None:
    expected = {"a\0b.jpg": "no file can have this name", "\ud800.jpg": "no file can have this name"}
    expected |= {"x" * 256: "file name too long", "x/" * 5000: "file name too long", "": "is a directory"}
    for name, text in expected.items():
        error = one(classifier, f"{tmp_path}/{name}").error
        assert error is not None
        assert error.startswith(text)


def test_links_folders_and_vanished_files(tmp_path: Path, classifier: Classifier) -> None:
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder link.jpg").symlink_to("folder.jpg")
    (tmp_path / "good link.jpg").symlink_to(DIGIT)
    gone = tmp_path / "gone.jpg"
    gone.write_bytes(DIGIT.read_bytes())

    def listed() -> Iterator[Path]:
        yield from (tmp_path / name for name in ("loop.jpg", "dangling.jpg", "folder.jpg", "folder link.jpg"))
        gone.unlink()  # after it was listed, before it is read
        yield from (gone, tmp_path / "good link.jpg")

    found = list(classifier.classify(listed()))
    assert [prediction.error for prediction in found] == [
        "too many levels of symbolic links",
        "no such file or directory",
        "is a directory without images",
        "is a directory without images",
        "no such file or directory",
        None,
    ]
    assert found[-1].scores[0].label == "3"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's are its user's own."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_unreadable_files_and_folders(open_folder: Path) -> None:
    (open_folder / "file.jpg").write_bytes(DIGIT.read_bytes())
    (open_folder / "folder.jpg").mkdir()
    paths = [open_folder / "file.jpg", open_folder / "folder.jpg"]
    for path in paths:
        path.chmod(0)
    root = os.geteuid() == 0  # who may read everything
    if root:
        os.seteuid(65534)
    try:
        reasons = [reason(path) for path in paths]
    finally:
        if root:
            os.seteuid(0)
    assert reasons == ["permission denied"] * 2


class Swapped(type(Path())):  # type: ignore[misc]
    """A path whose file becomes a FIFO as soon as it was looked at."""

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        status: os.stat_result = super().stat(follow_symlinks=follow_symlinks)
        self.unlink()
        os.mkfifo(self)
        return status


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_fifos_and_devices_are_not_opened(tmp_path: Path, classifier: Classifier) -> None:
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    for name in ("fifo.jpg", "zero.jpg", "null.jpg"):
        assert one(classifier, tmp_path / name).error == "not a regular file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
def test_a_fifo_put_in_a_files_place_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(DIGIT.read_bytes())
    with ThreadPoolExecutor(1) as pool:
        try:
            assert pool.submit(reason, Swapped(tmp_path / "a.jpg")).result(timeout=60) == "not a regular file"
        finally:  # let go of a thread that waits after all
            with contextlib.suppress(OSError):
                os.close(os.open(tmp_path / "a.jpg", os.O_WRONLY | os.O_NONBLOCK))


# All of it together.


def mixed_files(folder: Path, grey: Pixels, colour: Pixels) -> dict[str, bool]:
    """Some fifty different files; whether each shows the digit 3."""
    good = {f"good {name}": make(grey, colour)[0] for name, make in EXACT.items() if name in GOOD}
    good |= {f"lossy {name}": make(colour) for name, make in LOSSY.items()}
    bad = {f"bad {name}": content for name, (content, _) in BAD.items()} | {f"bomb {k}": v for k, v in claims().items()}
    bad |= {"empty": b"", **{f"cut to {n}": DIGIT.read_bytes()[:n] for n in range(50, 650, 150)}}
    for name, content in (good | bad).items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (SIDE, SIDE)).save(folder / "large", "PNG", compress_level=1)
    return dict.fromkeys(good, True) | dict.fromkeys(bad, False)


GOOD = {
    "RGB PNG",
    "BMP",
    "TGA",
    "TIFF",
    "lossless WebP",
    "grey GIF",
    "16-bit grey PNG",
    "CMYK TIFF",
    "APNG",
}

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]),) * 2)
from smlp_deploy.cli import main
try:
    main(sys.argv[2:])
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


@needs_proc
def test_ten_thousand_mixed_files_within_a_limit_on_memory(
    tmp_path: Path, grey: Pixels, colour: Pixels, digits_export: Export
) -> None:
    originals, inputs = tmp_path / "originals", tmp_path / "inputs"
    originals.mkdir()
    inputs.mkdir()
    shows_3 = mixed_files(originals, grey, colour)
    names = random.Random(0).choices(sorted(shows_3), k=9_999)
    names.insert(5_000, "large")
    for number, name in enumerate(names):
        (inputs / f"{number:05}.jpg").hardlink_to(originals / name)
    output = tmp_path / "out.jsonl"
    arguments = ["predict", str(inputs), "--model", str(digits_export.path), "-o", str(output)]
    command = [sys.executable, "-c", LIMITED, str(1 << 30), *arguments, "--workers", "4", "--allow-errors"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(record["path"]).name for record in records] == [f"{number:05}.jpg" for number in range(10_000)]
    for name, record in zip(names, records, strict=True):
        if name == "large":
            assert "predictions" in record
        elif shows_3[name]:
            assert record["predictions"][0]["label"] == "3", name
        else:
            assert record["error"].isprintable(), name
            assert "memory" not in record["error"], name
    assert int(done.stderr.splitlines()[-1]) * 1024 < 700_000_000
