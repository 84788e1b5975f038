"""Batched classification: images in, one prediction or error per image out, in order."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast
from weakref import WeakSet

import numpy as np
from PIL import Image

from smlp_deploy.errors import UsageError
from smlp_deploy.images.batches import Batch, FloatArray, ImageArray, available_cores, decoded_batches
from smlp_deploy.images.preprocessing import Decoder, ImageSource
from smlp_deploy.inference.shared import SharedRunner
from smlp_deploy.inference.stream import Outcome, infer_stream, memory_of
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.base import Runner, StreamingRunner, batch_size_of
from smlp_deploy.runners.placement import Placement

DEFAULT_TOPK = 5


@dataclass(frozen=True)
class Score:
    """One class and its softmax probability."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The result of one image: its best classes, best first, or a one-line error.

    `path` is empty for an image that was not given by its path.
    `decode` is "gpu" if ordinary JPEG files of its run were decoded on a GPU.
    """

    path: str
    scores: tuple[Score, ...] = ()
    error: str | None = None
    decode: str | None = None


class Classifier:
    """Classifies images with one loaded network; a context manager, because it holds the network's memory.

    Several threads may use it at the same time. The network computes one batch at a time, on all of its cores or on its
    GPU, so threads overlap in what is around it: reading, decoding and preparing images.

    Args:
        runner: the network.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._shared = SharedRunner(runner)
        self._running: WeakSet[Generator[Prediction]] = WeakSet()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        provider: str | None = None,
        device: str | None = None,
        runtime: str = "auto",
        threads: int | None = None,
        placement: Placement | None = None,
    ) -> Self:
        """Load an artifact or checkpoint, with the labels and preprocessing inside it.

        Args:
            path: the file.
            provider: what an ONNX file runs on: "cpu", "cuda" or "tensorrt"; by default "cuda" if `device` is a GPU,
                otherwise "cpu".
            device: "cpu", or a GPU: "cuda" for the first, "cuda:1" or "1" by its number in CUDA, or its UUID. By
                default engines run on the first GPU, and everything else on the CPU.
            runtime: what runs an ONNX file: "onnxruntime", "openvino" (on the CPU), or "auto" for the default.
            threads: cores that an ONNX file computes on, on the CPU; by default all that this process may use.
            placement: all four in one, if they were read before.

        Raises:
            SmlpError: the file cannot be used, or cannot run there.
        """
        placement = placement or Placement.of(device=device, provider=provider, runtime=runtime, threads=threads)
        return cls(open_runner(Path(path), placement=placement))

    @property
    def name(self) -> str:
        """What runs the network."""
        return self.runner.name

    @property
    def metadata(self) -> ModelMetadata:
        """What is known of the network: its labels, preprocessing, precision and more."""
        return self.runner.metadata

    @property
    def labels(self) -> tuple[str, ...]:
        """The name of each class, by its index."""
        return self.metadata.labels

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the network's memory; no thread may be using it any more."""
        for predictions in list(self._running):  # whose threads write to the runner's memory
            predictions.close()
        self.runner.__exit__(None, None, None)

    def predict_logits(self, batch: ImageArray) -> FloatArray:
        """The network's output for images that are prepared already.

        Args:
            batch: what the network takes: N, 3, S, S float32, normalized, or N, S, S, 3 uint8, if
                `runner.metadata.input` says so; see `metadata.Preprocessing`.

        Returns:
            N, classes, float32.

        Raises:
            UsageError: it has another shape or type.
            SmlpError: the network cannot run it.
        """
        metadata = self.runner.metadata
        fits = batch.shape[1:] == metadata.input_shape and batch.dtype == metadata.input
        if not fits or not len(batch):
            given, wanted = ("x".join(map(str, shape)) for shape in (batch.shape, metadata.input_shape))
            raise UsageError(f"a batch of {batch.dtype} {given}; the network takes {metadata.input} Nx{wanted}")
        return self._shared.user().infer(batch)

    def classify(
        self,
        images: ImageSource | Iterable[ImageSource],
        *,
        batch_size: int | None = None,
        topk: int | None = None,
        workers: int | None = None,
        decoder: Decoder | None = None,
    ) -> Iterator[Prediction]:
        """One prediction per image, in their order.

        Worker threads decode up to two batches ahead of the network, or two images each if that is more, and read no
        further, so memory is bounded for any number of images. The iterator ends when the classifier is closed.

        Args:
            images: one or more of them: paths, the bytes of image files, open binary files, images of Pillow's, or RGB
                pixels as uint8 H, W, 3.
            batch_size: images per run of the network, at most as many as an engine takes; by default what it is fastest
                with, 32 on a CPU.
            topk: classes per prediction; by default 5, or all if there are fewer.
            workers: decoding threads; by default one per core.
            decoder: asked first, a `GpuDecoder` for example; by default Pillow decodes everything.

        Raises:
            UsageError: a number is out of range.
        """
        if workers is not None and workers < 1:
            raise UsageError(f"{workers} is not at least 1", where="--workers")
        sources = _as_several(images)
        predictions = self._stream(
            sources,
            batch_size=self.resolve_batch_size(batch_size),
            topk=self.resolve_topk(topk),
            workers=workers or (available_cores() if sources is images else 1),
            decoder=decoder,
        )
        self._running.add(predictions)
        return predictions

    def resolve_batch_size(self, batch_size: int | None) -> int:
        """`batch_size`, at most what an engine takes; what the network is fastest with if None.

        Raises:
            UsageError: it is below 1.
        """
        largest = self.runner.largest if isinstance(self.runner, StreamingRunner) else None
        return check_batch_size(batch_size, usual=batch_size_of(self.runner), largest=largest)

    def resolve_topk(self, topk: int | None) -> int:
        """`topk`, or its default if None.

        Raises:
            UsageError: it is below 1 or above the number of classes.
        """
        return check_topk(topk, classes=len(self.labels))

    def _stream(
        self, images: Iterable[ImageSource], *, batch_size: int, topk: int, workers: int, decoder: Decoder | None
    ) -> Generator[Prediction]:
        runner = self._shared.user()
        batches = decoded_batches(
            images,
            runner.metadata,
            batch_size=batch_size,
            workers=workers,
            memory=memory_of(runner),
            decoder=decoder,
        )
        with closing(batches):
            for batch, outcomes in infer_stream(runner, batches):
                yield from self._predictions(batch, outcomes, topk, decode=None if decoder is None else "gpu")

    def _predictions(
        self, batch: Batch, outcomes: list[Outcome], topk: int, *, decode: str | None
    ) -> Iterator[Prediction]:
        logits = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        best = iter(best_classes(np.stack(logits), self.labels, topk) if logits else ())
        each = [outcome if isinstance(outcome, str) else next(best) for outcome in outcomes]
        for path, found in batch.with_each(each):
            scores, error = ((), found) if isinstance(found, str) else (found, None)
            yield Prediction(path, scores, error, decode)


def best_classes(logits: FloatArray, labels: Sequence[str], topk: int) -> Iterator[tuple[Score, ...]]:
    """The best classes of each image, best first, equal ones by index; from finite logits N, classes."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    worst = np.partition(logits, -topk, axis=1)[:, -topk, None]
    rows, columns = np.nonzero(logits >= worst)  # by row, then by column
    order = np.lexsort((-logits[rows, columns], rows))  # stable
    starts = np.searchsorted(rows, np.arange(len(logits)))
    for row, start in enumerate(starts):
        chosen = columns[order[start : start + topk]].tolist()
        values = probabilities[row, chosen].tolist()
        yield tuple(Score(i, labels[i], value) for i, value in zip(chosen, values, strict=True))


def check_batch_size(batch_size: int | None, *, usual: int, largest: int | None) -> int:
    """`batch_size`, at most `largest`; `usual` if None.

    Raises:
        UsageError: it is below 1.
    """
    if batch_size is None:
        return usual
    if batch_size < 1:
        raise UsageError(f"{batch_size} is not at least 1", where="--batch-size")
    return batch_size if largest is None else min(batch_size, largest)


def check_topk(topk: int | None, *, classes: int) -> int:
    """`topk`, or its default if None.

    Raises:
        UsageError: it is below 1 or above the number of classes.
    """
    if topk is None:
        return min(DEFAULT_TOPK, classes)
    if not 1 <= topk <= classes:
        raise UsageError(f"topk {topk} is not between 1 and the model's {classes} classes", where="--topk")
    return topk


def _as_several(images: ImageSource | Iterable[ImageSource]) -> Iterable[ImageSource]:
    """Several images as they are, one of them in a list; an array of four dimensions is several."""
    kinds = (str, Path, bytes, bytearray, memoryview, Image.Image)
    is_one = images.ndim < 4 if isinstance(images, np.ndarray) else isinstance(images, kinds) or hasattr(images, "read")
    return cast(Iterable[ImageSource], [images] if is_one else images)
