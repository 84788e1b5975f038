from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from smlp_deploy.errors import ArtifactError, CheckError, SmlpError
from smlp_deploy.evaluation.clock import GpuClock
from smlp_deploy.evaluation.worker import Target, TimedProcess, _Session
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.precision import to_input
from smlp_deploy.runners import open_runner
from tests.support.fakes import FakeRunner, quadrant_means
from tests.support.gpu import engine_in, gpu


@pytest.fixture
def process(digits_export: Export) -> TimedProcess:
    return TimedProcess(Target(path=digits_export.path))


def test_a_model_is_timed_in_its_own_process(
    process: TimedProcess, digits_export: Export, digit_images: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with process:
        loaded = process.load()
        assert loaded.name == f"onnxruntime (CPU) {digits_export.path.name}"
        assert loaded.metadata.precision == "fp32"
        assert loaded.seconds > 0
        assert process.first(1) > 0
        turn = process.turn(2, 0.02)
        assert min(turn.runs) > 0
        assert turn.gpu_runs == ()
        assert len(process.turn(2, 0).runs) == 1
        found = process.end_to_end([*digit_images, broken], 5, 2)
        assert found.failed == 1
        assert 0 < found.inference < found.seconds
        assert found.decode > 0
        peak = process.peak_memory()
        assert peak is None or 10**7 < peak < 10**10
        pid = process._process.pid
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path) -> None:
    with (
        TimedProcess(Target(path=tmp_path / "absent.onnx")) as process,
        pytest.raises(ArtifactError, match=r"no such file · .*absent\.onnx"),
    ):
        process.load()


def test_a_bug_of_a_framework_is_one_clear_line(process: TimedProcess, digits_export: Export) -> None:
    with process:
        process.load()
        with pytest.raises(SmlpError, match=rf"\w+Error: .* · .*{digits_export.path.name}"):
            process.first(-1)
        assert process.first(1) > 0


def test_a_model_that_overflows_is_not_timed(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    weight.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), 3e38), weight.name))
    path = tmp_path / "overflows.onnx"
    onnx.save(model, path)
    with TimedProcess(Target(path=path)) as process:
        process.load()
        with pytest.raises(CheckError, match=r"its output has NaN or infinite values.* · .*overflows\.onnx"):
            process.first(1)


def test_a_process_that_dies_is_one_clear_line(process: TimedProcess) -> None:
    with process:
        process.load()
        assert process._process.pid is not None
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(SmlpError, match=r"its process ended with signal 9 · .*smaller --batch"):
            process.first(1)


def test_ctrl_c_is_left_to_the_process_that_asks(process: TimedProcess) -> None:
    with process:
        process.load()
        assert process._process.pid is not None
        os.kill(process._process.pid, signal.SIGINT)
        assert process.first(1) > 0


class TimesOnGpu(FakeRunner):
    """A runner that says what a GPU would have taken."""

    def gpu_seconds(self, batch: FloatArray, *, runs: int) -> list[float]:
        return [len(batch) / 1000] * runs


def test_a_turn_on_a_gpu_is_timed_twice() -> None:
    session = _Session(Target(path=Path("x.engine")), 0)
    session._runner = TimesOnGpu(quadrant_means)
    turn = session.turn(2, 0)
    assert turn.gpu_runs == (0.002,)
    assert len(turn.runs) == 1


def test_the_clock_is_read_after_the_runs_of_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Timed(TimesOnGpu):
        def gpu_seconds(self, batch: FloatArray, *, runs: int) -> list[float]:
            done.append("runs")
            return super().gpu_seconds(batch, runs=runs)

    def now(_: GpuClock) -> int:
        done.append("clock")
        return 1980

    monkeypatch.setattr(GpuClock, "now", now)
    session = _Session(Target(path=Path("x.engine")), 0)
    session._runner = Timed(quadrant_means)
    assert session.turn(2, 0).clock == 1980
    assert done == ["runs", "clock"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_model_of_pixels_is_timed_on_pixels(digits_export: Export, digit_images: list[Path]) -> None:
    graph = to_input(digits_export.graph, "uint8")
    session = _Session(Target(path=graph.path, graph=graph), 0)
    assert session.load().metadata.input == "uint8"
    assert session.first(3) > 0
    assert session.turn(3, 0).runs
    batch = session._batch(3)
    assert (batch.dtype.name, batch.shape) == ("uint8", (3, 32, 32, 3))
    assert batch.std() == pytest.approx(73.9, abs=2)  # of numbers from 0 to 255
    assert session.end_to_end(digit_images, 5, 2).failed == 0
    session.close()


def test_files_go_through_an_engine_while_it_computes(
    digits_export: Export, digit_images: list[Path], tmp_path: Path
) -> None:
    engine = engine_in(tmp_path, digits_export, BatchProfile(min=1, opt=4, max=4))
    with gpu() as bench:
        session = _Session(Target(path=engine), 0)
        session._runner = open_runner(engine)
        found = session.end_to_end(digit_images, 4, 2)
        memory = session.gpu_memory()
        session.close()
        assert found.failed == 0
        assert 0 < found.inference < found.seconds
        assert memory is not None
        assert memory > 2 * 4 * 3 * 32 * 32 * 4  # two batches of images
        runs, uploads = ([work for work in bench.trace if work.name == name] for name in ("execute", "H2D"))
        assert uploads[2].overlaps(runs[1])


class TestPeakMemory:
    def test_stays_when_memory_is_freed(self) -> None:
        script = (
            "from pathlib import Path\n"
            "from smlp_deploy.evaluation.worker import Target, _Session\n"
            "session = _Session(Target(path=Path('x.onnx')), 0)\n"
            "before = session.peak_memory()\n"
            "held = b'1' * (before + 2**26)\n"  # more than was ever held
            "del held\n"
            "print(before, session.peak_memory())\n"
        )
        output = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout
        before, peak = map(int, output.split())
        assert before + 2**26 <= peak < 10**10

    def test_is_unknown_where_the_kernel_does_not_keep_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        status = "Name:\tpython\nVmSize:\t  3060 kB\nVmRSS:\t  1624 kB\n"
        monkeypatch.setattr(Path, "read_text", lambda path, encoding: status)
        assert _Session(Target(path=Path("x.onnx")), 0).peak_memory() is None
