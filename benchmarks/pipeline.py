"""CPU time and speed of the way from image files to records, without the network, beside an earlier version.

    python -m benchmarks.pipeline [--before CHECKOUT] [--images N] [--rounds N]

Both run `Classifier.classify` and write JSONL to nowhere, with a network that costs nothing: its logits are made
beforehand. In an earlier version, without streams, it copies the batch once, as its runner did. Versions take turns,
each in a process of its own. *prepared* has real JPEG files; *ready* has images that are decoded, resized and cropped
beforehand, so that its CPU time is all that is not decoding.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
BATCH = 64
CLASSES = 1000
PHOTO = ROOT / "smlp_deploy" / "data" / "parity" / "chelsea.jpg"


def measure(kind: str, files: str, images: int) -> dict[str, float]:
    """Images per second and CPU milliseconds per image, in this process.

    Args:
        kind: "float32", "uint8", or "before" for a version without streams.
        files: "prepared" or "ready".
        images: how many.
    """
    from smlp_deploy.images import preprocessing
    from smlp_deploy.inference.classify import Classifier
    from smlp_deploy.inference.records import FORMATS
    from smlp_deploy.metadata import ModelMetadata, Preprocessing, SMLPNetConfig

    more: dict[str, Any] = {"input": kind} if kind != "before" else {}
    metadata = ModelMetadata(
        name="nothing",
        config=SMLPNetConfig(dim=80, depths=(2, 8, 14, 2), num_classes=CLASSES),
        labels=tuple(f"class {index}" for index in range(CLASSES)),
        preprocessing=Preprocessing(image_size=224),
        **more,
    )
    runner = (Plain if kind == "before" else Streaming)(metadata)
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        path = Path(folder) / "x.jpg"
        with Image.open(PHOTO) as photo:
            photo.convert("RGB").resize((500, 375)).save(path, quality=90)
        if files == "ready":
            replace_decoding(preprocessing, path)
        classifier: Any = Classifier(runner)
        write = FORMATS["jsonl"].writer(nowhere, topk=5)
        for count in (4 * BATCH, images):  # the first to warm up
            started, cpu = time.perf_counter(), time.process_time()
            for prediction in classifier.classify([path] * count, batch_size=BATCH):
                write(prediction)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"images_per_second": images / seconds, "cpu_milliseconds": 1000 * cpu / images}


def replace_decoding(preprocessing: Any, path: Path) -> None:
    with Image.open(path) as image:
        crop = image.convert("RGB").resize((224, 224))

    @contextmanager
    def opened(_: Path) -> Iterator[Image.Image]:
        yield crop

    preprocessing.open_image = opened
    preprocessing.resize_and_crop = lambda *_: crop


class Plain:
    """A network that costs nothing, behind a copy of the batch."""

    name = "nothing"

    def __init__(self, metadata: Any) -> None:
        self.metadata = metadata
        self.logits = np.random.default_rng(0).standard_normal((BATCH, CLASSES), dtype=np.float32)
        self._pinned = np.zeros((BATCH, 3, 224, 224), np.float32)

    def infer(self, batch: Any) -> Any:
        np.copyto(self._pinned[: len(batch)], batch)
        return np.concatenate([self.logits[: len(batch)].copy()])

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Streaming(Plain):
    """The same with streams, which copies from the memory that images are decoded into."""

    slots, largest = 2, BATCH

    def __init__(self, metadata: Any) -> None:
        super().__init__(metadata)
        self._under_way: deque[int] = deque()

    def allocate(self, images: int) -> Any:
        return np.empty((images, *self.metadata.input_shape), self.metadata.input)

    def release(self, memory: Any) -> None:
        pass

    def submit(self, batch: Any) -> None:
        self._under_way.append(len(batch))

    def collect(self) -> Any:
        return self.logits[: self._under_way.popleft()]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time and speed from image files to records, without the network.")
    parser.add_argument("--before", type=Path, help="A checkout of an earlier version, without streams.")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "FILES"), help="Measure one in this process.")
    arguments = parser.parse_args()
    if arguments.measure:
        kind, files = arguments.measure
        print(json.dumps(measure(kind, files, arguments.images)))
        return
    kinds = (["before"] if arguments.before else []) + ["float32", "uint8"]
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for files in ("ready", "prepared"):
            for kind in kinds:
                code = arguments.before if kind == "before" else ROOT
                command = (sys.executable, __file__, "--measure", kind, files, "--images", str(arguments.images))
                environment = os.environ | {"PYTHONPATH": str(code.absolute())}
                text = subprocess.check_output(command, env=environment, text=True)  # noqa: S603
                found.setdefault((files, kind), []).append(json.loads(text))
    for (files, kind), runs in found.items():
        first = found[files, kinds[0]]
        line = f"{files} {kind}:"
        for name in ("images_per_second", "cpu_milliseconds"):
            ratios = [run[name] / base[name] for run, base in zip(runs, first, strict=True)]
            line += f" {name} {median(run[name] for run in runs):.3g} ({median(ratios):.2f})"
        print(line)


if __name__ == "__main__":
    main()
