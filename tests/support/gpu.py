"""A GPU in host memory under the real runner: `cuda_runtime` in place of CUDA, `cuda_engine` in place of TensorRT."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest

from smlp_deploy import files
from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.graphs.file import Graph
from smlp_deploy.metadata import BatchProfile, EngineManifest
from smlp_deploy.pipeline.export import Export
from smlp_deploy.runners import tensorrt
from tests.support.cuda_engine import CudaTensorRT
from tests.support.cuda_runtime import CudaBench

L4 = GpuDevice(name="NVIDIA L4", architecture="sm89", driver=12080)


@contextmanager
def gpu(
    version: str = "tensorrt_rtx-1.7",
    *,
    schedule: Literal["late", "eager"] = "late",
    devices: int = 1,
    cache: Path | None = None,
    milliseconds: Callable[[str, int], float] = lambda name, amount: 1.0,
    **options: Any,
) -> Iterator[CudaBench]:
    """An L4 whose engines are ONNX files; leaving it fails the test if the program did something wrong.

    Args:
        version: of the binding.
        schedule: when the GPU does what it is told.
        devices: how many such GPUs there are.
        cache: the user's cache directory; by default one that is removed.
        milliseconds: how long a work takes; see `CudaBench`.
        options: of `CudaTensorRT`.
    """
    with (
        TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
        CudaBench(schedule, devices=devices, milliseconds=milliseconds) as bench,
    ):

        def binding(manifest: EngineManifest) -> CudaTensorRT:
            profile = manifest.profile
            return CudaTensorRT(version, bench, (profile.min, profile.opt, profile.max), **options)

        bench.install(patch)
        patch.setattr(tensorrt, "_binding", binding)
        patch.setattr(tensorrt, "find_gpu", lambda: L4)
        patch.setattr(files, "user_cache_path", lambda _: cache or Path(folder))
        yield bench


def engine_in(folder: Path, export: Export, profile: BatchProfile, **changes: Any) -> Path:
    """An engine that the GPU in host memory runs: the bytes of an ONNX file."""
    path = folder / "x.engine"
    graph = Graph.read(export.path)
    path.write_bytes(graph.content)
    manifest = EngineManifest(
        engine_sha256=hashlib.sha256(graph.content).hexdigest(),
        metadata=graph.metadata,
        onnx_file=export.path.name,
        onnx_sha256=graph.sha256,
        backend="tensorrt-rtx",
        version="1.7.1.116",
        profile=profile,
        architectures=("sm89",),
        ran_here=False,
    )
    engine_manifest_path(path).write_text(replace(manifest, **changes).to_json())
    return path
