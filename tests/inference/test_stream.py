from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from smlp_deploy import Classifier
from smlp_deploy.cli import main
from smlp_deploy.errors import GpuError
from smlp_deploy.images.batches import Batch, FloatArray
from smlp_deploy.inference.classify import Prediction
from smlp_deploy.inference.stream import infer_stream
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.pipeline.export import Export
from tests.support.cuda_gpu import Traced
from tests.support.cuda_names import cudaError_t
from tests.support.cuda_runtime import CudaBench
from tests.support.fakes import FakeRunner, quadrant_means
from tests.support.gpu import engine_in, gpu

IMAGES = 2000
BROKEN = (70, 130, 131, 700, 1999)
BATCH = 64

Schedule = Literal["late", "eager"]
SCHEDULES = pytest.mark.parametrize("schedule", ["late", "eager"])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, digit_images: list[Path]) -> Path:
    """A folder of 2,000 JPEGs, all different, five of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    digits = [np.asarray(Image.open(path).convert("L").resize((28, 28)), np.int16) for path in digit_images]
    for number in range(IMAGES):
        noisy = digits[number % len(digits)] + rng.integers(-60, 60, (28, 28))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04}.jpg")
    for number in BROKEN:
        (folder / f"{number:04}.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no image")
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, digits_export: Export, photos: Path) -> list[dict[str, Any]]:
    """The records of ONNX Runtime."""
    return predict(digits_export.path, photos, tmp_path_factory.mktemp("expected") / "onnx.jsonl")


@pytest.fixture
def engine(tmp_path: Path, digits_export: Export) -> Path:
    return engine_in(tmp_path, digits_export, BatchProfile(min=1, opt=BATCH, max=BATCH))


def predict(model: Path, photos: Path, output: Path) -> list[dict[str, Any]]:
    """The records of `smlp predict`."""
    arguments = ["predict", str(photos), "--model", str(model), "--batch-size", str(BATCH), "-o", str(output), "-q"]
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--allow-errors"])
    assert not caught.value.code
    return [json.loads(line) for line in output.read_text().splitlines()]


def watch_records(monkeypatch: pytest.MonkeyPatch, seen: Callable[[], None]) -> None:
    """Call a function whenever a batch is turned into records."""
    real = Classifier._predictions

    def watched(self: Classifier, *arguments: Any, **named: Any) -> Iterator[Prediction]:
        seen()
        return real(self, *arguments, **named)

    monkeypatch.setattr(Classifier, "_predictions", watched)


def of(bench: CudaBench, name: str) -> list[Traced]:
    return [work for work in bench.trace if work.name == name]


@SCHEDULES
def test_two_thousand_images_through_an_engine(
    photos: Path,
    expected: list[dict[str, Any]],
    engine: Path,
    tmp_path: Path,
    schedule: Schedule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    milliseconds = {"H2D": 0.5, "execute": 4.0, "D2H": 0.1, "D2D": 0.1}
    allocations: list[int] = []
    with gpu(schedule=schedule, milliseconds=lambda name, _: milliseconds.get(name, 0.0)) as bench:

        def seen() -> None:
            bench.host("records", 1.0)
            allocations.append(bench.allocations)

        watch_records(monkeypatch, seen)
        records = predict(engine, photos, tmp_path / "engine.jsonl")
    assert records == expected
    assert len(records) == IMAGES
    assert [number for number, record in enumerate(records) if "error" in record] == list(BROKEN)

    uploads, runs, host = of(bench, "H2D"), of(bench, "execute"), of(bench, "records")
    assert len(uploads) == len(runs) == len(host) == -(-IMAGES // BATCH)
    for n in range(1, len(runs) - 1):
        assert uploads[n + 1].overlaps(runs[n])
        # Whether the thread of the network or that of the records is faster is up to the system.
        assert host[n - 1].overlaps(runs[n]) or host[n - 1].overlaps(runs[n + 1])
    assert allocations[3:] == allocations[3:4] * (len(host) - 3)
    # A batch with unreadable images runs as a full one: another size would need a context and a graph of its own.
    assert [(work.amount, work.in_graph) for work in runs[1:-1]] == [(BATCH, True)] * (len(runs) - 2)


def test_images_are_decoded_into_memory_that_is_copied_from_as_it_is(
    engine: Path, digit_images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpu() as bench:
        with Classifier.open(engine) as classifier:
            found = list(classifier.classify(digit_images * 20, batch_size=BATCH))
            again = list(classifier.classify(digit_images * 20, batch_size=BATCH))
        assert [prediction.error for prediction in found] == [None] * 240
        assert again == found
        assert bench.calls["cudaHostAlloc"] == 3 + 2  # three batches of images, two of logits
        assert not of(bench, "H2D pageable")


def test_batches_are_no_larger_than_the_engine_takes(
    tmp_path: Path, digits_export: Export, digit_images: list[Path]
) -> None:
    engine = engine_in(tmp_path, digits_export, BatchProfile(min=3, opt=4, max=5))
    with Classifier.open(digits_export.path) as classifier:
        expected = list(classifier.classify(digit_images, batch_size=5))
    for asked, sizes in ((None, [4, 4, 4]), (5, [5, 5, 3]), (64, [5, 5, 3]), (1, [3] * 12)):
        with gpu() as bench:
            with Classifier.open(engine) as classifier:
                found = list(classifier.classify(digit_images, batch_size=asked))
            assert [work.amount for work in of(bench, "execute")] == sizes
        assert [prediction.scores[0].label for prediction in found] == [
            prediction.scores[0].label for prediction in expected
        ]


def test_a_batch_that_the_gpu_refuses_is_run_one_by_one(engine: Path, digit_images: list[Path]) -> None:
    with gpu() as bench:
        with Classifier.open(engine) as classifier:
            real = classifier.runner.submit  # type: ignore[attr-defined]

            def picky(batch: NDArray[Any]) -> None:
                if len(batch) == 4 and len(of(bench, "execute")) >= 4:
                    raise RuntimeError("not this one")
                real(batch)

            classifier.runner.submit = picky  # type: ignore[attr-defined]
            found = list(classifier.classify(digit_images, batch_size=4))
        assert [prediction.path for prediction in found] == [str(path) for path in digit_images]
        right = [p.scores[0].label == Path(p.path).name.split("-")[1] for p in found]
        assert sum(right) >= 11


def test_a_dead_gpu_ends_the_run_after_the_batches_before(engine: Path, digit_images: list[Path]) -> None:
    found: list[Prediction] = []
    with gpu() as bench, Classifier.open(engine) as classifier:
        bench.fail("execute", cudaError_t.cudaErrorIllegalAddress, call=3)
        with pytest.raises(GpuError, match="illegal memory access"):
            found.extend(classifier.classify(digit_images, batch_size=2))
    assert len(found) in (2, 4)
    assert [prediction.error for prediction in found] == [None] * len(found)


def test_an_iterator_that_is_left_early_leaves_nothing_under_way(engine: Path, digit_images: list[Path]) -> None:
    with gpu(), Classifier.open(engine) as classifier:
        expected = list(classifier.classify(digit_images, batch_size=2))
        left = classifier.classify(reversed(digit_images), batch_size=2)
        next(left)
        left.close()  # type: ignore[attr-defined]
        assert list(classifier.classify(digit_images, batch_size=2)) == expected


def test_closing_the_classifier_ends_its_iterators_before_their_memory_is_released(
    engine: Path, digit_images: list[Path]
) -> None:
    with gpu():
        with Classifier.open(engine) as classifier:
            predictions = classifier.classify(digit_images * 10, batch_size=4)
            next(predictions)
        assert list(predictions) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("decode", "network"))]


class TestInferStream:
    def test_batches_without_a_readable_image_keep_their_place(self) -> None:
        batches = [batch_of(0, errors=2), batch_of(2), batch_of(0, errors=1), batch_of(1)]
        found = list(infer_stream(FakeRunner(quadrant_means), batches))
        assert [batch for batch, _ in found] == batches
        assert [len(outcomes) for _, outcomes in found] == [0, 2, 0, 1]

    def test_outcomes_stay_when_the_runner_writes_to_its_logits_again(self) -> None:
        logits = np.zeros((2, 4), np.float32)

        def reused(batch: FloatArray) -> FloatArray:
            logits[:] = quadrant_means(batch)
            return logits

        first, second = [outcomes for _, outcomes in infer_stream(FakeRunner(reused), [batch_of(2), batch_of(2, of=1)])]
        np.testing.assert_array_equal(np.stack(first), quadrant_means(batch_of(2).inputs))
        np.testing.assert_array_equal(np.stack(second), quadrant_means(batch_of(2, of=1).inputs))


def batch_of(images: int, *, errors: int = 0, of: int = 0) -> Batch:
    paths = [f"{number}.png" for number in range(images + errors)]
    inputs = np.random.default_rng(of).standard_normal((images, 3, 8, 8), dtype=np.float32)
    return Batch(paths, inputs, dict.fromkeys(range(images, images + errors), "broken"))


class TestTheThread:
    """The network's; everything else stays in the caller's, where signals arrive."""

    def test_batches_are_iterated_in_the_caller_s_thread_and_run_in_another(self) -> None:
        here, threads = threading.current_thread(), set()

        def noted(batch: FloatArray) -> FloatArray:
            threads.add(threading.current_thread())
            return quadrant_means(batch)

        def batches() -> Iterator[Batch]:
            for _ in range(5):
                assert threading.current_thread() is here
                yield batch_of(1)

        assert len(list(infer_stream(FakeRunner(noted), batches()))) == 5
        assert len(threads) == 1
        assert here not in threads

    def test_the_next_batch_runs_while_one_is_used(self) -> None:
        runs = threading.Semaphore(0)

        def noted(batch: FloatArray) -> FloatArray:
            runs.release()
            return quadrant_means(batch)

        for number, _ in enumerate(infer_stream(FakeRunner(noted), [batch_of(1) for _ in range(4)])):
            assert runs.acquire(timeout=30)
            assert number == 3 or runs.acquire(timeout=30), "the network stood still while a batch was used"
            if number < 3:
                runs.release()

    def test_an_error_comes_after_the_batches_before_it(self) -> None:
        def second_fails(batch: FloatArray) -> FloatArray:
            if len(batch) == 2:
                raise GpuError("an illegal memory access was encountered")
            return quadrant_means(batch)

        found: list[Batch] = []
        with pytest.raises(GpuError, match="illegal"):
            found.extend(batch for batch, _ in infer_stream(FakeRunner(second_fails), [batch_of(1), batch_of(2)]))
        assert [len(batch.paths) for batch in found] == [1]
