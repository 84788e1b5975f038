"""The model that ships: it is as good as its metadata say, on digits it never saw."""

from __future__ import annotations

import numpy as np
from PIL import Image

from scripts.digits import load_digits
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.images.preprocessing import prepare
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.runners import open_runner


def test_the_split_is_fixed_stratified_and_disjoint() -> None:
    train, held_out = load_digits()
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(held_out.labels).tolist() == [100] * 10
    assert not set(train.positions) & set(held_out.positions)
    assert held_out.positions[:3].tolist() == [10, 13, 14]


def test_held_out_accuracy_is_what_the_metadata_say(digits: Checkpoint) -> None:
    _, held_out = load_digits()
    with open_runner(BUNDLED_CHECKPOINT) as runner:
        images = [prepare(Image.fromarray(pixels), runner.metadata.preprocessing) for pixels in held_out.pixels]
        right = int((runner.infer(np.stack(images)).argmax(axis=1) == held_out.labels).sum())
    assert right >= 975
    assert abs(right / 10 - digits.metadata.training["held_out_top1"]) <= 0.1  # another CPU may tip one digit


def test_the_file_is_small() -> None:
    assert BUNDLED_CHECKPOINT.stat().st_size < 3_000_000
