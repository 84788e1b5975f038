"""Classification on several devices: a process for each, one queue of work for all of them, predictions in order."""

from __future__ import annotations

import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import count, islice
from multiprocessing.connection import wait
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Self

from smlp_deploy.errors import GpuError, UsageError
from smlp_deploy.images.batches import available_cores
from smlp_deploy.images.preprocessing import Decoder, ImageSource
from smlp_deploy.inference.classify import Classifier, Prediction, check_batch_size, check_topk
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.runners.base import Closing, StreamingRunner, batch_size_of
from smlp_deploy.runners.placement import Placement

_AHEAD = 2
"""Pieces of work under way for each device."""

_LARGEST = 6
"""A piece of work has at most 2 ** _LARGEST batches: a network idles while the first batch of a piece is decoded."""


@dataclass(frozen=True)
class Opened:
    """What another process says of a model that it has opened.

    Attributes:
        name: what runs it.
        metadata: of the model.
        provider: what it runs on, as `RunIdentity` has it.
        batch_size: what it is fastest with.
        largest: the largest batch that it takes, if that is limited.
    """

    name: str
    metadata: ModelMetadata
    provider: str
    batch_size: int
    largest: int | None

    @classmethod
    def of(cls, classifier: Classifier, path: Path, placement: Placement) -> Self:
        """What to say of the classifier of a file."""
        runner = classifier.runner
        largest = runner.largest if isinstance(runner, StreamingRunner) else None
        provider = placement.kind_of(path, runner.metadata)
        return cls(runner.name, runner.metadata, provider, batch_size_of(runner), largest)


class DeviceClassifier(Closing):
    """Classifies images on several devices with one model; a context manager, because its processes hold the memory.

    Processes are spawned, so a script that uses it runs its own code under `if __name__ == "__main__":`.

    Args:
        path: the artifact or checkpoint.
        placements: one for each process. Those that compute on the CPU share its cores.

    Attributes:
        name: what runs the model, and how many times.
        metadata: of the model.

    Raises:
        SmlpError: the file cannot be used, or cannot run on one of them.
    """

    def __init__(self, path: str | Path, placements: Sequence[Placement]) -> None:
        if not placements:
            raise UsageError("no devices", where="--devices", fix="for example 0,1")
        self._devices = len(placements)
        context = multiprocessing.get_context("spawn")
        queue: Queue[Placement] = context.Queue()
        share = max(1, available_cores() // self._devices)
        for placement in placements:
            queue.put(replace(placement, threads=placement.threads or share))
        logs: Queue[logging.LogRecord] = context.Queue()
        self._logs = logging.handlers.QueueListener(logs, _Forward())
        self._logs.start()
        self._pool = ProcessPoolExecutor(
            self._devices,
            mp_context=context,
            initializer=_start,
            initargs=(Path(path), queue, context.Barrier(self._devices), logs),
        )
        try:
            opened = [_result(future) for future in [self._pool.submit(_open) for _ in placements]]
        except BaseException:
            self.close()
            raise
        first: Opened = opened[0]
        self.name = f"{first.name} on {self._devices} devices"
        self.metadata = first.metadata
        self._batch_size = first.batch_size
        self._largest = min((one.largest for one in opened if one.largest is not None), default=None)

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each class, by its index."""
        return self.metadata.labels

    def close(self) -> None:
        """Stop the processes."""
        self._pool.shutdown(cancel_futures=True)
        self._logs.stop()

    def resolve_batch_size(self, batch_size: int | None) -> int:
        """See `Classifier.resolve_batch_size`."""
        return check_batch_size(batch_size, usual=self._batch_size, largest=self._largest)

    def resolve_topk(self, topk: int | None) -> int:
        """See `Classifier.resolve_topk`."""
        return check_topk(topk, classes=len(self.labels))

    def classify(
        self,
        images: Iterable[ImageSource],
        *,
        batch_size: int | None = None,
        topk: int | None = None,
        workers: int | None = None,
        decoder: Decoder | None = None,
    ) -> Iterator[Prediction]:
        """One prediction per image, in their order; see `Classifier.classify`.

        Images are grouped in batches as one device would group them. `workers` is the number of decoding threads of
        each process; by default the processes share the cores.

        Raises:
            UsageError: a number is out of range, or a decoder is given, which is in one process.
            GpuError: a device cannot go on, or its process ended.
        """
        if decoder is not None:
            raise UsageError("contradicts several devices", where="decoder", fix="give one of them")
        size, classes = self.resolve_batch_size(batch_size), self.resolve_topk(topk)
        threads = workers or max(1, available_cores() // self._devices)
        under_way: deque[Future[list[Prediction]]] = deque()
        for piece in _pieces(images, size, self._devices):
            if len(under_way) == _AHEAD * self._devices:
                yield from _result(under_way.popleft())
            under_way.append(self._pool.submit(_classify, piece, size, classes, threads))
        while under_way:
            yield from _result(under_way.popleft())


def _pieces(images: Iterable[ImageSource], batch_size: int, devices: int) -> Iterator[list[ImageSource]]:
    """Lists of whole batches: short ones first, so that all devices share a few images and begin soon."""
    remaining = iter(images)
    for number in count():
        piece = list(islice(remaining, batch_size << min(_LARGEST, number // devices)))
        if not piece:
            return
        yield piece


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise GpuError(
            "the process of a device ended", fix="see the system's log; it may have run out of memory"
        ) from None


class _Forward(logging.Handler):
    """Hands records of other processes to this one's loggers."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


class _Process:
    """What one of the processes holds."""

    path: Path
    placement: Placement
    opening: Barrier
    classifier: Classifier


def _start(path: Path, queue: Queue[Placement], opening: Barrier, logs: Queue[logging.LogRecord]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the first one decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    logging.getLogger("smlp_deploy").addHandler(logging.handlers.QueueHandler(logs))
    _Process.path, _Process.placement, _Process.opening = path, queue.get(), opening


def _end_with(sentinel: int) -> None:
    """End this process when the first one ends, however that happens: it holds a GPU's memory."""
    wait([sentinel])
    os._exit(1)


def _open() -> Opened:
    try:
        _Process.classifier = classifier = Classifier.open(_Process.path, placement=_Process.placement)
    finally:
        _Process.opening.wait()  # so that each process gets one of these calls
    return Opened.of(classifier, _Process.path, _Process.placement)


def _classify(images: list[ImageSource], batch_size: int, topk: int, workers: int) -> list[Prediction]:
    return list(_Process.classifier.classify(images, batch_size=batch_size, topk=topk, workers=workers))
