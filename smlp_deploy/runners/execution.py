"""An engine on the GPU: fixed buffers, a stream for uploads beside one that computes, and a CUDA graph per batch size.

A batch goes through

    pinned memory ──upload──► staging memory ──compute──► input ► execution ► outputs ──► pinned memory

Uploads have a stream of their own, so that the next batch is copied while this one is computed; two batches may be
under way. The copy from staging to the input stays on the GPU; it gives the input a fixed address, as a CUDA graph
needs.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smlp_deploy.errors import ArtifactError, GpuError, GpuMemoryError
from smlp_deploy.runners.cuda import Cuda

logger = logging.getLogger(__name__)

SLOTS = 2
"""Batches that may be under way."""

_SIZES = 4
"""Batch sizes that keep an execution context and a graph."""


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """An input or output of an engine, with its memory on the GPU for the largest batch."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    address: int

    def bytes_of(self, batch: int) -> int:
        return batch * math.prod(self.shape) * self.dtype.itemsize


@dataclass(eq=False, kw_only=True)
class _Slot:
    """The memory of one batch under way, and the events that tell how far it is."""

    staging: int
    outputs: Mapping[str, NDArray[Any]]
    uploaded: Any
    done: Any
    images: NDArray[Any] | None = None  # for what is not in pinned memory already
    batch: int = 0


@dataclass(eq=False, kw_only=True)
class _Size:
    """One batch size: its execution context, and its graph once it was captured.

    A graph is valid only while its context keeps its shapes, so each size has a context of its own; their scratch
    memory is shared, because they run one after the other.
    """

    context: Any
    runs: int = 0
    graph: Any = None
    capturable: bool = True


class Execution:
    """Runs an engine.

    Args:
        trt: the binding that loaded it.
        engine: with one input.
        cuda: the runtime, which it closes.
        largest: images in the largest batch.
        make_context: creates an execution context that is given its scratch memory, or None if there is no memory.
        graphs: whether to capture CUDA graphs.

    Raises:
        GpuMemoryError: it does not fit in the GPU's memory.
        GpuError: the GPU fails.
    """

    def __init__(
        self,
        trt: Any,
        engine: Any,
        cuda: Cuda,
        *,
        largest: int,
        make_context: Callable[[], Any],
        graphs: bool = True,
    ) -> None:
        self._cuda, self._make_context, self._graphs = cuda, make_context, graphs
        self._scratch_bytes = int(engine.device_memory_size_v2)
        self._scratch = cuda.device(self._scratch_bytes)
        tensors = [_tensor(trt, engine, index, largest, cuda) for index in range(engine.num_io_tensors)]
        is_input = [engine.get_tensor_mode(tensor.name) == trt.TensorIOMode.INPUT for tensor in tensors]
        (self._input,) = (tensor for tensor, reads in zip(tensors, is_input, strict=True) if reads)
        self._outputs = [tensor for tensor, reads in zip(tensors, is_input, strict=True) if not reads]
        self._upload, self._compute = cuda.stream(), cuda.stream()
        self._free = deque(self._slot(largest) for _ in range(SLOTS))
        self._under_way: deque[_Slot] = deque()
        self._sizes: OrderedDict[int, _Size] = OrderedDict()
        self._largest = largest
        self._pinned: list[NDArray[Any]] = []  # allocated for callers
        self._released: list[NDArray[Any]] = []  # those of them that nobody uses

    @property
    def device_bytes(self) -> int:
        """The GPU memory of buffers and scratch, without the engine's weights."""
        return self._cuda.device_bytes

    @property
    def captured(self) -> frozenset[int]:
        """The batch sizes that run as CUDA graphs."""
        return frozenset(size for size, of_size in self._sizes.items() if of_size.graph is not None)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one image at the engine's input."""
        return self._input.shape

    @property
    def image_dtype(self) -> np.dtype[Any]:
        """The element type of the engine's input."""
        return self._input.dtype

    def allocate(self, images: int) -> NDArray[Any]:
        """Pinned memory for so many images, which `submit` copies to the GPU without a detour; valid until `close`."""
        for position, memory in enumerate(self._released):
            if len(memory) == images:
                return self._released.pop(position)
        self._cuda.use()
        memory = self._cuda.pinned((images, *self._input.shape), self._input.dtype)
        self._pinned.append(memory)
        return memory

    def release(self, memory: NDArray[Any]) -> None:
        """Keep memory from `allocate` for the next who needs as much."""
        self._released.append(memory)

    def submit(self, images: NDArray[Any], *, reuse: bool = False) -> None:
        """Start a batch; at most `SLOTS` may be under way.

        Args:
            images: N images as the engine takes them; copied before this returns.
            reuse: run a batch that is up to a quarter smaller than an earlier one at the size of that, with old images
                in the other rows: an unreadable image makes a batch smaller, and a size of its own takes a context and
                a graph.

        Raises:
            ArtifactError: TensorRT cannot run it.
            GpuError: the GPU fails.
        """
        self._cuda.use()
        slot = self._free.popleft()
        try:
            self._start(slot, images, self._size_for(len(images)) if reuse else len(images))
        except BaseException:
            self._settle()  # what was enqueued may still use the slot
            self._free.append(slot)
            raise
        self._under_way.append(slot)

    def collect(self) -> dict[str, NDArray[Any]]:
        """Wait for the oldest batch under way, and return its outputs by name.

        They are valid until `SLOTS` more batches were submitted.

        Raises:
            GpuError: the GPU fails.
        """
        self._cuda.use()
        slot = self._under_way.popleft()
        self._cuda.call("cudaEventSynchronize", slot.done)
        self._free.append(slot)
        return {name: values[: slot.batch] for name, values in slot.outputs.items()}

    def seconds(self, batch: int, *, runs: int) -> list[float]:
        """Seconds that the GPU takes for each run of the last batch, of this size, by CUDA events, without copies."""
        self._cuda.use()
        size = self._size(batch)
        return [self._cuda.seconds(self._compute, lambda: self._run(size)) for _ in range(runs)]

    def close(self) -> None:
        """Wait for what is under way, and release all memory."""
        self._cuda.release("cudaSetDevice", self._cuda.number)
        self._settle()
        while self._sizes:
            self._discard(self._sizes.popitem()[1])
        self._make_context = lambda: None  # which holds the engine
        self._cuda.close()

    def _settle(self) -> None:
        """Wait for all that was enqueued, unless the GPU cannot go on."""
        for stream in (self._upload, self._compute):
            self._cuda.release("cudaStreamSynchronize", stream)

    def _slot(self, largest: int) -> _Slot:
        cuda = self._cuda
        return _Slot(
            staging=cuda.device(self._input.bytes_of(largest)),
            outputs={output.name: cuda.pinned((largest, *output.shape), output.dtype) for output in self._outputs},
            uploaded=cuda.event(),
            done=cuda.event(),
        )

    def _size_for(self, batch: int) -> int:
        """The smallest size with a context that may run a batch, or the batch's own."""
        return min((size for size in self._sizes if 0.75 * size <= batch <= size), default=batch)

    def _start(self, slot: _Slot, images: NDArray[Any], batch: int) -> None:
        cuda, compute, count = self._cuda, self._compute, len(images)
        nbytes = self._input.bytes_of(count)
        size = self._size(batch)
        source, is_given = self._source(slot, images)
        cuda.copy(slot.staging, source, nbytes, "HostToDevice", self._upload)
        cuda.call("cudaEventRecord", slot.uploaded, self._upload)
        cuda.wait(compute, slot.uploaded)
        cuda.copy(self._input.address, slot.staging, nbytes, "DeviceToDevice", compute)
        self._run(size)
        for output in self._outputs:
            target = slot.outputs[output.name]
            cuda.copy(target, output.address, output.bytes_of(count), "DeviceToHost", compute)
        cuda.call("cudaEventRecord", slot.done, compute)
        slot.batch = count
        if is_given:
            cuda.call("cudaEventSynchronize", slot.uploaded)  # while the batch before is computed

    def _source(self, slot: _Slot, images: NDArray[Any]) -> tuple[NDArray[Any], bool]:
        """Images in pinned memory: those given, or a copy; and which of the two."""
        if any(np.may_share_memory(images, memory) for memory in self._pinned) and images.flags.c_contiguous:
            return images, True
        if slot.images is None:
            slot.images = self._cuda.pinned((self._largest, *self._input.shape), self._input.dtype)
        np.copyto(slot.images[: len(images)], images, casting="no")
        return slot.images, False

    def _size(self, batch: int) -> _Size:
        """The state of a batch size, which becomes the latest used."""
        if batch in self._sizes:
            self._sizes.move_to_end(batch)
            return self._sizes[batch]
        if len(self._sizes) >= _SIZES:
            self._discard(self._sizes.popitem(last=False)[1])
        context = self._make_context()
        if context is None:
            raise GpuMemoryError("the GPU's memory is full", fix="choose a smaller batch")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        shaped = context.set_input_shape(self._input.name, (batch, *self._input.shape))
        placed = [context.set_tensor_address(each.name, each.address) for each in (self._input, *self._outputs)]
        if not (shaped and all(placed)):
            raise ArtifactError(f"TensorRT does not take a batch of {batch}")
        self._sizes[batch] = _Size(context=context, capturable=self._graphs)
        return self._sizes[batch]

    def _discard(self, size: _Size) -> None:
        self._cuda.release("cudaStreamSynchronize", self._compute)
        if size.graph is not None:
            self._cuda.release("cudaGraphExecDestroy", size.graph)
        size.context = None

    def _run(self, size: _Size) -> None:
        """Enqueue an execution: the first as it is, because TensorRT may prepare things then, the rest as a graph."""
        if size.runs and size.graph is None and size.capturable:
            self._capture(size)
        size.runs += 1
        if size.graph is None:
            self._execute(size)
        else:
            self._cuda.call("cudaGraphLaunch", size.graph, self._compute)

    def _capture(self, size: _Size) -> None:
        try:
            size.graph = self._cuda.capture(self._compute, lambda: self._execute(size))
        except (ArtifactError, GpuError, GpuMemoryError) as error:  # slower without, but it runs
            logger.info("not captured as a CUDA graph: %s", error)
            size.capturable = False

    def _execute(self, size: _Size) -> None:
        if not size.context.execute_async_v3(int(self._compute)):
            self._cuda.check("execute_async_v3")
            raise ArtifactError("TensorRT cannot run it")


def _tensor(trt: Any, engine: Any, index: int, largest: int, cuda: Cuda) -> _Tensor:
    name = engine.get_tensor_name(index)
    shape = tuple(engine.get_tensor_shape(name))[1:]
    dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
    address = cuda.device(largest * math.prod(shape) * dtype.itemsize)
    return _Tensor(name=name, shape=shape, dtype=dtype, address=address)
