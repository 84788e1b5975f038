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
    """NVIDIA's driver library with some GPUs of compute capability 8.9."""

    def __init__(self, *, gpus: int = 1, start: int = 0) -> None:
        self._gpus = gpus
        self._start = start

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._start

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._gpus
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: int) -> int:  # noqa: N802
        name.value = b"NVIDIA L4"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12080
        return 0


class TestFindingAGpu:
    def test_describes_the_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
        assert find_gpu() == GpuDevice(name="NVIDIA L4", architecture="sm89", driver=12080)

    @pytest.mark.parametrize("driver", [Driver(gpus=0), Driver(start=100)], ids=["no GPU", "does not start"])
    def test_a_driver_without_a_gpu(self, driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
        assert find_gpu() is None

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> None:
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", absent)
        assert find_gpu() is None
