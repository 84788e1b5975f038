"""The protocol of runners, all that classification, parity and evaluation see of a backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NamedTuple, Protocol, Self, runtime_checkable

import numpy as np

from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.images.preprocessing import normalize
from smlp_deploy.metadata import MAX_BATCH, BatchProfile, ModelMetadata, Preprocessing


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

    def infer(self, batch: ImageArray) -> FloatArray:
        """Logits N, classes, float32, of a batch of any N of at least 1; a copy the caller owns.

        The batch is what `metadata.input` says: N, 3, S, S float32, or N, S, S, 3 uint8.
        """
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

    def allocate(self, images: int) -> ImageArray:
        """Memory for a batch of so many images, which `submit` copies from fastest; valid until the runner closes."""
        ...

    def release(self, memory: ImageArray) -> None:
        """Take back memory from `allocate` that nobody uses any more."""
        ...

    def submit(self, batch: ImageArray) -> None:
        """Start a batch, as `infer` takes it; it may be changed once this returns."""
        ...

    def collect(self) -> FloatArray:
        """Wait for the oldest batch under way; its logits, valid until `slots` more are started."""
        ...


_ON_A_CPU, _ON_A_GPU = 32, 64
"""Usual batch sizes."""


def batch_size_of(runner: Runner) -> int:
    """Images per batch, if nothing else is asked for: an engine's best, otherwise 64 on a GPU and 32 on a CPU.

    A network that takes only one batch size gets a multiple of it.
    """
    fixed = runner.metadata.batch or 1
    usual = _ON_A_GPU if getattr(runner, "on_gpu", False) else _ON_A_CPU
    return int(getattr(runner, "batch_size", max(1, usual // fixed) * fixed))


def images_at_once(image_size: int, *, per_core: int, cores: int) -> int:
    """Images that run at once on the CPU: for each core as many pixels as `per_core` images of 224 x 224 have.

    The values inside a network for more images leave the caches. `benchmarks/README.md` has figures.
    """
    return min(max(1, cores * per_core * 224**2 // image_size**2), MAX_BATCH)


def common_input(*runners: Runner) -> str:
    """The input, as in `ModelMetadata`, that `input_of` makes into that of each runner: "uint8" if any takes it."""
    return "uint8" if any(runner.metadata.input == "uint8" for runner in runners) else "float32"


def input_of(runner: Runner, images: ImageArray, preprocessing: Preprocessing) -> ImageArray:
    """Images as a runner takes them, so that runners of either input see the same images.

    Args:
        runner: takes either input.
        images: one or more of them, in the `common_input` of this runner and others.
        preprocessing: how pixels are normalized for a runner that takes float32.

    Returns:
        `images` if that is what the runner takes, otherwise what `images.preprocessing` makes of the pixels.
    """
    if runner.metadata.input == "uint8" or images.dtype != np.uint8:
        return images
    *batch, height, width, channels = images.shape
    normalized = np.empty((*batch, channels, height, width), np.float32)
    normalize(images, preprocessing, normalized)
    return normalized


class TracingRunner(Runner, Protocol):
    """A runner that also returns values inside the network, at the points of `trace_points`."""

    def trace(self, batch: ImageArray) -> dict[str, FloatArray]:
        """The values at each point for a batch as in `infer`: N, C, G, G float32, in the order of the points."""
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

    def trace_layers(self, batch: ImageArray) -> Iterator[LayerOutput]:
        """Every int8 layer in execution order; a layer may be yielded in several pieces.

        The batch is N, 3, S, S float32 or N, S, S, 3 uint8, in the `common_input` of the two forms.
        """
        ...


@runtime_checkable
class GpuTimer(Protocol):
    """A runner that can measure GPU time alone."""

    def gpu_seconds(self, batch: ImageArray, *, runs: int) -> list[float]:
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


def in_batches(batch: ImageArray, profile: BatchProfile, run: Callable[[ImageArray], FloatArray]) -> FloatArray:
    """Run a batch of any size on a network limited to `profile`: split it, and pad a short rest with zeros.

    Returns:
        The logits of `batch`, copied.
    """
    results = []
    for start in range(0, len(batch), profile.max):
        part = batch[start : start + profile.max]
        results.append(run(padded(part, profile.min))[: len(part)].copy())
    return np.concatenate(results)


def padded(batch: ImageArray, smallest: int) -> ImageArray:
    """A batch, filled up with zeros if it has fewer images than the smallest that a network takes."""
    missing = smallest - len(batch)
    if missing <= 0:
        return batch
    return np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), dtype=batch.dtype)])
