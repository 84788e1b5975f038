"""The protocol of runners, all that classification, parity and evaluation see of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import BatchProfile, ModelMetadata


class Runner(Protocol):
    """A loaded network; a context manager, because it holds memory.

    Attributes:
        name: backend and file, for display: `onnxruntime (CPU) tiny-fp32.onnx`.
        metadata: of the network.
    """

    @property
    def name(self) -> str: ...

    @property
    def metadata(self) -> ModelMetadata: ...

    def infer(self, batch: FloatArray) -> FloatArray:
        """Logits N, classes of a batch N, 3, S, S, both float32, for any N of at least 1; a copy the caller owns."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def arithmetic_of(runner: Runner) -> str:
    """What a runner's products are computed in, which selects the gates: its precision, or "tf32"."""
    return str(getattr(runner, "arithmetic", runner.metadata.precision))


@runtime_checkable
class StreamingRunner(Runner, Protocol):
    """A runner that computes one batch while the next is copied to it.

    Attributes:
        slots: batches that may be under way.
        largest: images in the largest batch.
    """

    @property
    def slots(self) -> int: ...

    @property
    def largest(self) -> int: ...

    def allocate(self, images: int) -> NDArray[Any]:
        """Memory for a batch of so many images, which `submit` copies from fastest; valid until the runner closes."""
        ...

    def submit(self, batch: NDArray[Any]) -> None:
        """Start a batch, as `infer` takes it; it may be changed once this returns."""
        ...

    def collect(self) -> FloatArray:
        """Wait for the oldest batch under way; its logits, valid until `slots` more are started."""
        ...


DEFAULT_BATCH_SIZE = 32


def batch_size_of(runner: Runner) -> int:
    """Images per batch, if nothing else is asked for: what the runner is fastest with, as far as it says."""
    fixed = runner.metadata.batch or 1
    return int(getattr(runner, "batch_size", max(1, DEFAULT_BATCH_SIZE // fixed) * fixed))


class TracingRunner(Runner, Protocol):
    """A runner that also returns values inside the network, at the points of `trace_points`."""

    def trace(self, batch: FloatArray) -> dict[str, FloatArray]:
        """The values at each point for a batch N, 3, S, S: N, C, G, G float32, in the order of the points."""
        ...


class LayerOutput(NamedTuple):
    """Three outputs of one int8 layer for the same images, all float32 and of the same shape.

    Attributes:
        name: of the layer, as in the sensitivity report.
        reference: of the layer in fp32, inside the fp32 network.
        alone: of the layer in int8, given its input in the fp32 network.
        deployed: of the layer in int8, inside the int8 network.
    """

    name: str
    reference: FloatArray
    alone: FloatArray
    deployed: FloatArray


class LayerTracer(Protocol):
    """Compares each int8 layer of a network with its fp32 form."""

    def trace_layers(self, batch: FloatArray) -> Iterator[LayerOutput]:
        """Every int8 layer in execution order, for a batch N, 3, S, S; a layer may be yielded in several pieces."""
        ...


@runtime_checkable
class GpuTimer(Protocol):
    """A runner that can measure GPU time alone."""

    def gpu_seconds(self, batch: FloatArray, *, runs: int) -> list[float]:
        """Seconds of each run by CUDA events, data staying on the GPU; empty if it has to split `batch`."""
        ...


class Closing(ABC):
    """The context manager that runners share; leaving it closes the runner."""

    @abstractmethod
    def close(self) -> None:
        """Release the network's memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def in_batches(batch: NDArray[Any], profile: BatchProfile, run: Callable[[NDArray[Any]], FloatArray]) -> FloatArray:
    """Run a batch of any size on a network limited to `profile`: split it, and pad a short rest with zeros.

    Returns:
        The logits of `batch`, copied.
    """
    results = []
    for start in range(0, len(batch), profile.max):
        part = batch[start : start + profile.max]
        results.append(run(padded(part, profile.min))[: len(part)].copy())
    return np.concatenate(results)


def padded(batch: NDArray[Any], smallest: int) -> NDArray[Any]:
    """A batch, filled up with zeros if it has fewer images than the smallest that a network takes."""
    missing = smallest - len(batch)
    if missing <= 0:
        return batch
    return np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), dtype=batch.dtype)])
