"""Opening untrusted image files: what is opened, how much memory it may take, and why it failed.

`docs/images.md` states how each kind of file is handled.
"""

from __future__ import annotations

import ctypes
import io
import math
import os
import re
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import BinaryIO, cast

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from smlp_deploy.errors import ImageError

# Pillow's names of the only formats that are read: it would run Ghostscript for an EPS. HEIF needs a registered plugin.
# MPO is read as the JPEG that it begins with. TGA has no signature, so it is tried last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM", "ICO", "TGA")

EncodedImage = bytes | bytearray | memoryview | BinaryIO
"""An image file that is not on disk."""

MAX_PIXELS = 89_478_485  # of one image, and of all that are decoded at once; Pillow warns above it
MAX_FILE_SIZE = 3 << 28  # bytes; the largest image takes 0.7 GB uncompressed

_LARGE_FILE = 1 << 24  # bytes; Pillow may read all of a file when it opens it
_LARGE_IMAGE = 1 << 22  # pixels
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"  # signatures
_ICO = b"\0\0\1\0"  # signature of a format that Pillow decodes on opening
_HIDING = ("AVIF", "HEIF", "JPEG2000")  # a small image of these can make the decoder allocate a large one
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevm", b"hevs", b"hevx", b"mif1", b"msf1"))
_OBJECT = re.compile(r"<[^<>]*(?: at 0x|name=)[^<>]*>")  # such as <_io.BufferedReader name='...'>

# Pillow only warns between its limit (89 megapixels) and twice that; here that is an error.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# It also warns of odd but readable files, such as damaged EXIF: noise when classifying a million files.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class PixelBudget:
    """Limits the pixels decoded at once, whatever the number of threads; first come, first served."""

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels`, at most the whole budget, are free, and hold them. A thread must not take twice."""
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and pixels <= self._free)
                self._free -= pixels
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_budget = PixelBudget(MAX_PIXELS)


@contextmanager
def open_image(source: Path | EncodedImage) -> Iterator[Image.Image]:
    """An image that Pillow has opened but not decoded, with its share of the budget until the block ends.

    Args:
        source: a file's path, its bytes, or an open binary file, which is read from where it stands.

    Raises:
        ImageError: the file is refused, or not an image.
        Exception: whatever else Pillow raises for damaged files; `reason_of` explains it.
    """
    with _readable(source) as (file, size), ExitStack() as held:
        prefix = file.read(16)
        alone = prefix.startswith(_ICO) or size > _LARGE_FILE
        if alone:
            held.enter_context(_budget.take(MAX_PIXELS))
        try:
            opened = _opened(file, prefix)
        except UnidentifiedImageError:
            raise ImageError(_unidentified(prefix)) from None
        with closing(opened) as image:
            pixels = _pixels(image)
            if pixels > MAX_PIXELS:
                raise ImageError(f"more than {MAX_PIXELS} pixels")
            if not alone:
                held.enter_context(_budget.take(MAX_PIXELS if image.format in _HIDING else pixels))
            if pixels > _LARGE_IMAGE:
                held.callback(give_memory_back)
            yield image


@contextmanager
def hold_pixels(image: Image.Image) -> Iterator[None]:
    """The share of the budget for an image that a caller has opened.

    Raises:
        ImageError: it is too large.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"more than {MAX_PIXELS} pixels")
    with _budget.take(image.width * image.height):
        yield


@contextmanager
def _readable(source: Path | EncodedImage) -> Iterator[tuple[BinaryIO, int]]:
    """A file to read, and its size."""
    if isinstance(source, Path):
        with _regular_file(source) as file:
            yield file, os.fstat(file.fileno()).st_size
        return
    content = bytes(source if isinstance(source, (bytes, bytearray, memoryview)) else source.read(MAX_FILE_SIZE + 1))
    _check_size(len(content))
    yield io.BytesIO(content), len(content)


@contextmanager
def _regular_file(path: Path) -> Iterator[BinaryIO]:
    """The open file, if it is a regular one. Opening never blocks, even if the file is replaced after the check."""
    try:
        status = path.stat()
    except ValueError:  # a null character, or one that file names cannot encode
        raise ImageError("no file can have this name") from None
    if stat.S_ISDIR(status.st_mode):
        os.scandir(path).close()  # an unreadable directory raises its own reason
    _check_kind(status)
    with open(path, "rb", opener=_open_without_waiting) as file:
        _check_kind(os.fstat(file.fileno()))
        yield file


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_kind(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("is a directory without images")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not a regular file")
    _check_size(status.st_size)


def _check_size(size: int) -> None:
    if not size:
        raise ImageError("empty file")
    if size > MAX_FILE_SIZE:
        raise ImageError(f"larger than {MAX_FILE_SIZE} bytes")


def _pixels(image: Image.Image) -> int:
    """How many pixels will be in memory when the image is decoded."""
    pixels = image.width * image.height
    if isinstance(image, TiffImageFile):  # its tiles may be far larger than the image
        tile = [image.tag_v2.get(tag) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength)]
        pixels = max(pixels, math.prod(side if isinstance(side, int) else 0 for side in tile))
    return pixels


def give_memory_back() -> None:
    """Return freed memory to the system: glibc keeps it per thread, of images several times the budget in total."""
    if trim := _glibc("malloc_trim"):
        trim(0)


@cache
def keep_memory() -> None:
    """Have glibc keep the memory of small images for the next ones, in this process; call it before threads start.

    By default it returns what is free at the end of a thread's memory to the system, 1.5 MB or so, and gets it back for
    the next image page by page: 281 page faults for each JPEG of 500 x 375, during which other threads wait. With these
    settings there are 17, two threads on two cores are 1.3 times as fast, and the peak memory is the same.
    """
    if set_option := _glibc("mallopt"):
        set_option(_M_MMAP_THRESHOLD, _LARGE_FILE)
        set_option(_M_TRIM_THRESHOLD, 4 * _LARGE_FILE)


@cache
def _glibc(function: str) -> Callable[..., int] | None:
    try:
        return cast(Callable[..., int], getattr(ctypes.CDLL(None), function))
    except (AttributeError, OSError, TypeError):  # only glibc has it or needs it
        return None


def _opened(file: BinaryIO, prefix: bytes) -> Image.Image:
    """The image in a file; Pillow loads its other formats, in some 0.1 s, only for one that needs them."""
    if prefix.startswith((_JPEG, _PNG)):
        with suppress(UnidentifiedImageError):
            return Image.open(file, formats=("JPEG", "PNG"))
    return Image.open(file, formats=_formats())


def _formats() -> tuple[str, ...]:
    Image.init()  # Image.open raises KeyError for a name that Pillow does not know
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _unidentified(prefix: bytes) -> str:
    """Why a file that begins with `prefix` was not identified as an image."""
    formats = _formats()
    if "HEIF" not in formats and prefix[4:8] == b"ftyp" and prefix[8:12] in _HEIF_BRANDS:
        return "a HEIF (HEIC) image, which Pillow has no codec for; convert it to JPEG or PNG"
    for name in formats:
        accept = Image.OPEN[name][1]
        verdict = accept(prefix) if accept else False
        if isinstance(verdict, str):
            return f"a {name} image, which this Pillow was built without a codec for"
        if verdict:
            return f"damaged image: its {name} header cannot be read"
    return f"not an image in a supported format ({', '.join(formats)})"


def reason_of(error: Exception) -> str:
    """What a file system or Pillow error says about the file, in one line and without our own paths."""
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"more than {Image.MAX_IMAGE_PIXELS} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = " ".join(_OBJECT.sub("the file", str(error)).split())
    if "MAX_TEXT" in text:
        return "damaged image: text or a colour profile in it inflates to more than Pillow allows"
    if isinstance(error, MemoryError) or "out of memory" in text:
        return "not enough memory to decode it"
    if not text or not isinstance(error, (OSError, ValueError, SyntaxError)):
        text = f"{type(error).__name__} {text}".rstrip()
    return f"damaged image: {text}"
