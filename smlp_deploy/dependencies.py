"""Which optional packages are needed for what, and how to get them. Nothing is ever installed or replaced silently."""

from __future__ import annotations

import ctypes
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from smlp_deploy.errors import MissingDependencyError

TENSORRT_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The module of each flavour of TensorRT."""


def require(*modules: str, purpose: str, extra: str) -> None:
    """Check that modules can be imported, without importing them.

    Raises:
        MissingDependencyError: naming what is missing, what it is needed for, and the extra that brings it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"{', '.join(missing)} not installed, needed {purpose}", fix=f'pip install "smlp-deploy[{extra}]"'
        )


def require_torch(purpose: str) -> None:
    require("torch", purpose=purpose, extra="export")


def require_onnxruntime() -> None:
    """Check that exactly one onnxruntime package is installed.

    Raises:
        MissingDependencyError: there is none; or there are two, which overwrite each other's files.
    """
    require("onnxruntime", purpose="to run ONNX files", extra='cpu]" or "smlp-deploy[gpu')
    if installed_version("onnxruntime") and installed_version("onnxruntime-gpu"):
        raise MissingDependencyError(
            "onnxruntime and onnxruntime-gpu are both installed and own the same folder, so neither can be trusted",
            fix="pip uninstall -y onnxruntime onnxruntime-gpu, then install one of them",
        )


def gpu_present() -> bool:
    """Whether an NVIDIA driver with a GPU is there."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
