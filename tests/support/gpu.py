"""A GPU in host memory under the real runner: `cuda_runtime` in place of CUDA, `cuda_engine` in place of TensorRT."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest

from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.metadata import EngineManifest
from smlp_deploy.runners import tensorrt
from tests.support.cuda_engine import CudaTensorRT
from tests.support.cuda_runtime import CudaBench

L4 = GpuDevice(name="NVIDIA L4", architecture="sm89", driver=12080)


@contextmanager
def gpu(
    version: str = "tensorrt_rtx-1.7",
    *,
    schedule: Literal["late", "eager"] = "late",
    cache: Path | None = None,
    milliseconds: Callable[[str, int], float] = lambda name, amount: 1.0,
    **options: Any,
) -> Iterator[CudaBench]:
    """An L4 whose engines are ONNX files; leaving it fails the test if the program did something wrong.

    Args:
        version: of the binding.
        schedule: when the GPU does what it is told.
        cache: the user's cache directory; by default one that is removed.
        milliseconds: how long a work takes; see `CudaBench`.
        options: of `CudaTensorRT`.
    """
    with (
        TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        CudaBench(schedule, milliseconds=milliseconds) as bench,
    ):

        def binding(manifest: EngineManifest) -> CudaTensorRT:
            profile = manifest.profile
            return CudaTensorRT(version, bench, (profile.min, profile.opt, profile.max), **options)

        bench.install(patch)
        for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
            vars(sys.modules[name])["__spec__"] = ModuleSpec(name, None)
        patch.setattr(tensorrt, "_binding", binding)
        patch.setattr(tensorrt, "find_gpu", lambda: L4)
        patch.setattr(tensorrt, "user_cache_path", lambda _: cache or Path(folder))
        yield bench
