"""The network as one stage of a pipeline: it runs in a thread of its own, between decoding and writing records.

While a GPU computes one batch, the next is copied to it and the one before is turned into records. A runner without
streams goes through the same loop, one batch after the other.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import GpuError
from smlp_deploy.images.batches import Batch, FloatArray
from smlp_deploy.runners.base import Runner, StreamingRunner

logger = logging.getLogger(__name__)

Outcome = FloatArray | str
"""An image's logits, all finite, or why there are none."""

_Item = TypeVar("_Item")


class _Stream(Protocol):
    """What the loop needs of a `StreamingRunner`."""

    @property
    def slots(self) -> int: ...

    def submit(self, batch: NDArray[Any]) -> None: ...

    def collect(self) -> FloatArray: ...


def infer_stream(runner: Runner, batches: Iterable[Batch]) -> Generator[tuple[Batch, list[Outcome]]]:
    """Run batches in order; each with the outcomes of its readable images.

    The images of a batch that fails are run again one by one.

    Args:
        runner: the network.
        batches: whose inputs stay as they are until the next is requested; those of the results do not.

    Raises:
        GpuError: the GPU cannot go on.
    """
    stream: _Stream = runner if isinstance(runner, StreamingRunner) else _Unstreamed(runner)
    under_way: deque[tuple[Batch, list[Outcome] | None]] = deque()  # None: to be collected

    def oldest() -> tuple[Batch, list[Outcome]]:
        batch, outcomes = under_way.popleft()
        return batch, _outcomes(stream.collect()) if outcomes is None else outcomes

    for batch in batches:
        while len(under_way) >= stream.slots:
            yield oldest()
        if not len(batch.inputs):
            under_way.append((batch, []))
        elif (reason := _submit(stream, batch.inputs)) is None:
            under_way.append((batch, None))
        else:
            while under_way:
                yield oldest()
            under_way.append((batch, _run_one_by_one(runner, batch.inputs, reason)))
    while under_way:
        yield oldest()


def _submit(stream: _Stream, inputs: NDArray[Any]) -> str | None:
    """Start a batch; returns the reason if it fails."""
    try:
        stream.submit(inputs)
    except GpuError:  # no image's fault: all the others would fail too
        raise
    # A backend may raise anything, and one bad image must not cost the others in its batch their results.
    except Exception as error:
        return f"the network failed on it: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _run_one_by_one(runner: Runner, inputs: NDArray[Any], reason: str) -> list[Outcome]:
    if len(inputs) == 1:
        return [reason]
    logger.warning("a batch of %d failed (%s); its images are run one by one", len(inputs), reason)
    return [outcome for i in range(len(inputs)) for outcome in infer_each(runner, inputs[i : i + 1])]


def infer_each(runner: Runner, inputs: NDArray[Any]) -> list[Outcome]:
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

    slots = 1

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._done: deque[FloatArray] = deque()

    def submit(self, batch: NDArray[Any]) -> None:
        self._done.append(self._runner.infer(batch))

    def collect(self) -> FloatArray:
        return self._done.popleft()


def allocator_of(runner: Runner) -> Callable[[int], NDArray[Any]] | None:
    """What allocates the memory of batches, if the runner has a better kind than ordinary memory."""
    return runner.allocate if isinstance(runner, StreamingRunner) else None


def in_background(items: Generator[_Item], *, name: str) -> Generator[_Item]:
    """Iterate in a thread of its own, which makes the next item while the caller uses one.

    Args:
        items: closed at the end.
        name: of the thread.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix=name)
    end = object()
    try:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield cast(_Item, item)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        items.close()
