"""What each optional package is needed for, and how to install it. Nothing is installed or replaced silently."""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any
from uuid import UUID

from smlp_deploy.errors import GpuError, MissingDependencyError, UsageError

logger = logging.getLogger(__name__)

TENSORRT_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The module of each TensorRT backend."""

TENSORRT_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "tensorrt-rtx": ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
}
"""The distributions that provide each of these modules."""

PROVIDER_TENSORRT = 10
"""The major version of TensorRT that ONNX Runtime's provider is linked against."""

PROVIDER_PACKAGES = {12: "tensorrt-cu12>=10.12,<11", 13: "tensorrt-cu13>=10.13.2,<11"}
"""The packages with that version, by major version of CUDA."""

CUDA_RUNTIMES = {12: "nvidia-cuda-runtime-cu12", 13: "nvidia-cuda-runtime"}
"""The distribution of the CUDA runtime library, by major version of CUDA."""

# Device attributes of the CUDA driver API.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


def require(*modules: str, purpose: str, extra: str) -> None:
    """Check that modules can be imported, without importing them.

    Raises:
        MissingDependencyError: names what is missing, what it is needed for, and the extra that installs it.
    """
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        raise MissingDependencyError(
            f"{', '.join(missing)} not installed, needed {purpose}", fix=f'pip install "smlp-deploy[{extra}]"'
        )


def is_installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package
        return False


def require_torch(purpose: str) -> None:
    require("torch", purpose=purpose, extra="export")


def require_proof(purpose: str) -> None:
    """Check for the packages that compare an artifact with its checkpoint: PyTorch, onnx and ONNX Runtime.

    Raises:
        MissingDependencyError: one of them is missing.
    """
    require("torch", "onnx", "ml_dtypes", "onnx_ir", "onnxscript", purpose=purpose, extra="export")
    require_onnxruntime()


def require_onnxruntime() -> None:
    """Check that exactly one onnxruntime package is installed.

    Raises:
        MissingDependencyError: neither package is installed, or both are and overwrite each other's files.
    """
    require("onnxruntime", purpose="to run ONNX files", extra='cpu]" or "smlp-deploy[gpu')
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        raise MissingDependencyError(
            "onnxruntime and onnxruntime-gpu are both installed and own the same folder, so neither can be trusted",
            fix="pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )


@dataclass(frozen=True, kw_only=True)
class GpuDevice:
    """An NVIDIA GPU, as its driver describes it.

    Attributes:
        name: product name.
        architecture: compute capability, `sm89` for 8.9.
        driver: CUDA version of the driver, 12080 for 12.8.
        pci_bus_id: `0000:3B:00.0`, as in NVML; for a MIG instance, that of the whole GPU.
        index: its number in CUDA, which counts what CUDA_VISIBLE_DEVICES leaves.
        uuid: `GPU-` or, for a MIG instance, `MIG-` and 36 characters, as nvidia-smi -L lists it; empty if unknown.
    """

    name: str
    architecture: str
    driver: int
    pci_bus_id: str = ""
    index: int = 0
    uuid: str = ""

    @property
    def torch_name(self) -> str:
        """`cuda:0`, as PyTorch and the option --device name it."""
        return f"cuda:{self.index}"


def list_gpus() -> tuple[GpuDevice, ...]:
    """The NVIDIA GPUs in the order of CUDA; empty without a driver or a visible GPU.

    The CUDA driver itself is queried, through ctypes. NVML (nvidia-ml-py) cannot tell which GPUs a program may use, nor
    their order: it lists all of them by PCI address, whereas CUDA lists the fastest first (or as CUDA_DEVICE_ORDER
    says), only those in CUDA_VISIBLE_DEVICES, and MIG instances in place of their GPU. cuda-bindings could tell, but
    takes 31 MB for the nine calls below.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count, version_ = ctypes.c_int(0), ctypes.c_int(0)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or driver.cuDriverGetVersion(ctypes.byref(version_))
    )
    if failed:
        return ()
    found = (_describe(driver, index, version_.value) for index in range(count.value))
    return tuple(gpu for gpu in found if gpu is not None)


def _describe(driver: Any, index: int, version_: int) -> GpuDevice | None:
    """The GPU with this number, or None if the driver fails on it."""
    device, major, minor = (ctypes.c_int(0) for _ in range(3))
    name, pci_bus_id = ctypes.create_string_buffer(256), ctypes.create_string_buffer(32)
    uuid = (ctypes.c_uint8 * 16)()
    # The second version tells MIG instances apart; drivers before CUDA 11.4 lack it.
    get_uuid = getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid
    failed = (
        driver.cuDeviceGet(ctypes.byref(device), index)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDeviceGetPCIBusId(pci_bus_id, len(pci_bus_id), device)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    if failed:
        return None
    text = name.value.decode(errors="replace")
    kind = "MIG" if " MIG " in text else "GPU"  # CUDA names an instance "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    return GpuDevice(
        name=text,
        architecture=f"sm{major.value}{minor.value}",
        driver=version_,
        pci_bus_id=pci_bus_id.value.decode(),
        index=index,
        uuid="" if get_uuid(uuid, device) else f"{kind}-{UUID(bytes=bytes(uuid))}",
    )


def find_gpu(device: str | None = None) -> GpuDevice | None:
    """A visible NVIDIA GPU.

    Args:
        device: its number in CUDA (`1` or `cuda:1`), its UUID or a unique beginning of it (`GPU-3f2a`), or `cuda` for
            the first; None for the first if there is one.

    Returns:
        The GPU; None only if `device` is None and there is no GPU, or no driver.

    Raises:
        UsageError: there is no such GPU, or several; lists those there are.
        GpuError: there is no GPU at all, or no driver.
    """
    gpus = list_gpus()
    if device is None:
        return gpus[0] if gpus else None
    if not gpus:
        raise GpuError(
            "no NVIDIA GPU and driver was found, or CUDA_VISIBLE_DEVICES hides it",
            where=f"--device {device}",
            fix="smlp doctor shows what is there",
        )
    matching = [gpu for gpu in gpus if _is_called(gpu, device.strip().lower())]
    if len(matching) != 1:
        listed = ", ".join(f"{gpu.torch_name} {gpu.name} ({gpu.uuid or 'no UUID'})" for gpu in gpus)
        what = "several GPUs have a UUID that begins so" if matching else "no GPU has this number or UUID"
        raise UsageError(what, where=f"--device {device}", fix=f"choose one of {listed}")
    return matching[0]


def _is_called(gpu: GpuDevice, name: str) -> bool:
    if name.startswith(("gpu-", "mig-")):
        return gpu.uuid.lower().startswith(name)
    number = "0" if name == "cuda" else name.removeprefix("cuda:")
    return number.isdecimal() and gpu.index == int(number)


@dataclass(frozen=True, kw_only=True)
class CudaRuntime:
    """A CUDA runtime library that was loaded.

    Attributes:
        version: 12090 for 12.9.
        path: of the library, or its name if the system's loader found it.
    """

    version: int
    path: str

    @property
    def major(self) -> int:
        return self.version // 1000


def load_cuda_runtime() -> CudaRuntime:
    """Find and load the CUDA runtime library, which needs neither a GPU nor a driver.

    cuda-pathfinder looks in NVIDIA's packages, conda, the loader's path and CUDA_PATH, in this order; without it only
    the loader is asked.

    Raises:
        MissingDependencyError: there is none, or it does not load; says why.
    """
    try:
        path = _runtime_path()
        number = ctypes.c_int(0)
        status = ctypes.CDLL(path).cudaRuntimeGetVersion(ctypes.byref(number))
    # cuda-pathfinder raises RuntimeError, the loader OSError; a library without the function, AttributeError.
    except (OSError, RuntimeError, AttributeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise _no_cuda_runtime(reason) from None
    if status:
        raise _no_cuda_runtime(f"{path} fails with CUDA error {status}")
    return CudaRuntime(version=number.value, path=path)


def _runtime_path() -> str:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib
    except ImportError:
        return "cudart64_12.dll" if sys.platform == "win32" else "libcudart.so"
    library = load_nvidia_dynamic_lib("cudart")
    return library.abs_path or "libcudart.so"


def _no_cuda_runtime(reason: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"the CUDA runtime library does not load: {reason}",
        fix=" or ".join(f"pip install {name} (CUDA {major})" for major, name in CUDA_RUNTIMES.items()),
    )


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import, and rarely needed

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def cuda_major(distributions: Iterable[str]) -> int:
    """The CUDA major version in the names of distributions or their requirements; 0 if none states it."""
    from importlib.metadata import requires

    texts = [text for name in distributions for text in (name, *(requires(name) or ()))]
    return max((int(match[1]) for text in texts if (match := re.search(r"[-_]cu(\d\d)\b", text))), default=0)


def provider_tensorrt(gpu: GpuDevice | None) -> tuple[str, str] | None:
    """Why ONNX Runtime's TensorRT provider has no TensorRT here, and the pip line that installs it.

    None if the installed TensorRT is of the version that it needs.
    """
    installed = next(filter(None, map(installed_version, TENSORRT_DISTRIBUTIONS["tensorrt"])), None)
    if installed is not None and installed.split(".")[0] == str(PROVIDER_TENSORRT):
        return None
    here = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed_version(name)]
    major = cuda_major(here) or (gpu.driver // 1000 if gpu else max(PROVIDER_PACKAGES))
    package = PROVIDER_PACKAGES[12 if major < 13 else 13]
    return (
        f"it needs TensorRT {PROVIDER_TENSORRT}, but {installed or 'none'} is installed",
        f'pip install "{package}"',
    )


class TensorRTLog:
    """TensorRT's messages: all sent to `logging`, and kept while recording.

    Attributes:
        handle: what TensorRT is given.
    """

    handle: Any

    def __init__(self) -> None:
        self._kept: list[str] | None = None
        self._error = ""

    def receive(self, message: str, *, is_error: bool) -> None:
        # The caller of TensorRT raises an error with this message; its warnings are advice on building.
        logger.log(logging.INFO if is_error else logging.DEBUG, "%s", message)
        if is_error:
            self._error = message.splitlines()[0]
        if self._kept is not None:
            self._kept.append(message)

    def last_error(self) -> str:
        return self._error or "no reason given"

    @contextmanager
    def recording(self) -> Iterator[list[str]]:
        self._kept, self._error = [], ""
        try:
            yield self._kept
        finally:
            self._kept = None


def start_tensorrt(trt: Any, name: str) -> Any:
    """The binding's "Builder" or "Runtime", either of which starts CUDA; None if the driver is missing or too old."""
    try:
        return getattr(trt, name)(tensorrt_log(trt).handle)
    except TypeError as error:
        if "nullptr" not in str(error):
            raise
        return None


@cache
def tensorrt_log(trt: Any) -> TensorRTLog:
    """The log of a binding; one for the whole process, because TensorRT keeps the first that it is given."""
    log = TensorRTLog()
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Handle(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, level: Any, message: str) -> None:
            log.receive(message, is_error=level in errors)

    log.handle = Handle()
    return log
