"""Batched classification: paths in, one prediction or error per path out, in order."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import GpuError, UsageError
from smlp_deploy.images.batches import FloatArray, available_cores, decoded_batches
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.base import Runner
from smlp_deploy.runners.placement import Placement

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 32
DEFAULT_TOPK = 5


@dataclass(frozen=True)
class Score:
    """One class and its softmax probability."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The result of one input: its best classes, best first, or a one-line error."""

    path: str
    scores: tuple[Score, ...] = ()
    error: str | None = None


class Classifier:
    """Classifies image files with one loaded network; a context manager, because it holds the network's memory.

    Args:
        runner: the network.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        provider: str | None = None,
        device: str | None = None,
        placement: Placement | None = None,
    ) -> Self:
        """Load an artifact or checkpoint, with the labels and preprocessing inside it.

        Args:
            path: the file.
            provider: what an ONNX file runs on: "cpu", "cuda" or "tensorrt"; by default "cuda" if `device` is a GPU,
                otherwise "cpu".
            device: "cpu", or a GPU: "cuda" for the first, "cuda:1" or "1" by its number in CUDA, or its UUID. By
                default engines run on the first GPU, and everything else on the CPU.
            placement: both in one, if they were read before.

        Raises:
            SmlpError: the file cannot be used, or cannot run there.
        """
        return cls(open_runner(Path(path), provider=provider, device=device, placement=placement))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.runner.__exit__(kind, error, traceback)

    def classify(
        self,
        paths: Iterable[str | Path],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        topk: int | None = None,
        workers: int | None = None,
    ) -> Iterator[Prediction]:
        """One prediction per path, in the order of the paths.

        Worker threads decode up to two batches ahead of the network, and `paths` is read no further, so memory is
        bounded by three batches for any number of paths.

        Args:
            paths: image files.
            batch_size: images per run of the network.
            topk: classes per prediction; by default 5, or all if there are fewer.
            workers: decoding threads; by default one per core.

        Raises:
            UsageError: a number is out of range.
        """
        topk = self.resolve_topk(topk)
        if batch_size < 1 or (workers is not None and workers < 1):
            raise UsageError("batch size and workers must be at least 1", where="--batch-size, --workers")
        return self._stream(
            paths,
            batch_size=batch_size,
            topk=topk,
            workers=workers or available_cores(),
        )

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

    def _stream(self, paths: Iterable[str | Path], *, batch_size: int, topk: int, workers: int) -> Iterator[Prediction]:
        preprocessing = self.runner.metadata.preprocessing
        for batch in decoded_batches(paths, preprocessing, batch_size=batch_size, workers=workers):
            outputs = infer_each(self.runner, [content for _, content in batch if not isinstance(content, str)])
            for path, content in batch:
                result = content if isinstance(content, str) else next(outputs)
                if isinstance(result, str):
                    yield Prediction(path, error=result)
                else:
                    yield self._prediction(path, result, topk)

    def _prediction(self, path: str, logits: NDArray[np.float32], topk: int) -> Prediction:
        exponentials = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = exponentials / exponentials.sum()
        best = np.argsort(-logits, kind="stable")[:topk]
        labels = self.runner.metadata.labels
        return Prediction(path, tuple(Score(int(i), labels[i], float(probabilities[i])) for i in best))


def infer_each(runner: Runner, images: list[FloatArray]) -> Iterator[FloatArray | str]:
    """Finite logits of each image, or an error message; the images of a failed batch are run again one by one.

    Raises:
        GpuError: the GPU cannot go on.
    """
    if not images:
        return
    try:
        outputs = runner.infer(np.stack(images))
    except GpuError:  # no image's fault: all the others would fail too
        raise
    # A backend may raise anything, and one bad image must not cost the others in its batch their results.
    except Exception as error:
        reason = f"the network failed on it: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if len(images) == 1:
            yield reason
            return
        logger.warning("a batch of %d failed (%s); its images are run one by one", len(images), reason)
        for image in images:
            yield from infer_each(runner, [image])
        return
    for logits in outputs:
        yield logits if np.isfinite(logits).all() else "the network's output has NaN or infinite values"
