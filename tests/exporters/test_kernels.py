from __future__ import annotations

import json

from smlp_deploy.exporters.kernels import (
    Kernel,
    KernelTensor,
    kernels_from_inspector,
    kernels_from_log,
    summarize,
)
from tests.support.tensorrt_binding import INSPECTED, KERNEL


def kernel(kind: str, element: str, *, reads: str | None = None) -> Kernel:
    return Kernel(
        name="k",
        kind=kind,
        inputs=(KernelTensor(shape=(8, 10), element=reads or element),),
        outputs=(KernelTensor(shape=(8, 10), element=element),),
        nodes=(),
    )


def test_a_line_of_the_log_is_a_kernel() -> None:
    (found,) = kernels_from_log(["other", f"Layers:\n{KERNEL}\nmore"])
    assert (found.name, found.kind, found.nodes) == ("conv_myl0_1", "correlation", ("blocks.0/conv",))
    assert found.inputs == (KernelTensor(shape=(4, 3, 8, 8), element="Half"),)
    assert found.nbytes == 2 * (4 * 3 * 64 + 4 * 16 * 64)
    assert found.computes
    assert found.precision == "Half"


def test_an_inspectors_json_gives_the_same() -> None:
    (found,) = kernels_from_inspector(json.dumps(INSPECTED))
    (logged,) = kernels_from_log([KERNEL])
    assert (found.inputs, found.outputs, found.nodes) == (logged.inputs, logged.outputs, logged.nodes)
    assert found.computes


def test_totals() -> None:
    summary = summarize(
        [kernel("gemm", "Half"), kernel("gemm", "Half", reads="Int8"), kernel("gemm", "Float"), kernel("kgen", "Half")],
        batch=8,
    )
    assert summary.count == 4
    assert summary.by_kind == {"gemm": 3, "kgen": 1}
    assert summary.compute_by_precision == {"Half": 1, "Int8": 1, "Float": 1}
    assert summary.share("fp16") == summary.share("int8") == 1 / 3
    assert summary.share("bf16") == 0
    # 80 elements read and 80 written: Half 320 bytes, Int8 to Half 240, Float 640, and Half again.
    assert summary.bytes_per_image == (320 + 240 + 640 + 320) / 8


def test_no_kernels_share_nothing() -> None:
    assert summarize([], batch=8).share("fp16") == 0
