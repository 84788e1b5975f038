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
- Memory, streams, events, graphs and engines belong to the device that was the thread's current one when they were
  made, and may only be used where it is current.
- Freed memory stays mapped, poisoned and watched. A leak, and work that nothing waited for, are faults as well.

Time is virtual: it follows from durations and dependencies, so overlap in `trace` is the same in each run and schedule.
What is left out: copies between devices, captures of several streams, races inside one graph, and limits on how many
copies run at once. The host has one clock, whatever its threads, so they are taken to be ordered among each other.
"""

# ruff: noqa: N802, N803 - the names are NVIDIA's
from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Callable
from functools import cached_property, partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

import pytest

from tests.support.cuda_gpu import (
    ANY,
    Capture,
    Gpu,
    Handle,
    Operation,
    Pageable,
    Refusal,
    Work,
    address_of,
    cudaEvent_t,
    cudaGraph_t,
    cudaGraphExec_t,
    cudaStream_t,
)
from tests.support.cuda_names import (
    CONSTANTS,
    ENUMS,
    STICKY,
    cudaError_t,
    cudaMemcpyKind,
    cudaStreamCaptureMode,
    cudaStreamCaptureStatus,
)

CALL_MILLISECONDS = 0.001

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

Kind = TypeVar("Kind", cudaStream_t, cudaEvent_t, cudaGraph_t, cudaGraphExec_t)


class CudaBench(Gpu):
    """The functions, each under its own name; programs call them through `runtime`."""

    @cached_property
    def runtime(self) -> ModuleType:
        """To be used in place of the module `cuda.bindings.runtime`."""
        module = ModuleType("cuda.bindings.runtime")
        names = [name for name in dir(CudaBench) if name.startswith("cuda")]
        members = {name: partial(self._call, name) for name in names} | CONSTANTS
        vars(module).update(members | {kind.__name__: kind for kind in ENUMS})
        return module

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Make `cuda.bindings.runtime` importable, and this one."""
        package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        vars(package)["bindings"], vars(bindings)["runtime"] = bindings, self.runtime
        for module in (package, bindings, self.runtime):
            vars(module)["__spec__"] = ModuleSpec(module.__name__, None)
            patch.setitem(sys.modules, module.__name__, module)

    @property
    def allocations(self) -> int:
        """How often memory was allocated so far, on the device or pinned."""
        return sum(self.calls[name] for name in _ALLOCATIONS)

    def _call(self, name: str, *arguments: Any, **named: Any) -> tuple[Any, ...]:
        with self._lock:
            self.calls[name] += 1
            self._now += CALL_MILLISECONDS
            error = cudaError_t.cudaSuccess
            values: tuple[Any, ...]
            try:
                if name not in (*_ALWAYS, *_ASKS):
                    self._refuse(name)
                values = getattr(self, name)(*arguments, **named)
                if self._sticky and name in _UNSAFE:  # they wait, so they are the first to know
                    self._told = True
                    raise Refusal(self._sticky)
            except Refusal as refusal:
                error, values = refusal.error, (None,) * _VALUES.get(name, 0)
                if refusal.reason:
                    self.fault(f"{name}: {refusal.reason} ({error.name})")
                if name in _RELEASES:
                    self._given_up.add(address_of(arguments[0]))
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

    def _find(self, kind: type[Kind], handle: Any) -> Kind:
        found = self._handles.get(address_of(handle))
        if not isinstance(found, kind):
            reason = f"use after free: no {kind.__name__} with this handle, or not any more"
            raise Refusal(cudaError_t.cudaErrorInvalidResourceHandle, reason)
        return found

    def _new(self, kind: type[Kind], *values: Any) -> Kind:
        self._created += 1
        name = kind.__name__.removeprefix("cuda").removesuffix("_t")
        handle = kind(0x5EED0000 + 16 * self._created, f"{name} {self._created}", *values, device=self.device)
        self._handles[handle.value] = handle
        return handle

    # Memory

    def _free(self, pointer: Any, side: str) -> tuple[()]:
        address = address_of(pointer)
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
        return self._total - self._used(), self._total

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
            if stream.device in (ANY, self.device):
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
        self.expect_current(found.device, found)
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
        self.expect_current(found.device, found)
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
        self.expect_current(found.device, found)
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
        return (self._devices,)

    def cudaGetDevice(self) -> tuple[int]:
        return (self.device,)

    def cudaSetDevice(self, device: int) -> tuple[()]:
        if not 0 <= device < self._devices:
            raise Refusal(cudaError_t.cudaErrorInvalidDevice, f"there is no device {device}")
        self._thread.device = device
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
        error: cudaError_t = self._call("execute_async_v3", address_of(stream_handle), capturable, work)[0]
        return error
