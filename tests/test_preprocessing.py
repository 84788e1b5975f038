from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from smlp_deploy.errors import ImageError
from smlp_deploy.files import DATA_FOLDER
from smlp_deploy.metadata import Preprocessing
from smlp_deploy.preprocessing import load_image, prepare, resize_and_crop, to_rgb

IMAGENET = Preprocessing(image_size=224)
RAW = Preprocessing(image_size=8, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def whole_image_resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """What Resize and CenterCrop of torchvision do to a PIL image, written down plainly."""
    width, height = image.size
    short = preprocessing.resize
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    crop = preprocessing.image_size
    left, top = round((resized.width - crop) / 2), round((resized.height - crop) / 2)
    return resized.crop((left, top, left + crop, top + crop))


def pixels(image: Image.Image) -> NDArray[np.int16]:
    return np.asarray(image, dtype=np.int16)


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
def test_pixels_are_those_of_resizing_the_whole_image(crop_pct: float) -> None:
    preprocessing = Preprocessing(image_size=224, crop_pct=crop_pct)
    for path in sorted((DATA_FOLDER / "parity").glob("[a-c]*.jpg")):
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        for size in (photo.size, (500, 375), (333, 517), (224, 224), (100, 90), (1000, 260), (300, 900), (20, 900)):
            image = photo.resize(size, Image.Resampling.BILINEAR)
            found, expected = resize_and_crop(image, preprocessing), whole_image_resize_and_crop(image, preprocessing)
            np.testing.assert_array_equal(pixels(found), pixels(expected), err_msg=f"{path.name} at {size}")


@pytest.mark.parametrize("size", [(3, 9000), (9000, 3)])
def test_pixels_of_very_long_images_are_off_by_1_at_most(photo: Image.Image, size: tuple[int, int]) -> None:
    image, preprocessing = photo.resize(size), Preprocessing(image_size=47)
    found, expected = resize_and_crop(image, preprocessing), whole_image_resize_and_crop(image, preprocessing)
    difference = np.abs(pixels(found) - pixels(expected))
    assert difference.max() <= 1


def test_values_are_normalised_and_channels_first(photo: Image.Image) -> None:
    found = prepare(photo, IMAGENET)
    crop = np.asarray(resize_and_crop(photo, IMAGENET), dtype=np.float32)
    expected = (crop / 255 - np.float32(IMAGENET.mean)) / np.float32(IMAGENET.std)  # type: ignore[arg-type, operator]
    assert found.shape == (3, 224, 224)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    corner = Image.new("RGB", (16, 8), "black")
    corner.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    corner.save(path, exif=exif)
    with Image.open(path) as turned:
        expected = ImageOps.exif_transpose(turned).convert("RGB")
        assert to_rgb(turned).tobytes() == expected.tobytes()
        assert to_rgb(turned).size == ((16, 8) if orientation < 5 else (8, 16))


def grey(value: int, mode: str) -> Image.Image:
    return Image.new(mode, (8, 8), value)


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    expected = np.round(ramp / 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.fromarray(ramp)))[..., 0], expected)


def test_transparency_is_laid_over_white() -> None:
    for mode, clear in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))):
        assert to_rgb(Image.new(mode, (2, 2), clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert to_rgb(palette).getpixel((0, 0)) == (255, 0, 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_grey_1_bit_and_cmyk_become_rgb() -> None:
    assert to_rgb(grey(77, "L")).getpixel((0, 0)) == (77, 77, 77)
    assert to_rgb(grey(1, "1")).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (2, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(mode: str) -> None:
    with pytest.raises(ImageError, match="32-bit pixels"):
        to_rgb(grey(1, mode))


@pytest.mark.parametrize("size", [(1, 1), (1, 10000), (10000, 1), (7, 8)])
def test_any_size_gives_the_networks_size(size: tuple[int, int]) -> None:
    assert prepare(Image.new("RGB", size, "white"), RAW).shape == (3, 8, 8)


class TestBadFiles:
    def test_each_gets_its_reason(self, tmp_path: Path, photo: Image.Image) -> None:
        photo.save(tmp_path / "whole.jpg")
        whole = (tmp_path / "whole.jpg").read_bytes()
        (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "text.jpg").write_text("this is no image")
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "folder.jpg").mkdir()
        os.mkfifo(tmp_path / "fifo.jpg")
        reasons = {
            "truncated.jpg": "damaged image: image file is truncated",
            "text.jpg": "not an image in a format that Pillow reads",
            "empty.jpg": "empty file",
            "folder.jpg": "is a directory",
            "fifo.jpg": "not a regular file",
            "absent.jpg": "no such file or directory",
            "nul\0.jpg": "damaged image: embedded null byte",
        }
        for name, reason in reasons.items():
            with pytest.raises(ImageError, match=reason):
                load_image(tmp_path / name, RAW)

    def test_too_many_pixels(self, tmp_path: Path) -> None:
        path = tmp_path / "large.png"
        for side in (9500, 14000):
            Image.new("1", (side, side)).save(path)
            with pytest.raises(ImageError, match="more than 89478485 pixels"):
                load_image(path, RAW)


def test_content_decides_not_the_name(tmp_path: Path, photo: Image.Image) -> None:
    photo.save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg", RAW), prepare(photo, RAW))
