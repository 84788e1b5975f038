"""A GPU in host memory: allocations, streams of operations, and what a correct program does not do to them."""

# ruff: noqa: N801 - the names of handles are NVIDIA's
from __future__ import annotations

import ctypes
import gc
import operator
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from tests.support.cuda_names import cudaError_t, cudaStreamCaptureMode

Bytes = NDArray[np.uint8]
POISON = 0xFF  # NaN in every floating-point format
GUARD = 4096
ALIGNMENT = 256
ANY = -1
"""In place of a device: CUDA has a legacy stream for each, the bench one for all."""


class CudaFault(AssertionError):  # noqa: N818 - of the program, not an error of the bench
    """What the program did that a correct one does not do."""


class Refusal(Exception):  # noqa: N818 - an answer, not an error of the bench
    """A call returns `error`; a reason makes it a fault of the program."""

    def __init__(self, error: cudaError_t, reason: str = "") -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason


class Memory:
    """One allocation. `content` is what the GPU sees; the host sees it too if it is pinned, else poison."""

    def __init__(self, label: str, size: int, side: str, device: int) -> None:
        self.label, self.size, self.side, self.device = label, size, side, device
        self._whole: Bytes = np.full(size + 2 * GUARD + ALIGNMENT, POISON, np.uint8)
        self._offset = GUARD + -(self._whole.ctypes.data + GUARD) % ALIGNMENT
        self.address = self._whole.ctypes.data + self._offset
        seen = self._whole[self._offset : self._offset + size]
        self.content: Bytes = seen if side == "host" else np.full(size, POISON, np.uint8)
        self.written = np.zeros(size if side == "device" else 0, np.bool_)
        self.freed = False
        self.accesses: list[Access] = []

    def __str__(self) -> str:
        return f"{self.label} ({self.size} bytes)"

    def spoilt(self) -> str:
        """Where the host wrote and may not have, if it did."""
        stop = self._offset + self.size
        if (self._whole[: self._offset] != POISON).any() or (self._whole[stop:] != POISON).any():
            return f"out of bounds: the host wrote beside {self}"
        if (self.freed or self.side == "device") and (self._whole[self._offset : stop] != POISON).any():
            return f"{'use after free' if self.freed else 'wrong kind'}: the host wrote into {self}"
        return ""


class Pageable(Memory):
    """Memory the runtime did not allocate."""

    def __init__(self, address: int, size: int) -> None:
        self.label, self.size, self.side, self.address = "pageable memory", size, "host", address
        self.content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        self.freed = False


class Span(NamedTuple):
    memory: Memory
    start: int
    stop: int

    @property
    def view(self) -> Bytes:
        return self.memory.content[self.start : self.stop]

    def overlaps(self, other: Span) -> bool:
        return self.start < other.stop and other.start < self.stop

    def __str__(self) -> str:
        return f"bytes {self.start} to {self.stop} of {self.memory}"


@dataclass(eq=False)
class Work:
    """What the GPU does in one go; a graph replays it. `amount` is in bytes, or in images for an execution."""

    name: str
    amount: int
    run: Callable[[], None]
    reads: Sequence[Span] = ()
    writes: Sequence[Span] = ()
    replayed: Callable[[], None] = lambda: None


@dataclass(eq=False)
class Operation:
    """Works in a stream. `before` must be done first; `clock` counts, per stream, what is ordered before this one."""

    name: str
    stream: cudaStream_t
    works: Sequence[Work]
    before: list[Operation]
    enqueued: float
    index: int
    clock: dict[cudaStream_t, int]
    hashes: list[tuple[Span, int]] = field(default_factory=list)
    end: float = 0.0
    done: bool = False

    def __str__(self) -> str:
        return f"{self.name} on {self.stream}"


class Access(NamedTuple):
    span: Span
    write: bool
    operation: Operation


@dataclass(eq=False)
class Capture:
    mode: cudaStreamCaptureMode
    thread: int = field(default_factory=threading.get_ident)
    works: list[Work] = field(default_factory=list)
    broken: bool = False


@dataclass(eq=False)
class Handle:
    """What the program gets; it also passes for an integer."""

    value: int
    label: str
    device: int = field(default=0, kw_only=True)

    def __index__(self) -> int:
        return self.value

    __int__ = __index__

    def __str__(self) -> str:
        return self.label


@dataclass(eq=False)
class cudaStream_t(Handle):
    number: int
    blocking: bool
    queue: deque[Operation] = field(default_factory=deque)
    last: Operation | None = None
    last_work: Operation | None = None
    count: int = 0
    capture: Capture | None = None


@dataclass(eq=False)
class cudaEvent_t(Handle):
    timing: bool
    last: Operation | None = None
    capture: Capture | None = None


@dataclass(eq=False)
class cudaGraph_t(Handle):
    works: list[Work]


@dataclass(eq=False)
class cudaGraphExec_t(Handle):
    works: list[Work]
    last: Operation | None = None


class Traced(NamedTuple):
    """One work, in virtual milliseconds; of the host if `stream` is -1."""

    name: str
    stream: int
    amount: int
    enqueued: float
    start: float
    end: float
    in_graph: bool

    def overlaps(self, other: Traced) -> bool:
        return self.start < other.end and other.start < self.end


class Gpu:
    """The device, the host's view of it, and its faults. Use it as a context manager: leaving it raises `CudaFault`.

    Args:
        schedule: when operations run.
        devices: how many; each thread has a current one, the first until it chooses another.
        memory: bytes of each device.
        milliseconds: how long a work takes, by its name (H2D, D2H, D2D, memset, execute) and amount.

    Attributes:
        trace: all works, in the order they ran.
        calls: how often each function was called, and each work ran.
        faults: what was wrong so far.
    """

    def __init__(
        self,
        schedule: Literal["late", "eager"] = "late",
        *,
        devices: int = 1,
        memory: int = 1 << 30,
        milliseconds: Callable[[str, int], float] = lambda name, amount: 1.0,
    ) -> None:
        self.trace: list[Traced] = []
        self.calls: Counter[str] = Counter()
        self.faults: list[str] = []
        self.driver_version = 13020
        self._schedule, self._total, self._milliseconds = schedule, memory, milliseconds
        self._now = 0.0
        self._lock = threading.RLock()
        self._memory: list[Memory] = []
        self._legacy = cudaStream_t(0, "the legacy stream", 0, blocking=True, device=ANY)
        self._handles: dict[int, Handle] = {0: self._legacy}
        self._streams = [self._legacy]
        self._host: dict[cudaStream_t, int] = {}
        self._planned: list[tuple[str, cudaError_t, int]] = []
        self._sticky = cudaError_t.cudaSuccess
        self._devices = devices
        self._thread = threading.local()
        self._told = False
        self._given_up: set[int] = set()
        self._created = 0

    @property
    def device(self) -> int:
        """The current device of this thread."""
        return int(getattr(self._thread, "device", 0))

    @property
    def _last(self) -> cudaError_t:
        """The last error of this thread, until it is asked for."""
        last: cudaError_t = getattr(self._thread, "last", cudaError_t.cudaSuccess)
        return last

    @_last.setter
    def _last(self, error: cudaError_t) -> None:
        self._thread.last = error

    def expect_current(self, device: int, what: object) -> None:
        """Refuse what belongs to a device other than this thread's current one."""
        if device not in (ANY, self.device):
            reason = f"wrong device: {what} is of device {device}, but device {self.device} is current"
            raise Refusal(cudaError_t.cudaErrorInvalidResourceHandle, reason)

    def fail(self, name: str, error: cudaError_t, *, call: int = 1) -> None:
        """Let a call of a function, or a work on the GPU, fail: the next for 1."""
        self._planned.append((name, error, self.calls[name] + call))

    def break_device(self, error: cudaError_t) -> None:
        """Let every call fail from now on, as with a driver that is too old or after an illegal access."""
        self._sticky = error
        if error == cudaError_t.cudaErrorInsufficientDriver:  # the answer of a machine without one too, whose is 0
            self.driver_version = 12040

    def host(self, name: str, milliseconds: float) -> None:
        """Let work of the host take a time, during which the GPU goes on."""
        with self._lock:
            now = self._now
            self._now += milliseconds
            self.trace.append(Traced(name, -1, 0, now, now, self._now, in_graph=False))

    def fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)

    def check_result(self, values: NDArray[Any]) -> None:
        """Raise `CudaFault` if a result holds poison: it was read before it was there."""
        if np.isnan(values).any():
            raise CudaFault("missing synchronization: the result was read before the copy to the host had finished")

    def close(self) -> None:
        """Raise `CudaFault` unless all was waited for and released, and nothing was wrong."""
        if any(memory.label.startswith("engine") and not memory.freed for memory in self._memory):
            gc.collect()
        with self._lock:
            for stream in self._streams:
                self._expect_idle(stream, "at the end")
                if stream.capture:
                    self.fault(f"leak: a capture of {stream} was never ended")
            for memory in self._memory:
                if not memory.freed and memory.address not in self._given_up:
                    self.fault(f"leak: {memory} was never freed")
                if spoilt := memory.spoilt():
                    self.fault(spoilt)
            for value, handle in self._handles.items():
                if value and value not in self._given_up:
                    self.fault(f"leak: {handle} was never destroyed")
        if self.faults:
            raise CudaFault("\n".join(self.faults))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CudaFault:
            if error is None:
                raise
            for text in self.faults:
                if not text.startswith("leak"):  # as the error may have kept the program from releasing anything
                    error.add_note(text)

    def _planned_error(self, name: str) -> cudaError_t:
        for plan in self._planned:
            if plan[0] == name and plan[2] <= self.calls[name]:
                self._planned.remove(plan)
                return plan[1]
        return cudaError_t.cudaSuccess

    def _break_capture(self, capture: Capture, reason: str, error: int = 900) -> NoReturn:
        capture.broken = True
        raise Refusal(cudaError_t(error), f"uncapturable: it {reason}")

    def _crash(self, error: cudaError_t, reason: str = "") -> None:
        if reason:
            self.fault(f"{reason} ({error.name})")
        self._sticky = self._sticky or error

    # Operations

    def _enqueue(
        self, stream: cudaStream_t, name: str, works: Sequence[Work], after: Iterable[Operation | None] = ()
    ) -> Any:
        """Put works into a stream, or into the graph that it is captured into."""
        self.expect_current(stream.device, stream)
        if stream.capture:
            if stream.capture.broken:
                raise Refusal(cudaError_t.cudaErrorStreamCaptureInvalidated)
            stream.capture.works += works
            return None
        implicit: list[Operation | None] = [self._legacy.last] if stream.blocking else []
        if stream is self._legacy:
            implicit = [other.last for other in self._streams if other.blocking]
            for capture in [other.capture for other in self._streams if other.blocking and other.capture]:
                self._break_capture(capture, "uses the legacy stream while a blocking stream is captured", 906)
        before = [operation for operation in (stream.last, *after, *implicit) if operation]
        stream.count += 1
        clock = dict(self._host)
        for operation in before:
            _merge(clock, operation.clock)
        clock[stream] = stream.count
        operation = Operation(name, stream, works, before, self._now, stream.count, clock)
        for work in works:
            for span in work.reads:
                self._access(span, operation, write=False)
            for span in work.writes:
                self._access(span, operation, write=True)
        stream.queue.append(operation)
        stream.last = operation
        stream.last_work = operation if works else stream.last_work
        if self._schedule == "eager":
            self._finish(operation)
        return operation

    def _access(self, span: Span, operation: Operation, *, write: bool) -> None:
        """Check that an access is ordered after all earlier ones that conflict with it."""
        memory = span.memory
        if isinstance(memory, Pageable) or memory.freed:
            return
        memory.accesses = [access for access in memory.accesses if not self._seen(access.operation)]
        pending = [access for access in memory.accesses if access.span.overlaps(span)]
        for access in pending:
            other = access.operation
            ordered = operation.clock.get(other.stream, 0) >= other.index
            if (write or access.write) and not ordered:
                self.fault(f"race: nothing orders {other} before {operation}, and both use {memory}")
        if memory.side == "host" and not any(write or access.write for access in pending):
            if write:
                span.view.fill(POISON)
            operation.hashes.append((span, zlib.crc32(span.view.data)))
        memory.accesses.append(Access(span, write, operation))

    def _seen(self, operation: Operation) -> bool:
        """Whether the host has waited for an operation."""
        return self._host.get(operation.stream, 0) >= operation.index

    def _finish(self, operation: Operation) -> None:
        """Run what must run for an operation to be done."""
        while not operation.done:
            self._step(operation.stream)

    def _step(self, stream: cudaStream_t) -> None:
        for operation in stream.queue[0].before:
            self._finish(operation)
        self._perform(stream.queue.popleft())

    def _perform(self, operation: Operation) -> None:
        for span, hashed in operation.hashes:
            if not span.memory.freed and zlib.crc32(span.view.data) != hashed:
                self.fault(f"reuse: the host wrote into {span} while {operation} was pending")
        now = max([operation.enqueued, *(before.end for before in operation.before)])
        for work in operation.works:
            if not self._sticky:
                self._run(operation, work)
            end = now + self._milliseconds(work.name, work.amount)
            in_graph = operation.name == "graph"
            self.trace.append(
                Traced(work.name, operation.stream.number, work.amount, operation.enqueued, now, end, in_graph)
            )
            now = end
        operation.end, operation.done = now, True
        operation.before, operation.works, operation.hashes = [], [], []

    def _run(self, operation: Operation, work: Work) -> None:
        self.calls[work.name] += 1
        if error := self._planned_error(work.name):
            return self._crash(error)
        for span in (*work.reads, *work.writes):
            if span.memory.freed:
                reason = f"use after free: {work.name} on {operation.stream} uses {span.memory}"
                return self._crash(cudaError_t.cudaErrorIllegalAddress, reason)
        try:
            work.run()
        except Exception as error:  # of the computation
            self._crash(cudaError_t.cudaErrorLaunchFailure, f"{work.name} on {operation.stream}: {error}")
        for span in work.writes:
            if span.memory.side == "device":
                span.memory.written[span.start : span.stop] = True
        return None

    def _wait(self, operation: Operation | None) -> tuple[()]:
        """Let the host wait for an operation."""
        if operation is not None:
            self._finish(operation)
            _merge(self._host, operation.clock)
            self._now = max(self._now, operation.end)
        return ()

    def _query(self, operation: Operation | None) -> tuple[()]:
        if operation is not None and not operation.done:
            self._step(operation.stream)
            raise Refusal(cudaError_t.cudaErrorNotReady)
        return self._wait(operation)

    def _expect_idle(self, stream: cudaStream_t, when: str) -> None:
        if stream.last_work and not self._seen(stream.last_work) and not self._sticky:
            self.fault(f"missing synchronization: nothing has waited for {stream.last_work} {when}")

    # Memory

    def reserve(self, label: str, size: int, *, side: str = "device") -> Memory:
        if side == "device" and self._used() + size > self._total:
            raise Refusal(cudaError_t.cudaErrorMemoryAllocation)
        if size <= 0:
            raise Refusal(cudaError_t.cudaErrorInvalidValue, f"allocates {size} bytes")
        self._memory.append(Memory(f"{label} {len(self._memory) + 1}", size, side, self.device))
        return self._memory[-1]

    def _used(self) -> int:
        """Bytes of this thread's device."""
        there = (memory for memory in self._memory if memory.side == "device" and memory.device == self.device)
        return sum(memory.size for memory in there if not memory.freed)

    def release(self, memory: Memory) -> None:
        with self._lock:
            for access in memory.accesses:
                if not self._seen(access.operation) and not self._sticky:
                    self.fault(f"in use: {memory} is freed while {access.operation} may still use it")
            if spoilt := memory.spoilt():
                self.fault(spoilt)
            memory.freed = True
            memory.content.fill(POISON)

    def _at(self, address: int) -> Memory | None:
        """The allocation at or just beside an address."""
        near = (m for m in self._memory if m.address - GUARD <= address < m.address + m.size + GUARD)
        return next(near, None)

    def span(self, pointer: Any, count: int, side: str) -> Span:
        """A range of memory on the host or the device, or either if `side` is empty."""
        address = address_of(pointer)
        memory = self._at(address)
        invalid = cudaError_t.cudaErrorInvalidValue
        if memory is None:
            if side == "device" or not address:
                raise Refusal(invalid, f"wrong kind: {address:#x} is not device memory")
            if not _is_number(pointer) and memoryview(pointer).nbytes < count:
                raise Refusal(invalid, f"out of bounds: {count} bytes of a smaller array")
            return Span(Pageable(address, count), 0, count)
        span = Span(memory, address - memory.address, address - memory.address + count)
        if memory.freed:
            raise Refusal(invalid, f"use after free: {memory}")
        if span.start < 0 or span.stop > memory.size:
            raise Refusal(invalid, f"out of bounds: {span}")
        if side not in ("", memory.side):
            raise Refusal(invalid, f"wrong kind: {memory} is not {side} memory")
        if memory.side == "device":  # stricter than CUDA, which copies from one device to the other
            self.expect_current(memory.device, memory)
        return span


def _merge(clock: dict[cudaStream_t, int], other: Mapping[cudaStream_t, int]) -> None:
    for stream, count in other.items():
        clock[stream] = max(count, clock.get(stream, 0))


def _is_number(pointer: Any) -> bool:
    return hasattr(pointer, "__index__") and not isinstance(pointer, np.ndarray)


def address_of(pointer: Any) -> int:
    """Of None, a number, a handle or an array, as cuda-bindings takes them."""
    if pointer is None:
        return 0
    if _is_number(pointer):
        return operator.index(pointer)
    address: int = np.frombuffer(pointer, np.uint8).ctypes.data
    return address
