"""Fakes of what a test does not examine."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import ModelMetadata, Preprocessing, SMLPNetConfig
from smlp_deploy.pipeline.export import Export


def metadata(*, classes: int = 4, image_size: int = 8, batch: int | None = None) -> ModelMetadata:
    return ModelMetadata(
        name="fake",
        config=SMLPNetConfig(dim=4, depths=(1,), image_size=image_size, num_classes=classes),
        labels=tuple(f"class {index}" for index in range(classes)),
        preprocessing=Preprocessing(image_size=image_size, crop_pct=1.0),
        batch=batch,
    )


class Exported(Protocol):
    """The fixture `exported`."""

    def __call__(self, precision: str = "fp32", batch: int | None = None, form: str = "cpu") -> Export: ...


class FakeRunner:
    """A runner whose logits are whatever a function makes of the batch; it remembers the batch sizes it saw."""

    def __init__(self, function: Callable[[FloatArray], FloatArray], of: ModelMetadata | None = None) -> None:
        self.name = "fake"
        self.metadata = of or metadata()
        self.arithmetic = self.metadata.precision
        self.batch_sizes: list[int] = []
        self.closed = False
        self._function = function

    def infer(self, batch: FloatArray) -> FloatArray:
        self.batch_sizes.append(len(batch))
        return self._function(batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.closed = True


def quadrant_means(batch: FloatArray) -> FloatArray:
    """Four logits of an image: the sums of its quadrants, so that every class depends on the input."""
    n, _, height, width = batch.shape
    quadrants = batch.reshape(n, 3, 2, height // 2, 2, width // 2).sum(axis=(1, 3, 5))
    logits: FloatArray = quadrants.reshape(n, 4).astype(np.float32)
    return logits
