from __future__ import annotations

import numpy as np
import pytest

from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.runners.base import in_batches
from tests.support.fakes import quadrant_means


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
