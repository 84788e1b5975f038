"""From an image file to the network's input, as `Preprocessing` describes.

The result equals that of torchvision's PIL path (Resize with antialias on the shorter side, CenterCrop, ToTensor,
Normalize) bit for bit; only an image hundreds of times as long as it is wide may have pixels off by 1 of 255.
`docs/images.md` covers orientation, transparency, CMYK, 16-bit images and the limits on untrusted files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ExifTags, Image

from smlp_deploy.errors import GpuError, ImageError
from smlp_deploy.images.decode import EncodedImage, hold_pixels, open_image, reason_of
from smlp_deploy.images.find import InlineImage
from smlp_deploy.images.remote import is_remote, read_object
from smlp_deploy.metadata import Preprocessing

ImageSource = str | Path | EncodedImage | Image.Image | NDArray[np.uint8]
"""An image: the path, the bytes or the open binary file of an image file, an image of Pillow's, or RGB pixels, uint8
H, W, 3."""

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_WIDEST_FILTER = 3  # source pixels on either side at scale 1: Lanczos
_LONG = 1 << 16  # an axis that would become longer than this is never resized whole
_BAND = 1 << 20  # pixels converted to RGB at a time
# From Pillow 13 a resize whose height shrinks much more than its width starts with the vertical pass.
_MAY_START_VERTICALLY = int(PIL.__version__.split(".")[0]) >= 13

# EXIF orientation: the transpose that makes the image upright, whether it swaps the axes, which source axes it mirrors.
_TURNS: dict[int, tuple[Image.Transpose | None, bool, bool, bool]] = {
    1: (None, False, False, False),
    2: (Image.Transpose.FLIP_LEFT_RIGHT, False, True, False),
    3: (Image.Transpose.ROTATE_180, False, True, True),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, False, False, True),
    5: (Image.Transpose.TRANSPOSE, True, False, False),
    6: (Image.Transpose.ROTATE_270, True, False, True),
    7: (Image.Transpose.TRANSVERSE, True, True, True),
    8: (Image.Transpose.ROTATE_90, True, True, False),
}


class Decoder(Protocol):
    """Decodes some kinds of images in place of Pillow."""

    def decode(self, image: Image.Image) -> Image.Image | None:
        """The decoded form of an image that Pillow has opened, with its `info`; None to leave it to Pillow."""
        ...


def load_image(
    source: ImageSource, preprocessing: Preprocessing, out: NDArray[Any] | None = None, decoder: Decoder | None = None
) -> NDArray[Any]:
    """The network's input for one image; see `prepare`. After an error, `out` may have any values.

    Args:
        source: the image.
        preprocessing: how to prepare it.
        out: where to write it.
        decoder: of files, asked first; by default Pillow decodes everything.

    Raises:
        ImageError: it cannot be read as an image; the message is a one-line reason.
        GpuError: the decoder cannot go on.
    """
    try:
        if isinstance(source, (Image.Image, np.ndarray)):
            opened = source if isinstance(source, Image.Image) else _from_pixels(source)
            with hold_pixels(opened):
                return prepare(opened, preprocessing, out)
        if isinstance(source, InlineImage):
            source = source.content
        elif isinstance(source, str) and is_remote(source):
            source = read_object(source)
        with open_image(Path(source) if isinstance(source, str) else source) as image:
            decoded = None if decoder is None else decoder.decode(image)
            return prepare(image if decoded is None else decoded, preprocessing, out)
    except (GpuError, ImageError):
        raise
    # Pillow's decoders raise almost anything on damaged files; only this one image is affected.
    except Exception as error:
        raise ImageError(reason_of(error)) from None


def _from_pixels(pixels: NDArray[Any]) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        shape = "x".join(map(str, pixels.shape))
        raise ImageError(f"an array of {pixels.dtype} {shape}, not of uint8 HxWx3, which RGB pixels are")
    return Image.fromarray(pixels)


def prepare(image: Image.Image, preprocessing: Preprocessing, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """The network's input for an image.

    Args:
        image: of any mode.
        preprocessing: how to prepare it.
        out: where to write it: float32, 3 x image_size x image_size, for normalized values (a new array by default), or
            uint8, image_size x image_size x 3, for pixels.

    Returns:
        `out`.

    Raises:
        ImageError: the pixels cannot be converted to RGB; see `to_rgb`.
    """
    pixels = np.asarray(resize_and_crop(image, preprocessing))
    if out is None:
        out = np.empty((3, *pixels.shape[:2]), np.float32)
    if out.dtype == np.uint8:
        np.copyto(out, pixels)
    else:
        normalize(pixels, preprocessing, out)
    return out


def normalize(pixels: NDArray[np.uint8], preprocessing: Preprocessing, out: NDArray[np.float32]) -> None:
    """Write `(pixels / 255 - mean) / std`, computed in float32, to `out`.

    Args:
        pixels: ..., H, W, 3.
        preprocessing: with the mean and the standard deviation.
        out: ..., 3, H, W.
    """
    scaled = np.divide(pixels, np.float32(255), dtype=np.float32)
    scaled -= np.array(preprocessing.mean, np.float32)
    scaled /= np.array(preprocessing.std, np.float32)
    np.copyto(out, np.moveaxis(scaled, -1, -3))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, transparency over white, 16-bit grey scaled to 8 bits; each pixel independently.

    Raises:
        ImageError: 32-bit pixels, whose range no format states.
    """
    _check_mode(image)
    if image.mode.startswith("I;16"):
        image = _in_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_mode(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise ImageError(f"32-bit pixels (mode {image.mode}) have no stated range; convert the image to 8 or 16 bits")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with an alpha channel if a value marks transparency."""
    wide = np.asarray(image, dtype=np.uint32)
    grey = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    opaque = np.where(wide == image.info["transparency"], np.uint8(0), np.uint8(255))
    return Image.merge("LA", (grey, Image.fromarray(opaque)))


class _Upright:
    """A decoded image, turned upright by its EXIF orientation and converted to RGB part by part.

    `ImageOps.exif_transpose` on the whole image holds two copies of it: 402 MiB instead of 234 for a 48-megapixel JPEG.
    On a part it would still need the part's place in the source, and would parse and write EXIF every time.
    """

    def __init__(self, image: Image.Image) -> None:
        if image.format == "PPM" and image.mode == "I":
            image = image.convert("I;16")  # Pillow has scaled these to 16 bits
        _check_mode(image)
        image.load()
        self._image = image
        self._turn, self._swaps, self._mirrors_x, self._mirrors_y = _TURNS[_orientation(image)]
        width, height = image.size
        self.size = (height, width) if self._swaps else (width, height)

    def part(self, left: int, top: int, right: int, bottom: int) -> Image.Image:
        if self._swaps:
            left, top, right, bottom = top, left, bottom, right
        if self._mirrors_x:
            left, right = self._image.width - right, self._image.width - left
        if self._mirrors_y:
            top, bottom = self._image.height - bottom, self._image.height - top
        part = self._image.crop((left, top, right, bottom))
        return to_rgb(part if self._turn is None else part.transpose(self._turn))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except MemoryError:
        raise
    except Exception:  # damaged EXIF raises many types of errors; the pixels are still good
        return 1
    return orientation if isinstance(orientation, int) and orientation in _TURNS else 1


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize the shorter side to `preprocessing.resize` and crop the centre, computing little beyond the crop's pixels.

    The two passes run separately, in the order in which Pillow runs them on a whole image; the first works band by
    band, each converted to RGB just before.

    Args:
        image: of any mode; it is turned upright and converted to RGB.
        preprocessing: the sizes and the interpolation.

    Returns:
        RGB, image_size x image_size.

    Raises:
        ImageError: the pixels cannot be converted to RGB; see `to_rgb`.
    """
    upright = _Upright(image)
    width, height = upright.size
    short, size = preprocessing.resize, preprocessing.image_size
    new_width = short if width <= height else int(short * width / height)
    new_height = short if height <= width else int(short * height / width)
    columns, rows = _span(width, new_width, size), _span(height, new_height, size)
    resampling = _RESAMPLING[preprocessing.interpolation]
    if _MAY_START_VERTICALLY and height - new_height > max(0, 2 * (width - new_width)):
        half = Image.new("RGB", (columns.end - columns.begin, size))
        for begin, end in _bands(columns, rows):
            band = _resize_height(upright.part(begin, rows.begin, end, rows.end), rows, size, resampling)
            half.paste(band, (begin - columns.begin, 0))
        return _resize_width(half, columns, size, resampling)
    half = Image.new("RGB", (size, rows.end - rows.begin))
    for begin, end in _bands(rows, columns):
        band = _resize_width(upright.part(columns.begin, begin, columns.end, end), columns, size, resampling)
        half.paste(band, (0, begin - rows.begin))
    return _resize_height(half, rows, size, resampling)


def _bands(axis: _Span, across: _Span) -> Iterator[tuple[int, int]]:
    """The source pixels of `axis`, in steps of as many lines as make about _BAND pixels."""
    step = max(1, _BAND // (across.end - across.begin))
    for begin in range(axis.begin, axis.end, step):
        yield begin, min(begin + step, axis.end)


@dataclass(frozen=True)
class _Span:
    """What one axis of the crop is computed from.

    Source pixels `begin` to `end`, the part `start` to `stop` of them (float), resized to `length` pixels; the first
    `skip` of these lie outside the crop.
    """

    begin: int
    end: int
    start: float
    stop: float
    length: int
    skip: int


@lru_cache(maxsize=1024)
def _span(length: int, resized: int, size: int) -> _Span:
    """The smallest part of an axis that gives the same pixels as resizing all of it.

    Pillow takes the ends as float32. If float32 cannot hold them exactly, the whole axis is resized, unless it is so
    long that this would take much memory: then a pixel may be off by 1.
    """
    first = round((resized - size) / 2)
    scale = Fraction(length, resized)
    margin = math.ceil(_WIDEST_FILTER * max(scale, Fraction(1))) + 1
    begin = max(0, math.floor(first * scale) - margin)
    end = min(length, math.ceil((first + size) * scale) + margin)
    start, stop = first * scale - begin, (first + size) * scale - begin
    exact = all(Fraction(float(np.float32(number))) == number for number in (start, stop, stop - start))
    if exact or resized > _LONG:
        return _Span(begin, end, float(start), float(stop), size, 0)
    return _Span(0, length, 0, length, resized, first)


def _resize_width(image: Image.Image, span: _Span, size: int, resampling: Image.Resampling) -> Image.Image:
    box = (span.start, 0, span.stop, image.height)
    resized = image.resize((span.length, image.height), resampling, box=box)
    return resized.crop((span.skip, 0, span.skip + size, image.height))


def _resize_height(image: Image.Image, span: _Span, size: int, resampling: Image.Resampling) -> Image.Image:
    box = (0, span.start, image.width, span.stop)
    resized = image.resize((image.width, span.length), resampling, box=box)
    return resized.crop((0, span.skip, image.width, span.skip + size))
