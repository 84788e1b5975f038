from __future__ import annotations

import numpy as np
import pytest

from fakes import FakeRunner, quadrant_means
from smlp_deploy.runners.base import Runner, in_fixed_batches


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
def test_any_batch_is_split_and_padded_to_the_fixed_one(count: int) -> None:
    fake: Runner = FakeRunner(quadrant_means)
    batch = np.random.default_rng(0).standard_normal((count, 3, 8, 8), dtype=np.float32)
    logits = in_fixed_batches(batch, 4, fake.infer)
    np.testing.assert_array_equal(logits, quadrant_means(batch))
    assert isinstance(fake, FakeRunner)
    assert fake.batch_sizes == [4] * -(-count // 4)
