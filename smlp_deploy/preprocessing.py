"""From an image file to the network's input, as `Preprocessing` describes.

The numbers are those of torchvision's PIL path (Resize with antialias on the shorter side, CenterCrop, ToTensor,
Normalize), within 1 of 255 on any pixel; only the crop's own pixels are ever resized. What is done with orientation,
transparency, CMYK and 16-bit images is stated in `docs/images.md`.
"""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

import numpy as np
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
    """Resize the shorter side to `preprocessing.resize` and crop the centre, computing only the crop's pixels."""
    width, height = image.size
    short, size = preprocessing.resize, preprocessing.image_size
    new_width = short if width <= height else int(short * width / height)
    new_height = short if height <= width else int(short * height / width)
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    scale_x, scale_y = width / new_width, height / new_height
    box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
    return image.resize((size, size), _RESAMPLING[preprocessing.interpolation], box=box)
