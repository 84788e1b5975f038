"""The network as one stage of a pipeline, in a thread of its own between decoding and writing records.

While a GPU computes one batch, the next is copied to it and the one before is turned into records. A runner without
streams goes through the same loop, one batch after the other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from smlp_deploy.errors import GpuError
from smlp_deploy.images.batches import Batch, BatchMemory, FloatArray, ImageArray
from smlp_deploy.runners.base import Runner, StreamingRunner

logger = logging.getLogger(__name__)

Outcome = FloatArray | str
"""An image's logits, all finite, or why there are none."""

Done = tuple[Batch, list[Outcome]]
"""A batch, whose inputs are no longer valid, and the outcomes of its readable images."""


class _Stream(Protocol):
    """What the network needs of a `StreamingRunner`."""

    @property
    def slots(self) -> int: ...

    def submit(self, batch: ImageArray) -> None: ...

    def collect(self) -> FloatArray: ...


def infer_stream(runner: Runner, batches: Iterable[Batch]) -> Iterator[Done]:
    """Run batches, in order. The network runs in its own thread while the caller uses what was done before.

    The images of a batch that fails are run again one by one.

    Args:
        runner: the network.
        batches: iterated in the caller's thread; the inputs of each stay as they are until the next is requested.

    Raises:
        GpuError: the GPU cannot go on.
    """
    network = _Network(runner)
    with ThreadPoolExecutor(1, thread_name_prefix="network") as thread:
        try:
            done: list[Done] = []
            for batch in batches:
                fed = thread.submit(network.feed, batch)
                yield from done
                done = fed.result()
                if network.error is not None:
                    break
            last = thread.submit(network.finish)
            yield from done
            yield from last.result()
        finally:  # the runner must not keep batches of a caller that left early
            thread.submit(network.finish).result()
    if network.error is not None:
        raise network.error


class _Network:
    """A runner with its batches under way.

    Attributes:
        error: after which the GPU cannot go on, so that batches are lost.
    """

    def __init__(self, runner: Runner) -> None:
        self.error: GpuError | None = None
        self._runner = runner
        self._stream: _Stream = runner if isinstance(runner, StreamingRunner) else _Unstreamed(runner)
        self._under_way: deque[tuple[Batch, list[Outcome] | None]] = deque()  # None: to be collected

    def feed(self, batch: Batch) -> list[Done]:
        """Start a batch, and return those that are done; its inputs may be changed afterwards."""
        done: list[Done] = []
        try:
            self._collect(done, leave=max(0, self._stream.slots - 1))
            if not len(batch.inputs):
                self._under_way.append((batch, []))
            elif (reason := _submit(self._stream, batch.inputs)) is None:
                self._under_way.append((batch, None))
            else:
                self._collect(done, leave=0)
                self._under_way.append((batch, _run_one_by_one(self._runner, batch.inputs, reason)))
            self._collect(done, leave=self._stream.slots)
        except GpuError as error:
            self.error = error
        return done

    def finish(self) -> list[Done]:
        """Wait for all batches under way, unless the GPU has failed."""
        done: list[Done] = []
        try:
            self._collect(done, leave=len(self._under_way) if self.error else 0)
        except GpuError as error:
            self.error = error
        return done

    def _collect(self, done: list[Done], *, leave: int) -> None:
        """Wait for the oldest batches under way."""
        while len(self._under_way) > leave:
            batch, outcomes = self._under_way.popleft()
            done.append((batch, _outcomes(self._stream.collect()) if outcomes is None else outcomes))


def _submit(stream: _Stream, inputs: ImageArray) -> str | None:
    """Start a batch; returns the reason if it fails."""
    try:
        stream.submit(inputs)
    except GpuError:  # no image's fault: all the others would fail too
        raise
    # A backend may raise anything, and one bad image must not cost the others in its batch their results.
    except Exception as error:
        return f"the network failed on it: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _run_one_by_one(runner: Runner, inputs: ImageArray, reason: str) -> list[Outcome]:
    if len(inputs) == 1:
        return [reason]
    logger.warning("a batch of %d failed (%s); its images are run one by one", len(inputs), reason)
    return [outcome for i in range(len(inputs)) for outcome in infer_each(runner, inputs[i : i + 1])]


def infer_each(runner: Runner, inputs: ImageArray) -> list[Outcome]:
    """The outcome of each image of a batch; if the batch fails, its images are run again one by one.

    Args:
        runner: the network.
        inputs: N images, as `runner` takes them.

    Raises:
        GpuError: the GPU cannot go on.
    """
    if not len(inputs):
        return []
    alone = _Unstreamed(runner)
    reason = _submit(alone, inputs)
    return _outcomes(alone.collect()) if reason is None else _run_one_by_one(runner, inputs, reason)


def _outcomes(logits: FloatArray) -> list[Outcome]:
    finite = np.logical_and.reduce(np.isfinite(logits), axis=1)
    return [
        row if good else "the network's output has NaN or infinite values"
        for row, good in zip(logits.copy(), finite.tolist(), strict=True)
    ]


class _Unstreamed:
    """A runner without streams: a batch is done when `submit` returns."""

    slots = 0

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._done: deque[FloatArray] = deque()

    def submit(self, batch: ImageArray) -> None:
        self._done.append(self._runner.infer(batch))

    def collect(self) -> FloatArray:
        return self._done.popleft()


def memory_of(runner: Runner) -> BatchMemory | None:
    """The memory that the runner copies batches from fastest, if it has some."""
    return runner if isinstance(runner, StreamingRunner) else None
