"""The bench for GPU code: a correct program passes, and each planted fault is named."""

from __future__ import annotations

import ctypes
import importlib
import inspect
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.cuda_engine import CudaTensorRT
from tests.support.cuda_gpu import CudaFault
from tests.support.cuda_names import CONSTANTS, ENUMS, cudaError_t
from tests.support.cuda_runtime import CudaBench
from tests.support.graphs import smallest_classifier
from tests.support.tensorrt_binding import VERSIONS

IMAGE = 3 * 8 * 8 * 4
LOGITS = 4 * 4
MANY = 4
ERROR = cudaError_t

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def plan() -> bytes:
    content: bytes = smallest_classifier().SerializeToString()
    return content


def batch_of(number: int, size: int = MANY) -> Floats:
    return np.random.default_rng(number).standard_normal((size, 3, 8, 8), dtype=np.float32)


def expected(images: Floats) -> Floats:
    logits: Floats = np.repeat(images.reshape(len(images), -1).sum(axis=1)[:, None], 4, axis=1)
    return logits


class Logger:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, severity: int, text: str) -> None:
        self.lines.append(text)


class User:
    """A small program as it should be: pinned buffers, one stream, one execution context."""

    def __init__(self, bench: CudaBench, plan: bytes, version: str = VERSIONS[0]) -> None:
        self.bench, self.cuda, self.logger = bench, bench.runtime, Logger()
        trt = CudaTensorRT(version, bench, (1, 2, MANY))
        self.engine: Any = trt.Runtime(self.logger).deserialize_cuda_engine(plan)
        self.stream = self.do("cudaStreamCreateWithFlags", 1)
        self.images, self.logits = self.do("cudaMalloc", MANY * IMAGE), self.do("cudaMalloc", MANY * LOGITS)
        self.source = self.do("cudaHostAlloc", MANY * IMAGE, 0)
        self.result = self.do("cudaHostAlloc", MANY * LOGITS, 0)
        self.context = self.context_for(MANY)

    def do(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self.cuda, name)(*arguments)
        if error:
            raise RuntimeError(f"{name}: {error.name}")
        return values[0] if values else None

    def context_for(self, size: int) -> Any:
        context = self.engine.create_execution_context()
        assert context.set_input_shape("images", (size, 3, 8, 8))
        assert context.set_tensor_address("images", self.images)
        assert context.set_tensor_address("logits", self.logits)
        return context

    def host(self, address: int, shape: tuple[int, ...]) -> Floats:
        size = int(np.prod(shape))
        return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(shape)

    def up(self, size: int = MANY, stream: Any = None) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.do("cudaMemcpyAsync", self.images, self.source, size * IMAGE, kind, stream or self.stream)

    def down(self, size: int = MANY) -> None:
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.do("cudaMemcpyAsync", self.result, self.logits, size * LOGITS, kind, self.stream)

    def enqueue(self) -> None:
        self.up()
        assert self.context.execute_async_v3(int(self.stream))
        self.down()

    def wait(self) -> None:
        self.do("cudaStreamSynchronize", self.stream)

    def infer(self, images: Floats) -> Floats:
        self.host(self.source, images.shape)[:] = images
        self.enqueue()
        self.wait()
        return self.host(self.result, (MANY, 4)).copy()

    def capture(self, work: Callable[[], object]) -> Any:
        self.do("cudaStreamBeginCapture", self.stream, self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeGlobal)
        work()
        graph = self.do("cudaStreamEndCapture", self.stream)
        exec_graph = self.do("cudaGraphInstantiate", graph, 0)
        self.do("cudaGraphDestroy", graph)
        return exec_graph

    def close(self) -> None:
        for name, value in (
            ("cudaFree", self.images),
            ("cudaFree", self.logits),
            ("cudaFreeHost", self.source),
            ("cudaFreeHost", self.result),
            ("cudaStreamDestroy", self.stream),
        ):
            getattr(self.cuda, name)(value)
        del self.context, self.engine


SCHEDULES = pytest.mark.parametrize("schedule", ["late", "eager"])


class TestCorrectPrograms:
    @SCHEDULES
    @pytest.mark.parametrize("version", VERSIONS)
    def test_copy_execute_copy(self, plan: bytes, schedule: Any, version: str) -> None:
        with CudaBench(schedule) as bench:
            user = User(bench, plan, version)
            before = bench.allocations
            for number in range(3):
                images = batch_of(number)
                np.testing.assert_allclose(user.infer(images), expected(images), rtol=1e-4, atol=1e-4)
            assert bench.allocations == before
            assert [event.name for event in bench.trace if event.end > event.start][:3] == ["H2D", "execute", "D2H"]
            user.close()

    @SCHEDULES
    def test_a_graph_recomputes_from_what_is_in_memory_then(self, plan: bytes, schedule: Any) -> None:
        with CudaBench(schedule) as bench:
            user = User(bench, plan)
            user.infer(batch_of(0))
            graph = user.capture(user.enqueue)
            for number in range(1, 4):
                images = batch_of(number)
                user.host(user.source, images.shape)[:] = images
                user.do("cudaGraphLaunch", graph, user.stream)
                user.wait()
                np.testing.assert_allclose(user.host(user.result, (MANY, 4)), expected(images), rtol=1e-4, atol=1e-4)
            assert [event.name for event in bench.trace if event.in_graph] == ["H2D", "execute", "D2H"] * 3
            user.do("cudaGraphExecDestroy", graph)
            user.close()

    def test_launches_of_one_graph_are_ordered_also_on_two_streams(self, plan: bytes) -> None:
        with CudaBench() as bench:
            user = User(bench, plan)
            user.infer(batch_of(0))
            graph, stream = user.capture(user.enqueue), user.do("cudaStreamCreateWithFlags", 1)
            for launched in (user.stream, stream):
                user.do("cudaGraphLaunch", graph, launched)
            user.do("cudaStreamSynchronize", stream)
            bench.check_result(user.host(user.result, (MANY, 4)))
            user.do("cudaGraphExecDestroy", graph)
            user.do("cudaStreamDestroy", stream)
            user.close()

    @SCHEDULES
    def test_a_pipeline_on_two_streams_overlaps(self, plan: bytes, schedule: Any) -> None:
        milliseconds = {"H2D": 1.0, "execute": 2.0, "D2H": 0.1}
        with CudaBench(schedule, milliseconds=lambda name, amount: milliseconds.get(name, 0.0)) as bench:
            user = User(bench, plan)
            pipeline = Pipeline(user)
            batches = [batch_of(number) for number in range(6)]
            for images, logits in zip(batches, pipeline.run(batches), strict=True):
                np.testing.assert_allclose(logits, expected(images), rtol=1e-4, atol=1e-4)
            copies, executions, host = (
                [event for event in bench.trace if event.name == name] for name in ("H2D", "execute", "top-k")
            )
            for n in range(1, 5):
                assert copies[n + 1].overlaps(executions[n])
                assert host[n - 1].overlaps(executions[n])
            pipeline.close()
            user.close()

    def test_elapsed_time_is_that_of_the_work(self, plan: bytes) -> None:
        with CudaBench(milliseconds=lambda name, amount: amount * {"execute": 0.5}.get(name, 0.0)) as bench:
            user = User(bench, plan)
            user.infer(batch_of(0))
            first, second = (user.do("cudaEventCreate") for _ in range(2))
            user.do("cudaEventRecord", first, user.stream)
            assert user.context.execute_async_v3(user.stream)
            user.do("cudaEventRecord", second, user.stream)
            assert user.cuda.cudaEventElapsedTime(first, second) == (ERROR.cudaErrorNotReady, None)
            while user.cuda.cudaEventQuery(second)[0] == ERROR.cudaErrorNotReady:
                pass
            assert user.do("cudaEventElapsedTime", first, second) == pytest.approx(2.0, abs=0.01)
            for event in (first, second):
                user.do("cudaEventDestroy", event)
            user.close()

    def test_pageable_memory_is_read_at_once_and_filled_before_the_call_returns(self, plan: bytes) -> None:
        with CudaBench() as bench:
            user = User(bench, plan)
            kinds, images = user.cuda.cudaMemcpyKind, batch_of(1)
            user.do("cudaMemcpyAsync", user.images, images, images.nbytes, kinds.cudaMemcpyHostToDevice, user.stream)
            wanted = expected(images)
            images[:] = 0
            assert user.context.execute_async_v3(user.stream)
            logits = np.empty((MANY, 4), np.float32)
            kind = kinds.cudaMemcpyDeviceToHost
            user.do("cudaMemcpyAsync", logits.ctypes.data, user.logits, logits.nbytes, kind, user.stream)
            np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
            assert {event.name for event in bench.trace} == {"H2D pageable", "execute", "D2H pageable"}
            user.close()

    def test_one_context_and_graph_for_each_batch_size(self, plan: bytes) -> None:
        with CudaBench() as bench:
            user = User(bench, plan)
            user.host(user.source, (MANY, 3, 8, 8))[:] = batch_of(3)
            user.up()
            contexts = {size: user.context_for(size) for size in (1, 2, MANY)}
            graphs = {}
            for size, context in contexts.items():
                assert context.get_tensor_shape("logits") == (size, 4)
                assert context.execute_async_v3(user.stream)
                user.wait()
                graphs[size] = user.capture(partial(context.execute_async_v3, user.stream))
            for size, graph in graphs.items():
                user.do("cudaGraphLaunch", graph, user.stream)
                user.down(size)
                user.wait()
                result = user.host(user.result, (size, 4))
                np.testing.assert_allclose(result, expected(batch_of(3)[:size]), rtol=1e-4, atol=1e-4)
                user.do("cudaGraphExecDestroy", graph)
            contexts.clear()
            del context
            user.close()


class Pipeline:
    """Two sets of buffers: batch n + 1 is copied and batch n - 1 is read by the host while batch n is computed."""

    def __init__(self, user: User) -> None:
        self.user, do = user, user.do
        self.copying = do("cudaStreamCreateWithFlags", 1)
        self.sets = [(user.images, user.source, user.result, user.logits)]
        self.sets.append(
            (
                do("cudaMalloc", MANY * IMAGE),
                do("cudaHostAlloc", MANY * IMAGE, 0),
                do("cudaHostAlloc", MANY * LOGITS, 0),
                do("cudaMalloc", MANY * LOGITS),
            )
        )
        self.copied, self.read, self.done = ([do("cudaEventCreateWithFlags", 2) for _ in "01"] for _ in "012")
        self.order = True

    def up(self, n: int, images: Floats) -> None:
        user, (device, pinned, _, _) = self.user, self.sets[n % 2]
        user.do("cudaEventSynchronize", self.copied[n % 2])
        user.host(pinned, images.shape)[:] = images
        if self.order:
            user.do("cudaStreamWaitEvent", self.copying, self.read[n % 2], 0)
        kind = user.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        user.do("cudaMemcpyAsync", device, pinned, images.nbytes, kind, self.copying)
        user.do("cudaEventRecord", self.copied[n % 2], self.copying)

    def execute(self, n: int) -> None:
        user, (device, _, pinned, logits) = self.user, self.sets[n % 2]
        user.do("cudaStreamWaitEvent", user.stream, self.copied[n % 2], 0)
        user.context.set_tensor_address("images", device)
        user.context.set_tensor_address("logits", logits)
        assert user.context.execute_async_v3(user.stream)
        user.do("cudaEventRecord", self.read[n % 2], user.stream)
        kind = user.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        user.do("cudaMemcpyAsync", pinned, logits, MANY * LOGITS, kind, user.stream)
        user.do("cudaEventRecord", self.done[n % 2], user.stream)

    def collect(self, n: int) -> Floats:
        self.user.do("cudaEventSynchronize", self.done[n % 2])
        self.user.bench.host("top-k", 0.5)
        return self.user.host(self.sets[n % 2][2], (MANY, 4)).copy()

    def run(self, batches: list[Floats]) -> list[Floats]:
        results = []
        self.up(0, batches[0])
        for n in range(len(batches)):
            self.execute(n)
            if n + 1 < len(batches):
                self.up(n + 1, batches[n + 1])
            if n:
                results.append(self.collect(n - 1))
        results.append(self.collect(len(batches) - 1))
        return results

    def close(self) -> None:
        do = self.user.do
        do("cudaDeviceSynchronize")
        device, source, result, logits = self.sets[1]
        for name, value in (
            ("cudaFree", device),
            ("cudaFree", logits),
            ("cudaFreeHost", source),
            ("cudaFreeHost", result),
            *(("cudaEventDestroy", event) for event in self.copied + self.read + self.done),
            ("cudaStreamDestroy", self.copying),
        ):
            do(name, value)


def allocate_in_capture(user: User) -> None:
    user.capture(lambda: user.do("cudaMalloc", 64))


def wait_in_capture(user: User) -> None:
    user.capture(user.wait)


def copy_pageable_in_capture(user: User) -> None:
    images, kind = batch_of(0), user.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    user.capture(lambda: user.do("cudaMemcpyAsync", user.images, images.ctypes.data, images.nbytes, kind, user.stream))


def copy_synchronously_in_capture(user: User) -> None:
    images, kind = batch_of(0), user.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    user.capture(lambda: user.do("cudaMemcpy", user.images, images.ctypes.data, images.nbytes, kind))


def await_outer_work_in_capture(user: User) -> None:
    event = user.do("cudaEventCreateWithFlags", 2)
    user.do("cudaEventRecord", event, user.stream)
    user.capture(lambda: user.do("cudaStreamWaitEvent", user.stream, event, 0))


def capture_new_shapes(user: User) -> None:
    user.context.set_input_shape("images", (2, 3, 8, 8))
    user.capture(lambda: user.context.execute_async_v3(user.stream))


def change_context_of_graph(user: User) -> None:
    graph = user.capture(user.enqueue)
    user.context.set_input_shape("images", (2, 3, 8, 8))
    user.do("cudaGraphLaunch", graph, user.stream)
    user.wait()
    user.do("cudaGraphExecDestroy", graph)


def free_memory_of_graph(user: User) -> None:
    graph = user.capture(user.enqueue)
    user.do("cudaFree", user.images)
    user.do("cudaGraphLaunch", graph, user.stream)
    user.wait()


def use_freed_device_memory(user: User) -> None:
    user.do("cudaFree", user.images)
    user.up()


def use_freed_pinned_memory(user: User) -> None:
    user.do("cudaFreeHost", user.source)
    user.up()


def write_freed_pinned_memory(user: User) -> None:
    view = user.host(user.source, (MANY,))
    user.do("cudaFreeHost", user.source)
    view[:] = 1
    user.source = 0


def execute_on_freed_memory(user: User) -> None:
    user.do("cudaFree", user.logits)
    assert user.context.execute_async_v3(user.stream)
    user.wait()


def free_during_copy(user: User) -> None:
    user.up()
    user.do("cudaFreeHost", user.source)


def free_during_execution(user: User) -> None:
    user.enqueue()
    user.do("cudaFree", user.images)


def delete_context_during_execution(user: User) -> None:
    user.enqueue()
    user.context = None
    user.wait()


def destroy_stream_in_use(user: User) -> None:
    user.enqueue()
    user.do("cudaStreamDestroy", user.stream)


def destroy_graph_in_use(user: User) -> None:
    graph = user.capture(user.enqueue)
    user.do("cudaGraphLaunch", graph, user.stream)
    user.do("cudaGraphExecDestroy", graph)
    user.wait()


def destroy_event_in_use(user: User) -> None:
    event = user.do("cudaEventCreateWithFlags", 2)
    user.up()
    user.do("cudaEventRecord", event, user.stream)
    user.do("cudaEventDestroy", event)
    user.wait()


def refill_source_during_copy(user: User) -> None:
    user.up()
    user.host(user.source, (1,))[:] = 9
    user.wait()


def write_result_during_copy(user: User) -> None:
    user.down()
    user.host(user.result, (1,))[:] = 9
    user.wait()


def swap_pointers(user: User) -> None:
    kind = user.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    user.do("cudaMemcpyAsync", user.source, user.images, IMAGE, kind, user.stream)


def execute_on_host_memory(user: User) -> None:
    user.context.set_tensor_address("images", user.source)
    assert user.context.execute_async_v3(user.stream)
    user.wait()


def write_device_memory_from_host(user: User) -> None:
    user.host(user.images, (1,))[:] = 1


def free_pinned_as_device(user: User) -> None:
    user.do("cudaFree", user.source)


def copy_too_much(user: User) -> None:
    user.up(MANY + 1)


def copy_from_short_array(user: User) -> None:
    kind = user.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
    user.do("cudaMemcpyAsync", user.images, np.zeros(4, np.float32), IMAGE, kind, user.stream)


def execute_on_too_little(user: User) -> None:
    user.context.set_tensor_address("images", user.logits)
    assert user.context.execute_async_v3(user.stream)
    user.wait()


def write_beside_pinned_memory(user: User) -> None:
    user.host(user.result, (MANY + 1, 4))[:] = 1


def free_twice(user: User) -> None:
    user.do("cudaFree", user.images)
    user.do("cudaFree", user.images)


def free_pinned_twice(user: User) -> None:
    user.do("cudaFreeHost", user.source)
    user.do("cudaFreeHost", user.source)


def destroy_twice(user: User) -> None:
    user.do("cudaStreamDestroy", user.stream)
    user.do("cudaStreamDestroy", user.stream)


def go_on_after_a_crash(user: User) -> None:
    user.bench.fail("execute", ERROR.cudaErrorIllegalAddress)
    user.context.execute_async_v3(user.stream)
    error = user.cuda.cudaStreamSynchronize(user.stream)
    assert error == (ERROR.cudaErrorIllegalAddress,)
    assert user.cuda.cudaGetLastError() == error
    user.cuda.cudaMemcpyAsync(user.images, user.source, 4, user.cuda.cudaMemcpyKind(1), user.stream)


def read_what_nothing_wrote(user: User) -> None:
    images = user.do("cudaMalloc", MANY * IMAGE)
    user.context.set_tensor_address("images", images)
    user.context.execute_async_v3(user.stream)
    user.wait()
    user.do("cudaFree", images)


def execute_context_twice_at_once(user: User) -> None:
    stream, logits = user.do("cudaStreamCreateWithFlags", 1), user.do("cudaMalloc", MANY * LOGITS)
    user.context.execute_async_v3(user.stream)
    user.context.set_tensor_address("logits", logits)
    user.context.execute_async_v3(stream)


def copy_on_another_stream(user: User) -> None:
    stream = user.do("cudaStreamCreateWithFlags", 1)
    user.up(stream=stream)
    user.context.execute_async_v3(user.stream)


def misalign(user: User) -> None:
    user.context.set_tensor_address("logits", user.logits + 4)


def never_wait(user: User) -> None:
    user.enqueue()


FAULTS: list[tuple[Callable[[User], None], str]] = [
    (use_freed_device_memory, r"cudaMemcpyAsync: use after free: device memory 2 .*cudaErrorInvalidValue"),
    (use_freed_pinned_memory, r"cudaMemcpyAsync: use after free: pinned memory 4"),
    (write_freed_pinned_memory, r"use after free: the host wrote into pinned memory 4"),
    (execute_on_freed_memory, r"execute: use after free: device memory 3 .*cudaErrorIllegalAddress"),
    (free_memory_of_graph, r"use after free: H2D on Stream 1 uses device memory 2 .*cudaErrorIllegalAddress"),
    (free_during_copy, r"in use: pinned memory 4 .* is freed while H2D on Stream 1 may still use it"),
    (free_during_execution, r"in use: device memory 2 .* is freed while H2D on Stream 1 may still use it"),
    (delete_context_during_execution, r"in use: engine context 6 .* is freed while execute on Stream 1"),
    (destroy_stream_in_use, r"missing synchronization: .* D2H on Stream 1 when Stream 1 is destroyed"),
    (destroy_graph_in_use, r"in use: GraphExec \d is destroyed while graph on Stream 1 may still use it"),
    (destroy_event_in_use, r"in use: Event 2 is destroyed while record on Stream 1 may still use it"),
    (never_wait, r"(?s)in use: .*\nmissing synchronization: nothing has waited for D2H on Stream 1"),
    (allocate_in_capture, r"cudaMalloc: uncapturable: .*cudaErrorStreamCaptureUnsupported"),
    (wait_in_capture, r"cudaStreamSynchronize: uncapturable: .*cudaErrorStreamCaptureUnsupported"),
    (copy_pageable_in_capture, r"cudaMemcpyAsync: uncapturable: it copies pageable memory"),
    (copy_synchronously_in_capture, r"cudaMemcpy: uncapturable"),
    (await_outer_work_in_capture, r"cudaStreamWaitEvent: uncapturable: .*cudaErrorStreamCaptureIsolation"),
    (capture_new_shapes, r"execute_async_v3: uncapturable: .* first time since its shapes were set"),
    (change_context_of_graph, r"stale graph: it is launched after its execution context was changed"),
    (swap_pointers, r"cudaMemcpyAsync: wrong kind: device memory 2 .* is not host memory"),
    (execute_on_host_memory, r"execute: wrong kind: pinned memory 4 .* is not device memory"),
    (write_device_memory_from_host, r"wrong kind: the host wrote into device memory 2"),
    (free_pinned_as_device, r"cudaFree: wrong kind: pinned memory 4"),
    (copy_too_much, r"cudaMemcpyAsync: out of bounds: bytes 0 to 3840 of pinned memory 4 \(3072 bytes\)"),
    (copy_from_short_array, r"cudaMemcpyAsync: out of bounds: 768 bytes of a smaller array"),
    (execute_on_too_little, r"execute: out of bounds: bytes 0 to 3072 of device memory 3 .*cudaErrorIllegalAddress"),
    (write_beside_pinned_memory, r"out of bounds: the host wrote beside pinned memory 5"),
    (free_twice, r"cudaFree: double free: device memory 2"),
    (free_pinned_twice, r"cudaFreeHost: double free: pinned memory 4"),
    (destroy_twice, r"cudaStreamDestroy: use after free: no cudaStream_t with this handle"),
    (go_on_after_a_crash, r"sticky error: cudaMemcpyAsync after cudaErrorIllegalAddress"),
    (read_what_nothing_wrote, r"uninitialized: execute reads images"),
    (
        execute_context_twice_at_once,
        r"race: nothing orders execute on Stream 1 before execute on Stream 2, .*context 6",
    ),
    (copy_on_another_stream, r"race: nothing orders H2D on Stream 2 before execute on Stream 1, .* device memory 2"),
    (misalign, r"misaligned: the address of logits is not a multiple of 256"),
]
LATE_FAULTS: list[tuple[Callable[[User], None], str]] = [
    (refill_source_during_copy, r"reuse: the host wrote into bytes 0 to 3072 of pinned memory 4 .* H2D on Stream 1"),
    (write_result_during_copy, r"reuse: the host wrote into bytes 0 to 64 of pinned memory 5 .* while D2H on Stream 1"),
]
"""Found only while the copy is pending, which with the schedule `eager` it never is."""


class TestFaults:
    @pytest.mark.parametrize(
        ("schedule", "act", "message"),
        [(schedule, *fault) for schedule in ("late", "eager") for fault in FAULTS]
        + [("late", *fault) for fault in LATE_FAULTS],
    )
    def test_each_fails_the_test_and_is_named_first(
        self, plan: bytes, schedule: Any, act: Callable[[User], None], message: str
    ) -> None:
        bench = CudaBench(schedule)
        user = User(bench, plan)
        user.infer(batch_of(0))
        with suppress(RuntimeError):
            act(user)
        user.close()
        with pytest.raises(CudaFault) as caught:
            bench.close()
        assert re.match(message, str(caught.value)), str(caught.value)

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            ("cudaMalloc", (64,), r"device memory 7 \(64 bytes\) was never freed"),
            ("cudaHostAlloc", (64, 0), "pinned memory 7"),
            ("cudaMallocHost", (64,), "pinned memory 7"),
            ("cudaStreamCreate", (), "Stream 2 was never destroyed"),
            ("cudaEventCreate", (), "Event 2 was never destroyed"),
            ("cudaStreamBeginCapture", (0x5EED0010, 2), "a capture of Stream 1 was never ended"),
        ],
    )
    def test_a_leak(self, plan: bytes, name: str, arguments: tuple[int, ...], message: str) -> None:
        bench = CudaBench()
        user = User(bench, plan)
        user.do(name, *arguments)
        user.close()
        with pytest.raises(CudaFault, match=f"^leak: {message}"):
            bench.close()

    def test_a_graph_and_an_engine_that_leak(self, plan: bytes) -> None:
        kept: list[Any] = []
        bench = CudaBench()
        user = User(bench, plan)
        user.infer(batch_of(0))
        user.capture(user.enqueue)
        kept.append(user.context)
        user.close()
        with pytest.raises(CudaFault) as caught:
            bench.close()
        leaks = [line.split(" (")[0] for line in str(caught.value).splitlines()]
        assert leaks == ["leak: engine weights 1", "leak: engine context 6", "leak: GraphExec 3 was never destroyed"]

    def test_a_result_read_too_early_is_poison_never_that_of_the_batch_before(self, plan: bytes) -> None:
        with CudaBench() as bench:
            user = User(bench, plan)
            user.infer(batch_of(0))
            user.enqueue()
            early = user.host(user.result, (MANY, 4)).copy()
            assert np.isnan(early).all()
            with pytest.raises(CudaFault, match="missing synchronization: the result was read before the copy"):
                bench.check_result(early)
            user.wait()
            bench.check_result(user.host(user.result, (MANY, 4)))
            user.close()

    @SCHEDULES
    def test_a_pipeline_without_an_event_is_a_race_whatever_the_order_was(self, plan: bytes, schedule: Any) -> None:
        bench = CudaBench(schedule)
        user = User(bench, plan)
        pipeline = Pipeline(user)
        pipeline.order = False
        pipeline.run([batch_of(number) for number in range(4)])
        pipeline.close()
        user.close()
        with pytest.raises(CudaFault, match=r"^race: nothing orders execute on Stream 1 before H2D on Stream 2"):
            bench.close()

    def test_faults_are_noted_on_an_error_that_is_on_its_way(self, plan: bytes) -> None:
        def program() -> None:
            with CudaBench() as bench:
                copy_too_much(User(bench, plan))

        with pytest.raises(RuntimeError, match="cudaMemcpyAsync: cudaErrorInvalidValue") as caught:
            program()
        (note,) = caught.value.__notes__
        assert note.startswith("cudaMemcpyAsync: out of bounds")


class TestTwoDevices:
    """Each thread has a current device; what belongs to another cannot be used."""

    def test_a_thread_begins_on_the_first_and_keeps_its_own(self) -> None:
        with CudaBench(devices=2) as bench:
            cuda = bench.runtime
            assert cuda.cudaGetDeviceCount() == (ERROR.cudaSuccess, 2)
            assert cuda.cudaSetDevice(1) == (ERROR.cudaSuccess,)
            seen: list[Any] = []
            thread = threading.Thread(target=lambda: seen.append(cuda.cudaGetDevice()))
            thread.start()
            thread.join()
            assert [*seen, cuda.cudaGetDevice()] == [(ERROR.cudaSuccess, 0), (ERROR.cudaSuccess, 1)]

    def test_each_has_its_memory(self) -> None:
        with CudaBench(devices=2, memory=1000) as bench:
            cuda = bench.runtime
            (_, first) = cuda.cudaMalloc(600)
            assert cuda.cudaMalloc(600) == (ERROR.cudaErrorMemoryAllocation, None)
            cuda.cudaSetDevice(1)
            (error, second) = cuda.cudaMalloc(600)
            assert (error, cuda.cudaMemGetInfo()) == (ERROR.cudaSuccess, (ERROR.cudaSuccess, 400, 1000))
            assert [cuda.cudaFree(pointer) for pointer in (first, second)] == [(ERROR.cudaSuccess,)] * 2

    def test_a_program_on_the_second(self, plan: bytes) -> None:
        with CudaBench(devices=2) as bench:
            bench.runtime.cudaSetDevice(1)
            user = User(bench, plan)
            np.testing.assert_allclose(user.infer(batch_of(1)), expected(batch_of(1)), rtol=1e-4, atol=1e-4)
            user.close()

    @pytest.mark.parametrize(
        ("use", "fault"),
        [
            (lambda user, graph: user.up(), "cudaMemcpyAsync: wrong device: device memory"),
            (
                lambda user, graph: user.cuda.cudaMemsetAsync(user.images, 0, 4, user.stream),
                "cudaMemsetAsync: wrong device: device memory",
            ),
            (
                lambda user, graph: user.context.execute_async_v3(int(user.stream)),
                "wrong device: an engine of device 0 is executed, but 1 is current",
            ),
            (lambda user, graph: user.cuda.cudaGraphLaunch(graph, user.stream), "cudaGraphLaunch: wrong device"),
            (lambda user, graph: user.capture(user.enqueue), "cudaStreamBeginCapture: wrong device: Stream"),
            (
                lambda user, graph: user.cuda.cudaEventRecord(user.do("cudaEventCreate"), user.stream),
                "cudaEventRecord: wrong device: Stream",
            ),
        ],
    )
    def test_what_belongs_to_another_device(self, plan: bytes, use: Callable[[User, Any], object], fault: str) -> None:
        bench = CudaBench(devices=2)
        user = User(bench, plan)
        user.infer(batch_of(0))
        graph = user.capture(user.enqueue)
        bench.runtime.cudaSetDevice(1)
        with suppress(RuntimeError):
            use(user, graph)
        assert any(line.startswith(fault) for line in bench.faults), bench.faults

    def test_an_engine_of_a_runtime_of_another_device(self, plan: bytes) -> None:
        with CudaBench(devices=2) as bench:
            runtime = CudaTensorRT(VERSIONS[0], bench, (1, 2, MANY)).Runtime(Logger())
            bench.runtime.cudaSetDevice(1)
            runtime.deserialize_cuda_engine(plan)
            assert bench.faults == ["wrong device: an engine is loaded by a runtime of device 0, another is current"]
            bench.faults.clear()


def test_it_is_imported_in_place_of_the_real_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with CudaBench() as bench:
        bench.install(monkeypatch)
        module = importlib.import_module("cuda.bindings.runtime")
        assert module.cudaGetDeviceCount() == (ERROR.cudaSuccess, 1)
        assert module.cudaGetErrorName(ERROR.cudaErrorNotReady) == (ERROR.cudaSuccess, b"cudaErrorNotReady")
        assert not hasattr(module, "faults")


@pytest.mark.parametrize("mode", range(3))
def test_what_another_thread_may_do_during_a_capture(mode: int) -> None:
    with CudaBench() as bench:
        cuda, pointers = bench.runtime, []
        (_, stream) = cuda.cudaStreamCreateWithFlags(1)
        cuda.cudaStreamBeginCapture(stream, cuda.cudaStreamCaptureMode(mode))
        thread = threading.Thread(target=lambda: pointers.append(cuda.cudaMalloc(64)))
        thread.start()
        thread.join()
        active = cuda.cudaStreamIsCapturing(stream)[1]
        ((error, pointer),) = pointers
        if mode == 0:
            assert (error, active) == (ERROR.cudaErrorStreamCaptureUnsupported, 2)
            assert cuda.cudaStreamEndCapture(stream) == (ERROR.cudaErrorStreamCaptureInvalidated, None)
            assert len(bench.faults) == 1
            bench.faults.clear()
        else:
            assert (error, active) == (ERROR.cudaSuccess, 1)
            assert cuda.cudaGraphDestroy(cuda.cudaStreamEndCapture(stream)[1]) == (ERROR.cudaSuccess,)
            cuda.cudaFree(pointer)
        cuda.cudaStreamDestroy(stream)


class TestErrorsOnDemand:
    def test_a_call_that_fails_once(self, plan: bytes) -> None:
        with CudaBench() as bench:
            user = User(bench, plan)
            bench.fail("cudaMalloc", ERROR.cudaErrorMemoryAllocation, call=2)
            pointer = user.do("cudaMalloc", 64)
            assert user.cuda.cudaMalloc(64) == (ERROR.cudaErrorMemoryAllocation, None)
            assert user.cuda.cudaPeekAtLastError() == (ERROR.cudaErrorMemoryAllocation,)
            assert user.cuda.cudaGetLastError() == (ERROR.cudaErrorMemoryAllocation,)
            assert user.cuda.cudaGetLastError() == (ERROR.cudaSuccess,)
            user.do("cudaFree", pointer)
            user.infer(batch_of(0))
            user.close()

    def test_the_last_error_is_of_one_thread_and_outlives_calls_that_succeed(self) -> None:
        with CudaBench() as bench:
            cuda, seen = bench.runtime, []
            bench.fail("cudaMalloc", ERROR.cudaErrorMemoryAllocation)
            cuda.cudaMalloc(64)
            cuda.cudaSetDevice(0)
            thread = threading.Thread(target=lambda: seen.append(cuda.cudaGetLastError()))
            thread.start()
            thread.join()
            assert [*seen, cuda.cudaGetLastError()] == [(ERROR.cudaSuccess,), (ERROR.cudaErrorMemoryAllocation,)]

    def test_memory_runs_out(self, plan: bytes) -> None:
        with CudaBench(memory=20_000) as bench:
            user = User(bench, plan)
            free, total = user.cuda.cudaMemGetInfo()[1:]
            assert total - free == len(plan) + MANY * (IMAGE + LOGITS) + 1024
            assert user.cuda.cudaMalloc(free + 1) == (ERROR.cudaErrorMemoryAllocation, None)
            contexts = []
            while context := user.engine.create_execution_context():
                contexts.append(context)
            assert len(contexts) == free // 1024
            assert "does not fit in memory" in user.logger.lines[-1]
            contexts.clear()
            user.close()

    @SCHEDULES
    def test_a_crash_of_the_gpu_is_for_ever_and_may_still_be_cleaned_up(self, plan: bytes, schedule: Any) -> None:
        with CudaBench(schedule) as bench:
            user = User(bench, plan)
            bench.fail("execute", ERROR.cudaErrorIllegalAddress, call=2)
            user.infer(batch_of(0))
            user.up()
            user.context.execute_async_v3(user.stream)
            for _ in range(2):
                assert user.cuda.cudaStreamSynchronize(user.stream) == (ERROR.cudaErrorIllegalAddress,)
            assert user.cuda.cudaMemGetInfo() == (ERROR.cudaErrorIllegalAddress, None, None)
            assert user.cuda.cudaFree(user.images) == (ERROR.cudaErrorIllegalAddress,)
            user.close()

    def test_an_old_driver(self, plan: bytes, capsys: pytest.CaptureFixture[str]) -> None:
        with CudaBench() as bench:
            bench.break_device(ERROR.cudaErrorInsufficientDriver)
            assert bench.runtime.cudaGetDeviceCount() == (ERROR.cudaErrorInsufficientDriver, None)
            assert bench.runtime.cudaDriverGetVersion() == (ERROR.cudaSuccess, 12040)
            trt, logger = CudaTensorRT(VERSIONS[0], bench, (1, 2, 4), fail="driver", prints=True), Logger()
            for constructor in (trt.Runtime, trt.Builder):
                with pytest.raises(TypeError, match="factory function returned nullptr"):
                    constructor(logger)
            assert logger.lines == ["CUDA initialization failure with error: 35"] * 2
            assert capsys.readouterr().out == "[TRT] [E] CUDA initialization failure with error: 35\n" * 2


class TestEngines:
    @pytest.mark.parametrize("version", VERSIONS)
    def test_objects_have_the_members_of_the_version(self, plan: bytes, version: str) -> None:
        with CudaBench() as bench:
            user = User(bench, plan, version)
            assert [user.engine.get_tensor_name(index) for index in range(user.engine.num_io_tensors)] == [
                "images",
                "logits",
            ]
            shapes = user.engine.get_tensor_profile_shape("images", 0)
            assert shapes == [(1, 3, 8, 8), (2, 3, 8, 8), (MANY, 3, 8, 8)]
            assert user.engine.get_tensor_shape("logits") == (-1, 4)
            assert user.engine.device_memory_size_v2 == 1024
            old = version.startswith("tensorrt-10")
            assert hasattr(user.engine, "device_memory_size") == old
            assert hasattr(user.engine, "create_execution_context_without_device_memory") == old
            assert hasattr(user.context, "is_stream_capturable") == version.startswith("tensorrt_rtx")
            assert not hasattr(user.context, "set_binding_shape")
            user.close()

    @pytest.mark.parametrize("version", VERSIONS)
    def test_a_context_on_memory_of_the_program(self, plan: bytes, version: str) -> None:
        with CudaBench() as bench:
            user = User(bench, plan, version)
            config = user.engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(
                CudaTensorRT(version, bench, (1, 2, 4)).ExecutionContextAllocationStrategy.USER_MANAGED
            )
            user.context = user.engine.create_execution_context(config)
            user.context.set_input_shape("images", (MANY, 3, 8, 8))
            user.context.set_tensor_address("images", user.images)
            assert not user.context.execute_async_v3(user.stream)
            assert user.logger.lines[-1].endswith("not set: logits")
            user.context.set_tensor_address("logits", user.logits)
            assert not user.context.execute_async_v3(user.stream)
            assert user.logger.lines[-1].endswith("not set: device memory")
            scratch = user.do("cudaMalloc", user.engine.device_memory_size_v2)
            user.context.set_device_memory(scratch, user.engine.device_memory_size_v2)
            images = batch_of(5)
            np.testing.assert_allclose(user.infer(images), expected(images), rtol=1e-4, atol=1e-4)
            user.do("cudaFree", scratch)
            user.close()

    def test_what_is_refused_returns_false_and_is_logged(self, plan: bytes) -> None:
        with CudaBench() as bench:
            user = User(bench, plan)
            for size in (0, MANY + 1):
                assert not user.context.set_input_shape("images", (size, 3, 8, 8))
            assert not user.context.set_input_shape("images", (2, 3, 8, 9))
            assert not user.context.set_input_shape("logits", (2, 4))
            assert not user.context.set_tensor_address("pixels", user.images)
            assert len(user.logger.lines) == 5
            with pytest.raises(TypeError):
                user.context.set_tensor_address("images", None)
            user.close()

    @pytest.mark.parametrize("version", VERSIONS)
    def test_tensorrt_rtx_has_no_kernels_for_hopper(self, plan: bytes, version: str) -> None:
        with CudaBench() as bench:
            logger = Logger()
            runtime = CudaTensorRT(version, bench, (1, 2, 4), architecture="sm90").Runtime(logger)
            engine = runtime.deserialize_cuda_engine(plan)
            if version.startswith("tensorrt-"):
                assert engine is not None
                del engine
                return
            assert engine is None
            assert "which has compute capability 9.0. Supported compute capabilities: 8.0" in logger.lines[-1]
            validity, reason = runtime.get_engine_validity(plan)
            assert (validity.name, reason) == ("INVALID", 2)

    def test_a_version_compatible_plan_needs_permission(self, plan: bytes) -> None:
        with CudaBench() as bench:
            trt = CudaTensorRT(VERSIONS[0], bench, (1, 2, 4), version_compatible=True)
            runtime = trt.Runtime(Logger())
            assert runtime.deserialize_cuda_engine(plan) is None
            runtime.engine_host_code_allowed = True
            assert runtime.deserialize_cuda_engine(plan) is not None


FUNCTIONS = [name for name in vars(CudaBench) if name.startswith("cuda")]


class TestAgainstTheRealPackage:
    """What the fake says is what cuda-bindings says; without a driver, down to the answer of each call."""

    @pytest.fixture
    def real(self) -> Any:
        return pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")

    def test_names_values_and_texts(self, real: Any) -> None:
        for kind in ENUMS:
            theirs = getattr(real, kind.__name__)
            assert {member.name: member.value for member in kind}.items() <= {m.name: m.value for m in theirs}.items()
        for error in cudaError_t:
            assert real.cudaGetErrorString(real.cudaError_t(error))[1].decode() == error.text
        for name, value in CONSTANTS.items():
            assert getattr(real, name) == value

    def test_arguments(self, real: Any) -> None:
        for name in FUNCTIONS:
            line = getattr(real, name).__doc__.splitlines()[0].replace(" not None ", "")
            theirs = [part.split(":")[0].split()[-1] for part in re.findall(r"[^(),]+", line)[1:]]
            assert [*inspect.signature(getattr(CudaBench, name)).parameters][1:] == theirs, line

    def test_answers_without_a_driver(self, real: Any) -> None:
        if real.cudaDriverGetVersion()[1]:
            pytest.skip("there is a driver")
        fake = CudaBench()
        fake.break_device(ERROR.cudaErrorInsufficientDriver)
        fake.driver_version = 0
        for name in FUNCTIONS:
            count = len(inspect.signature(getattr(CudaBench, name)).parameters) - 1
            arguments = [real.cudaError_t(1) if "GetError" in name else 0] * count
            theirs = getattr(real, name)(*arguments)
            assert getattr(fake.runtime, name)(*arguments)[1:] == theirs[1:] or name == "cudaRuntimeGetVersion"
            assert getattr(fake.runtime, name)(*arguments)[0] == theirs[0], name
