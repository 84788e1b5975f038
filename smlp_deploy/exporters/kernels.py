"""What is inside an engine: the kernels of a graph, read from TensorRT's build log or its engine inspector.

TensorRT-RTX logs a line per kernel when it compiles a static shape with detailed verbosity, and needs no GPU for it.
Bytes are those of each kernel's inputs and outputs: an estimate of memory traffic, not a measurement. What TensorRT
does not state is unknown, and never guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

UNKNOWN = "unknown"
"""An element type or a kind that TensorRT does not state."""

ELEMENT_BYTES = {
    "Half": 2,
    "BFloat16": 2,
    "Float": 4,
    "Double": 8,
    "Int8": 1,
    "FP8": 1,
    "Bool": 1,
    "UInt8": 1,
    "Int16": 2,
    "Int32": 4,
    "Int64": 8,
}
PRECISION_ELEMENTS = {"fp32": "Float", "fp16": "Half", "bf16": "BFloat16", "int8": "Int8"}

_COMPUTE_OPERATIONS = ("corr", "conv", "gemm", "matmul", "matrmult", "matrixmult")
_FULLY_CONNECTED = re.compile(r"Fc(?![a-z])")
"""Myelin's abbreviation of a matrix product, as in `__myl_FcMulAdd`."""
_OPAQUE = ("fusion", "myelin", UNKNOWN)
_NARROW = ("Half", "BFloat16", "Int8", "FP8")

_ELEMENTS = {name.upper(): name for name in ELEMENT_BYTES} | {
    "FP16": "Half",
    "FP32": "Float",
    "FP64": "Double",
    "BF16": "BFloat16",
    "INT4": "Int4",
    "FP4": "FP4",
}
_TACTIC_ELEMENTS = {
    "Int8": ("i8", "int8", "icudnn"),
    "Half": ("f16", "fp16", "h884", "h1688", "h16816"),
    "BFloat16": ("bf16",),
    "FP8": ("e4m3", "e5m2"),
    "Float": ("f32", "fp32", "tf32", "sgemm", "scudnn"),
}
"""How words of a tactic's name begin: `sm80_xmma_gemm_f16f16_f16f32_f32` reads Half, `volta_scudnn_128x64` Float."""

_TENSOR = re.compile(r"Name: ([^,]+), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TYPE_KEYS = ("datatype", "format/datatype", "format")


@dataclass(frozen=True, kw_only=True)
class KernelTensor:
    """An input or output of a kernel.

    Attributes:
        shape: -1 for each size that TensorRT does not state.
        element: its type, as TensorRT names it; or "unknown".
    """

    shape: tuple[int, ...]
    element: str

    @property
    def nbytes(self) -> int | None:
        """None if its type or one of its sizes is unknown."""
        size = ELEMENT_BYTES.get(self.element)
        return None if size is None or min(self.shape, default=0) < 0 else math.prod(self.shape) * size

    def written_out(self, times: str) -> str:
        """Its shape with `times` between the sizes, and "?" for an unknown one."""
        return times.join("?" if size < 0 else str(size) for size in self.shape)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel.

    Attributes:
        name: TensorRT's own.
        kind: gemm, correlation (convolution), runtime_fusion, kgen (generated element-wise code), ...; or "unknown".
        inputs: without constants.
        outputs: what it writes.
        nodes: the ONNX nodes it implements.
        weights: the element type of its weights, else of what its tactic reads; or "unknown".
    """

    name: str
    kind: str
    inputs: tuple[KernelTensor, ...]
    outputs: tuple[KernelTensor, ...]
    nodes: tuple[str, ...]
    weights: str = UNKNOWN

    @property
    def nbytes(self) -> int | None:
        """Bytes read and written, constants not counted; None if they are unknown.

        They are if those of one tensor are, and for a region, because the kernels inside it are not listed.
        """
        sizes = [tensor.nbytes for tensor in (*self.inputs, *self.outputs)]
        known = [size for size in sizes if size is not None]
        listed = not self._is_region and (sizes or self.kind != UNKNOWN)
        return sum(known) if listed and len(known) == len(sizes) else None

    @property
    def opaque(self) -> bool:
        """Whether it can hold any operation: a fusion, a region of the graph that Myelin compiled, or a mere name."""
        return self.kind.lower() in _OPAQUE or self._is_region

    @property
    def computes(self) -> bool:
        """Whether it convolves or multiplies matrices; of an opaque kernel, whether it is known to."""
        if _says_compute(self.kind):
            return True
        if self.opaque:
            return any(_says_compute(text) or _FULLY_CONNECTED.search(text) for text in (self.name, *self.nodes))
        # TensorRT's own layers, a Reformat for example, bear the name of the layer they serve; Myelin's do not, and
        # their kinds are in lower case.
        return not self.kind[:1].isupper() and _says_compute(self.name)

    @property
    def precision(self) -> str:
        """The element type of its arithmetic: Int8 if it reads that, otherwise that of its output.

        If those are unknown, the type of a product's inputs, then that of the weights or tactic.
        """
        reads, writes = ([tensor.element for tensor in tensors] for tensors in (self.inputs, self.outputs))
        if self.computes and "Int8" in reads:
            return "Int8"
        if self._is_region:  # Float at the borders of a region tells nothing about what is inside
            stated = [element for element in (*writes, *reads) if element in _NARROW]
        else:
            stated = [*writes[:1], *(reads if self.computes else ())]
        known = [element for element in (*stated, self.weights) if element != UNKNOWN]
        if known:
            return known[0]
        return UNKNOWN if writes or self.computes or self.opaque else "none"

    @property
    def _is_region(self) -> bool:
        return self.kind.lower() == "myelin" or self.name.startswith("{ForeignNode[")


def _says_compute(text: str) -> bool:
    return any(word in text.lower() for word in _COMPUTE_OPERATIONS)


@dataclass(frozen=True, kw_only=True)
class KernelSummary:
    """The kernels of one engine at one batch size.

    Attributes:
        batch: images per run.
        count: of kernels.
        by_kind: how many of each kind.
        compute_by_precision: convolutions and matrix products by element type; under "unknown" also the kernels that
            may be one.
        bytes_per_image: read and written by all kernels whose bytes are known, over `batch`.
        bytes_unknown: the number of the other kernels.
    """

    batch: int
    count: int
    by_kind: Mapping[str, int]
    compute_by_precision: Mapping[str, int]
    bytes_per_image: int
    bytes_unknown: int = 0

    @property
    def compute(self) -> str:
        """`compute_by_precision` in words: "31 in Half, 2 unknown"."""
        return ", ".join(
            f"{count} {UNKNOWN}" if precision == UNKNOWN else f"{count} in {precision}"
            for precision, count in self.compute_by_precision.items()
        )

    def share(self, precision: str) -> float:
        """Share of the compute kernels known to be in fp32, fp16, bf16 or int8."""
        total = sum(self.compute_by_precision.values())
        return self.compute_by_precision.get(PRECISION_ELEMENTS[precision], 0) / total if total else 0.0


def summarize(kernels: Iterable[Kernel], *, batch: int) -> KernelSummary:
    """Totals over kernels that run `batch` images at a time."""
    kernels = list(kernels)
    compute = Counter(k.precision if k.computes else UNKNOWN for k in kernels if k.computes or k.opaque)
    known = [kernel.nbytes for kernel in kernels if kernel.nbytes is not None]
    return KernelSummary(
        batch=batch,
        count=len(kernels),
        by_kind=dict(Counter(kernel.kind for kernel in kernels).most_common()),
        compute_by_precision=dict(compute.most_common()),
        bytes_per_image=round(sum(known) / batch),
        bytes_unknown=len(kernels) - len(known),
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
        KernelTensor(shape=tuple(_size(size) for size in shape.split(",") if size), element=_element(element))
        for _, shape, element in _TENSOR.findall(text)
    )


def _nodes(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_NODE.findall(text)))


def _size(value: object) -> int:
    """A size, or -1 if it depends on the input: TensorRT then prints -1, another negative number or a symbol."""
    try:
        return max(int(str(value)), -1)
    except ValueError:
        return -1


def _element(text: str) -> str:
    """The element type in a description such as "Channel major FP16 format where channel % 8 == 0"."""
    words = text.replace(".", " ").upper().split()
    return next((_ELEMENTS[word] for word in words if word in _ELEMENTS), UNKNOWN)


def kernels_from_inspector(text: str) -> tuple[Kernel, ...]:
    """The kernels in an engine inspector's JSON; of an engine built without detailed verbosity, only their names.

    Raises:
        ValueError: it is not JSON of that form.
    """
    document = json.loads(text, strict=False, object_pairs_hook=_lowered)
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    return tuple(_from_layer(layer) for layer in document.get("layers") or ())


def _lowered(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are in lower case, because TensorRT 11 writes both Datatype and DataType."""
    return {key.lower(): value for key, value in pairs}


def _from_layer(layer: object) -> Kernel:
    if not isinstance(layer, dict):
        return Kernel(name=str(layer), kind=UNKNOWN, inputs=(), outputs=(), nodes=())
    weights = (value for key, value in layer.items() if key.endswith("weights") and isinstance(value, dict))
    elements = (_element(str(value.get("type", ""))) for value in weights)
    return Kernel(
        name=str(layer.get("name", "")),
        kind=str(layer.get("layertype") or UNKNOWN),
        inputs=tuple(_from_inspected(tensor) for tensor in layer.get("inputs") or ()),
        outputs=tuple(_from_inspected(tensor) for tensor in layer.get("outputs") or ()),
        nodes=_nodes(str(layer.get("metadata", ""))),
        weights=next((e for e in elements if e != UNKNOWN), _tactic_element(str(layer.get("tacticname", "")))),
    )


def _tactic_element(tactic: str) -> str:
    words = tactic.lower().split("_")
    beginnings = [(word, element) for element, some in _TACTIC_ELEMENTS.items() for word in some]
    return next((element for word in words for start, element in beginnings if word.startswith(start)), UNKNOWN)


def _from_inspected(tensor: Mapping[str, Any]) -> KernelTensor:
    sizes = tensor.get("dimensions")
    elements = (_element(str(tensor.get(key, ""))) for key in _TYPE_KEYS)
    return KernelTensor(
        shape=tuple(map(_size, sizes)) if isinstance(sizes, list) else (-1,),
        element=next((element for element in elements if element != UNKNOWN), UNKNOWN),
    )
