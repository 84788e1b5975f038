"""Image files to batches of network inputs, decoded by threads, in order; an unreadable file yields its reason."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import ImageError
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.metadata import Preprocessing

FloatArray = NDArray[np.float32]
ImageArray = NDArray[Any]
"""What a network takes: float32 N, 3, S, S or uint8 N, S, S, 3; see `ModelMetadata.input`."""

_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def decoded_batches(
    paths: Iterable[str | Path], preprocessing: Preprocessing, *, batch_size: int, workers: int, pixels: bool = False
) -> Iterator[list[tuple[str, ImageArray | str]]]:
    """Batches of paths, each with the network's input or the reason it could not be read; decoded two batches ahead.

    The inputs are normalized images, or with `pixels` what a network of uint8 input takes.
    """
    size = preprocessing.image_size

    def load(path: str | Path) -> ImageArray | str:
        try:
            if pixels:
                return load_image(Path(path), preprocessing, np.empty((size, size, 3), np.uint8))
            return load_image(Path(path), preprocessing)
        except ImageError as error:
            return str(error)

    remaining = iter(paths)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    queue: deque[tuple[str, Future[ImageArray | str]]] = deque()

    def fill() -> None:
        for path in islice(remaining, 2 * batch_size - len(queue)):
            queue.append((os.fspath(path), pool.submit(load, path)))

    try:
        fill()
        while queue:
            batch = [queue.popleft() for _ in range(min(batch_size, len(queue)))]
            loaded = [(path, future.result()) for path, future in batch]
            fill()  # before the network runs, so that decoding continues meanwhile
            yield loaded
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
