"""The CUDA runtime, through cuda-bindings: calls that raise, and memory, streams and events that are released."""

from __future__ import annotations

import ctypes
import importlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from smlp_deploy.dependencies import GpuDevice, require
from smlp_deploy.errors import GpuError, GpuMemoryError

logger = logging.getLogger(__name__)


class Cuda:
    """The CUDA runtime. What it made is released when it is closed, the newest first.

    Args:
        device: number of the GPU; it is the thread's current one afterwards.

    Attributes:
        number: of the GPU.
        device_bytes: allocated on the GPU so far.

    Raises:
        GpuError: the GPU cannot be used.
    """

    def __init__(self, device: int = 0) -> None:
        self._runtime: Any = importlib.import_module("cuda.bindings.runtime")
        self.number = device
        self._stack = ExitStack()
        self.device_bytes = 0
        self.use()

    def use(self) -> None:
        """Make the GPU this thread's current one, on which all else that the thread calls works.

        Each thread has its own, the first GPU unless it chose another, and any library may change it. So whatever works
        on the GPU begins with this.

        Raises:
            GpuError: the GPU cannot be used.
        """
        self.call("cudaSetDevice", self.number)

    def call(self, function: str, *arguments: Any) -> Any:
        """The value that a function of the runtime returns, if any.

        Raises:
            GpuMemoryError: there is not enough memory; the GPU can go on.
            GpuError: any other error. Most of them end all work on the GPU, in this process.
        """
        error, *values = getattr(self._runtime, function)(*arguments)
        self._check(function, error)
        return values[0] if values else None

    def check(self, function: str) -> None:
        """Raise the error of an earlier call, which somebody else made.

        Raises:
            GpuMemoryError, GpuError: see `call`.
        """
        self._check(function, self._runtime.cudaGetLastError()[0])

    def _check(self, function: str, error: Any) -> None:
        errors = self._runtime.cudaError_t
        if error == errors.cudaSuccess:
            return
        self._runtime.cudaGetLastError()  # keeps an error until it is asked, and the next `check` is of another call
        reason = self._runtime.cudaGetErrorString(error)[1]
        reason = reason.decode() if isinstance(reason, bytes) else str(reason)
        if error == errors.cudaErrorMemoryAllocation:
            raise GpuMemoryError(
                "the GPU's memory is full", fix="choose a smaller batch, or end what else runs on the GPU"
            )
        old = error == errors.cudaErrorInsufficientDriver
        fix = "update the NVIDIA driver" if old else "nvidia-smi shows the GPU's state, smlp doctor what does not fit"
        raise GpuError(f"the GPU failed: {reason} ({function})", fix=fix)

    def device(self, size: int) -> int:
        """The address of new memory on the GPU, in bytes."""
        pointer = self.call("cudaMalloc", max(size, 1))
        self._owned("cudaFree", pointer)
        self.device_bytes += size
        return int(pointer)

    def pinned(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """A new array in memory of the host that the GPU copies from and to while the host goes on."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        pointer = self.call("cudaHostAlloc", max(size, 1), self._runtime.cudaHostAllocDefault)
        self._owned("cudaFreeHost", pointer)
        content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(pointer)))
        return content.view(dtype).reshape(tuple(shape))

    def stream(self) -> Any:
        """A new stream that does not wait for the default stream."""
        stream = self.call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)
        self._owned("cudaStreamDestroy", stream)
        return stream

    def event(self, *, timing: bool = False) -> Any:
        """A new event."""
        flags = self._runtime.cudaEventDefault if timing else self._runtime.cudaEventDisableTiming
        event = self.call("cudaEventCreateWithFlags", flags)
        self._owned("cudaEventDestroy", event)
        return event

    def copy(self, target: Any, source: Any, size: int, direction: str, stream: Any) -> None:
        """Enqueue a copy of `size` bytes; direction: "HostToDevice", "DeviceToHost" or "DeviceToDevice"."""
        kind = getattr(self._runtime.cudaMemcpyKind, f"cudaMemcpy{direction}")
        self.call("cudaMemcpyAsync", _address(target), _address(source), size, kind, stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Have a stream wait for an event."""
        self.call("cudaStreamWaitEvent", stream, event, self._runtime.cudaEventWaitDefault)

    def capture(self, stream: Any, work: Callable[[], None]) -> Any:
        """The graph of what `work` enqueues in a stream, ready to launch; the caller destroys it.

        Raises:
            ArtifactError, GpuMemoryError, GpuError: it cannot be captured. Nothing has run, and the stream can be used
                as before.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", stream, mode)
        try:
            work()
        finally:
            error, graph = self._runtime.cudaStreamEndCapture(stream)
        self._check("cudaStreamEndCapture", error)
        try:
            return self.call("cudaGraphInstantiate", graph, 0)
        finally:
            self.call("cudaGraphDestroy", graph)

    def seconds(self, stream: Any, work: Callable[[], None]) -> float:
        """How long the GPU takes for what `work` enqueues in a stream."""
        start, end = self._clock
        self.call("cudaEventRecord", start, stream)
        work()
        self.call("cudaEventRecord", end, stream)
        self.call("cudaEventSynchronize", end)
        milliseconds: float = self.call("cudaEventElapsedTime", start, end)
        return milliseconds / 1000

    @cached_property
    def _clock(self) -> tuple[Any, Any]:
        return self.event(timing=True), self.event(timing=True)

    def close(self) -> None:
        """Release everything; nothing may be under way."""
        self._stack.close()

    def _owned(self, function: str, resource: Any) -> None:
        self._stack.callback(self.release, function, resource)

    def release(self, function: str, resource: Any) -> None:
        """Call a function that releases or waits for something; after a fatal error it cannot, and that is reported."""
        (error,) = getattr(self._runtime, function)(resource)
        if error != self._runtime.cudaError_t.cudaSuccess:
            self._runtime.cudaGetLastError()  # as in `_check`
            logger.debug("%s: %s", function, error)


def use_gpu(gpu: GpuDevice | None) -> None:
    """Make a GPU this thread's current one, for TensorRT to build engines on; None changes nothing.

    Raises:
        GpuError: it cannot be used.
        MissingDependencyError: cuda-bindings is not installed.
    """
    if gpu is not None:
        require("cuda.bindings", purpose="to choose a GPU", extra="gpu")
        Cuda(gpu.index)


def _address(memory: Any) -> Any:
    return memory.ctypes.data if isinstance(memory, np.ndarray) else memory
