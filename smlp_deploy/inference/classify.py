"""Batched classification: paths in, one prediction or error per path out, in order."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from weakref import WeakSet

import numpy as np

from smlp_deploy.errors import UsageError
from smlp_deploy.images.batches import Batch, FloatArray, available_cores, decoded_batches
from smlp_deploy.images.preprocessing import Decoder
from smlp_deploy.inference.stream import Outcome, infer_stream, memory_of
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
    """The result of one input: its best classes, best first, or a one-line error.

    `decode` is "gpu" if ordinary JPEG files of its run were decoded on a GPU.
    """

    path: str
    scores: tuple[Score, ...] = ()
    error: str | None = None
    decode: str | None = None


class Classifier:
    """Classifies image files with one loaded network; a context manager, because it holds the network's memory.

    Args:
        runner: the network.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._running: WeakSet[Generator[Prediction]] = WeakSet()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        provider: str | None = None,
        device: str | None = None,
        runtime: str = "auto",
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
            placement: all three in one, if they were read before.

        Raises:
            SmlpError: the file cannot be used, or cannot run there.
        """
        return cls(open_runner(Path(path), provider=provider, device=device, runtime=runtime, placement=placement))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for predictions in list(self._running):  # whose threads write to the runner's memory
            predictions.close()
        self.runner.__exit__(kind, error, traceback)

    def classify(
        self,
        paths: Iterable[str | Path],
        *,
        batch_size: int | None = None,
        topk: int | None = None,
        workers: int | None = None,
        decoder: Decoder | None = None,
    ) -> Iterator[Prediction]:
        """One prediction per path, in the order of the paths.

        Worker threads decode up to two batches ahead of the network, or two images each if that is more, and `paths` is
        read no further, so memory is bounded for any number of paths. The iterator ends when the classifier is closed.

        Args:
            paths: image files.
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
        predictions = self._stream(
            paths,
            batch_size=self.resolve_batch_size(batch_size),
            topk=self.resolve_topk(topk),
            workers=workers or available_cores(),
            decoder=decoder,
        )
        self._running.add(predictions)
        return predictions

    def resolve_batch_size(self, batch_size: int | None) -> int:
        """`batch_size`, at most what an engine takes; what the network is fastest with if None.

        Raises:
            UsageError: it is below 1.
        """
        if batch_size is None:
            return batch_size_of(self.runner)
        if batch_size < 1:
            raise UsageError(f"{batch_size} is not at least 1", where="--batch-size")
        return min(batch_size, self.runner.largest) if isinstance(self.runner, StreamingRunner) else batch_size

    def resolve_topk(self, topk: int | None) -> int:
        """`topk`, or its default if None.

        Raises:
            UsageError: it is below 1 or above the number of classes.
        """
        classes = len(self.runner.metadata.labels)
        if topk is None:
            return min(DEFAULT_TOPK, classes)
        if not 1 <= topk <= classes:
            raise UsageError(f"topk {topk} is not between 1 and the model's {classes} classes", where="--topk")
        return topk

    def _stream(
        self, paths: Iterable[str | Path], *, batch_size: int, topk: int, workers: int, decoder: Decoder | None
    ) -> Generator[Prediction]:
        batches = decoded_batches(
            paths,
            self.runner.metadata,
            batch_size=batch_size,
            workers=workers,
            memory=memory_of(self.runner),
            decoder=decoder,
        )
        with closing(batches):
            for batch, outcomes in infer_stream(self.runner, batches):
                yield from self._predictions(batch, outcomes, topk, decode=None if decoder is None else "gpu")

    def _predictions(
        self, batch: Batch, outcomes: list[Outcome], topk: int, *, decode: str | None
    ) -> Iterator[Prediction]:
        logits = [outcome for outcome in outcomes if not isinstance(outcome, str)]
        best = iter(self._best(np.stack(logits), topk) if logits else ())
        each = [outcome if isinstance(outcome, str) else next(best) for outcome in outcomes]
        for path, found in batch.with_each(each):
            scores, error = ((), found) if isinstance(found, str) else (found, None)
            yield Prediction(path, scores, error, decode)

    def _best(self, logits: FloatArray, topk: int) -> Iterator[tuple[Score, ...]]:
        """The best classes of each image, best first, equal ones by index; from finite logits N, classes."""
        exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        worst = np.partition(logits, -topk, axis=1)[:, -topk, None]
        rows, columns = np.nonzero(logits >= worst)  # by row, then by column
        order = np.lexsort((-logits[rows, columns], rows))  # stable
        starts = np.searchsorted(rows, np.arange(len(logits)))
        labels = self.runner.metadata.labels
        for row, start in enumerate(starts):
            chosen = columns[order[start : start + topk]].tolist()
            values = probabilities[row, chosen].tolist()
            yield tuple(Score(i, labels[i], value) for i, value in zip(chosen, values, strict=True))
