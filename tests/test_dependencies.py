from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from smlp_deploy import dependencies
from smlp_deploy.dependencies import (
    GpuDevice,
    find_gpu,
    installed_version,
    load_cuda_runtime,
    require,
    require_onnxruntime,
)
from smlp_deploy.errors import GpuError, MissingDependencyError, UsageError


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


UUIDS = ("3f2a0000-0000-0000-0000-000000000001", "3f2b0000-0000-0000-0000-000000000002")


class Driver:
    """NVIDIA's driver library with GPUs of compute capability 8.9.

    Args:
        failing: the function that fails, if any.
        status: what it returns then.
        names: of the GPUs.
        old: it lacks the functions added in CUDA 11.4.
    """

    def __init__(
        self, *, failing: str = "", status: int = 0, names: tuple[str, ...] = ("NVIDIA L4",), old: bool = False
    ) -> None:
        self._failing = failing
        self._status = status
        self._names = names
        self._old = old
        self._started = False

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu") or (self._old and name.endswith("_v2")):
            raise AttributeError(name)

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

    def _cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self._names)
        return 0

    def _cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = 7 + ordinal
        return 0 if ordinal < len(self._names) else 101  # CUDA_ERROR_INVALID_DEVICE

    def _cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:  # noqa: N802
        name.value = self._names[device.value - 7].encode()
        return 0

    def _cuDeviceGetPCIBusId(self, pci_bus_id: Any, length: int, device: Any) -> int:  # noqa: N802
        pci_bus_id.value = f"0000:{0x3B + device.value - 7:02X}:00.0".encode()
        return 0

    def _cuDeviceGetUuid(self, uuid: Any, device: Any) -> int:  # noqa: N802
        uuid[:] = UUID(UUIDS[device.value - 7]).bytes
        return 0

    _cuDeviceGetUuid_v2 = _cuDeviceGetUuid  # noqa: N815

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def _cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12080
        return 0


def l4(index: int = 0) -> GpuDevice:
    return GpuDevice(
        name="NVIDIA L4",
        architecture="sm89",
        driver=12080,
        pci_bus_id=f"0000:{0x3B + index:02X}:00.0",
        index=index,
        uuid=f"GPU-{UUIDS[index]}",
    )


class TestFindingAGpu:
    @pytest.mark.parametrize("old", [False, True])
    def test_describes_the_first(self, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(old=old))
        assert find_gpu() == l4()

    @pytest.mark.parametrize(
        ("failing", "status"),
        [
            ("cuInit", 100),  # CUDA_ERROR_NO_DEVICE: no GPU, or CUDA_VISIBLE_DEVICES hides all of them
            ("cuInit", 34),  # CUDA_ERROR_STUB_LIBRARY: the toolkit's library for linking was loaded
            ("cuInit", 803),  # CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: library and kernel module differ
            ("cuDeviceGetCount", 3),
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

    def test_a_gpu_without_a_uuid_is_found_by_its_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(failing="cuDeviceGetUuid_v2", status=1))
        gpu = find_gpu("0")
        assert gpu is not None
        assert (gpu.name, gpu.uuid) == ("NVIDIA L4", "")

    def test_no_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def absent(name: str) -> None:
            raise OSError(name)

        monkeypatch.setattr(ctypes, "CDLL", absent)
        assert find_gpu() is None
        with pytest.raises(GpuError, match=r"no NVIDIA GPU and driver was found.* · --device cuda · smlp doctor"):
            find_gpu("cuda")


class TestChoosingAGpu:
    @pytest.fixture(autouse=True)
    def two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(names=("NVIDIA L4", "NVIDIA L4")))

    @pytest.mark.parametrize(
        ("device", "index"),
        [
            ("cuda", 0),
            ("cuda:0", 0),
            ("0", 0),
            ("cuda:1", 1),
            ("1", 1),
            (f"GPU-{UUIDS[1]}", 1),
            (f"GPU-{UUIDS[1].upper()}", 1),
            ("GPU-3f2b", 1),
        ],
    )
    def test_by_number_or_uuid(self, device: str, index: int) -> None:
        assert find_gpu(device) == l4(index)

    @pytest.mark.parametrize("device", ["2", "cuda:2", "-1", "GPU-4", "MIG-3f2b", "cuda1", "NVIDIA L4", "", "²"])
    def test_one_that_is_not_there_is_an_error_that_lists_those_that_are(self, device: str) -> None:
        with pytest.raises(UsageError) as raised:
            find_gpu(device)
        assert str(raised.value) == (
            f"no GPU has this number or UUID · --device {device} · choose one of cuda:0 NVIDIA L4 (GPU-{UUIDS[0]}), "
            f"cuda:1 NVIDIA L4 (GPU-{UUIDS[1]})"
        )

    @pytest.mark.parametrize("device", ["GPU-", "GPU-3f2"])
    def test_the_beginning_of_several_uuids_is_an_error(self, device: str) -> None:
        with pytest.raises(UsageError, match=r"^several GPUs have a UUID that begins so · .*cuda:0.*cuda:1"):
            find_gpu(device)

    def test_a_mig_instance_has_a_uuid_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        name = "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
        monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(names=(name,)))
        gpu = find_gpu("MIG-3f2a")
        assert gpu is not None
        assert (gpu.name, gpu.uuid) == (name, f"MIG-{UUIDS[0]}")


class TestLoadingTheCudaRuntime:
    @pytest.fixture
    def pathfinder(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | Exception], None]:
        """Makes cuda-pathfinder find a path, or fail."""

        def finds(result: str | Exception) -> None:
            def load(name: str) -> SimpleNamespace:
                assert name == "cudart"
                if isinstance(result, Exception):
                    raise result
                return SimpleNamespace(abs_path=result)

            module = ModuleType("cuda.pathfinder")
            module.load_nvidia_dynamic_lib = load  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, "cuda.pathfinder", module)

        return finds

    def test_the_one_of_this_environment(self) -> None:
        runtime = load_cuda_runtime()
        assert Path(runtime.path).name == f"libcudart.so.{runtime.major}"

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("Failure finding libcudart.so: No such file: libcudart.so*\n  listdir()"),
            OSError("libdl.so.2: cannot open shared object file"),
        ],
    )
    def test_none_is_one_line_with_the_package_to_install(
        self, pathfinder: Callable[[str | Exception], None], error: Exception
    ) -> None:
        pathfinder(error)
        with pytest.raises(MissingDependencyError) as raised:
            load_cuda_runtime()
        assert raised.value.what == f"the CUDA runtime library does not load: {str(error).splitlines()[0]}"
        assert raised.value.fix == (
            "pip install nvidia-cuda-runtime-cu12 (CUDA 12) or pip install nvidia-cuda-runtime (CUDA 13)"
        )

    @pytest.mark.parametrize("content", [b"", b"not a library"])
    def test_a_damaged_library(
        self, pathfinder: Callable[[str | Exception], None], tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "libcudart.so.12").write_bytes(content)
        pathfinder(str(tmp_path / "libcudart.so.12"))
        with pytest.raises(MissingDependencyError, match=r"does not load: .*libcudart\.so\.12"):
            load_cuda_runtime()

    def test_another_library_of_that_name(self, pathfinder: Callable[[str | Exception], None]) -> None:
        pathfinder("libc.so.6")
        with pytest.raises(MissingDependencyError, match="cudaRuntimeGetVersion"):
            load_cuda_runtime()

    def test_one_that_fails(
        self, pathfinder: Callable[[str | Exception], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pathfinder("libcudart.so.12")
        fails = SimpleNamespace(cudaRuntimeGetVersion=lambda number: 3)
        monkeypatch.setattr(ctypes, "CDLL", lambda path: fails)
        with pytest.raises(MissingDependencyError, match=r"libcudart\.so\.12 fails with CUDA error 3"):
            load_cuda_runtime()

    def test_without_pathfinder_the_loader_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
        asked = []

        def absent(path: str) -> None:
            asked.append(path)
            raise OSError(f"{path}: cannot open shared object file")

        monkeypatch.setattr(ctypes, "CDLL", absent)
        with pytest.raises(MissingDependencyError, match=r"libcudart\.so: cannot open"):
            load_cuda_runtime()
        assert asked == ["libcudart.so"]
