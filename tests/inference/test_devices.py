"""Several devices, each with a process: what they return is what one returns, and none outlives the first process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from smlp_deploy.errors import ArtifactError, GpuError, SmlpError, UsageError
from smlp_deploy.images.find import InlineImage
from smlp_deploy.inference import devices
from smlp_deploy.inference.classify import Classifier
from smlp_deploy.inference.devices import DeviceClassifier
from smlp_deploy.pipeline.export import Export
from smlp_deploy.runners.placement import Placement
from tests.support.processes import after_bytes, run_verb, start

CPU = Placement.of(device="cpu")


@pytest.fixture(scope="module")
def two(digits_export: Export) -> Iterator[DeviceClassifier]:
    with DeviceClassifier(digits_export.path, [CPU, CPU]) as classifier:
        yield classifier


@pytest.fixture
def images(tmp_path: Path, digit_images: list[Path]) -> list[str]:
    """Seventy, some of them broken, one in memory, and one whose name is not text."""
    found = []
    for number in range(68):
        path = tmp_path / f"{number:02d}.jpg"
        if number % 9 == 3:
            path.write_text("no image")
        else:
            path.symlink_to(digit_images[number % len(digit_images)])
        found.append(str(path))
    undecodable = tmp_path / os.fsdecode(b"\xff.jpg")
    undecodable.symlink_to(digit_images[0])
    return [*found, str(undecodable), InlineImage.of("-", digit_images[1].read_bytes())]


class TestClassify:
    def test_the_predictions_are_those_of_one_process_in_the_same_order(
        self, two: DeviceClassifier, digits_export: Export, images: list[str]
    ) -> None:
        with Classifier.open(digits_export.path, placement=CPU) as one:
            expected = list(one.classify(images, batch_size=3, topk=2))
        assert list(two.classify(images, batch_size=3, topk=2)) == expected
        assert [prediction.path for prediction in expected] == images

    def test_no_images(self, two: DeviceClassifier) -> None:
        assert list(two.classify([])) == []

    def test_numbers_are_checked_as_with_one(self, two: DeviceClassifier) -> None:
        assert (two.resolve_batch_size(None), two.resolve_topk(None), two.labels[3]) == (32, 5, "3")
        with pytest.raises(UsageError, match="topk 11 is not between 1 and the model's 10 classes"):
            list(two.classify(["a.jpg"], topk=11))
        with pytest.raises(UsageError, match="0 is not at least 1"):
            list(two.classify(["a.jpg"], batch_size=0))

    def test_pieces_are_whole_batches_that_grow(self) -> None:
        pieces = list(devices._pieces(map(str, range(1000)), 2, 3))
        assert [len(piece) // 2 for piece in pieces[:10]] == [1, 1, 1, 2, 2, 2, 4, 4, 4, 8]
        assert max(map(len, pieces)) == 2 << 6
        assert [image for piece in pieces for image in piece] == list(map(str, range(1000)))

    def test_images_are_read_no_further_than_they_are_used(self, two: DeviceClassifier, images: list[str]) -> None:
        read: list[int] = []

        def endless() -> Iterator[str]:
            while True:
                read.append(1)
                yield images[0]

        predictions = two.classify(endless(), batch_size=1)
        assert [next(predictions).error for _ in range(4)] == [None] * 4
        assert len(read) < 30


class TestErrors:
    def test_a_model_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "bad.onnx").write_bytes(b"no model")
        with pytest.raises(ArtifactError, match=r"bad\.onnx"):
            DeviceClassifier(tmp_path / "bad.onnx", [CPU, CPU])

    def test_no_devices(self, digits_export: Export) -> None:
        with pytest.raises(UsageError, match="no devices"):
            DeviceClassifier(digits_export.path, [])

    def test_a_process_that_ends(self, digits_export: Export, images: list[str]) -> None:
        before = set(multiprocessing.active_children())
        with DeviceClassifier(digits_export.path, [CPU]) as classifier:
            (process,) = set(multiprocessing.active_children()) - before
            process.kill()
            with pytest.raises(GpuError, match="the process of a device ended"):
                list(classifier.classify(images))

    def test_errors_keep_their_parts_on_the_way(self) -> None:
        import pickle

        error = pickle.loads(pickle.dumps(SmlpError("what", where="where", fix="fix")))
        assert str(error) == "what · where · fix"

    def test_notes_of_all_processes_come_to_the_first(self, micro_pth: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING), DeviceClassifier(micro_pth, [CPU]):
            pass
        assert any("states no labels" in record.getMessage() for record in caplog.records)


_HOLD = """
import sys
from smlp_deploy.inference.devices import DeviceClassifier
from smlp_deploy.runners.placement import Placement

if __name__ == "__main__":
    with DeviceClassifier(sys.argv[1], [Placement.of(device="cpu")]) as classifier:
        (pid,) = classifier._pool._processes
        print(pid, flush=True)
        sys.stdin.read()
"""


def test_they_end_with_the_first_process_however_that_ends(digits_export: Export, tmp_path: Path) -> None:
    script = tmp_path / "hold.py"
    script.write_text(_HOLD)
    with subprocess.Popen(
        [sys.executable, script, digits_export.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        other = os.pidfd_open(int(first.stdout.readline()))
        first.kill()
        multiprocessing.connection.wait([other])
        os.close(other)


class TestPredict:
    def test_the_file_has_the_bytes_of_a_run_in_one_process_also_when_it_is_continued(
        self, digits_export: Export, images: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "list.txt").write_bytes(b"".join(os.fsencode(path) + b"\n" for path in images[:-1]))
        command: list[str | Path] = [
            "predict",
            f"@{tmp_path / 'list.txt'}",
            "-m",
            digits_export.path,
            "--batch",
            "4",
            "--allow-errors",
        ]
        whole, shared = tmp_path / "whole.jsonl", tmp_path / "shared.jsonl"
        assert run_verb(*command, "-o", whole)[0] == 0
        stopped = start(
            *command,
            "-o",
            shared,
            "--devices",
            "cpu,cpu",
            before=after_bytes(signal.SIGINT, 2000).replace("os.kill(os.getpid()", "os.killpg(0"),
            process_group=0,
        )
        _, err = stopped.communicate()
        assert (stopped.returncode, "stopped by Ctrl-C after" in err, "Traceback" in err) == (130, True, False)
        process = start(*command, "-o", shared, "--devices", "cpu,cpu", "--resume")
        _, err = process.communicate()
        assert (process.returncode, err) == (0, f"69 images, 8 failed, written to {shared}\n")
        assert shared.read_bytes() == whole.read_bytes()

    @pytest.mark.parametrize(
        ("options", "exit_code", "message"),
        [
            (("--devices", "0,1"), 6, "error: no NVIDIA GPU"),
            (("--devices", "cpu,cpu", "--device", "cpu"), 2, "error: contradicts --devices · --device cpu"),
            (("--devices", "cpu,cpu", "--decode", "gpu"), 2, "error: contradicts --decode gpu · --devices"),
            (("--devices", "cpu,,cpu"), 2, "error: names no device · --devices cpu,,cpu"),
        ],
    )
    def test_wrong_usage(self, digits_export: Export, options: tuple[str, ...], exit_code: int, message: str) -> None:
        code, err = run_verb("predict", "images", "-m", digits_export.path, *options)
        assert (code, err.splitlines()[-1][: len(message)]) == (exit_code, message)
