"""Where a model runs: what the options --device, --provider and --runtime mean for each kind of file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from smlp_deploy.dependencies import GpuDevice, find_gpu, is_installed
from smlp_deploy.errors import UsageError
from smlp_deploy.metadata import ModelMetadata

CPU = "cpu"
AUTO, ONNXRUNTIME, OPENVINO = "auto", "onnxruntime", "openvino"


def default_runtime(metadata: ModelMetadata) -> str:
    """What runs an ONNX file on the CPU if nothing is chosen: "onnxruntime" or "openvino".

    OpenVINO runs fp16, bf16 and int8 in 0.2 to 0.7 of ONNX Runtime's time, which emulates the first two. In fp32 it
    takes 0.8 to 1.0 of it with AVX-512 and 0.7 to 1.15 with AVX2 (`benchmarks/README.md`), and starts later.
    """
    return OPENVINO if metadata.precision != "fp32" and is_installed("openvino") else ONNXRUNTIME


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model runs. By default engines run on the first GPU, and everything else on the CPU.

    Attributes:
        provider: what ONNX Runtime runs ONNX files on: "cpu", "cuda" or "tensorrt"; None for "cuda" if a GPU was
            chosen, otherwise "cpu".
        gpu: the GPU that was chosen.
        only_cpu: the CPU was chosen.
        runtime: what runs ONNX files: "onnxruntime", "openvino", or "auto" for the default.
        threads: cores that ONNX files compute on, on the CPU; None for all that this process may use.
    """

    provider: str | None = None
    gpu: GpuDevice | None = None
    only_cpu: bool = False
    runtime: str = AUTO
    threads: int | None = None

    @classmethod
    def of(
        cls,
        *,
        device: str | None = None,
        provider: str | None = None,
        runtime: str = AUTO,
        threads: int | None = None,
    ) -> Self:
        """The placement that four options give.

        Args:
            device: "cpu", or a GPU as `find_gpu` takes it; None for each kind of file's default.
            provider: see the attribute.
            runtime: see the attribute; a provider is ONNX Runtime's, and OpenVINO runs on the CPU.
            threads: see the attribute.

        Raises:
            UsageError: there is no such GPU, or two of them contradict each other.
        """
        device = device if device is None else device.strip()
        is_cpu = device is not None and device.lower() == CPU
        if device is not None and provider is not None and is_cpu != (provider == CPU):
            raise UsageError(
                f"--provider {provider} contradicts --device {device}", fix="give one of them, or two that agree"
            )
        if runtime == OPENVINO and provider is not None:
            raise UsageError(
                f"--runtime openvino contradicts --provider {provider}",
                fix="leave out one: providers are ONNX Runtime's",
            )
        if runtime == OPENVINO and device is not None and not is_cpu:
            raise UsageError(
                f"--runtime openvino contradicts --device {device}", fix="leave out one: OpenVINO runs on the CPU"
            )
        if threads is not None and threads < 1:
            raise UsageError(f"{threads} is not at least 1", where="threads")
        gpu = None if device is None or is_cpu else find_gpu(device)
        return cls(provider=provider, gpu=gpu, only_cpu=is_cpu, runtime=runtime, threads=threads)

    @property
    def onnx_provider(self) -> str:
        """What ONNX Runtime runs ONNX files on."""
        return self.provider or ("cuda" if self.gpu else CPU)

    def runtime_for(self, metadata: ModelMetadata) -> str:
        """What runs an ONNX file with this metadata: "onnxruntime" or "openvino"."""
        if self.runtime != AUTO:
            return self.runtime
        return ONNXRUNTIME if self.provider is not None or self.gpu is not None else default_runtime(metadata)

    def check(self, path: Path) -> None:
        """Check that a file can run there.

        Raises:
            UsageError: it cannot.
        """
        suffix = path.suffix.lower()
        if self.provider is not None and suffix != ".onnx":
            raise UsageError("only ONNX files take a provider", where=path, fix="use --device in place of --provider")
        if self.runtime != AUTO and suffix != ".onnx":
            raise UsageError("only ONNX files take a runtime", where=path, fix="leave out --runtime")
        if self.only_cpu and suffix == ".engine":
            raise UsageError(
                "an engine runs only on a GPU", where=path, fix="leave out --device cpu, or use the ONNX file"
            )

    def for_file(self, path: Path) -> Self:
        """The same without provider and runtime, unless it is an ONNX file: for commands that take several kinds."""
        return self if path.suffix.lower() == ".onnx" else replace(self, provider=None, runtime=AUTO)

    def gpu_of(self, path: Path) -> GpuDevice | None:
        """The GPU that a file runs on, or None for the CPU; also None if there is no GPU."""
        if self.gpu is not None:
            return self.gpu
        suffix = path.suffix.lower()
        on_gpu = suffix == ".engine" or (suffix == ".onnx" and self.onnx_provider != CPU)
        return find_gpu() if on_gpu and not self.only_cpu else None

    def kind_of(self, path: Path, metadata: ModelMetadata) -> str:
        """What a file's results depend on: "cpu", "cuda", "tensorrt" or "openvino"; of an engine "cpu": no choice."""
        if path.suffix.lower() == ".onnx":
            return OPENVINO if self.runtime_for(metadata) == OPENVINO else self.onnx_provider
        return "cuda" if self.gpu is not None and path.suffix.lower() != ".engine" else CPU


ANYWHERE = Placement()
"""Each kind of file where it runs by default."""


def on_gpu(backend: str, gpu: GpuDevice | None) -> str:
    """A backend and where it runs, for a runner's name: `pytorch (CPU)`, `pytorch (CUDA)`, `pytorch (CUDA:1)`."""
    place = "CPU" if gpu is None else "CUDA" if not gpu.index else f"CUDA:{gpu.index}"
    return f"{backend} ({place})"
