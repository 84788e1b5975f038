"""The clock of a GPU, which NVML tells."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.runners.base import Closing


class GpuClock(Closing):
    """The SM clock of one GPU, found by its UUID, because NVML and CUDA number GPUs differently.

    NVML tells nothing without nvidia-ml-py, to containers and users that may not ask, and of many virtual GPUs; the
    clocks are then None, and no error.

    Args:
        gpu: the GPU; for a MIG instance, the clock is that of the whole GPU. None for the CPU.
    """

    def __init__(self, gpu: GpuDevice | None) -> None:
        self._stack = ExitStack()
        self._nvml: Any = None
        self._handle: Any = None
        if gpu is not None and gpu.uuid and find_spec("pynvml") is not None:
            import pynvml

            self._nvml = pynvml
            self._handle = self._ask(self._find, gpu.uuid)

    def now(self) -> int | None:
        """In MHz."""
        return self._read("nvmlDeviceGetClockInfo")

    def most(self) -> int | None:
        """The highest that the GPU can have, in MHz."""
        return self._read("nvmlDeviceGetMaxClockInfo")

    def close(self) -> None:
        self._handle = None
        if self._nvml is not None:
            self._ask(self._stack.close)

    def _find(self, uuid: str) -> Any:
        self._nvml.nvmlInit()
        self._stack.callback(self._nvml.nvmlShutdown)
        handle = self._nvml.nvmlDeviceGetHandleByUUID(uuid)
        return self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if uuid.startswith("MIG-") else handle

    def _read(self, function: str) -> int | None:
        if self._handle is None:
            return None
        clock: int | None = self._ask(getattr(self._nvml, function), self._handle, self._nvml.NVML_CLOCK_SM)
        return clock

    def _ask(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except self._nvml.NVMLError:
            return None
