from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from smlp_deploy import dependencies
from smlp_deploy.dependencies import GpuDevice, find_gpu, installed_version, require, require_onnxruntime
from smlp_deploy.errors import MissingDependencyError


def test_what_is_installed_passes() -> None:
    require("json", purpose="to test", extra="none")
    require_onnxruntime()


def test_what_is_missing_is_named_with_the_extra() -> None:
    with pytest.raises(
        MissingDependencyError, match=r'no_such_module not installed, needed to export.*"smlp-deploy\[export\]"'
    ):
        require("json", "no_such_module", purpose="to export", extra="export")


def test_no_onnxruntime_names_both_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'"smlp-deploy\[cpu\]" or "smlp-deploy\[gpu\]"'):
        require_onnxruntime()


def test_two_onnxruntimes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"both installed.*pip uninstall -y onnxruntime onnxruntime-gpu"):
        require_onnxruntime()


def test_versions() -> None:
    assert installed_version("numpy")
    assert installed_version("no-such-distribution") is None


class Driver:
    """NVIDIA's driver library with one GPU, of compute capability 8.9.

    Args:
        failing: the function that fails, if any.
        status: what it returns then.
    """

    def __init__(self, *, failing: str = "", status: int = 0) -> None:
        self._failing = failing
        self._status = status
        self._started = False

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self._failing:
                return self._status
            if name != "cuInit" and not self._started:
                return 3  # CUDA_ERROR_NOT_INITIALIZED
            answer: int = getattr(self, f"_{name}")(*arguments)
            return answer

        return call

    def _cuInit(self, flags: int) -> int:  # noqa: N802
        self._started = True
        return 0

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 7
        return 0 if ordinal == 0 else 101  # CUDA_ERROR_INVALID_DEVICE

    def _cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        assert device.value == 7
        name.value = b"NVIDIA L4"
        return 0

    def _cuDeviceGetPCIBusId(self, pci_bus_id: Any, length: int, device: Any) -> int:  # noqa: N802
        assert device.value == 7
        pci_bus_id.value = b"0000:3B:00.0"
        return 0

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        assert device.value == 7
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def _cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12080
        return 0


class TestFindingAGpu:
    def test_describes_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
        assert find_gpu() == GpuDevice(name="NVIDIA L4", architecture="sm89", driver=12080, pci_bus_id="0000:3B:00.0")

    @pytest.mark.parametrize(
        ("failing", "status"),
        [
            ("cuInit", 100),  # CUDA_ERROR_NO_DEVICE: no GPU, or CUDA_VISIBLE_DEVICES hides all of them
            ("cuInit", 34),  # CUDA_ERROR_STUB_LIBRARY: the toolkit's library for linking was loaded
            ("cuInit", 803),  # CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: library and kernel module differ
            ("cuDeviceGet", 101),  # CUDA_ERROR_INVALID_DEVICE
            ("cuDeviceGetName", 101),
            ("cuDeviceGetPCIBusId", 101),
            ("cuDeviceGetAttribute", 101),
            ("cuDriverGetVersion", 1),
        ],
    )
    def test_a_driver_that_fails_has_none(self, failing: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(failing=failing, status=status))
        assert find_gpu() is None

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> None:
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", absent)
        assert find_gpu() is None
