"""Several threads on one engine, which a GPU in host memory runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest

from smlp_deploy import Classifier
from smlp_deploy.errors import GpuError
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.inference.classify import Prediction
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.pipeline.export import Export
from tests.support.cuda_names import cudaError_t
from tests.support.gpu import engine_in, gpu


@pytest.fixture
def engine(tmp_path: Path, digits_export: Export) -> Path:
    return engine_in(tmp_path, digits_export, BatchProfile(min=1, opt=4, max=4))


def rotated(paths: list[Path], by: int) -> list[Path]:
    return paths[by:] + paths[:by]


def test_streams_of_several_threads_do_not_mix(engine: Path, digit_images: list[Path]) -> None:
    with gpu(), Classifier.open(engine) as classifier:

        def run(by: int) -> list[Prediction]:
            return list(classifier.classify(rotated(digit_images, by) * 3, batch_size=4))

        expected = [run(by) for by in range(6)]
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(run, range(6))) == expected


def test_two_streams_in_one_thread_advance_in_turns(engine: Path, digit_images: list[Path]) -> None:
    with gpu(), Classifier.open(engine) as classifier:
        lists = (digit_images * 3, rotated(digit_images, 5))
        expected = [list(classifier.classify(paths, batch_size=2)) for paths in lists]
        streams = [classifier.classify(paths, batch_size=2) for paths in lists]
        pairs = list(zip_longest(*streams))
    assert [[prediction for prediction in stream if prediction] for stream in zip(*pairs, strict=True)] == expected


def test_prepared_images_beside_a_stream(engine: Path, digit_images: list[Path]) -> None:
    with gpu(), Classifier.open(engine) as classifier:
        metadata = classifier.runner.metadata
        prepared = np.stack([load_image(path, metadata.preprocessing) for path in digit_images[:3]])
        expected, logits = list(classifier.classify(digit_images, batch_size=2)), classifier.predict_logits(prepared)
        stream = classifier.classify(digit_images, batch_size=2)
        first = next(stream)
        np.testing.assert_array_equal(classifier.predict_logits(prepared), logits)
        assert [first, *stream] == expected


def test_a_dead_gpu_ends_all_streams(engine: Path, digit_images: list[Path]) -> None:
    with gpu() as bench, Classifier.open(engine) as classifier:
        bench.fail("execute", cudaError_t.cudaErrorIllegalAddress, call=9)

        def run(by: int) -> str:
            with pytest.raises(GpuError) as caught:
                list(classifier.classify(rotated(digit_images, by) * 9, batch_size=4))
            return str(caught.value)

        with ThreadPoolExecutor(3) as pool:
            assert all("illegal memory access" in reason for reason in pool.map(run, range(3)))
