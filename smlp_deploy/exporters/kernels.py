"""What is inside an engine: the kernels of a graph, read from TensorRT's build log or its engine inspector.

TensorRT-RTX logs a line per kernel when it compiles a static shape with detailed verbosity, and needs no GPU for it.
Bytes are those of each kernel's inputs and outputs: an estimate of memory traffic, not a measurement.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ELEMENT_BYTES = {
    "Half": 2,
    "BFloat16": 2,
    "Float": 4,
    "Int8": 1,
    "FP8": 1,
    "Bool": 1,
    "UInt8": 1,
    "Int32": 4,
    "Int64": 8,
}
PRECISION_ELEMENTS = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16", "int8": "Int8"}

_COMPUTE_TYPES = {"gemm", "correlation", "CaskConvolution", "CaskGemmConvolution", "CaskGemmMatrixMultiply"}
_COMPUTE_OPERATIONS = ("corr", "conv", "gemm", "matmul", "matrmult")
_TENSOR = re.compile(r"Name: ([^,]+), Dimensions: \[([\d,-]*)\].*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_INSPECTOR_ELEMENTS = {"FP16": "Half", "FP32": "Float", "INT8": "Int8", "BF16": "BFloat16", "INT32": "Int32"}


@dataclass(frozen=True, kw_only=True)
class KernelTensor:
    """An input or output of a kernel: its shape and element type, as TensorRT names it."""

    shape: tuple[int, ...]
    element: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ELEMENT_BYTES.get(self.element, 4)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel.

    Attributes:
        name: TensorRT's own.
        kind: gemm, correlation (convolution), runtime_fusion, kgen (generated element-wise code), ...
        inputs: without constants.
        outputs: what it writes.
        nodes: the ONNX nodes it implements.
    """

    name: str
    kind: str
    inputs: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    nodes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes read and written, constants not counted."""
        return sum(tensor.nbytes for tensor in (*self.inputs, *self.outputs))

    @property
    def computes(self) -> bool:
        """Whether it convolves or multiplies matrices."""
        return self.kind in _COMPUTE_TYPES or any(word in self.name.lower() for word in _COMPUTE_OPERATIONS)

    @property
    def precision(self) -> str:
        """The element type of its arithmetic: Int8 if it reads that, otherwise that of its output."""
        if self.computes and any(tensor.element == "Int8" for tensor in self.inputs):
            return "Int8"
        return self.outputs[0].element if self.outputs else "none"


@dataclass(frozen=True, kw_only=True)
class KernelSummary:
    """The kernels of one engine at one batch size.

    Attributes:
        batch: images per run.
        count: of kernels.
        by_kind: how many of each kind.
        compute_by_precision: convolutions and matrix products by element type.
        bytes_per_image: read and written by all kernels, over `batch`.
    """

    batch: int
    count: int
    by_kind: Mapping[str, int]
    compute_by_precision: Mapping[str, int]
    bytes_per_image: int

    def share(self, precision: str) -> float:
        """Share of the compute kernels in fp32, fp16, bf16 or int8."""
        total = sum(self.compute_by_precision.values())
        return self.compute_by_precision.get(PRECISION_ELEMENTS[precision], 0) / total if total else 0.0


def summarize(kernels: Iterable[Kernel], *, batch: int) -> KernelSummary:
    """Totals over kernels that run `batch` images at a time."""
    kernels = list(kernels)
    return KernelSummary(
        batch=batch,
        count=len(kernels),
        by_kind=dict(Counter(kernel.kind for kernel in kernels).most_common()),
        compute_by_precision=dict(Counter(kernel.precision for kernel in kernels if kernel.computes).most_common()),
        bytes_per_image=round(sum(kernel.nbytes for kernel in kernels) / batch),
    )


def kernels_from_log(messages: Iterable[str]) -> tuple[Kernel, ...]:
    """The kernels that a build with detailed verbosity logged."""
    lines = (line for message in messages for line in message.splitlines())
    return tuple(_from_line(line) for line in lines if line.startswith("Name: ") and ", LayerType: " in line)


def _from_line(line: str) -> Kernel:
    head, _, rest = line.partition(", Inputs: ")
    name, _, kind = head.removeprefix("Name: ").partition(", LayerType: ")
    inputs, _, rest = rest.partition(", Constants: ")
    _, _, rest = rest.partition(", Outputs: ")
    outputs, _, _ = rest.partition(", TacticName: ")
    return Kernel(name=name, kind=kind, inputs=_tensors(inputs), outputs=_tensors(outputs), nodes=_nodes(line))


def _tensors(text: str) -> tuple[KernelTensor, ...]:
    return tuple(
        KernelTensor(shape=tuple(int(size) for size in shape.split(",") if size), element=element)
        for _, shape, element in _TENSOR.findall(text)
    )


def _nodes(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_NODE.findall(text)))


def kernels_from_inspector(text: str) -> tuple[Kernel, ...]:
    """The kernels in an engine inspector's JSON, from an engine built with detailed verbosity."""
    layers = json.loads(text)["Layers"]
    return tuple(_from_layer(layer) for layer in layers if isinstance(layer, dict))


def _from_layer(layer: Mapping[str, Any]) -> Kernel:
    return Kernel(
        name=str(layer.get("Name", "")),
        kind=str(layer.get("LayerType", "")),
        inputs=tuple(_from_inspected(tensor) for tensor in layer.get("Inputs", ())),
        outputs=tuple(_from_inspected(tensor) for tensor in layer.get("Outputs", ())),
        nodes=_nodes(str(layer.get("Metadata", ""))),
    )


def _from_inspected(tensor: Mapping[str, Any]) -> KernelTensor:
    text = str(tensor.get("Datatype") or tensor.get("Format/Datatype", ""))
    words = {_INSPECTOR_ELEMENTS.get(word.upper(), word) for word in text.split()}
    element = next((word for word in words if word in ELEMENT_BYTES), "Float")
    return KernelTensor(shape=tuple(int(size) for size in tensor.get("Dimensions", ())), element=element)
