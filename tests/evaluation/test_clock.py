from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, cast

import pynvml
import pytest

from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.evaluation import clock as module
from smlp_deploy.evaluation.clock import GpuClock

UUID = "GPU-3f2a0000-0000-0000-0000-000000000001"
INSTANCE = "MIG-3f2b0000-0000-0000-0000-000000000002"
L4 = GpuDevice(name="NVIDIA L4", architecture="sm89", driver=12080, uuid=UUID)


class Nvml:
    """NVIDIA's management library, below the real pynvml; knows one GPU and a MIG instance of it.

    Args:
        failing: the function that fails, if any.
        status: what it returns then.
    """

    def __init__(self, *, failing: str = "", status: int = 0) -> None:
        self._failing = failing
        self._status = status
        self.users = 0
        self.clock = 1980

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if name == self._failing:
                return self._status
            if not self.users and name != "nvmlInitWithFlags":
                return 1  # NVML_ERROR_UNINITIALIZED
            answer: int = getattr(self, f"_{name}")(*arguments)
            return answer

        return call

    def _nvmlInitWithFlags(self, flags: int) -> int:  # noqa: N802
        self.users += 1
        return 0

    def _nvmlShutdown(self) -> int:  # noqa: N802
        self.users -= 1
        return 0

    def _nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:  # noqa: N802
        if uuid.value not in (UUID.encode(), INSTANCE.encode()):
            return 6  # NVML_ERROR_NOT_FOUND
        handle._obj.contents = pynvml.struct_c_nvmlDevice_t()
        self.handle = uuid.value
        return 0

    def _nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance: Any, handle: Any) -> int:  # noqa: N802
        assert self.handle == INSTANCE.encode()
        handle._obj.contents = pynvml.struct_c_nvmlDevice_t()
        self.handle = UUID.encode()
        return 0

    def _nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, clock: Any) -> int:  # noqa: N802
        assert (bool(handle), kind.value) == (True, pynvml.NVML_CLOCK_SM)
        if self.handle != UUID.encode():
            return 3  # NVML_ERROR_NOT_SUPPORTED, for a MIG instance
        clock._obj.value = self.clock
        return 0

    def _nvmlDeviceGetMaxClockInfo(self, handle: Any, kind: Any, clock: Any) -> int:  # noqa: N802
        assert (bool(handle), kind.value) == (True, pynvml.NVML_CLOCK_SM)
        clock._obj.value = 2040
        return 0


def load(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlLib", nvml)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})


def test_it_is_that_of_the_gpu_with_this_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    load(nvml, monkeypatch)
    with GpuClock(L4) as clock:
        assert (clock.now(), clock.most()) == (1980, 2040)
        nvml.clock = 210
        assert clock.now() == 210
        assert nvml.users == 1
    assert nvml.users == 0
    assert clock.now() is None


def test_a_mig_instance_has_that_of_the_whole_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    load(Nvml(), monkeypatch)
    with GpuClock(replace(L4, uuid=INSTANCE)) as clock:
        assert clock.now() == 1980


@pytest.mark.parametrize("gpu", [None, replace(L4, uuid=""), replace(L4, uuid="GPU-another")])
def test_there_is_none_without_a_gpu_that_nvml_knows(gpu: GpuDevice | None, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    load(nvml, monkeypatch)
    with GpuClock(gpu) as clock:
        assert (clock.now(), clock.most()) == (None, None)
    assert nvml.users == 0


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ("nvmlInitWithFlags", "DriverNotLoaded"),
        ("nvmlInitWithFlags", "LibRmVersionMismatch"),
        ("nvmlDeviceGetHandleByUUID", "NoPermission"),
        ("nvmlDeviceGetClockInfo", "NotSupported"),  # a virtual GPU
        ("nvmlDeviceGetClockInfo", "GpuIsLost"),
        ("nvmlShutdown", "Unknown"),
    ],
)
def test_it_is_left_out_where_nvml_fails(failing: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml(failing=failing, status=getattr(pynvml, f"NVMLError_{error}")().value)
    load(nvml, monkeypatch)
    with GpuClock(L4) as clock:
        assert clock.now() == (1980 if failing == "nvmlShutdown" else None)
    assert nvml.users == (failing == "nvmlShutdown")


def test_it_is_left_out_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    load(cast(Nvml, None), monkeypatch)
    monkeypatch.setattr(pynvml, "CDLL", absent)
    with pytest.raises(pynvml.NVMLError_LibraryNotFound):
        pynvml.nvmlInit()
    with GpuClock(L4) as clock:
        assert clock.now() is None


def test_it_is_left_out_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with GpuClock(L4) as clock:
        assert clock.now() is None
