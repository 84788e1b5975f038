"""How TensorRT-RTX compiles sMLPNet: kernels, memory traffic and engine size of each graph. Needs no GPU.

    python -m benchmarks.kernels [VARIANT ...] [--json FILE]

Each variant gets the seeded weights of `tests/support/recipe.py`. Its graphs are the unlowered baseline, which is the
trained network as `torch.onnx.export` exports it, and those of smlp-deploy that `smlp build-engine` makes from a
checkpoint: lowered for GPUs in fp32, narrowed to fp16, and int8 inside fp16, calibrated on the eighteen images in the
package. Kernels and bytes are those of a build for batch 8 and one architecture; the size is that of the engine that
`smlp build-engine` writes, for batches from 1 to 32. Nothing is run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from smlp_deploy.exporters.kernels import summarize
from smlp_deploy.exporters.onnx import export_onnx, export_unlowered
from smlp_deploy.exporters.tensorrt import DEFAULT_ARCHITECTURES, BuildOptions, TensorRT
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.defaults import bundled_images
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.variants import VARIANTS, Variant
from smlp_deploy.pipeline.precision import Int8Options, plan_quantization, to_precision
from tests.support.recipe import recipe_weights

BATCH = 8
SEED = 1
TARGETS = {"sm89": DEFAULT_ARCHITECTURES, "sm75": ("sm75",)}
"""The architecture to list kernels for -> those to build the engine for."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One graph on one architecture.

    Attributes:
        variant: of the paper.
        graph: how it was made.
        architecture: of the kernels.
        kernels: their number.
        megabytes: read and written for one batch, in 10^6 bytes.
        engine_megabytes: size of the engine.
        compute: convolutions and matrix products by element type.
    """

    variant: str
    graph: str
    architecture: str
    kernels: int
    megabytes: float
    engine_megabytes: float
    compute: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description="Kernels, memory traffic and engine size of each graph; needs no GPU.")
    parser.add_argument("variants", nargs="*", default=["smlpnet_tiny"], metavar="VARIANT")
    parser.add_argument("--json", type=Path, help="Also write the figures here.")
    arguments = parser.parse_args()
    tensorrt = TensorRT.load("tensorrt-rtx")
    rows = []
    for name in arguments.variants:
        for graph, made in graphs(VARIANTS[name]):
            for architecture in TARGETS:
                if graph in ("unlowered fp32", "lowered fp32") and architecture == "sm75":
                    continue  # TensorRT-RTX has no fp32 matrix product for sm75
                rows.append(measure(tensorrt, name, graph, made.content, architecture))
                print(rows[-1], file=sys.stderr)
    show(rows)
    if arguments.json:
        document = {"tensorrt_rtx": tensorrt.version, "batch": BATCH, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def graphs(variant: Variant) -> Iterator[tuple[str, Graph]]:
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / f"{variant.name}.pth"
        torch.save(recipe_weights(variant.config, SEED), weights)
        checkpoint = load_checkpoint(weights)
    metadata = describe(checkpoint)
    yield "unlowered fp32", export_unlowered(checkpoint.network(), metadata, path=Path("unlowered.onnx"))
    lowered = export_onnx(checkpoint.network(), replace(metadata, form="gpu"), path=Path("lowered.onnx"))
    yield "lowered fp32", lowered
    yield "fp16", to_precision(lowered, "fp16")
    quantization = plan_quantization(lowered, Int8Options(images=tuple(bundled_images())))
    yield "int8", to_precision(lowered, "int8", quantization=quantization)


def measure(tensorrt: TensorRT, variant: str, graph: str, content: bytes, architecture: str) -> Row:
    single = BuildOptions(profile=BatchProfile.fixed(BATCH), architectures=(architecture,))
    summary = summarize(tensorrt.kernels(content, single), batch=BATCH)
    engine = tensorrt.build(content, BuildOptions(architectures=TARGETS[architecture]))
    return Row(
        variant=variant,
        graph=graph,
        architecture=architecture,
        kernels=summary.count,
        megabytes=round(summary.bytes_per_image * BATCH / 1e6, 1),
        engine_megabytes=round(len(engine.plan) / 1e6, 1),
        compute=dict(summary.compute_by_precision),
    )


def show(rows: list[Row]) -> None:
    """Each row, with ratios to the variant's unlowered baseline, or to its fp16 graph if that was not built."""
    table = Table(box=None, pad_edge=False)
    for heading in ("variant", "graph", "GPU", "kernels", "MB moved", "engine MB"):
        table.add_column(heading, justify="left" if heading in ("variant", "graph", "GPU") else "right")
    for row in rows:
        first = next(r for r in rows if (r.variant, r.architecture) == (row.variant, row.architecture))
        table.add_row(
            row.variant,
            row.graph,
            row.architecture,
            f"{row.kernels} ({row.kernels / first.kernels:.2f})",
            f"{row.megabytes:.0f} ({row.megabytes / first.megabytes:.2f})",
            f"{row.engine_megabytes:.1f} ({row.engine_megabytes / first.engine_megabytes:.2f})",
        )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
