"""The kernels that TensorRT compiles a graph to, and their least time on known GPUs; needs no GPU.

A roofline estimate is the larger of two times: the bytes of all kernels over the memory bandwidth, and all operations
over the peak rate. Kernels reach neither limit; the estimate is a bound for comparing graphs, not a measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from smlp_deploy.exporters.kernels import Kernel, KernelSummary, summarize
from smlp_deploy.exporters.tensorrt import BuildOptions, TensorRT, find_backend
from smlp_deploy.graphs.file import Graph
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.models.variants import mac_count

DEFAULT_ARCHITECTURE = "sm89"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU's data sheet figures; rates are dense, without sparsity.

    Attributes:
        name: the product name.
        bandwidth: of its memory, GB/s.
        peak: tera-operations per second by precision; a multiply-add counts as two.
        source: the vendor's document.
    """

    name: str
    bandwidth: float
    peak: Mapping[str, float]
    source: str


GPUS = (
    Gpu(name="T4", bandwidth=320, peak={"fp32": 8.1, "fp16": 65, "int8": 130}, source="NVIDIA T4 data sheet"),
    Gpu(
        name="L4",
        bandwidth=300,
        peak={"fp32": 30.3, "fp16": 121, "bf16": 121, "int8": 242},
        source="NVIDIA L4 data sheet (sparse rates halved)",
    ),
    Gpu(
        name="A10",
        bandwidth=600,
        peak={"fp32": 31.2, "fp16": 125, "bf16": 125, "int8": 250},
        source="NVIDIA A10 data sheet",
    ),
    Gpu(
        name="RTX 4090",
        bandwidth=1008,
        peak={"fp32": 82.6, "fp16": 165.2, "bf16": 165.2, "int8": 660.6},
        source="NVIDIA Ada GPU architecture white paper (FP16 with FP32 accumulation)",
    ),
    Gpu(
        name="A100 80GB",
        bandwidth=2039,
        peak={"fp32": 19.5, "fp16": 312, "bf16": 312, "int8": 624},
        source="NVIDIA A100 data sheet (SXM)",
    ),
    Gpu(
        name="H100",
        bandwidth=3350,
        peak={"fp32": 67, "fp16": 989, "bf16": 989, "int8": 1979},
        source="NVIDIA H100 data sheet (SXM, sparse rates halved)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class GraphProfile:
    """The kernels of one ONNX file.

    Attributes:
        source: the file.
        precision: of its graph; it selects the peak rates.
        architecture: the GPU architecture compiled for.
        kernels: in the order they run.
        summary: their totals.
        macs: multiply-accumulates per image, from the configuration inside the file.
    """

    source: Path
    precision: str
    architecture: str
    kernels: tuple[Kernel, ...]
    summary: KernelSummary
    macs: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The least time an image can take on a GPU, in microseconds, by memory and by arithmetic."""

    gpu: Gpu
    memory_us: float
    compute_us: float

    @property
    def microseconds(self) -> float:
        return max(self.memory_us, self.compute_us)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_us >= self.compute_us else "arithmetic"


def profile_graph(source: Path, *, batch: int = 8, architecture: str = DEFAULT_ARCHITECTURE) -> GraphProfile:
    """Compile an ONNX file for one batch size with TensorRT-RTX and list its kernels.

    Raises:
        ArtifactError, BuildError: the file cannot be read, smlp-deploy did not write it, or TensorRT rejects it.
        UsageError: the architecture is unknown.
        MissingDependencyError: TensorRT-RTX is not installed.
    """
    tensorrt = TensorRT.load(find_backend("tensorrt-rtx"))
    tensorrt.check_architectures([architecture])
    graph = Graph.read(source)
    options = BuildOptions(profile=BatchProfile.fixed(batch), architectures=(architecture,))
    kernels = tensorrt.kernels(graph.content, options)
    return GraphProfile(
        source=source,
        precision=graph.metadata.precision,
        architecture=architecture,
        kernels=kernels,
        summary=summarize(kernels, batch=batch),
        macs=mac_count(graph.metadata.config),
    )


def roofline(profile: GraphProfile) -> tuple[Estimate, ...]:
    """The estimate for each GPU that supports the profile's precision."""
    return tuple(
        Estimate(
            gpu=gpu,
            memory_us=profile.summary.bytes_per_image / (gpu.bandwidth * 1e3),
            compute_us=2 * profile.macs / (gpu.peak[profile.precision] * 1e6),
        )
        for gpu in GPUS
        if profile.precision in gpu.peak
    )
