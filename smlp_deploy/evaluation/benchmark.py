"""Times models side by side (A B A B ...), so that other load on the machine affects all of them alike.

Each model has its own process (`worker.py`), so that spinning threads of one framework cannot slow down another, and
because peak memory is measured per process. They take turns; only one runs at a time.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from smlp_deploy import __version__
from smlp_deploy.dependencies import TENSORRT_DISTRIBUTIONS, GpuDevice, find_gpu, installed_version
from smlp_deploy.errors import SmlpError, UsageError
from smlp_deploy.evaluation.clock import GpuClock
from smlp_deploy.evaluation.worker import Loaded, Run, Sample, Target, TimedProcess
from smlp_deploy.images.batches import available_cores
from smlp_deploy.interrupts import Progress, no_progress

DEFAULT_BATCH_SIZES = (1, 8, 32)
DEFAULT_ROUNDS = 10

_TURN_SECONDS = 0.25
_WARM_UP_TURNS = range(3, 13)
_STABLE = 0.05
"""Largest relative difference between the medians of three consecutive turns."""
_MOST_ROUNDS = 3
"""Over the number of rounds requested."""
_PRECISE = 0.1
"""Width of a ratio's interval, over the ratio."""
_FEWEST_ROUNDS = 5
"""For a meaningful bootstrap interval of a median."""
_PASSES = 5
_RESAMPLES = 2000
_SEED = 2109
_PACKAGES = ("numpy", "pillow", "torch", "onnxruntime", "onnxruntime-gpu", *sum(TENSORRT_DISTRIBUTIONS.values(), ()))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The speedup over the first model, with its 95% interval `low` to `high`.

    `value` is the median over the rounds of the first model's time divided by this one's in the same round; the
    interval is a percentile bootstrap over rounds. With fewer than five rounds, `low` and `high` are None.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class BatchTiming:
    """One model at one batch size; times are seconds per run of the whole batch.

    Attributes:
        batch: images per run.
        stable: the warm-up ended with stable times, not at its limit.
        rounds: the timed runs of each round.
        median, p90, p95, p99: of all timed runs; percentiles by nearest rank.
        spread: interquartile range over the median.
        images_per_second: by the median.
        ratio: to the first model; None for the first.
        gpu_median: of runs by CUDA events, without transfers; None on the CPU and in ONNX Runtime.
    """

    batch: int
    stable: bool
    rounds: tuple[tuple[float, ...], ...]
    median: float
    p90: float
    p95: float
    p99: float
    spread: float
    images_per_second: float
    ratio: Ratio | None
    gpu_median: float | None = None


@dataclass(frozen=True, kw_only=True)
class EndToEnd:
    """From image files to records; seconds are medians over the rounds.

    Attributes:
        images: files.
        failed: files without a prediction.
        batch: images per run of the network.
        workers: decoding threads.
        seconds: from the first file to the last record.
        inference: those of them in which the network ran.
        idle: the rest, in which the network waited for decoding, or records were written.
        decode: seconds of decoding alone, with as many threads and no network running.
        images_per_second: by `seconds`.
        ratio: to the first model; None for the first.
    """

    images: int
    failed: int
    batch: int
    workers: int
    seconds: float
    inference: float
    idle: float
    decode: float
    images_per_second: float
    ratio: Ratio | None


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A GPU's SM clock during the timed runs, in MHz: read at the end of each turn.

    `most` is the highest that the GPU can have, None if unknown.
    """

    median: float
    low: int
    high: int
    most: int | None


@dataclass(frozen=True, kw_only=True)
class ModelTiming:
    """The measurements of one model.

    Attributes:
        name: of its runner, after the runs.
        precision: of its arithmetic.
        load: seconds from starting the process to a loaded model, including the framework's import.
        first: seconds of the first prediction after that, at the smallest batch size.
        peak_memory: of its process in bytes, including the framework; None if the system does not report it.
        batches: by batch size.
        end_to_end: files to records, if requested.
        gpu: name of the GPU that it ran on; None for the CPU.
        gpu_memory: bytes of it that an engine's buffers and scratch take, beside its weights; None for other models.
        gpu_clock: of that GPU; None if NVML does not tell it.
    """

    name: str
    precision: str
    load: float
    first: float
    peak_memory: int | None
    batches: tuple[BatchTiming, ...]
    end_to_end: EndToEnd | None = None
    gpu: str | None = None
    gpu_memory: int | None = None
    gpu_clock: Clock | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The result of one run: all models and their environment.

    Attributes:
        environment: the machine and the versions, as text by name.
        models: in the order given; ratios are to the first.
        left_out: models that could not run, with the reason.
    """

    environment: dict[str, str]
    models: tuple[ModelTiming, ...]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> str:
        """A JSON object with all fields, including every timed run."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class Files:
    """The input of an end-to-end measurement.

    Attributes:
        paths: image files.
        batch: images per run of the network.
        workers: decoding threads.
    """

    paths: tuple[Path, ...]
    batch: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class _Model:
    """A loaded model in its process, the GPU it runs on, the seconds of its first prediction, and clocks read later."""

    process: TimedProcess
    loaded: Loaded
    first: float
    gpu: GpuDevice | None = None
    clocks: list[int] = field(default_factory=list)


def run_benchmark(
    targets: Sequence[Target],
    *,
    baselines: Sequence[Target] = (),
    batch_sizes: Sequence[int] = DEFAULT_BATCH_SIZES,
    rounds: int = DEFAULT_ROUNDS,
    files: Files | None = None,
    progress: Progress = no_progress,
) -> Benchmark:
    """Time models in turns.

    Args:
        targets: the models; ratios are to the first.
        baselines: more models; one that cannot be started is left out.
        batch_sizes: images per run.
        rounds: turns of each model at each batch size; up to three times as many while a ratio's interval is wider than
            a tenth of the ratio.
        files: also measure the time from files to records.
        progress: told of the phase, and of the steps done and in total.

    Raises:
        UsageError: there is nothing to time, a number is out of range, or none of the files can be read.
        SmlpError: a model cannot be loaded or run, or its process ended.
    """
    if not targets or not batch_sizes or min(*batch_sizes, rounds) < 1:
        raise UsageError("there is nothing to time", fix="give at least one model, batch size and round")
    gpu = next(filter(None, (target.placement.gpu_of(target.path) for target in targets)), None)
    environment = describe_environment(gpu)
    with ExitStack() as stack:
        models: list[_Model] = []
        left_out: list[str] = []
        for number, target in enumerate([*targets, *baselines]):
            progress(f"loading {target.path.name}", number, len(targets) + len(baselines))
            try:
                models.append(_start(target, min(batch_sizes), stack))
            except SmlpError as error:
                if number < len(targets):
                    raise
                left_out.append(f"{'torch.compile: ' if target.compiled else ''}{error}")
        if files is not None:
            _warm_up_files(models, files, progress=progress)
        timings = _time_batches(models, sorted(set(batch_sizes)), rounds=rounds, progress=progress)
        ends = _end_to_end(models, files, progress=progress) if files else [None] * len(models)
        measured = tuple(
            _model_timing(model, batches, end)
            for model, batches, end in zip(models, zip(*timings, strict=True), ends, strict=True)
        )
        environment |= _clocks(measured)
        return Benchmark(environment=environment, left_out=tuple(left_out), models=measured)


def _model_timing(model: _Model, batches: tuple[BatchTiming, ...], end: EndToEnd | None) -> ModelTiming:
    with GpuClock(model.gpu) as clock:
        most = clock.most()
    return ModelTiming(
        name=model.process.name(),
        precision=model.loaded.metadata.precision,
        load=model.loaded.seconds,
        first=model.first,
        peak_memory=model.process.peak_memory(),
        batches=batches,
        end_to_end=end,
        gpu=model.gpu.name if model.gpu else None,
        gpu_memory=model.process.gpu_memory(),
        gpu_clock=Clock(median=median(model.clocks), low=min(model.clocks), high=max(model.clocks), most=most)
        if model.clocks
        else None,
    )


def _clocks(models: Sequence[ModelTiming]) -> dict[str, str]:
    """The GPU's clocks as a line of the environment, by the numbers of the models."""
    found = [(number, model.gpu_clock) for number, model in enumerate(models, start=1) if model.gpu_clock]
    if not found:
        return {}
    texts = [f"{number}: {clock.median:g} ({clock.low} to {clock.high})" for number, clock in found]
    most = found[0][1].most
    limit = f"; {most} at most" if most is not None else ""
    return {"GPU clock, MHz": f"median (range) during the runs of model {', '.join(texts)}{limit}"}


def _start(target: Target, batch: int, stack: ExitStack) -> _Model:
    with ExitStack() as trying:
        process = trying.enter_context(TimedProcess(target))
        gpu = target.placement.gpu_of(target.path)
        model = _Model(process=process, loaded=process.load(), gpu=gpu, first=process.first(batch))
        stack.push(trying.pop_all())
    return model


def _time_batches(
    models: Sequence[_Model], sizes: Sequence[int], *, rounds: int, progress: Progress
) -> list[tuple[BatchTiming, ...]]:
    """Every model's times at each batch size."""
    stable: dict[int, list[bool]] = {}
    for number, batch in enumerate(sizes):
        progress(f"batch {batch}: warming up", number, len(sizes))
        stable[batch] = [_warm_up(model.process, batch) for model in models]
    turns = _take_turns(models, sizes, rounds=rounds, progress=progress)
    return [
        tuple(
            _batch_timing(batch, of_model, stable=was_stable, ratio=ratio)
            for of_model, was_stable, ratio in zip(turns[batch], stable[batch], _ratios(turns[batch]), strict=True)
        )
        for batch in sizes
    ]


def _take_turns(
    models: Sequence[_Model], sizes: Sequence[int], *, rounds: int, progress: Progress
) -> dict[int, list[list[Sample]]]:
    """The turns of each model at each batch size.

    A round goes through all sizes, so that each of them is spread over the whole run, because machines drift over
    minutes. Sizes with an imprecise ratio get more rounds.
    """
    turns: dict[int, list[list[Sample]]] = {batch: [[] for _ in models] for batch in sizes}
    for number in range(_MOST_ROUNDS * rounds):
        for batch, of_size in turns.items():
            if number >= rounds and _are_precise(_ratios(of_size)):
                continue
            progress(f"round {number + 1}: batch {batch}", number, max(rounds, number + 1))
            for model, of_model in zip(models, of_size, strict=True):
                turn = model.process.turn(batch, _TURN_SECONDS)
                of_model.append(turn)
                model.clocks.extend([turn.clock] if turn.clock is not None else [])
    return turns


def _ratios(turns: Sequence[Sequence[Sample]]) -> list[Ratio | None]:
    """The ratio of each model's turns to the first's."""
    first, *others = ([median(turn.runs) for turn in of_model] for of_model in turns)
    return [None, *(ratio_to_first(first, other) for other in others)]


def _are_precise(ratios: Sequence[Ratio | None]) -> bool:
    """Whether the intervals are narrow enough, or there are none to narrow by more rounds."""
    return all(
        ratio is None or ratio.low is None or ratio.high is None or ratio.high - ratio.low <= _PRECISE * ratio.value
        for ratio in ratios
    )


def _warm_up(process: TimedProcess, batch: int) -> bool:
    """Run a model until its times are stable, for a limited number of turns; returns whether they are."""
    medians: list[float] = []
    for _ in range(_WARM_UP_TURNS.stop - 1):
        medians.append(median(process.turn(batch, _TURN_SECONDS).runs))
        last = medians[-_WARM_UP_TURNS.start :]
        if len(last) == _WARM_UP_TURNS.start and max(last) - min(last) <= _STABLE * min(last):
            return True
    return False


def _batch_timing(batch: int, turns: Sequence[Sample], *, stable: bool, ratio: Ratio | None) -> BatchTiming:
    runs = np.concatenate([turn.runs for turn in turns])
    on_gpu = [seconds for turn in turns for seconds in turn.gpu_runs]
    p25, p75 = np.percentile(runs, (25, 75))
    p90, p95, p99 = (float(value) for value in np.percentile(runs, (90, 95, 99), method="inverted_cdf"))
    middle = float(np.median(runs))
    return BatchTiming(
        batch=batch,
        stable=stable,
        rounds=tuple(turn.runs for turn in turns),
        median=middle,
        p90=p90,
        p95=p95,
        p99=p99,
        spread=float(p75 - p25) / middle,
        images_per_second=batch / middle,
        ratio=ratio,
        gpu_median=median(on_gpu) if on_gpu else None,
    )


def ratio_to_first(first: Sequence[float], other: Sequence[float]) -> Ratio:
    """The speedup of the other model over the first, from the times of both in each round.

    Percentile bootstrap: Efron, Ann. Stat. 7, 1979. Rounds are resampled whole, so drift from round to round cancels.
    """
    ratios = np.array(first) / np.array(other)
    if len(ratios) < _FEWEST_ROUNDS:
        return Ratio(value=float(np.median(ratios)), low=None, high=None)
    picks = np.random.default_rng(_SEED).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    return Ratio(value=float(np.median(ratios)), low=float(low), high=float(high))


def _warm_up_files(models: Sequence[_Model], files: Files, *, progress: Progress) -> None:
    """Run all files once, so that networks compiled per batch size have also seen the size of the last batch."""
    for position, model in enumerate(models):
        progress("files to records: warming up", position, len(models))
        found = model.process.end_to_end(files.paths, files.batch, files.workers)
        if found.failed == len(files.paths):
            raise UsageError(f"none of the {found.failed} files can be read", where=files.paths[0])


def _end_to_end(models: Sequence[_Model], files: Files, *, progress: Progress) -> list[EndToEnd]:
    """Every model over the same files, in turns."""
    passes: list[list[Run]] = [[] for _ in models]
    for number in range(_PASSES):
        for position, model in enumerate(models):
            progress("files to records", number * len(models) + position, _PASSES * len(models))
            passes[position].append(model.process.end_to_end(files.paths, files.batch, files.workers))
    seconds = [[one.seconds for one in of_model] for of_model in passes]
    return [
        EndToEnd(
            images=len(files.paths),
            failed=of_model[0].failed,
            batch=files.batch,
            workers=files.workers,
            seconds=median(seconds[i]),
            inference=median(one.inference for one in of_model),
            idle=median(one.seconds - one.inference for one in of_model),
            decode=median(one.decode for one in of_model),
            images_per_second=len(files.paths) / median(seconds[i]),
            ratio=ratio_to_first(seconds[0], seconds[i]) if i else None,
        )
        for i, of_model in enumerate(passes)
    ]


def describe_environment(gpu: GpuDevice | None = None) -> dict[str, str]:
    """The machine, its first GPU or the given one, and the versions of the software on it, as text by name."""
    return {name: value for name, value in _facts(gpu or find_gpu()) if value}


def _facts(gpu: GpuDevice | None) -> Iterator[tuple[str, str | None]]:
    yield "CPU", _of_cpu("model name") or platform.processor() or platform.machine()
    yield "cores", f"{available_cores()} of {os.cpu_count()}"
    yield "CPU clock, MHz", _of_cpu("cpu MHz")
    yield "CPU governor", _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if hasattr(os, "getloadavg"):
        yield "load before", f"{os.getloadavg()[0]:.2f} (mean of one minute)"
    yield "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")
    if gpu is not None:
        yield "GPU", f"{gpu.name}, {gpu.architecture}, driver for CUDA {gpu.driver // 1000}"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "python", platform.python_version()
    yield "smlp-deploy", __version__
    for package in _PACKAGES:
        yield package, installed_version(package)


def _of_cpu(name: str) -> str | None:
    """A property of the first core on Linux; psutil has no model name, and reads the clock from the same file."""
    match = re.search(rf"^{name}\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1] if match else None


def _read(path: str) -> str | None:
    """The text of a file that exists only on some systems."""
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").strip()
    return None
