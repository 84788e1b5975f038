"""JPEG files decoded on a GPU by nvImageCodec, by option only: its pixels are not always those of Pillow.

Only decoding moves. Which files are read at all, their limits, orientation, resize and crop are those of every image.
Before a run the bundled images are decoded both ways, and `check_pixels` refuses a decoder that differs.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from smlp_deploy.dependencies import find_gpu, require
from smlp_deploy.errors import GpuError, MissingDependencyError
from smlp_deploy.images.defaults import bundled_images
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.metadata import Preprocessing

MODULE = "nvidia.nvimgcodec"

MOST = 4
"""Levels of 255 by which a prepared pixel may differ from Pillow's. On an H100 nvJPEG 13.0 differed by 1 on the bundled
images, and by 3 on a progressive one; without interpolated chroma it differs by up to 44."""

_OPTIONS = ":fancy_upsampling=1"
_END_OF_IMAGE, _START_OF_SCAN = b"\xff\xd9", b"\xff\xda"
_SAMPLINGS = ((1, 1), (2, 1), (1, 2), (2, 2))
_YCBCR = [1, 2, 3]  # component numbers of JFIF


class GpuDecoder:
    """Decodes ordinary JPEG files.

    Args:
        library: nvImageCodec.
        device: the GPU's number in CUDA, or the library's number for "no GPU", which serves tests.
        backends: the library's kinds of decoders; by default those that compute on the GPU.

    Raises:
        MissingDependencyError: it does not start here.
    """

    def __init__(self, library: Any, *, device: int = 0, backends: Sequence[Any] = ()) -> None:
        self._library = library
        self.name = f"nvImageCodec {library.__version__}"
        kinds = backends or (library.BackendKind.GPU_ONLY, library.BackendKind.HYBRID_CPU_GPU)
        try:
            self._decoder = library.Decoder(
                device_id=device, backends=[library.Backend(kind) for kind in kinds], options=_OPTIONS
            )
        except RuntimeError as error:
            raise MissingDependencyError(
                f"nvImageCodec does not start here: {_line(error)}",
                where="--decode gpu",
                fix="check the NVIDIA driver with smlp doctor, or omit --decode gpu",
            ) from None
        self._parameters = library.DecodeParams(apply_exif_orientation=False)
        self._turn = threading.Lock()  # a decoder called by two threads at once returns nothing to either

    @classmethod
    def open(cls) -> GpuDecoder:
        """A decoder on the first GPU.

        Raises:
            MissingDependencyError: nvImageCodec is not installed, or does not start here.
        """
        require(MODULE, purpose="to decode on a GPU", extra="decode-gpu")
        if find_gpu() is None:  # the library's import prints a line for each thing that it does not find
            raise MissingDependencyError(
                "needs an NVIDIA GPU and driver; none was found", where="--decode gpu", fix="omit --decode gpu"
            )
        try:
            library = importlib.import_module(MODULE)
        except (ImportError, OSError) as error:
            raise MissingDependencyError(
                f"{MODULE} cannot be imported: {_line(error)}",
                where="--decode gpu",
                fix='pip install "smlp-deploy[decode-gpu]", or decode-gpu-cu12 for CUDA 12',
            ) from None
        return cls(library)

    def decode(self, image: Image.Image) -> Image.Image | None:
        """The decoded form of an image that `open_image` opened, or None if Pillow is to decode it.

        That is: if it is not an ordinary JPEG file, or cannot be decoded in full.

        Raises:
            GpuError: the GPU cannot go on.
        """
        if not isinstance(image, JpegImageFile) or not is_ordinary(image):
            return None
        assert image.fp is not None, "the image is decoded already"
        image.fp.seek(0)
        content = image.fp.read()
        # nvJPEG decodes a file that is cut off, and says nothing.
        if content.rfind(_END_OF_IMAGE) < content.rfind(_START_OF_SCAN):
            return None
        pixels = self._pixels(content, image.size)
        if pixels is None:
            self._check_alive()
            return None
        decoded = Image.fromarray(pixels)
        decoded.info = image.info  # with the orientation
        return decoded

    def _pixels(self, content: bytes, size: tuple[int, int]) -> NDArray[np.uint8] | None:
        """Pixels H, W, 3 of an image of this width and height."""
        try:
            with self._turn:
                stream = self._library.CodeStream(content)
                if (stream.width, stream.height) != size:
                    return None
                decoded = self._decoder.decode(stream, params=self._parameters)
                if decoded is None:
                    return None
                pixels = np.array(decoded.cpu())
        except RuntimeError:  # of a damaged file, or of the GPU
            return None
        return pixels if pixels.shape == (size[1], size[0], 3) and pixels.dtype == np.uint8 else None

    def _check_alive(self) -> None:
        """Tell a file that the library cannot decode from a GPU that decodes no more.

        Raises:
            GpuError: a good file fails too.
        """
        good = bundled_images()[0]
        with Image.open(good) as image:
            size = image.size
        if self._pixels(good.read_bytes(), size) is None:
            raise GpuError(
                "the GPU does not decode any more", where="--decode gpu", fix="check it with smlp doctor, then --resume"
            )


def is_ordinary(image: JpegImageFile) -> bool:
    """Whether an opened JPEG file is grey or YCbCr in one of the usual samplings; not an MPO."""
    if image.format != "JPEG" or image.mode not in ("L", "RGB"):
        return False
    numbers = [component[0] for component in image.layer]
    (first, *others) = [(component[1], component[2]) for component in image.layer]
    if image.mode == "L":
        return len(numbers) == 1
    is_ycbcr = numbers == _YCBCR and image.info.get("adobe_transform", 1) == 1
    return is_ycbcr and first in _SAMPLINGS and others == [(1, 1), (1, 1)]


def check_pixels(decoder: GpuDecoder, preprocessing: Preprocessing, *, most: int = MOST) -> int:
    """Prepare the bundled images with and without the decoder, and compare the pixels.

    Args:
        decoder: under test.
        preprocessing: of the model that is to run.
        most: levels of 255 by which a pixel may differ.

    Returns:
        The largest difference.

    Raises:
        GpuError: it is larger than `most`, or an image was not decoded on the GPU.
    """
    largest = 0
    for path in bundled_images():
        with Image.open(path) as image:
            if decoder.decode(image) is None:
                raise _refused(f"{decoder.name} does not decode the bundled {path.name}")
        ours, theirs = (_prepared(path, preprocessing, which) for which in (None, decoder))
        largest = max(largest, int(np.abs(ours - theirs).max()))
    if largest > most:
        raise _refused(f"{decoder.name} differs from Pillow by {largest} of 255 levels, more than {most}")
    return largest


def _prepared(path: Path, preprocessing: Preprocessing, decoder: GpuDecoder | None) -> NDArray[np.int16]:
    size = preprocessing.image_size
    return load_image(path, preprocessing, np.empty((size, size, 3), np.uint8), decoder).astype(np.int16)


def _refused(what: str) -> GpuError:
    return GpuError(what, where="--decode gpu", fix="omit it")


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
