"""From an image file to the network's input, as `Preprocessing` describes.

The numbers are those of torchvision's PIL path (Resize with antialias on the shorter side, CenterCrop, ToTensor,
Normalize), bit for bit; only an image hundreds of times as long as it is wide may have pixels off by 1 of 255. What is
done with orientation, transparency, CMYK and 16-bit images is stated in `docs/images.md`.
"""

from __future__ import annotations

import math
import stat
import warnings
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from smlp_deploy.errors import ImageError
from smlp_deploy.metadata import Preprocessing

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_WIDEST_FILTER = 3  # source pixels on either side at scale 1: Lanczos
_LONG = 1 << 16  # an axis that would become longer than this is never resized whole
# From Pillow 13 a resize whose height shrinks much more than its width starts with the vertical pass.
_MAY_START_VERTICALLY = int(PIL.__version__.split(".")[0]) >= 13

# Pillow merely warns between its limit (89 megapixels) and twice that; here the limit is the limit.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def load_image(path: Path, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """The network's input for one image file: float32, 3 x image_size x image_size.

    Raises:
        ImageError: with a one-line reason, for whatever is wrong with the file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO would block for ever
            raise ImageError("is a directory without images" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if not status.st_size:
            raise ImageError("empty file")
        with Image.open(path) as image:
            return prepare(image, preprocessing)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image in a format that Pillow reads") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {Image.MAX_IMAGE_PIXELS} pixels") from None
    except OSError as error:
        raise ImageError(error.strerror.lower() if error.strerror else f"damaged image: {error}") from None
    # A damaged file makes Pillow's many decoders raise almost anything; whatever it is, this one image is at fault.
    except Exception as error:
        raise ImageError(f"damaged image: {error or type(error).__name__}") from None


def prepare(image: Image.Image, preprocessing: Preprocessing) -> NDArray[np.float32]:
    """The network's input for a decoded image: float32, 3 x image_size x image_size."""
    crop = resize_and_crop(to_rgb(image), preprocessing)
    scaled = np.asarray(crop, dtype=np.float32) / np.float32(255)
    normalised = (scaled - np.array(preprocessing.mean, np.float32)) / np.array(preprocessing.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, upright as EXIF says, transparency over white, 16-bit grey scaled to 8 bits.

    Raises:
        ImageError: 32-bit pixels, whose range no format states.
    """
    if image.mode in ("I", "F"):
        raise ImageError(f"32-bit pixels (mode {image.mode}) have no stated range; convert the image to 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        wide = np.asarray(image, dtype=np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize the shorter side to `preprocessing.resize` and crop the centre, computing little but the crop's pixels.

    The two passes are made one by one, in the order in which Pillow makes them when it resizes the whole image.
    """
    width, height = image.size
    short, size = preprocessing.resize, preprocessing.image_size
    new_width = short if width <= height else int(short * width / height)
    new_height = short if height <= width else int(short * height / width)
    columns, rows = _span(width, new_width, size), _span(height, new_height, size)
    image = image.crop((columns.begin, rows.begin, columns.end, rows.end))
    resampling = _RESAMPLING[preprocessing.interpolation]
    if _MAY_START_VERTICALLY and height - new_height > max(0, 2 * (width - new_width)):
        return _resize_width(_resize_height(image, rows, size, resampling), columns, size, resampling)
    return _resize_height(_resize_width(image, columns, size, resampling), rows, size, resampling)


@dataclass(frozen=True)
class _Span:
    """What one axis of the crop is computed from.

    Source pixels `begin` to `end`, the part `start` to `stop` of them (float), resized to `length` pixels of which the
    first `skip` are not of the crop.
    """

    begin: int
    end: int
    start: float
    stop: float
    length: int
    skip: int


@lru_cache(maxsize=1024)
def _span(length: int, resized: int, size: int) -> _Span:
    """The least of an axis that gives the same pixels as resizing all of it.

    Pillow takes the ends as float32. Where they are no such numbers the whole axis is resized, unless it is so long
    that this would cost much memory: there a pixel may be off by 1.
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
