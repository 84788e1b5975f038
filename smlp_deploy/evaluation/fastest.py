"""Which of several ONNX files of one network is the fastest on this machine: by a short measurement, which is kept.

The files give the same classes, because each passed its gates when it was exported, and differ in precision, form and
input. Which is fastest depends on the CPU: without instructions for 16 bits an fp16 file is slower than an fp32 one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np

from smlp_deploy import strictjson
from smlp_deploy.dependencies import installed_version
from smlp_deploy.errors import SmlpError
from smlp_deploy.files import cache_folder, read_text, write_text
from smlp_deploy.images.batches import available_cores
from smlp_deploy.interrupts import Progress, no_progress
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.placement import Placement

_IMAGES = 8
_RUNS = 3
_MOST_FILES = 8
_MOST_KEPT = 200
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino")


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A file and the seconds it takes for an image."""

    path: Path
    seconds: float


def compare_speed(files: Sequence[Path], placement: Placement, *, progress: Progress = no_progress) -> list[Speed]:
    """The speed of those files that hold the same network as the first, the fastest first.

    Each runs three batches of eight images, unless it was measured before: results are kept in the user's cache
    directory, for the file as it is, the runtimes' versions, the cores, and the placement. Without that directory they
    are measured each time. At most eight files are compared.

    Args:
        files: ONNX files; those after the first that cannot be run are left out.
        placement: where they run.
        progress: told of each file.

    Raises:
        SmlpError: the first cannot be run.
    """
    kept = _Kept(placement)
    network: str | None = None
    speeds = []
    compared = files[:_MOST_FILES]
    for number, path in enumerate(compared):
        progress("comparing speed", number, len(compared))
        try:
            found = kept.find(path) or kept.add(path, _measure(path, placement))
        except SmlpError:
            if number == 0:
                raise
            continue
        network = found[0] if network is None else network
        if found[0] == network:
            speeds.append(Speed(path=path, seconds=found[1]))
    kept.save()
    return sorted(speeds, key=lambda speed: speed.seconds)


def _measure(path: Path, placement: Placement) -> tuple[str, float]:
    """What identifies the network in a file, and the seconds it takes for an image."""
    with open_runner(path, placement=placement) as runner:
        images = -(-_IMAGES // (runner.metadata.batch or 1)) * (runner.metadata.batch or 1)
        batch = np.zeros((images, *runner.metadata.input_shape), runner.metadata.input)
        runner.infer(batch)
        seconds = []
        for _ in range(_RUNS):
            started = time.perf_counter()
            runner.infer(batch)
            seconds.append(time.perf_counter() - started)
        return _network(runner.metadata), min(seconds) / images


def _network(metadata: ModelMetadata) -> str:
    """The same for all files of one checkpoint with the same labels and preprocessing."""
    same = replace(metadata, precision="fp32", batch=None, input="float32", form="cpu", libraries={}, quantization={})
    return sha256(same.to_json().encode()).hexdigest()


class _Kept:
    """The results so far, in a file of the user's cache directory; nothing depends on whether it can be used."""

    def __init__(self, placement: Placement) -> None:
        gpu = placement.gpu.name if placement.gpu else None
        versions = [installed_version(name) for name in _RUNTIMES]
        self._where = repr((placement.provider, placement.runtime, gpu, available_cores(), versions))
        self._results: dict[str, list[object]] = {}
        self._changed = False
        try:
            document = strictjson.loads(read_text(_kept_results(), error=SmlpError, fix=""))
        except (SmlpError, ValueError):
            document = None  # none yet, or damaged
        if isinstance(document, dict):
            self._results = {key: value for key, value in document.items() if _is_result(value)}

    def find(self, path: Path) -> tuple[str, float] | None:
        result = self._results.get(self._key(path))
        return None if result is None else (str(result[0]), float(str(result[1])))

    def add(self, path: Path, result: tuple[str, float]) -> tuple[str, float]:
        self._results[self._key(path)] = list(result)
        self._changed = True
        return result

    def save(self) -> None:
        if not self._changed:
            return
        newest = dict(list(self._results.items())[-_MOST_KEPT:])
        try:
            write_text(_kept_results(), json.dumps(newest))
        except (OSError, SmlpError):
            self._changed = False  # a read-only home: the next command measures again

    def _key(self, path: Path) -> str:
        status = path.stat()
        return sha256(repr((str(path.resolve()), status.st_size, status.st_mtime_ns, self._where)).encode()).hexdigest()


def _kept_results() -> Path:
    return cache_folder("speed.json")


def _is_result(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], float)
