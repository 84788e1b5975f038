from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from smlp_deploy import dependencies
from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.evaluation import benchmark as module
from smlp_deploy.evaluation.benchmark import (
    Clock,
    Files,
    ModelTiming,
    Ratio,
    _clocks,
    _Model,
    _model_timing,
    _take_turns,
    _time_batches,
    describe_environment,
    ratio_to_first,
    run_benchmark,
)
from smlp_deploy.evaluation.clock import GpuClock
from smlp_deploy.evaluation.worker import Loaded, Sample, Target, TimedProcess
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.graphs.file import Graph
from smlp_deploy.interrupts import no_progress
from smlp_deploy.pipeline import baselines
from smlp_deploy.pipeline.baselines import baselines_of
from smlp_deploy.pipeline.export import Export
from smlp_deploy.runners import open_graph, open_runner
from smlp_deploy.runners.placement import Placement
from tests.support.fakes import metadata


def test_a_ratio_is_that_of_each_round() -> None:
    drift = np.linspace(1, 5, 9)  # both get slower and slower, the ratio stays
    ratio = ratio_to_first(list(2 * drift), list(drift))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))


def test_few_rounds_tell_no_interval() -> None:
    assert ratio_to_first([1, 2, 3, 4], [2, 4, 6, 8]) == Ratio(value=0.5, low=None, high=None)


def test_the_interval_of_a_ratio_is_as_wide_as_the_rounds_differ() -> None:
    rng = np.random.default_rng(0)
    first = np.ones(25)
    other = 0.5 * np.exp(rng.normal(0, 0.1, 25))
    ratio = ratio_to_first(list(first), list(other))
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < ratio.value < ratio.high
    # A median of 25 has a standard error of about 1.25 * 0.1 / 5 here, twice 1.96 of them in all.
    assert (ratio.high - ratio.low) / ratio.value == pytest.approx(0.1, rel=0.5)
    assert ratio_to_first(list(first), list(other)) == ratio


class Scripted:
    """A process whose runs take the seconds it is told, with noise of its own."""

    def __init__(self, seconds: float, noise: float) -> None:
        self._seconds, self._noise = seconds, noise
        self._random = np.random.default_rng(int(1000 * seconds))

    def turn(self, batch: int, seconds: float) -> Sample:
        return Sample(runs=(self._seconds * batch * float(np.exp(self._random.normal(0, self._noise))),))


@pytest.mark.parametrize(("noise", "fewest", "most"), [(0.001, 10, 10), (0.05, 11, 29), (0.5, 30, 30)])
def test_there_are_more_rounds_where_a_ratio_is_not_known_well(noise: float, fewest: int, most: int) -> None:
    loaded = Loaded(name="x", metadata=metadata(), seconds=0)
    models = [
        _Model(process=cast(TimedProcess, Scripted(seconds, noise)), loaded=loaded, first=0) for seconds in (0.1, 0.2)
    ]
    for first, second in _time_batches(models, (1, 8), rounds=10, progress=no_progress):
        assert fewest <= len(first.rounds) == len(second.rounds) <= most
        assert second.ratio is not None
        assert second.ratio.value == pytest.approx(0.5, rel=max(noise, 0.01))


def test_models_are_timed_side_by_side(
    digits_export: Export, digit_images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TURN_SECONDS", 0.05)
    told: list[tuple[str, int, int]] = []
    report = run_benchmark(
        [Target(path=digits_export.path), Target(path=BUNDLED_CHECKPOINT)],
        baselines=[Target(path=Path("absent.pth"), compiled=True)],
        batch_sizes=(4, 1, 4),
        rounds=3,
        files=Files(paths=tuple(digit_images), batch=4, workers=1),
        progress=lambda *step: told.append(step),
    )
    first, second = report.models
    assert first.name == f"onnxruntime (CPU) {digits_export.path.name}"
    assert [timing.batch for timing in first.batches] == [1, 4]
    timing = second.batches[1]
    runs = np.concatenate(timing.rounds)
    assert len(timing.rounds) == 3
    assert timing.median == pytest.approx(np.median(runs))
    assert timing.median <= timing.p90 <= timing.p95 <= timing.p99 <= runs.max()
    assert timing.p99 in runs
    assert timing.images_per_second == pytest.approx(4 / timing.median)
    assert first.batches[1].ratio is None
    assert timing.ratio is not None
    assert timing.ratio.low is timing.ratio.high is None  # of three rounds
    assert second.end_to_end is not None
    assert (second.end_to_end.images, second.end_to_end.failed) == (12, 0)
    assert report.left_out == ("torch.compile: no such file · absent.pth · give the path of a weights file",)
    assert json.loads(report.to_json())["models"][1]["batches"][1]["rounds"][0]
    turns = [phase for phase, _, _ in told if phase.startswith("round ")]
    assert turns[:6] == [f"round {n}: batch {size}" for n in (1, 2, 3) for size in (1, 4)]
    assert {phase.split(":")[0] for phase, _, _ in told} >= {"batch 1", "batch 4", "files to records"}


def test_what_cannot_be_started_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no such file · .*absent\.onnx"):
        run_benchmark([Target(path=tmp_path / "absent.onnx")])


def test_files_that_cannot_be_read_are_told_before_anything_is_timed(digits_export: Export) -> None:
    phases: list[str] = []
    with pytest.raises(UsageError, match=r"none of the 1 files can be read · absent"):
        run_benchmark(
            [Target(path=digits_export.path)],
            files=Files(paths=(Path("absent"),), batch=1, workers=1),
            progress=lambda phase, *_: phases.append(phase),
        )
    assert phases[-1] == "files to records: warming up"


@pytest.mark.parametrize("wrong", [{"targets": []}, {"batch_sizes": ()}, {"batch_sizes": (0, 1)}, {"rounds": 0}])
def test_nothing_to_time_is_refused(wrong: dict[str, object], digits_export: Export) -> None:
    arguments: dict[str, object] = {"targets": [Target(path=digits_export.path)], **wrong}
    with pytest.raises(UsageError, match="there is nothing to time"):
        run_benchmark(**arguments)  # type: ignore[arg-type]


@pytest.fixture
def small_export(small_graph: Graph) -> Path:
    """An ONNX file beside its checkpoint."""
    small_graph.save()
    return small_graph.path


def test_the_baselines_are_made_from_the_same_checkpoint(one_block: Path, small_export: Path) -> None:
    eager, compiled, unlowered = baselines_of(small_export)
    assert (eager.path, eager.compiled) == (one_block, False)
    assert (compiled.path, compiled.compiled) == (one_block, True)
    assert unlowered.path == Path("one_block-unlowered.onnx")
    assert unlowered.graph is not None
    batch = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    with open_graph(unlowered.graph) as runner, open_runner(small_export) as lowered:
        np.testing.assert_allclose(runner.infer(batch), lowered.infer(batch), atol=1e-4)
    assert baselines_of(one_block)[0].compiled


def test_the_environment_is_told() -> None:
    environment = describe_environment()
    assert {"CPU", "cores", "system", "python", "smlp-deploy", "numpy", "onnxruntime"} <= environment.keys()
    assert all(environment.values())


L4 = GpuDevice(name="NVIDIA L4", architecture="sm89", driver=12080)


class TestTheClockOfAGpu:
    @staticmethod
    def timed(clocks: list[int | None], monkeypatch: pytest.MonkeyPatch, most: int | None = 2040) -> ModelTiming:
        """What is reported of a model on a GPU with these clocks at the ends of its turns."""
        read = iter(clocks)

        class Process(Scripted):
            def turn(self, batch: int, seconds: float) -> Sample:
                return replace(super().turn(batch, seconds), clock=next(read, None))

            def name(self) -> str:
                return "tensorrt (CUDA graphs) x.engine"

            def peak_memory(self) -> None:
                return None

            def gpu_memory(self) -> int:
                return 30_000_000

        monkeypatch.setattr(GpuClock, "most", lambda self: most)
        loaded = Loaded(name="tensorrt x.engine", metadata=metadata(), seconds=0)
        model = _Model(process=cast(TimedProcess, Process(0.1, 0)), loaded=loaded, first=0, gpu=L4)
        _take_turns([model], [8], rounds=len(clocks), progress=no_progress)
        return _model_timing(model, (), None)

    def test_is_read_at_the_end_of_each_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timing = self.timed([1980, 1755, 1965], monkeypatch)
        assert timing.gpu == "NVIDIA L4"
        assert timing.gpu_clock == Clock(median=1965, low=1755, high=1980, most=2040)
        assert _clocks([replace(timing, gpu_clock=None), timing]) == {
            "GPU clock, MHz": "median (range) during the runs of model 2: 1965 (1755 to 1980); 2040 at most"
        }

    def test_is_left_out_where_it_is_not_known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timing = self.timed([None, None], monkeypatch)
        assert timing.gpu_clock is None
        assert _clocks([timing]) == {}
        (text,) = _clocks([self.timed([1980], monkeypatch, most=None)]).values()
        assert text.endswith("1980 (1980 to 1980)")

    def test_a_model_is_named_after_its_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.timed([], monkeypatch).name == "tensorrt (CUDA graphs) x.engine"


def test_the_environment_names_the_gpu_that_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_gpu", lambda: L4)
    assert describe_environment()["GPU"] == "NVIDIA L4, sm89, driver for CUDA 12"
    hopper = GpuDevice(name="NVIDIA H100", architecture="sm90", driver=13000)
    assert describe_environment(hopper)["GPU"] == "NVIDIA H100, sm90, driver for CUDA 13"


class TestWhereBaselinesRun:
    """On the GPU if the first model runs on one."""

    @pytest.fixture(autouse=True)
    def two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dependencies, "list_gpus", lambda: (L4, replace(L4, index=1)))

    @pytest.mark.parametrize(
        ("device", "provider", "index", "onnx_provider"),
        [
            (None, None, None, "cpu"),
            ("cpu", None, None, "cpu"),
            ("cuda:1", None, 1, "cuda"),
            (None, "cuda", 0, "cuda"),
            ("1", "tensorrt", 1, "tensorrt"),
        ],
    )
    def test_of_an_onnx_file(
        self,
        small_export: Path,
        monkeypatch: pytest.MonkeyPatch,
        device: str | None,
        provider: str | None,
        index: int | None,
        onnx_provider: str,
    ) -> None:
        monkeypatch.setattr(baselines, "open_runner", lambda path, placement: open_runner(path))
        targets = baselines_of(small_export, placement=Placement.of(device=device, provider=provider))
        eager, compiled, unlowered = targets
        for target in targets:
            gpu = target.placement.gpu
            assert (gpu.index if gpu else None) == index
        assert [eager.placement.provider, compiled.placement.provider] == [None, None]
        assert unlowered.placement.onnx_provider == onnx_provider

    def test_of_an_engine(self, small_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(baselines, "open_runner", lambda path, placement: open_runner(small_export))
        for target in baselines_of(small_export.with_name("x.engine")):
            assert target.placement.gpu == L4
            assert target.placement.onnx_provider == "cuda"

    def test_of_a_checkpoint(self, one_block: Path) -> None:
        compiled, unlowered = baselines_of(one_block, placement=Placement.of(device="1"))
        assert compiled.placement.gpu == unlowered.placement.gpu == replace(L4, index=1)
        assert unlowered.placement.onnx_provider == "cuda"
        assert baselines_of(one_block)[0].placement.gpu is None
