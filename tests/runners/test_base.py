from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.images.preprocessing import normalize
from smlp_deploy.metadata import BatchProfile, Preprocessing
from smlp_deploy.runners.base import common_input, images_at_once, in_batches, input_of
from tests.support.fakes import FakeRunner, metadata, quadrant_means


@pytest.mark.parametrize(
    ("profile", "count", "expected"),
    [
        (BatchProfile.fixed(4), 1, [4]),
        (BatchProfile.fixed(4), 4, [4]),
        (BatchProfile.fixed(4), 9, [4, 4, 4]),
        (BatchProfile(min=2, opt=3, max=5), 1, [2]),
        (BatchProfile(min=2, opt=3, max=5), 8, [5, 3]),
        (BatchProfile(min=2, opt=3, max=5), 11, [5, 5, 2]),
        (BatchProfile(), 65, [64, 1]),
    ],
)
def test_any_batch_is_split_and_padded_to_the_profile(profile: BatchProfile, count: int, expected: list[int]) -> None:
    sizes: list[int] = []
    buffer = np.zeros((profile.max, 4), np.float32)

    def run(part: FloatArray) -> FloatArray:
        sizes.append(len(part))
        buffer[: len(part)] = quadrant_means(part)
        return buffer[: len(part)]  # reused by the next run, as TensorRT's outputs are

    batch = np.random.default_rng(0).standard_normal((count, 3, 8, 8), dtype=np.float32)
    np.testing.assert_array_equal(in_batches(batch, profile, run), quadrant_means(batch))
    assert sizes == expected


def test_pixels_are_padded_as_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    seen = []

    def run(part: ImageArray) -> FloatArray:
        seen.append((part.dtype.name, part.shape))
        return part.reshape(len(part), -1)[:, :4].astype(np.float32)

    np.testing.assert_array_equal(in_batches(pixels, BatchProfile.fixed(4), run), pixels.reshape(5, -1)[:, :4])
    assert seen == [("uint8", (4, 8, 8, 3))] * 2


def test_runners_of_either_input_see_the_same_images() -> None:
    floats = FakeRunner(quadrant_means)
    pixels = FakeRunner(quadrant_means, replace(metadata(), input="uint8"))
    assert [common_input(floats), common_input(pixels), common_input(floats, pixels)] == ["float32", "uint8", "uint8"]
    preprocessing = Preprocessing(image_size=8)
    batch = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    assert input_of(pixels, batch, preprocessing) is batch
    expected = np.empty((2, 3, 8, 8), np.float32)
    normalize(batch, preprocessing, expected)
    np.testing.assert_array_equal(input_of(floats, batch, preprocessing), expected)
    np.testing.assert_array_equal(input_of(floats, batch[1], preprocessing), expected[1])
    assert input_of(floats, expected, preprocessing) is expected


@pytest.mark.parametrize(
    ("image_size", "cores", "expected"), [(224, 1, 4), (224, 2, 8), (32, 1, 196), (384, 2, 2), (2048, 1, 1)]
)
def test_as_many_images_run_at_once_as_fit_in_the_caches(image_size: int, cores: int, expected: int) -> None:
    assert images_at_once(image_size, per_core=4, cores=cores) == expected
