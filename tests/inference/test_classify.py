from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smlp_deploy import Classifier
from smlp_deploy.errors import GpuError, UsageError
from smlp_deploy.images import batches
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.preprocessing import Decoder, load_image
from smlp_deploy.inference.classify import Prediction
from smlp_deploy.metadata import Preprocessing
from smlp_deploy.pipeline.export import Export
from tests.support.fakes import FakeRunner, metadata, quadrant_means


@pytest.fixture
def mixed(tmp_path: Path, photo: Image.Image) -> list[Path]:
    """Six files, in order: good, truncated, text, empty, CMYK, 16-bit."""
    paths = [tmp_path / name for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.png")]
    photo.save(paths[0])
    content = paths[0].read_bytes()
    paths[1].write_bytes(content[: len(content) // 3])
    paths[2].write_text("not an image")
    paths[3].touch()
    photo.convert("CMYK").save(paths[4])
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(paths[5])
    return paths


def quadrant_image(path: Path, bright: int) -> Path:
    image = Image.new("RGB", (8, 8))
    image.paste("white", (bright % 2 * 4, bright // 2 * 4, bright % 2 * 4 + 4, bright // 2 * 4 + 4))
    image.save(path)
    return path


def test_digits_are_recognised(digits_export: Export, digit_images: list[Path]) -> None:
    with Classifier.open(digits_export.path) as classifier:
        predictions = list(classifier.classify(digit_images))
    assert [prediction.path for prediction in predictions] == [str(path) for path in digit_images]
    right = [p.scores[0].label == Path(p.path).name.split("-")[1] for p in predictions]
    assert len(right) == 12
    assert sum(right) >= 11


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
@pytest.mark.parametrize("workers", [1, 3])
def test_six_files_give_six_records_in_order(
    digits_export: Export, mixed: list[Path], batch_size: int, workers: int
) -> None:
    with Classifier.open(str(digits_export.path)) as classifier:
        predictions = list(classifier.classify(mixed, batch_size=batch_size, workers=workers))
    assert [prediction.path for prediction in predictions] == [str(path) for path in mixed]
    assert [prediction.error is None for prediction in predictions] == [True, False, False, False, True, True]
    assert [bool(prediction.scores) for prediction in predictions] == [True, False, False, False, True, True]


def test_bad_files_do_not_shift_the_others(tmp_path: Path) -> None:
    paths: list[Path] = []
    for index in range(40):
        path = tmp_path / f"{index:02d}.png"
        paths.append(path if index % 3 == 0 else quadrant_image(path, index % 4))
    predictions = list(Classifier(FakeRunner(quadrant_means)).classify(paths, batch_size=7, topk=1))
    for index, prediction in enumerate(predictions):
        assert prediction.path == str(paths[index])
        if index % 3 == 0:
            assert prediction.error == "no such file or directory"
        else:
            assert prediction.scores[0].label == f"class {index % 4}"


def test_probabilities_are_the_softmax_best_first(tmp_path: Path) -> None:
    runner = FakeRunner(lambda images: np.array([[1, 1000, -3, 1000]], np.float32))
    (prediction,) = Classifier(runner).classify([quadrant_image(tmp_path / "a.png", 0)], topk=3)
    assert [score.index for score in prediction.scores] == [1, 3, 0]
    assert [score.probability for score in prediction.scores] == pytest.approx([0.5, 0.5, 0])


def test_logits_that_are_no_numbers_are_an_error_record(tmp_path: Path) -> None:
    def spoil_second(images: FloatArray) -> FloatArray:
        logits = quadrant_means(images)
        logits[1, 2] = np.nan
        return logits

    paths = [quadrant_image(tmp_path / f"{index}.png", index) for index in range(3)]
    predictions = list(Classifier(FakeRunner(spoil_second)).classify(paths))
    assert [prediction.error for prediction in predictions] == [
        None,
        "the network's output has NaN or infinite values",
        None,
    ]


def test_all_bad_files_run_no_inference(tmp_path: Path) -> None:
    runner = FakeRunner(quadrant_means)
    assert all(p.error for p in Classifier(runner).classify([tmp_path / "x.jpg"] * 5, batch_size=2))
    assert runner.batch_sizes == []


def test_no_paths_give_no_records() -> None:
    assert list(Classifier(FakeRunner(quadrant_means)).classify([])) == []


def test_paths_are_read_no_further_than_three_batches_beyond_that_of_the_records(tmp_path: Path) -> None:
    path, read = quadrant_image(tmp_path / "a.png", 0), 0

    def endless() -> Iterator[Path]:
        nonlocal read
        while True:
            read += 1
            yield path

    predictions = Classifier(FakeRunner(quadrant_means)).classify(endless(), batch_size=4)
    for _ in range(9):
        next(predictions)
    assert read <= 3 * 4 + 3 * 4
    predictions.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "network"))]


def test_decoding_goes_on_while_the_network_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [quadrant_image(tmp_path / f"{index}.png", 0) for index in range(8)]
    decoded = threading.Semaphore(0)

    def counted(path: Path, preprocessing: Preprocessing, out: FloatArray, decoder: Decoder | None) -> FloatArray:
        image = load_image(path, preprocessing, out, decoder)
        decoded.release()
        return image

    def waits_for_two_more_batches(images: FloatArray) -> FloatArray:
        # The network's first run returns only once its own two images and the next four are decoded.
        for _ in range(6 if not finished else 0):
            assert decoded.acquire(timeout=30), "decoding stood still while the network ran"
        finished.append(True)
        return quadrant_means(images)

    finished: list[bool] = []
    monkeypatch.setattr(batches, "load_image", counted)
    predictions = list(Classifier(FakeRunner(waits_for_two_more_batches)).classify(paths, batch_size=2))
    assert [prediction.error for prediction in predictions] == [None] * 8


@pytest.mark.parametrize(("topk", "reason"), [(5, "topk 5 is not between 1 and the model's 4 classes"), (0, "topk 0")])
def test_topk_beyond_the_classes_is_refused(topk: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Classifier(FakeRunner(quadrant_means)).classify([], topk=topk)


def test_topk_is_5_or_all_classes_of_fewer() -> None:
    assert Classifier(FakeRunner(quadrant_means)).resolve_topk(None) == 4
    assert Classifier(FakeRunner(quadrant_means, metadata(classes=9))).resolve_topk(None) == 5


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"workers": 0}])
def test_impossible_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        Classifier(FakeRunner(quadrant_means)).classify([], **options)


def test_the_classifier_closes_its_runner() -> None:
    runner = FakeRunner(quadrant_means)
    with Classifier(runner):
        assert not runner.closed
    assert runner.closed


def test_a_prediction_is_a_value() -> None:
    assert Prediction("a.jpg", error="x") == Prediction("a.jpg", error="x")


class TestABatchThatFails:
    """The images of it are run one by one: what is wrong with one costs no neighbour its result."""

    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        return [quadrant_image(tmp_path / f"{index}.png", index % 4) for index in range(6)]

    def test_costs_only_the_image_at_fault(self, paths: list[Path], caplog: pytest.LogCaptureFixture) -> None:
        def picky(batch: FloatArray) -> FloatArray:
            logits = quadrant_means(batch)
            if (logits.argmax(axis=1) == 2).any():
                raise RuntimeError("no memory\nfor this")
            return logits

        runner = FakeRunner(picky)
        predictions = list(Classifier(runner).classify(paths, batch_size=3))
        assert [p.scores[0].index if p.scores else p.error for p in predictions] == [
            0,
            1,
            "the network failed on it: RuntimeError: no memory",
            3,
            0,
            1,
        ]
        assert runner.batch_sizes == [3, 1, 1, 1, 3]
        assert "a batch of 3 failed" in caplog.text

    def test_a_batch_too_large_for_the_memory_is_run_in_parts(self, paths: list[Path]) -> None:
        def small(batch: FloatArray) -> FloatArray:
            if len(batch) > 1:
                raise MemoryError
            return quadrant_means(batch)

        predictions = list(Classifier(FakeRunner(small)).classify(paths))
        assert [p.scores[0].index for p in predictions] == [0, 1, 2, 3, 0, 1]


def test_a_dead_gpu_is_no_image_s_fault(mixed: list[Path]) -> None:
    def dead(batch: FloatArray) -> FloatArray:
        raise GpuError("an illegal memory access was encountered")

    runner = FakeRunner(dead)
    with pytest.raises(GpuError, match="illegal memory access"):
        list(Classifier(runner).classify(mixed))
    assert runner.batch_sizes == [3]


class TestSources:
    """Images that are no paths give what their files give."""

    def test_all_kinds(self, digits_export: Export, digit_images: list[Path]) -> None:
        path = digit_images[3]
        with Image.open(path) as opened, path.open("rb") as file, Classifier.open(digits_export.path) as classifier:
            (expected,) = classifier.classify(path)
            content = path.read_bytes()
            pixels = np.asarray(opened.convert("RGB"))
            sources = (str(path), content, bytearray(content), memoryview(content), file, opened, pixels)
            found = list(classifier.classify(sources, batch_size=1))
            alone = [next(iter(classifier.classify(source))) for source in sources if source is not file]
            several = list(classifier.classify(np.stack([pixels, pixels]), batch_size=1))
        assert [prediction.scores for prediction in found + alone + several] == [expected.scores] * 15
        assert [prediction.path for prediction in found] == [str(path), *[""] * 6]

    @pytest.mark.parametrize(
        ("source", "error"),
        [
            (b"", "empty file"),
            (b"no image", "not an image in a supported format"),
            (np.zeros((4, 4), np.uint8), "an array of uint8 4x4, not of uint8 HxWx3"),
            (np.zeros((4, 4, 3), np.float32), "an array of float32 4x4x3, not of uint8 HxWx3"),
            (np.zeros((0, 4, 3), np.uint8), "an array of uint8 0x4x3, not of uint8 HxWx3"),
            (Image.new("F", (4, 4)), "32-bit pixels"),
            (Image.new("1", (10_000, 10_000)), "more than 89478485 pixels"),
        ],
    )
    def test_a_bad_one_is_an_error_among_the_others(self, source: Any, error: str, photo: Image.Image) -> None:
        first, second, third = Classifier(FakeRunner(quadrant_means)).classify([photo, source, photo])
        assert not first.error
        assert first == third
        assert second.error is not None
        assert second.error.startswith(error)

    def test_a_truncated_upload(self, photo: Image.Image) -> None:
        file = io.BytesIO()
        photo.save(file, "JPEG")
        (prediction,) = Classifier(FakeRunner(quadrant_means)).classify(file.getvalue()[:2000])
        assert prediction.error is not None
        assert prediction.error.startswith("damaged image")


def test_prepared_images(digits_export: Export, digit_images: list[Path]) -> None:
    with Classifier.open(digits_export.path) as classifier:
        preprocessing = classifier.runner.metadata.preprocessing
        logits = classifier.predict_logits(np.stack([load_image(path, preprocessing) for path in digit_images]))
        best = [classifier.labels[index] for index in logits.argmax(axis=1)]
        assert best == [prediction.scores[0].label for prediction in classifier.classify(digit_images)]
        for wrong in (np.zeros((1, 3, 31, 32), np.float32), np.zeros((1, 3, 32, 32)), np.zeros((0, 3, 32, 32), "f4")):
            with pytest.raises(
                UsageError, match=r"^a batch of float\d\d .x3x3.x32; the network takes float32 Nx3x32x32$"
            ):
                classifier.predict_logits(wrong)


def test_several_threads_get_their_own_results(digits_export: Export, digit_images: list[Path]) -> None:
    with Classifier.open(digits_export.path, threads=1) as classifier:
        expected = [next(iter(classifier.classify(path))) for path in digit_images]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda path: next(iter(classifier.classify(path))), digit_images * 8))
    assert found == expected * 8


def test_threads_are_counted(digits_export: Export) -> None:
    with pytest.raises(UsageError, match=r"^0 is not at least 1 · threads$"):
        Classifier.open(digits_export.path, threads=0)
