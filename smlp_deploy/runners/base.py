"""What runs a network: the one protocol that classification, parity and evaluation see."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.metadata import ModelMetadata

FloatArray = NDArray[np.float32]


class Runner(Protocol):
    """A loaded network; a context manager, because it holds memory.

    Attributes:
        name: what runs what, for people: `onnxruntime (CPU) tiny-fp32.onnx`.
        metadata: of the network.
    """

    @property
    def name(self) -> str: ...

    @property
    def metadata(self) -> ModelMetadata: ...

    def infer(self, batch: FloatArray) -> FloatArray:
        """Logits N, classes of a batch N, 3, S, S, both float32, for any N from 1; a copy that the caller owns."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def in_fixed_batches(batch: FloatArray, size: int, run: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """Run a batch of any size on a network that takes exactly `size` images: split, and the rest padded with zeros."""
    results = []
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        padding = np.zeros((size - len(part), *part.shape[1:]), dtype=part.dtype)
        results.append(run(np.concatenate([part, padding]))[: len(part)])
    return np.concatenate(results)
