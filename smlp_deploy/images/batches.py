"""Images to batches of network inputs, decoded by threads, in order; an unreadable one has its reason instead."""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import ImageError
from smlp_deploy.images.decode import keep_memory
from smlp_deploy.images.preprocessing import Decoder, ImageSource, load_image
from smlp_deploy.metadata import ModelMetadata

FloatArray = NDArray[np.float32]
ImageArray = NDArray[Any]
"""What a network takes: float32 N, 3, S, S or uint8 N, S, S, 3; see `ModelMetadata.input`."""

_Result = TypeVar("_Result")

_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


class BatchMemory(Protocol):
    """Where the inputs of batches lie."""

    def allocate(self, images: int) -> ImageArray:
        """Memory for the inputs of that many images."""
        ...

    def release(self, memory: ImageArray) -> None:
        """Take back memory that nobody uses any more."""
        ...


@dataclass(frozen=True)
class Batch:
    """Consecutive images.

    Attributes:
        paths: of all of them; empty for one that is not given by its path.
        inputs: what the network takes, of the readable ones in order; see `ModelMetadata.input`. Other images are
            written to this memory once the next batch is requested.
        errors: why an image could not be read, by its position in `paths`.
    """

    paths: Sequence[str]
    inputs: ImageArray
    errors: Mapping[int, str]

    def with_each(self, results: Iterable[_Result]) -> Iterator[tuple[str, _Result | str]]:
        """Each path with its result, of which the readable images have one each, or with its error."""
        result = iter(results)
        for position, path in enumerate(self.paths):
            yield path, self.errors[position] if position in self.errors else next(result)


def decoded_batches(
    images: Iterable[ImageSource],
    metadata: ModelMetadata,
    *,
    batch_size: int,
    workers: int,
    memory: BatchMemory | None = None,
    decoder: Decoder | None = None,
) -> Generator[Batch]:
    """Batches of images, decoded ahead: at most two batches, or two images per thread if that is more.

    The images are decoded straight into the memory of their batch. There are as many of these as are decoded ahead,
    three as a rule, and they are used again and again.

    Args:
        images: where they are; read no further than they are decoded.
        metadata: of the network, which says how images are prepared and what it takes.
        batch_size: images per batch; the last one may be smaller.
        workers: decoding threads.
        memory: where batches lie; by default ordinary memory.
        decoder: asked first; by default Pillow decodes everything.
    """
    reader = _Reader(metadata, batch_size, workers, memory or _OrdinaryMemory(metadata), decoder)
    try:
        yield from reader.read(iter(images))
    finally:
        reader.close()


class _OrdinaryMemory:
    def __init__(self, metadata: ModelMetadata) -> None:
        self._shape, self._dtype = metadata.input_shape, metadata.input

    def allocate(self, images: int) -> ImageArray:
        return np.empty((images, *self._shape), self._dtype)

    def release(self, memory: ImageArray) -> None:
        """Does nothing: it is freed when nobody has it any more."""


class _Reader:
    """The decoding threads and the memory of `decoded_batches`."""

    def __init__(
        self,
        metadata: ModelMetadata,
        batch_size: int,
        workers: int,
        memory: BatchMemory,
        decoder: Decoder | None,
    ) -> None:
        self._decoder = decoder
        self._preprocessing = metadata.preprocessing
        self._batch_size = batch_size
        self._ahead = math.ceil(max(2 * batch_size, 2 * workers) / batch_size)  # batches
        self._source = memory
        self._memory: list[ImageArray] = []  # one more than `_ahead`: the batch that was handed out
        keep_memory()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._queue: deque[tuple[str, Future[str | None]]] = deque()
        self._started = 0  # images, since the beginning

    def read(self, images: Iterator[ImageSource]) -> Iterator[Batch]:
        self._decode_ahead(images)
        for number in itertools.count():
            if not self._queue:
                return
            files = [self._queue.popleft() for _ in range(min(self._batch_size, len(self._queue)))]
            reasons = [decoded.result() for _, decoded in files]
            self._decode_ahead(images)  # before the network runs, so that decoding continues meanwhile
            yield _batch([path for path, _ in files], reasons, self._memory_of(number))

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        while self._memory:
            self._source.release(self._memory.pop())

    def _decode_ahead(self, images: Iterator[ImageSource]) -> None:
        for image in itertools.islice(images, self._ahead * self._batch_size - len(self._queue)):
            number, row = divmod(self._started, self._batch_size)
            decoded = self._pool.submit(self._decode, image, self._memory_of(number)[row])
            path = os.fspath(image) if isinstance(image, (str, Path)) else ""
            self._queue.append((path, decoded))
            self._started += 1

    def _memory_of(self, number: int) -> ImageArray:
        """The memory of a batch, which is that of an earlier one if there are enough."""
        position = number % (self._ahead + 1)
        if position == len(self._memory):
            self._memory.append(self._source.allocate(self._batch_size))
        return self._memory[position]

    def _decode(self, image: ImageSource, row: ImageArray) -> str | None:
        """Decode an image; returns the reason if it cannot be read."""
        try:
            load_image(image, self._preprocessing, row, self._decoder)
        except ImageError as error:
            return str(error)
        return None


def _batch(paths: Sequence[str], reasons: Sequence[str | None], memory: ImageArray) -> Batch:
    """A batch whose readable images lie together at the beginning of its memory."""
    readable = [row for row, reason in enumerate(reasons) if reason is None]
    for target, row in enumerate(readable):
        if target != row:
            np.copyto(memory[target], memory[row])
    errors = {position: reason for position, reason in enumerate(reasons) if reason is not None}
    return Batch(paths, memory[: len(readable)], errors)


def available_cores() -> int:
    """Cores that this process may use: its CPU affinity, capped by the CPU time of its control groups.

    In a container run with `--cpus=2` the affinity still has all cores of the host. The standard library and psutil
    report those, because they do not read control groups.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *map(math.ceil, _cpu_limits())])


def _cpu_limits() -> Iterator[float]:
    """The CPU time limits of this process's control groups (version 2 or 1), in cores; Linux only.

    In a container a group's path may be the host's and not exist. Its parents are tried too: their limits apply to the
    group, and the root is the container's own group.
    """
    try:
        groups = os.fsdecode(_OWN_CGROUPS.read_bytes()).split("\n")
    except OSError:
        return
    for line in filter(None, groups):
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parents) - len(root.parents)]):
            with suppress(OSError, ValueError):  # it does not exist, or its limit is "max"
                quota, period = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
                if int(quota) > 0:
                    yield int(quota) / int(period)
