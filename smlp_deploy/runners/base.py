"""What runs a network: the one protocol that classification, parity and evaluation see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.metadata import BatchProfile, ModelMetadata

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


class Closing(ABC):
    """A context manager that closes itself; runners share it."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the network's memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def in_batches(batch: FloatArray, profile: BatchProfile, run: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """Run a batch of any size on a network that takes `profile`: split, and a short rest padded with zeros.

    Returns:
        The logits of `batch`, in memory of their own.
    """
    results = []
    for start in range(0, len(batch), profile.max):
        part = batch[start : start + profile.max]
        missing = max(0, profile.min - len(part))
        if missing:
            part = np.concatenate([part, np.zeros((missing, *part.shape[1:]), dtype=part.dtype)])
        results.append(run(part)[: len(part) - missing].copy())
    return np.concatenate(results)
