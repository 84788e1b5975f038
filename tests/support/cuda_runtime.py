"""A CUDA runtime in host memory, with the names, argument orders and tuples of `cuda.bindings.runtime` 13.5.

Copies and executions really move and compute bytes, as late as CUDA allows: with the schedule `late` an operation runs
only when a synchronization, a query or an event forces it, so a missing synchronization yields poison (NaN) and never
luck. `eager` runs each operation as soon as it is enqueued. Both are deterministic.

Whatever a correct program does not do is a fault, and a fault fails the test when the bench is closed:

- Device pointers point to a decoy. The host reads poison there, and what it writes there is found.
- Every operation carries a vector clock of all that is ordered before it, so a race between streams is found whichever
  way the operations happen to run, as is memory that is freed, or a stream destroyed, while the GPU may still use it.
- The ranges of pinned memory that a copy reads or fills are hashed when it is enqueued and when it runs; a range that
  is to be filled is poisoned at once.
- Freed memory stays mapped, poisoned and watched. A leak, and work that nothing waited for, are faults as well.

Time is virtual: it follows from durations and dependencies, so overlap in `trace` is the same in each run and schedule.
One device; a capture covers one stream; accesses inside one graph are not checked for races among each other.
"""

# ruff: noqa: N801, N802, N803, N815 - the names are NVIDIA's
from __future__ import annotations

import ctypes
import gc
import operator
import sys
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from types import ModuleType, TracebackType
from typing import Any, Literal, NamedTuple, NoReturn, Self, TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
POISON = 0xFF  # NaN in every floating-point format
GUARD = 4096
ALIGNMENT = 256
CALL_MILLISECONDS = 0.001


class cudaError_t(IntEnum):
    text: str

    def __new__(cls, value: int, text: str = "") -> Self:
        member = int.__new__(cls, value)
        member._value_ = value
        member.text = text
        return member

    cudaSuccess = 0, "no error"
    cudaErrorInvalidValue = 1, "invalid argument"
    cudaErrorMemoryAllocation = 2, "out of memory"
    cudaErrorInitializationError = 3, "initialization error"
    cudaErrorInsufficientDriver = 35, "CUDA driver version is insufficient for CUDA runtime version"
    cudaErrorNoDevice = 100, "no CUDA-capable device is detected"
    cudaErrorInvalidDevice = 101, "invalid device ordinal"
    cudaErrorECCUncorrectable = 214, "uncorrectable ECC error encountered"
    cudaErrorInvalidResourceHandle = 400, "invalid resource handle"
    cudaErrorIllegalState = 401, "the operation cannot be performed in the present state"
    cudaErrorNotReady = 600, "device not ready"
    cudaErrorIllegalAddress = 700, "an illegal memory access was encountered"
    cudaErrorLaunchTimeout = 702, "the launch timed out and was terminated"
    cudaErrorAssert = 710, "device-side assert triggered"
    cudaErrorHardwareStackError = 714, "hardware stack error"
    cudaErrorIllegalInstruction = 715, "an illegal instruction was encountered"
    cudaErrorMisalignedAddress = 716, "misaligned address"
    cudaErrorLaunchFailure = 719, "unspecified launch failure"
    cudaErrorStreamCaptureUnsupported = 900, "operation not permitted when stream is capturing"
    cudaErrorStreamCaptureInvalidated = 901, "operation failed due to a previous error during capture"
    cudaErrorStreamCaptureIsolation = 905, "dependency created on uncaptured work in another stream"
    cudaErrorStreamCaptureImplicit = (
        906,
        "operation would make the legacy stream depend on a capturing blocking stream",
    )
    cudaErrorCapturedEvent = 907, "operation not permitted on an event last recorded in a capturing stream"
    cudaErrorStreamCaptureWrongThread = (
        908,
        "attempt to terminate a thread-local capture sequence from another thread",
    )
    cudaErrorUnknown = 999, "unknown error"


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3
    cudaMemcpyDefault = 4


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaStreamCaptureStatus(IntEnum):
    cudaStreamCaptureStatusNone = 0
    cudaStreamCaptureStatusActive = 1
    cudaStreamCaptureStatusInvalidated = 2


ENUMS = (cudaError_t, cudaMemcpyKind, cudaStreamCaptureMode, cudaStreamCaptureStatus)
CONSTANTS = {
    "cudaEventBlockingSync": 1,
    "cudaEventDefault": 0,
    "cudaEventDisableTiming": 2,
    "cudaEventRecordDefault": 0,
    "cudaEventWaitDefault": 0,
    "cudaHostAllocDefault": 0,
    "cudaHostAllocMapped": 2,
    "cudaHostAllocPortable": 1,
    "cudaHostAllocWriteCombined": 4,
    "cudaStreamDefault": 0,
    "cudaStreamNonBlocking": 1,
}
STICKY = {error for error in cudaError_t if error in (35, 100, 214, 719) or 700 <= error < 719}
"""After one of these, every call of the process returns it."""

_ALLOCATIONS = ("cudaMalloc", "cudaHostAlloc", "cudaMallocHost")
_CREATED = ("cudaStreamCreate", "cudaStreamCreateWithFlags", "cudaEventCreate", "cudaEventCreateWithFlags")
_VALUES = dict.fromkeys((*_ALLOCATIONS, *_CREATED, "cudaStreamEndCapture", "cudaGraphInstantiate"), 1)
_VALUES |= dict.fromkeys(("cudaStreamIsCapturing", "cudaEventElapsedTime", "cudaGetDeviceCount", "cudaGetDevice"), 1)
_VALUES["cudaMemGetInfo"] = 2
"""How many values follow the error: each is None if there is one."""

_ALWAYS = ("cudaGetErrorName", "cudaGetErrorString", "cudaRuntimeGetVersion", "cudaDriverGetVersion")
_ASKS = ("cudaGetLastError", "cudaPeekAtLastError")
_ENQUEUES = ("cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch", "execute_async_v3")
_WORK = (*_ALLOCATIONS, *_CREATED, *_ENQUEUES, "cudaMemcpy", "cudaStreamBeginCapture", "cudaGraphInstantiate")
_RELEASES = ("cudaFree", "cudaFreeHost", *(f"cuda{kind}Destroy" for kind in ("Stream", "Event", "Graph", "GraphExec")))
_WAITS = ("cudaStreamSynchronize", "cudaStreamQuery", "cudaEventSynchronize", "cudaEventQuery", "cudaDeviceSynchronize")
_UNSAFE = (*_ALLOCATIONS, *_WAITS, "cudaFree", "cudaFreeHost", "cudaMemcpy")
"""What may wait for the GPU, and so cannot be called while a stream is captured."""

_SIDES = (("host", "host"), ("host", "device"), ("device", "host"), ("device", "device"), ("", ""))


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

    def __init__(self, label: str, size: int, side: str) -> None:
        self.label, self.size, self.side = label, size, side
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


Kind = TypeVar("Kind", cudaStream_t, cudaEvent_t, cudaGraph_t, cudaGraphExec_t)


class CudaBench:
    """The fake runtime and what it saw. Use it as a context manager: leaving it raises `CudaFault`.

    Args:
        schedule: when operations run.
        memory: bytes of the device.
        milliseconds: how long a work takes, by its name (H2D, D2H, D2D, memset, execute) and amount.

    Attributes:
        runtime: to be used in place of the module `cuda.bindings.runtime`.
        trace: all works, in the order they ran.
        calls: how often each function was called.
        faults: what was wrong so far.
    """

    def __init__(
        self,
        schedule: Literal["late", "eager"] = "late",
        *,
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
        self._legacy = cudaStream_t(0, "the legacy stream", 0, blocking=True)
        self._handles: dict[int, Handle] = {0: self._legacy}
        self._streams = [self._legacy]
        self._host: dict[cudaStream_t, int] = {}
        self._planned: list[tuple[str, cudaError_t, int]] = []
        self._sticky = self._last = cudaError_t.cudaSuccess
        self._told = False
        self._given_up: set[int] = set()
        self._created = 0
        self.runtime = ModuleType("cuda.bindings.runtime")
        names = [name for name in dir(self) if name.startswith("cuda")]
        members = {name: partial(self._call, name) for name in names} | CONSTANTS
        vars(self.runtime).update(members | {kind.__name__: kind for kind in ENUMS})

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Make `cuda.bindings.runtime` importable, and this one."""
        package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        vars(package)["bindings"], vars(bindings)["runtime"] = bindings, self.runtime
        for module in (package, bindings, self.runtime):
            patch.setitem(sys.modules, module.__name__, module)

    def fail(self, name: str, error: cudaError_t, *, call: int = 1) -> None:
        """Let a call of a function, or a work on the GPU, fail: the next for 1."""
        self._planned.append((name, error, self.calls[name] + call))

    def break_device(self, error: cudaError_t) -> None:
        """Let every call fail from now on, as with a driver that is too old or after an illegal access."""
        self._sticky = error
        if error in (35, 100):
            self.driver_version = 0 if error == 100 else 12040

    @property
    def allocations(self) -> int:
        """How often memory was allocated so far, on the device or pinned."""
        return sum(self.calls[name] for name in _ALLOCATIONS)

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
        """Raise `CudaFault` if any byte run of a result is poison: it was read before it was there."""
        if np.isnan(values).any():
            raise CudaFault("missing synchronization: the result was read before the copy to the host had finished")

    def close(self) -> None:
        """Raise `CudaFault` unless all was waited for and released, and nothing was wrong."""
        if any(memory.label.startswith("engine") and not memory.freed for memory in self._memory):
            gc.collect()
        with self._lock:
            for stream in self._streams:
                self._expect_idle(stream, "at the end")
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

    # Calls

    def _call(self, name: str, *arguments: Any, **named: Any) -> tuple[Any, ...]:
        with self._lock:
            self.calls[name] += 1
            self._now += CALL_MILLISECONDS
            error, values = cudaError_t.cudaSuccess, (None,) * _VALUES.get(name, 0)
            try:
                if name not in (*_ALWAYS, *_ASKS):
                    self._refuse(name)
                values = getattr(self, name)(*arguments, **named)
                if self._sticky and name in _UNSAFE:  # they wait, so they are the first to know
                    self._told = True
                    raise Refusal(self._sticky)
            except Refusal as refusal:
                error = refusal.error
                if refusal.reason:
                    self.fault(f"{name}: {refusal.reason} ({error.name})")
                if name in _RELEASES:
                    self._given_up.add(_address(arguments[0]))
                if name not in _ASKS:
                    self._last = error
            return (error, *values)

    def _refuse(self, name: str) -> None:
        if error := self._planned_error(name):
            self._sticky = error if error in STICKY else self._sticky
            if not self._sticky:
                raise Refusal(error)
        if self._sticky:
            if self._told and name in _WORK:
                self.fault(f"sticky error: {name} after {self._sticky.name}, from which nothing recovers")
            self._told = True
            raise Refusal(self._sticky)
        if name in _UNSAFE:
            for capture in [stream.capture for stream in self._streams if stream.capture]:
                mine = capture.thread == threading.get_ident()
                if capture.mode == 0 or (capture.mode == 1 and mine):
                    self._break_capture(capture, "cannot be called while a stream is captured")

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

    def _find(self, kind: type[Kind], handle: Any) -> Kind:
        found = self._handles.get(_address(handle))
        if not isinstance(found, kind):
            reason = f"use after free: no {kind.__name__} with this handle, or not any more"
            raise Refusal(cudaError_t.cudaErrorInvalidResourceHandle, reason)
        return found

    def _new(self, kind: type[Kind], *values: Any) -> Kind:
        self._created += 1
        name = kind.__name__.removeprefix("cuda").removesuffix("_t")
        handle = kind(0x5EED0000 + 16 * self._created, f"{name} {self._created}", *values)
        self._handles[handle.value] = handle
        return handle

    # The GPU

    def _enqueue(
        self, stream: cudaStream_t, name: str, works: Sequence[Work], after: Iterable[Operation | None] = ()
    ) -> Any:
        """Put works into a stream, or into the graph that it is captured into."""
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
        used = sum(memory.size for memory in self._memory if memory.side == "device" and not memory.freed)
        if side == "device" and used + size > self._total:
            raise Refusal(cudaError_t.cudaErrorMemoryAllocation)
        if size <= 0:
            raise Refusal(cudaError_t.cudaErrorInvalidValue, f"allocates {size} bytes")
        self._memory.append(Memory(f"{label} {len(self._memory) + 1}", size, side))
        return self._memory[-1]

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
        address = _address(pointer)
        memory = self._at(address)
        invalid = cudaError_t.cudaErrorInvalidValue
        if memory is None:
            if side == "device" or not address:
                raise Refusal(invalid, f"wrong kind: {address:#x} is not device memory")
            if not isinstance(pointer, int) and memoryview(pointer).nbytes < count:
                raise Refusal(invalid, f"out of bounds: {count} bytes of a smaller array")
            return Span(Pageable(address, count), 0, count)
        span = Span(memory, address - memory.address, address - memory.address + count)
        if memory.freed:
            raise Refusal(invalid, f"use after free: {memory}")
        if span.start < 0 or span.stop > memory.size:
            raise Refusal(invalid, f"out of bounds: {span}")
        if side not in ("", memory.side):
            raise Refusal(invalid, f"wrong kind: {memory} is not {side} memory")
        return span

    def _free(self, pointer: Any, side: str) -> tuple[()]:
        address = _address(pointer)
        memory = self._at(address)
        if not address:
            return ()
        invalid = cudaError_t.cudaErrorInvalidValue
        if memory is None or memory.address != address:
            raise Refusal(invalid, f"no allocation begins at {address:#x}")
        if memory.freed:
            raise Refusal(invalid, f"double free: {memory}")
        if memory.side != side:
            raise Refusal(invalid, f"wrong kind: {memory} is not {side} memory")
        self.release(memory)
        return ()

    def cudaMalloc(self, size: int) -> tuple[int]:
        return (self.reserve("device memory", operator.index(size)).address,)

    def cudaFree(self, devPtr: Any) -> tuple[()]:
        return self._free(devPtr, "device")

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int]:
        return (self.reserve("pinned memory", operator.index(size), side="host").address,)

    def cudaMallocHost(self, size: int) -> tuple[int]:
        return self.cudaHostAlloc(size, 0)

    def cudaFreeHost(self, ptr: Any) -> tuple[()]:
        return self._free(ptr, "host")

    def cudaMemGetInfo(self) -> tuple[int, int]:
        used = sum(memory.size for memory in self._memory if memory.side == "device" and not memory.freed)
        return self._total - used, self._total

    def cudaMemcpyAsync(self, dst: Any, src: Any, count: int, kind: cudaMemcpyKind, stream: Any) -> tuple[()]:
        return self._copy(dst, src, count, kind, self._find(cudaStream_t, stream))

    def cudaMemcpy(self, dst: Any, src: Any, count: int, kind: cudaMemcpyKind) -> tuple[()]:
        self._copy(dst, src, count, kind, self._legacy)
        return self._wait(self._legacy.last)

    def _copy(self, dst: Any, src: Any, count: int, kind: cudaMemcpyKind, stream: cudaStream_t) -> tuple[()]:
        sides = _SIDES[cudaMemcpyKind(kind)]
        source, target = self.span(src, count, sides[0]), self.span(dst, count, sides[1])
        name = "".join("H" if span.memory.side == "host" else "D" for span in (source, target)).replace("", "2")[1:-1]
        from_pageable, to_pageable = (isinstance(span.memory, Pageable) for span in (source, target))
        if from_pageable or to_pageable:
            name += " pageable"
            if stream.capture:  # stricter than CUDA, which leaves the lifetime of the memory to the program
                self._break_capture(stream.capture, "copies pageable memory")
        # CUDA reads pageable memory before it returns, and returns from a copy to pageable memory when it is done.
        content = source.view.copy() if from_pageable else source.view

        def run() -> None:
            target.view[:] = content

        operation = self._enqueue(stream, name, [Work(name, count, run, [source], [target])])
        if to_pageable:
            self._wait(operation)
        return ()

    def cudaMemsetAsync(self, devPtr: Any, value: int, count: int, stream: Any) -> tuple[()]:
        target = self.span(devPtr, count, "device")
        work = Work("memset", count, lambda: target.view.fill(value & 0xFF), writes=[target])
        self._enqueue(self._find(cudaStream_t, stream), "memset", [work])
        return ()

    # Streams and events

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[cudaStream_t]:
        self._streams.append(self._new(cudaStream_t, len(self._streams), not flags))
        return (self._streams[-1],)

    def cudaStreamCreate(self) -> tuple[cudaStream_t]:
        return self.cudaStreamCreateWithFlags(0)

    def cudaStreamDestroy(self, stream: Any) -> tuple[()]:
        found = self._find(cudaStream_t, stream)
        self._expect_idle(found, f"when {found} is destroyed")
        return self._destroy(found)

    def _destroy(self, handle: Handle, last: Operation | None = None) -> tuple[()]:
        if last is not None and not self._seen(last):
            self.fault(f"in use: {handle} is destroyed while {last} may still use it")
        del self._handles[handle.value]
        return ()

    def _uncaptured(self, item: cudaStream_t | cudaEvent_t, error: int = 900) -> Operation | None:
        if item.capture:
            self._break_capture(item.capture, f"waits for {item}, which is captured", error)
        return item.last

    def cudaStreamSynchronize(self, stream: Any) -> tuple[()]:
        return self._wait(self._uncaptured(self._find(cudaStream_t, stream)))

    def cudaStreamQuery(self, stream: Any) -> tuple[()]:
        return self._query(self._uncaptured(self._find(cudaStream_t, stream)))

    def cudaDeviceSynchronize(self) -> tuple[()]:
        for stream in self._streams:
            self._wait(self._uncaptured(stream))
        return ()

    def cudaStreamWaitEvent(self, stream: Any, event: Any, flags: int) -> tuple[()]:
        found, awaited = self._find(cudaStream_t, stream), self._find(cudaEvent_t, event)
        if awaited.capture is not found.capture and awaited.capture:
            raise NotImplementedError("the bench captures one stream at a time")
        if found.capture and awaited.last and not awaited.capture:
            self._break_capture(found.capture, "waits for work outside the capture", 905)
        if awaited.last:
            self._enqueue(found, "wait", [], [awaited.last])
        return ()

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[cudaEvent_t]:
        return (self._new(cudaEvent_t, not flags & 2),)

    def cudaEventCreate(self) -> tuple[cudaEvent_t]:
        return self.cudaEventCreateWithFlags(0)

    def cudaEventDestroy(self, event: Any) -> tuple[()]:
        found = self._find(cudaEvent_t, event)
        return self._destroy(found, found.last)

    def cudaEventRecord(self, event: Any, stream: Any) -> tuple[()]:
        found, recorded = self._find(cudaEvent_t, event), self._find(cudaStream_t, stream)
        found.capture = recorded.capture
        found.last = self._enqueue(recorded, "record", [])
        return ()

    def cudaEventSynchronize(self, event: Any) -> tuple[()]:
        return self._wait(self._uncaptured(self._find(cudaEvent_t, event), 907))

    def cudaEventQuery(self, event: Any) -> tuple[()]:
        return self._query(self._uncaptured(self._find(cudaEvent_t, event), 907))

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[float]:
        first, second = self._find(cudaEvent_t, start), self._find(cudaEvent_t, end)
        if not (first.timing and second.timing and first.last and second.last):
            raise Refusal(cudaError_t.cudaErrorInvalidResourceHandle, "an event without timing, or never recorded")
        if not (first.last.done and second.last.done):
            raise Refusal(cudaError_t.cudaErrorNotReady)
        return (second.last.end - first.last.end,)

    # Graphs

    def cudaStreamBeginCapture(self, stream: Any, mode: cudaStreamCaptureMode) -> tuple[()]:
        found = self._find(cudaStream_t, stream)
        if found is self._legacy or found.capture:
            reason = "uncapturable: the legacy stream, or one that is captured already"
            raise Refusal(cudaError_t.cudaErrorIllegalState, reason)
        found.capture = Capture(cudaStreamCaptureMode(mode))
        return ()

    def cudaStreamEndCapture(self, stream: Any) -> tuple[cudaGraph_t]:
        found = self._find(cudaStream_t, stream)
        capture = found.capture
        if capture is None:
            raise Refusal(cudaError_t.cudaErrorIllegalState, f"{found} is not captured")
        if capture.mode != 2 and capture.thread != threading.get_ident():
            raise Refusal(cudaError_t.cudaErrorStreamCaptureWrongThread, "uncapturable: it began in another thread")
        found.capture = None
        if capture.broken:
            raise Refusal(cudaError_t.cudaErrorStreamCaptureInvalidated)
        return (self._new(cudaGraph_t, capture.works),)

    def cudaStreamIsCapturing(self, stream: Any) -> tuple[cudaStreamCaptureStatus]:
        capture = self._find(cudaStream_t, stream).capture
        return (cudaStreamCaptureStatus(0 if capture is None else 2 if capture.broken else 1),)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[cudaGraphExec_t]:
        return (self._new(cudaGraphExec_t, list(self._find(cudaGraph_t, graph).works)),)

    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> tuple[()]:
        found, target = self._find(cudaGraphExec_t, graphExec), self._find(cudaStream_t, stream)
        if target.capture:  # stricter than CUDA, where it becomes a child graph
            self._break_capture(target.capture, "launches a graph while a stream is captured")
        for work in found.works:
            work.replayed()
        found.last = self._enqueue(target, "graph", found.works, [found.last])
        return ()

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[()]:
        found = self._find(cudaGraphExec_t, graphExec)
        return self._destroy(found, found.last)

    def cudaGraphDestroy(self, graph: Any) -> tuple[()]:
        return self._destroy(self._find(cudaGraph_t, graph))

    # Device and errors

    def cudaGetDeviceCount(self) -> tuple[int]:
        return (1,)

    def cudaGetDevice(self) -> tuple[int]:
        return (0,)

    def cudaSetDevice(self, device: int) -> tuple[()]:
        if device:
            raise Refusal(cudaError_t.cudaErrorInvalidDevice, f"there is no device {device}")
        return ()

    def cudaPeekAtLastError(self) -> tuple[()]:
        if error := self._sticky or self._last:
            raise Refusal(error)
        return ()

    def cudaGetLastError(self) -> tuple[()]:
        try:
            return self.cudaPeekAtLastError()
        finally:
            self._last = cudaError_t.cudaSuccess

    def cudaGetErrorName(self, error: cudaError_t) -> tuple[bytes]:
        return (cudaError_t(error).name.encode(),)

    def cudaGetErrorString(self, error: cudaError_t) -> tuple[bytes]:
        return (cudaError_t(error).text.encode(),)

    def cudaRuntimeGetVersion(self) -> tuple[int]:
        return (13050,)

    def cudaDriverGetVersion(self) -> tuple[int]:
        return (self.driver_version,)

    # For engines

    def execute_async_v3(self, stream_handle: int, capturable: bool, work: Callable[[], Work]) -> tuple[()]:
        """Enqueue what a context executes. TensorRT cannot see a bad address: the GPU faults on it, later."""
        stream = self._find(cudaStream_t, stream_handle)
        if stream.capture and not capturable:
            self._break_capture(stream.capture, "executes a context for the first time since its shapes were set")
        try:
            made = work()
        except Refusal as refusal:
            crash = partial(self._crash, cudaError_t.cudaErrorIllegalAddress, f"execute: {refusal.reason}")
            made = Work("execute", 0, crash)
        self._enqueue(stream, "execute", [made])
        return ()

    def submit(self, stream_handle: Any, *, capturable: bool, work: Callable[[], Work]) -> cudaError_t:
        """`execute_async_v3`, with the errors that any call has."""
        error: cudaError_t = self._call("execute_async_v3", _address(stream_handle), capturable, work)[0]
        return error


def _merge(clock: dict[cudaStream_t, int], other: Mapping[cudaStream_t, int]) -> None:
    for stream, count in other.items():
        clock[stream] = max(count, clock.get(stream, 0))


def _address(pointer: Any) -> int:
    """Of None, a number, a handle or an array, as cuda-bindings takes them."""
    if pointer is None:
        return 0
    if hasattr(pointer, "__index__") and not isinstance(pointer, np.ndarray):
        return operator.index(pointer)
    address: int = np.frombuffer(pointer, np.uint8).ctypes.data
    return address
