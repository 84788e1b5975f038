from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from smlp_deploy.errors import ImageError
from smlp_deploy.files import DATA_FOLDER
from smlp_deploy.images import preprocessing as module
from smlp_deploy.images.decode import PixelBudget
from smlp_deploy.images.preprocessing import load_image, prepare, resize_and_crop, to_rgb
from smlp_deploy.metadata import Preprocessing

IMAGENET = Preprocessing(image_size=224)
RAW = Preprocessing(image_size=8, crop_pct=1.0, mean=(0, 0, 0), std=(1, 1, 1))


def whole_image_resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """What Resize and CenterCrop of torchvision do to a PIL image, written down plainly."""
    width, height = image.size
    short = preprocessing.resize
    size = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    resized = image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])
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


def whole_image_to_rgb(image: Image.Image) -> Image.Image:
    """The image upright and in RGB, all of it at once."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def noise(mode: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Random pixels of any mode; "P+" is a palette with transparency."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, size[::-1], dtype=np.uint16))
    if mode in ("P", "P+"):
        image = Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8)).convert("P")
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
        if mode == "P+":
            image.info["transparency"] = rng.integers(0, 256, 256, dtype=np.uint8).tobytes()
        return image
    bands = Image.getmodebands(mode)
    return (
        Image.frombytes("L", size, rng.bytes(size[0] * size[1])).convert(mode)
        if bands == 1
        else Image.merge(mode, [Image.frombytes("L", size, rng.bytes(size[0] * size[1])) for _ in range(bands)])
    )


@settings(max_examples=250, deadline=None, derandomize=True, database=None)
@given(
    mode=st.sampled_from(["1", "L", "LA", "P", "P+", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]),
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    seed=st.integers(0, 1000),
    orientation=st.integers(0, 9),
    image_size=st.integers(1, 64),
    crop_pct=st.floats(0.3, 1.0),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic", "lanczos"]),
    band=st.sampled_from([1, 100, 1000, 1 << 20]),
)
def test_any_size_mode_orientation_and_crop_gives_the_pixels_of_the_whole_image(
    mode: str,
    size: tuple[int, int],
    seed: int,
    orientation: int,
    image_size: int,
    crop_pct: float,
    interpolation: str,
    band: int,
) -> None:
    preprocessing = Preprocessing(image_size=image_size, crop_pct=crop_pct, interpolation=interpolation)
    image = noise(mode, size, seed)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    expected = whole_image_resize_and_crop(whole_image_to_rgb(image), preprocessing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BAND", band)
        np.testing.assert_array_equal(pixels(resize_and_crop(image, preprocessing)), pixels(expected))


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
            "text.jpg": r"not an image in a supported format \(JPEG, PNG, .*TGA\)",
            "empty.jpg": "empty file",
            "folder.jpg": "is a directory",
            "fifo.jpg": "not a regular file",
            "absent.jpg": "no such file or directory",
            "nul\0.jpg": "no file can have this name",
            "\ud800.jpg": "no file can have this name",
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


class TestPixelBudget:
    def test_all_threads_together_stay_within_it(self) -> None:
        budget, lock = PixelBudget(100), threading.Lock()
        held, most = 0, 0

        def hold(pixels: int) -> None:
            nonlocal held, most
            with budget.take(pixels):
                with lock:
                    held += pixels
                    most = max(most, held)
                with lock:
                    held -= pixels

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(hold, [1, 100, 40, 60, 99, 7] * 200))
        assert 60 <= most <= 100
        assert held == 0

    def test_a_large_image_does_not_wait_for_every_small_one(self) -> None:
        budget, order = PixelBudget(10), list[str]()

        def hold(name: str, pixels: int) -> None:
            with budget.take(pixels):
                order.append(name)

        large, small = (
            threading.Thread(target=hold, args=("large", 10)),
            threading.Thread(target=hold, args=("small", 1)),
        )
        with budget.take(1):
            for number, thread in enumerate((large, small), start=1):
                thread.start()
                while len(budget._waiting) < number:  # until it waits
                    pass
        large.join()
        small.join()
        assert order == ["large", "small"]

    def test_an_error_gives_the_pixels_back(self) -> None:
        budget = PixelBudget(10)
        with pytest.raises(ZeroDivisionError), budget.take(10):
            raise ZeroDivisionError
        with budget.take(10):
            pass
