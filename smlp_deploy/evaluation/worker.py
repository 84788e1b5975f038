"""One model in its own process, which runs and times it on request."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from smlp_deploy.errors import CheckError, SmlpError
from smlp_deploy.evaluation.clock import GpuClock
from smlp_deploy.images.batches import FloatArray, ImageArray, decoded_batches
from smlp_deploy.inference.classify import Classifier
from smlp_deploy.inference.records import FORMATS
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.runners import open_compiled, open_graph, open_runner
from smlp_deploy.runners.base import GpuTimer, Runner, StreamingRunner
from smlp_deploy.runners.placement import ANYWHERE, Placement

if TYPE_CHECKING:
    from smlp_deploy.graphs.file import Graph

_SEED = 2109


@dataclass(frozen=True, kw_only=True)
class Target:
    """A model to time.

    Attributes:
        path: an artifact or checkpoint.
        placement: where it runs.
        compiled: run a checkpoint through `torch.compile`.
        graph: a graph without a file.
    """

    path: Path
    placement: Placement = ANYWHERE
    compiled: bool = False
    graph: Graph | None = None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A loaded model's name, metadata, and the seconds from the start of its process."""

    name: str
    metadata: ModelMetadata
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The runs of a turn.

    Attributes:
        runs: wall-clock seconds of each.
        gpu_runs: seconds by CUDA events, without transfers, of as many more; empty on the CPU and in ONNX Runtime.
        clock: SM clock right after them, in MHz; None on the CPU, and if NVML does not tell it.
    """

    runs: tuple[float, ...]
    gpu_runs: tuple[float, ...] = ()
    clock: int | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of all files through the model: seconds in total, in the network, and of decoding alone."""

    failed: int
    seconds: float
    inference: float
    decode: float


class TimedProcess:
    """A process with one model; a context manager. Its methods wait for the result.

    Raises:
        SmlpError: from each method, if the model fails or its process ended; of the class that it had there.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, target, time.time()), daemon=True)
        self._process.start()
        theirs.close()

    def load(self) -> Loaded:
        """Load the model."""
        answer: Loaded = self._ask("load")
        return answer

    def name(self) -> str:
        """The name of the model's runner now: an engine's tells whether its runs so far were CUDA graphs."""
        answer: str = self._ask("name")
        return answer

    def first(self, batch: int) -> float:
        """Seconds of the first prediction.

        Raises:
            CheckError: its output is not finite.
        """
        answer: float = self._ask("first", batch)
        return answer

    def turn(self, batch: int, seconds: float) -> Sample:
        """Run batches for about `seconds`, at least one.

        The first run refills caches that other models have evicted, and is dropped unless it is the only one.
        """
        answer: Sample = self._ask("turn", batch, seconds)
        return answer

    def end_to_end(self, paths: Sequence[Path], batch: int, workers: int) -> Run:
        """Run image files to records, which are discarded."""
        answer: Run = self._ask("end_to_end", paths, batch, workers)
        return answer

    def gpu_memory(self) -> int | None:
        """Bytes of GPU memory of an engine's buffers and scratch; None for other models."""
        answer: int | None = self._ask("gpu_memory")
        return answer

    def peak_memory(self) -> int | None:
        """The peak memory of the process so far in bytes, or None if the system does not report it."""
        answer: int | None = self._ask("peak_memory")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            with suppress(SmlpError):
                self._ask("close")  # so that an engine's runner can cache its compiled kernels
        self._connection.close()
        self._process.kill()
        self._process.join()

    def _ask(self, method: str, *arguments: object) -> Any:
        try:
            self._connection.send((method, arguments))
            error, answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise SmlpError(
                f"its process ended with {_ending(self._process.exitcode)}",
                where=self._target.path,
                fix="if memory ran out, choose smaller --batch",
            ) from None
        if error is not None:
            kind, what, where, fix = error
            raise kind(what, where=where or self._target.path, fix=fix)
        return answer


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"code {code}"


def _serve(connection: Connection, target: Target, started: float) -> None:
    """Answer requests until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    logging.getLogger("smlp_deploy").addHandler(logging.NullHandler())  # the parent process logs the same messages
    session = _Session(target, started)
    with suppress(EOFError, OSError):
        while True:
            method, arguments = connection.recv()
            try:
                connection.send((None, getattr(session, method)(*arguments)))
            except SmlpError as error:
                connection.send(((type(error), error.what, error.where, error.fix), None))
            # A framework may raise anything; the caller gets it as one line.
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                connection.send(((SmlpError, f"{type(error).__name__}: {lines[0]}", None, None), None))


def _open(target: Target) -> Runner:
    if target.compiled:
        return open_compiled(target.path, placement=target.placement)
    if target.graph is not None:
        return open_graph(target.graph, placement=target.placement)
    return open_runner(target.path, placement=target.placement)


class _Session:
    """Serves the requests of `TimedProcess` in the child process."""

    def __init__(self, target: Target, started: float) -> None:
        self._target = target
        self._started = started
        self._runner: Runner | None = None
        self._clock = GpuClock(None)
        self._batches: dict[int, ImageArray] = {}

    @property
    def runner(self) -> Runner:
        assert self._runner is not None, "the model is not loaded"
        return self._runner

    def load(self) -> Loaded:
        opened = _open(self._target)
        # Wall-clock time, because monotonic clocks cannot be compared between processes.
        seconds = time.time() - self._started
        self._runner = opened
        self._clock = GpuClock(self._target.placement.gpu_of(self._target.path))
        return Loaded(name=opened.name, metadata=opened.metadata, seconds=seconds)

    def name(self) -> str:
        return self.runner.name

    def first(self, batch: int) -> float:
        images = self._batch(batch)
        start = time.perf_counter()
        logits = self.runner.infer(images)
        seconds = time.perf_counter() - start
        if not np.isfinite(logits).all():
            raise CheckError("its output has NaN or infinite values, so its speed means nothing")
        return seconds

    def turn(self, batch: int, seconds: float) -> Sample:
        images = self._batch(batch)
        runs: list[float] = []
        end = time.perf_counter() + seconds
        while not runs or time.perf_counter() < end:
            start = time.perf_counter()
            self.runner.infer(images)
            runs.append(time.perf_counter() - start)
        kept = runs[1:] or runs
        gpu_runs = self.runner.gpu_seconds(images, runs=len(kept)) if isinstance(self.runner, GpuTimer) else []
        # The GPU keeps its clock for longer than it takes to ask for it.
        return Sample(runs=tuple(kept), gpu_runs=tuple(gpu_runs), clock=self._clock.now())

    def end_to_end(self, paths: Sequence[Path], batch: int, workers: int) -> Run:
        decode = self._decode(paths, batch, workers)
        clocked = _ClockedStream(self.runner) if isinstance(self.runner, StreamingRunner) else _Clocked(self.runner)
        classifier = Classifier(clocked)
        failed = 0
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            write = FORMATS["jsonl"].writer(nowhere, topk=classifier.resolve_topk(None))
            start = time.perf_counter()
            for prediction in classifier.classify(paths, batch_size=batch, workers=workers):
                write(prediction)
                failed += prediction.error is not None
            seconds = time.perf_counter() - start
        return Run(failed=failed, seconds=seconds, inference=clocked.seconds, decode=decode)

    def _decode(self, paths: Sequence[Path], batch: int, workers: int) -> float:
        start = time.perf_counter()
        for _ in decoded_batches(paths, self.runner.metadata, batch_size=batch, workers=workers):
            pass
        return time.perf_counter() - start

    def gpu_memory(self) -> int | None:
        return getattr(self.runner, "device_bytes", None)

    def peak_memory(self) -> int | None:
        # psutil 7 reports a peak only on Windows; elsewhere its `rss` is the current value.
        if sys.platform == "linux":
            # Not getrusage, which includes memory the process held before this interpreter started in it.
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)  # an emulated /proc may lack it
            return int(peak[1]) * 1024 if peak else None
        if sys.platform == "darwin":
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return None

    def close(self) -> None:
        self._clock.close()
        if self._runner is not None:
            self._runner.__exit__(None, None, None)

    def _batch(self, size: int) -> ImageArray:
        """Seeded noise: pixels, or of mean 0 and deviation 1 like normalised images; times do not depend on it."""
        if size not in self._batches:
            metadata, rng = self.runner.metadata, np.random.default_rng(_SEED)
            shape = (size, *metadata.input_shape)
            self._batches[size] = (
                rng.integers(0, 256, shape, dtype=np.uint8)
                if metadata.input == "uint8"
                else rng.standard_normal(shape, dtype=np.float32)
            )
        return self._batches[size]


class _Clocked:
    """A runner that adds up the seconds it runs."""

    def __init__(self, runner: Runner) -> None:
        self.name, self.metadata = runner.name, runner.metadata
        self.seconds = 0.0
        self._runner = runner

    def infer(self, batch: ImageArray) -> FloatArray:
        with self._clocked():
            return self._runner.infer(batch)

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Does nothing; the code that opened the runner closes it."""


class _ClockedStream(_Clocked):
    """The same of a `StreamingRunner`: the seconds in which batches are started or waited for."""

    def __init__(self, runner: StreamingRunner) -> None:
        super().__init__(runner)
        self._stream = runner
        self.slots, self.largest = runner.slots, runner.largest

    def allocate(self, images: int) -> ImageArray:
        return self._stream.allocate(images)

    def release(self, memory: ImageArray) -> None:
        self._stream.release(memory)

    def submit(self, batch: ImageArray) -> None:
        with self._clocked():
            self._stream.submit(batch)

    def collect(self) -> FloatArray:
        with self._clocked():
            return self._stream.collect()
