"""Image files to batches of network inputs: decoded by threads, in order, a file that cannot be read in its place."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import ImageError
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.metadata import Preprocessing

FloatArray = NDArray[np.float32]


def decoded_batches(
    paths: Iterable[str | Path], preprocessing: Preprocessing, *, batch_size: int, workers: int
) -> Iterator[list[tuple[str, FloatArray | str]]]:
    """Batches of paths, each with the network's input or the reason why there is none; decoded two batches ahead."""

    def load(path: str | Path) -> FloatArray | str:
        try:
            return load_image(Path(path), preprocessing)
        except ImageError as error:
            return str(error)

    remaining = iter(paths)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    queue: deque[tuple[str, Future[FloatArray | str]]] = deque()

    def fill() -> None:
        for path in islice(remaining, 2 * batch_size - len(queue)):
            queue.append((os.fspath(path), pool.submit(load, path)))

    try:
        fill()
        while queue:
            batch = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
            loaded = [(path, future.result()) for path, future in batch]
            fill()  # before the network runs, so that decoding goes on meanwhile
            yield loaded
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
