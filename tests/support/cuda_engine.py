"""Engines that ONNX Runtime computes, in the memory and streams of the fake CUDA runtime.

The objects have exactly the members of a real binding (see `tensorrt_binding`). Contexts are as strict as TensorRT's
documents: one execution at a time, an execution outside a capture after each change of shapes, and no replay of a graph
whose context was changed after the capture. Device memory of engines and contexts counts, and is freed with them.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from tests.support.cuda_gpu import ALIGNMENT, Memory, Refusal, Span, Work
from tests.support.cuda_runtime import CudaBench
from tests.support.tensorrt_binding import FakeTensorRT, Strict

_DTYPES = {
    "tensor(float)": ("FLOAT", np.float32),
    "tensor(float16)": ("HALF", np.float16),
    "tensor(uint8)": ("UINT8", np.uint8),
    "tensor(int64)": ("INT64", np.int64),
}
RTX_ARCHITECTURES = ("sm80", "sm86", "sm89", "sm120")
UNKNOWN_GPU = (
    "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine cannot run on this GPU, which has "
    "compute capability {digits}. Supported compute capabilities: 8.0 8.6 8.9 12.0. TensorRT-RTX does not support "
    "this compute capability, so the engine cannot be rebuilt for it. In throwUnlessSupported"
)
"""What TensorRT-RTX 1.7.1 says on an H100."""
_VALUES = {"TensorIOMode": ["NONE", "INPUT", "OUTPUT"]}
_VALUES["ExecutionContextAllocationStrategy"] = ["STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED"]


class Tensor(NamedTuple):
    """An input or output; dimensions that the profile gives are -1."""

    name: str
    is_input: bool
    shape: tuple[int, ...]
    type: str
    dtype: Any

    def shape_of(self, batch: int) -> tuple[int, ...]:
        return tuple(batch if size < 0 else size for size in self.shape)


class CudaTensorRT(FakeTensorRT):
    """The module of a version. A plan is the bytes of an ONNX file.

    Args:
        version: one of `tensorrt_binding.VERSIONS`.
        bench: where engines run.
        profile: the smallest, best and largest batch.
        fail: `driver`: constructors raise, as on a driver that is too old; `load`: the engine is None; `context`: the
            context is None, as when it does not fit in memory.
        prints: also write log lines to standard output.
        workspace: bytes that each execution context needs.
        version_compatible: whether the plan carries code of its own, which the runtime must allow.
        architecture: of the GPU, for which TensorRT-RTX needs kernels: a plan is then refused by any other than sm80,
            sm86, sm89 and sm120.
    """

    def __init__(
        self,
        version: str,
        bench: CudaBench,
        profile: tuple[int, int, int],
        *,
        fail: str = "",
        prints: bool = False,
        workspace: int = 1024,
        version_compatible: bool = False,
        architecture: str = "sm89",
    ) -> None:
        super().__init__(version, fail=fail)
        self.bench, self.profile, self.prints, self.workspace = bench, profile, prints, workspace
        self.version_compatible, self.architecture = version_compatible, architecture
        vars(self)["_enumeration"] = cache(self._make_enumeration)

    def _make_enumeration(self, name: str) -> Any:
        return IntEnum(name, _VALUES.get(name, self.names[name]), start=0)

    def report(self, text: str) -> None:
        """Log an error, as TensorRT does where it returns None or False."""
        if self.prints:
            sys.stdout.write(f"[TRT] [E] {text}\n")
        self.logger.log(1, text)

    def make_nptype(self) -> Callable[[Any], Any]:
        return lambda dtype: next(numpy for name, numpy in _DTYPES.values() if name == dtype.name)

    def make_Builder(self) -> Any:  # noqa: N802
        return partial(self._construct, super().make_Builder())

    def make_Runtime(self) -> Any:  # noqa: N802
        return partial(self._construct, self._runtime)

    def _construct(self, constructor: Callable[[Any], Any], logger: Any) -> Any:
        self.logger = logger
        if self.fail == "driver":
            self.report("CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return constructor(logger)

    def _runtime(self, logger: Any) -> Strict:
        runtime = self._object("Runtime", engine_host_code_allowed=False, logger=logger)
        itself, device = weakref.ref(runtime), self.bench.device
        behaviour = runtime.__dict__["_behaviour"]
        behaviour["deserialize_cuda_engine"] = lambda plan: self._load(itself(), plan, device)
        if "get_engine_validity" in self.names["Runtime"]:
            valid = self.EngineValidity
            behaviour["get_engine_validity"] = lambda plan: (valid.INVALID, 2) if self._foreign else (valid.VALID, 0)
        return runtime

    @property
    def _foreign(self) -> bool:
        """Whether TensorRT-RTX has no kernels for the GPU."""
        return "get_engine_validity" in self.names["Runtime"] and self.architecture not in RTX_ARCHITECTURES

    def _load(self, runtime: Any, plan: bytes, device: int) -> Strict | None:
        if device != self.bench.device:
            self.bench.fault(f"wrong device: an engine is loaded by a runtime of device {device}, another is current")
        if self._foreign:
            self.report(UNKNOWN_GPU.format(digits=".".join(self.architecture[2:])))
            return None
        if self.fail == "load" or (self.version_compatible and not runtime.engine_host_code_allowed):
            self.report("IRuntime::deserializeCudaEngine: the plan cannot be deserialized here")
            return None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(bytes(plan), options, providers=["CPUExecutionProvider"])
        memory = self.reserve("engine weights", len(plan))
        return None if memory is None else self.owned("ICudaEngine", Engine(self, session), memory)

    def reserve(self, label: str, size: int) -> Memory | None:
        try:
            return self.bench.reserve(label, size)
        except Refusal:
            self.report(f"[defaultAllocator.cpp::allocate] CUDA out of memory: {size} bytes")
            return None

    def owned(self, name: str, item: Any, memory: Memory | None, **more: Any) -> Strict:
        """The object of the binding for an item; when it is deleted, its memory is freed."""
        members = {member: getattr(item, member) for member in dir(item) if not member.startswith("_")}
        made = self._object(name, **members, **more)
        item._itself = weakref.ref(made)
        if memory is not None:
            weakref.finalize(made, self.bench.release, memory).atexit = False
        return made


class Engine:
    """The members of ICudaEngine."""

    num_optimization_profiles = 1
    num_layers = 1
    _itself: Callable[[], Strict | None]

    def __init__(self, binding: CudaTensorRT, session: Any) -> None:
        self._binding, self._session, self._device = binding, session, binding.bench.device
        self._tensors: dict[str, Tensor] = {}
        for is_input, values in ((True, session.get_inputs()), (False, session.get_outputs())):
            for value in values:
                shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
                self._tensors[value.name] = Tensor(value.name, is_input, shape, *_DTYPES[value.type])
        self.num_io_tensors = len(self._tensors)
        self.device_memory_size = self.device_memory_size_v2 = binding.workspace

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        mode = self._binding.TensorIOMode
        return mode.NONE if name not in self._tensors else mode.INPUT if self._tensors[name].is_input else mode.OUTPUT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def get_tensor_dtype(self, name: str) -> Any:
        return self._binding.DataType[self._tensors[name].type]

    def get_tensor_location(self, name: str) -> Any:
        return self._binding.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        return [self._tensors[name].shape_of(batch) for batch in self._binding.profile]

    def create_runtime_config(self) -> Any:
        binding = self._binding
        config = binding._runtime_config() if "IRuntimeCache" in binding.names else binding._object("IRuntimeConfig")
        behaviour = config.__dict__["_behaviour"]
        behaviour["set_execution_context_allocation_strategy"] = partial(behaviour.__setitem__, "_strategy")
        return config

    def create_execution_context(self, strategy: Any = None) -> Strict | None:
        if isinstance(strategy, Strict):
            strategy = strategy.__dict__["_behaviour"].get("_strategy")
        binding, memory = self._binding, None
        if not strategy or strategy.name != "USER_MANAGED":
            memory = None if binding.fail == "context" else binding.reserve("engine context", binding.workspace)
            if memory is None:
                binding.report("IExecutionContext::IExecutionContext: the context does not fit in memory")
                return None
        scratch = None if memory is None else Span(memory, 0, memory.size)
        context = Context(binding, self._session, self._tensors, scratch, self._device)
        return binding.owned("IExecutionContext", context, memory, engine=self._itself())  # which keeps it alive

    def create_execution_context_without_device_memory(self) -> Strict | None:
        return self.create_execution_context(self._binding.ExecutionContextAllocationStrategy.USER_MANAGED)


class Context:
    """The members of IExecutionContext."""

    def __init__(
        self, binding: CudaTensorRT, session: Any, tensors: dict[str, Tensor], scratch: Span | None, device: int
    ) -> None:
        self._device = device
        self._binding, self._session, self._tensors, self._scratch = binding, session, tensors, scratch
        self._addresses: dict[str, int] = {}
        self._batches = {t.name: t.shape[0] if min(t.shape) >= 0 else -1 for t in tensors.values() if t.is_input}
        self._changes = 0
        self._flushed = min(self._batches.values()) >= 0

    def _refused(self, text: str) -> bool:
        self._binding.report(text)
        return False

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        tensor, batch = self._tensors.get(name), next(iter(shape), 0)
        if tensor is None or not tensor.is_input or tensor.shape_of(batch) != tuple(shape):
            return self._refused(f"IExecutionContext::setInputShape: {name} cannot have the shape {tuple(shape)}")
        low, _, high = self._binding.profile
        if not low <= batch <= high:
            return self._refused(f"IExecutionContext::setInputShape: {name}: {batch} is outside the profile")
        if self._batches[name] != batch:
            self._batches[name] = batch
            self._changes += 1
            self._flushed = False
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        address = operator.index(memory)
        if name not in self._tensors:
            return self._refused(f"IExecutionContext::setTensorAddress: there is no tensor {name}")
        if address % ALIGNMENT:
            self._binding.bench.fault(f"misaligned: the address of {name} is not a multiple of {ALIGNMENT}")
        self._changes += self._addresses.get(name) != address
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape_of(max(self._batches.values()))

    def infer_shapes(self) -> list[str]:
        return [name for name, batch in self._batches.items() if batch < 0]

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if profile_index:
            self._refused(f"IExecutionContext::setOptimizationProfileAsync: there is no profile {profile_index}")
            raise RuntimeError("Error in set optimization profile async.")
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = self._binding.bench.span(memory, size, "device")
        self._changes += 1
        if size < self._binding.workspace:
            self._binding.bench.fault(f"out of bounds: the context needs {self._binding.workspace} bytes, not {size}")

    def is_stream_capturable(self, stream_handle: int) -> bool:
        return self._flushed

    def execute_async_v3(self, stream_handle: int) -> bool:
        missing = self.infer_shapes() + [name for name in self._tensors if not self._addresses.get(name)]
        if missing or self._scratch is None:
            return self._refused(f"IExecutionContext::enqueueV3: not set: {', '.join(missing) or 'device memory'}")
        bench = self._binding.bench
        if self._device != bench.device:
            bench.fault(f"wrong device: an engine of device {self._device} is executed, but {bench.device} is current")
        error = bench.submit(stream_handle, capturable=self._flushed, work=self._work)
        if error:
            return self._refused(f"IExecutionContext::enqueueV3: Cuda Runtime ({error.text})")
        self._flushed = True
        return True

    def _work(self) -> Work:
        bench, session, changes, scratch = self._binding.bench, self._session, self._changes, self._scratch
        batch = max(self._batches.values())
        spans, shapes = {}, {}
        for name, tensor in self._tensors.items():
            shapes[name] = tensor.shape_of(batch)
            size = prod(shapes[name]) * np.dtype(tensor.dtype).itemsize
            spans[name] = bench.span(self._addresses[name], size, "device")
        inputs = {name: span for name, span in spans.items() if self._tensors[name].is_input}
        outputs = {name: span for name, span in spans.items() if name not in inputs}

        def run() -> None:
            for name, span in inputs.items():
                if not span.memory.written[span.start : span.stop].all():
                    bench.fault(f"uninitialized: execute reads {name}, of which nothing has written {span}")
            feeds = {name: span.view.view(self._tensors[name].dtype) for name, span in inputs.items()}
            feeds = {name: values.reshape(shapes[name]) for name, values in feeds.items()}
            results: list[NDArray[Any]] = session.run(list(outputs), feeds)
            for span, values in zip(outputs.values(), results, strict=True):
                span.view[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

        def replayed() -> None:
            if self._changes != changes:
                bench.fault("stale graph: it is launched after its execution context was changed")

        assert scratch is not None
        return Work("execute", batch, run, list(inputs.values()), [*outputs.values(), scratch], replayed)
