"""Regenerate docs/gpu-speed.md: what limits a run from image files to records on a GPU.

    python -m scripts.gpu_speed

Computed from benchmarks/kernels.json (`python -m benchmarks.kernels`), the networks' multiply-adds, the vendor's data
sheets, and benchmarks/h100.json, which has what was measured. Needs no GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from smlp_deploy.evaluation.profile import GPUS, Gpu
from smlp_deploy.models.variants import VARIANTS, mac_count

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "gpu-speed.md"
KERNELS: dict[str, Any] = json.loads((ROOT / "benchmarks" / "kernels.json").read_text())
MEASURED: dict[str, Any] = json.loads((ROOT / "benchmarks" / "h100.json").read_text())

FLOAT32_BYTES = 224 * 224 * 3 * 4
UINT8_BYTES = 224 * 224 * 3
CORES = (8, 16, 64, 128)

_LANES = 16
_GIGATRANSFERS = {3: 8, 4: 16, 5: 32}
"""Per second and lane, by PCIe generation; 128 of 130 bits are data."""


@dataclass(frozen=True)
class Board:
    """A GPU with what the roofline estimate does not need.

    Attributes:
        gpu: memory bandwidth and peak rates.
        architecture: its own.
        compiled_for: the architecture whose kernels are counted.
        pcie: generation of its 16 lanes.
    """

    gpu: Gpu
    architecture: str
    compiled_for: str
    pcie: int

    @property
    def bus(self) -> float:
        """GB/s in one direction, at the efficiency measured on the H100."""
        return pcie_peak(self.pcie) * bus_efficiency()


_SHEETS = {gpu.name: gpu for gpu in GPUS}
L40S = Gpu(
    name="L40S",
    bandwidth=864,
    peak={"fp32": 91.6, "fp16": 362, "bf16": 362, "int8": 733},
    source="NVIDIA L40S data sheet (sparse rates halved)",
)
BOARDS = (
    Board(_SHEETS["T4"], "sm75", "sm75", 3),
    Board(_SHEETS["L4"], "sm89", "sm89", 4),
    Board(_SHEETS["A10"], "sm86", "sm89", 4),
    Board(L40S, "sm89", "sm89", 4),
    Board(_SHEETS["RTX 4090"], "sm89", "sm89", 4),
    Board(_SHEETS["A100 80GB"], "sm80", "sm89", 4),
    Board(_SHEETS["H100"], "sm90", "sm89", 5),
)


def pcie_peak(generation: int) -> float:
    """GB/s in one direction over 16 lanes."""
    return _GIGATRANSFERS[generation] * _LANES * 128 / 130 / 8


def bus_efficiency() -> float:
    """Share of the bus's peak that a copy from pinned memory reached on the H100."""
    copy = MEASURED["copy"]
    return float(copy["bytes"] / copy["milliseconds"] / 1e6 / pcie_peak(5))


def bytes_per_image(variant: str, graph: str, architecture: str) -> float:
    """What the kernels of one graph read and write for an image, without weights."""
    rows = [
        r for r in KERNELS["rows"] if (r["variant"], r["graph"], r["architecture"]) == (variant, graph, architecture)
    ]
    (row,) = rows
    return float(row["megabytes"] * 1e6 / KERNELS["batch"])


def operations(variant: str) -> float:
    """Per image; a multiply-add counts as two."""
    return 2.0 * mac_count(VARIANTS[variant].config)


@dataclass(frozen=True)
class Limits:
    """Images per second that a GPU cannot exceed, by what limits them."""

    memory: float
    arithmetic: float
    bus_float32: float
    bus_uint8: float

    @property
    def network(self) -> float:
        return min(self.memory, self.arithmetic)


def limits(board: Board, variant: str) -> Limits:
    """The limits of the fp16 engine of a network."""
    return Limits(
        memory=board.gpu.bandwidth * 1e9 / bytes_per_image(variant, "fp16", board.compiled_for),
        arithmetic=board.gpu.peak["fp16"] * 1e12 / operations(variant),
        bus_float32=board.bus * 1e9 / FLOAT32_BYTES,
        bus_uint8=board.bus * 1e9 / UINT8_BYTES,
    )


def prepared(workers: str, count: int, *, what: str = "load_image") -> dict[str, Any]:
    """What threads of one process, or processes of one thread, made of uint8 pixels from JPEG files."""
    rows = [
        row
        for row in MEASURED["decoding"]["rows"]
        if (row["what"], row["workers"], row["count"]) == (what, workers, count)
    ]
    (row,) = rows
    found: dict[str, Any] = row
    return found


def per_core() -> float:
    """Images per second that a core prepares while all cores do."""
    return float(prepared("processes", MEASURED["cores"])["images_per_second"] / MEASURED["cores"])


def in_one_process() -> float:
    """Images per second that a process prepares with as many threads as the machine has cores."""
    return float(prepared("threads", MEASURED["cores"])["images_per_second"])


def bottleneck(found: Limits, preparing: float) -> tuple[str, float]:
    """What limits a run with uint8 input whose stages overlap, and its images per second.

    Args:
        found: the GPU's limits.
        preparing: images per second that the CPU prepares.
    """
    stages = {
        "CPU": preparing,
        "bus": found.bus_uint8,
        "memory": found.memory,
        "arithmetic": found.arithmetic,
    }
    return min(stages.items(), key=itemgetter(1))


def least_milliseconds(row: dict[str, Any]) -> float:
    """The model's bound for a measured batch on the H100."""
    peak = _SHEETS["H100"].peak
    tera = peak["fp16"] if row["graph"] == "fp16" else peak["fp32"]
    if row["how"].endswith(", TF32"):
        tera = peak["fp16"] / 2  # as the data sheet has it
    memory = bytes_per_image(row["variant"], row["graph"], "sm89") / (_SHEETS["H100"].bandwidth * 1e9)
    least: float = row["batch"] * max(memory, operations(row["variant"]) / (tera * 1e12)) * 1e3
    return least


HEADING = """# Speed on a GPU

A model of a whole run, from image files to records: bytes, times and limits for seven GPUs, beside what was measured on
one. Written by `python -m scripts.gpu_speed` from the kernel list in `benchmarks/kernels.json`, the vendor's data
sheets, and the measurements in `benchmarks/h100.json`. The limits are bounds; no engine has been timed.

## The way of an image

| stage | where | for one image at 224 pixels |
|---|---|---|
| decode, resize, crop | a CPU core | {preparing:.1f} ms for a JPEG of 500 x 375; decoding alone {decoding:.1f} |
| to the GPU | the bus | {float32:,} bytes as float32, {uint8:,} as uint8 |
| network | the GPU's memory and arithmetic | the table below |
| logits back | the bus | 4,000 bytes for 1,000 classes |
| softmax, top k, record | a CPU core | not in the model |

"""

NETWORKS = """
`smlp profile` and `smlp build-engine` print the bytes of a graph ("MB read and written per image"); the operations
follow from the network's shape; the form for GPUs has an eighth more ([forms](../benchmarks/lowering.md)), which the
memory's time hides on all GPUs below. Weights are read once per batch and are not counted.
"""

LIMITS = """
## Limits

Images per second that an fp16 engine cannot exceed: memory bandwidth over bytes, and peak rate over operations. The bus
is PCIe with 16 lanes at {efficiency:.0%} of its peak, which is what a copy from pinned memory reached on the H100
({copy:.0f} GB/s).

"""

SOURCES = """
Kernels are those that TensorRT-RTX 1.7.1 lists for sm75 (T4) and sm89 (all others). It does not serve sm90, so the row
of the H100 assumes that another compiler fuses as much. The PCIe generation is the one the vendor states for the
product. Bandwidth and rates, dense:

"""

BOTTLENECK = """
## What limits a run

With every stage overlapped and uint8 input, the slowest stage sets the pace. *Cores* is how many must prepare images to
keep up with the network's bound, at {per_core:.0f} images/s each, which is what {cores} processes of one thread reached
on {cores} cores. *One process* is what {cores} threads of one process reached there.

"""

BOTTLENECK_END = """
- Preparing images is expected to limit a run on all GPUs but the T4, until many cores take part. The bus does not: even
  with float32 it allows at least {closest:.1f} times the network's bound (least on the {closest_gpu}).
- uint8 helps on the CPU first: {threads} threads prepared {as_uint8} images/s as uint8 and {as_float32} as float32.
- Threads of one process stop scaling: 1, 2, 4, 8 and 16 prepared {threads_rates} images/s, and as many
  processes {process_rates}. Single figures vary: one thread prepared 196 images/s in another run. These were measured
  before freed memory was kept for the next image; that saves 264 of 281 page faults per image, for which the threads of
  a process wait for each other, and made two threads on two cores 1.3 times as fast
  ([benchmarks](../benchmarks/README.md)). What it does on 16 cores was not measured. If the CPU limits you, split the
  folder among several `smlp predict` processes.
- Decoding is {share:.0%} of the CPU's work on such files; most of the rest is the resize. With decoding moved to the
  GPU preparing is at most {gain:.1f} times as fast. nvJPEG took, with the copy back and one at a time:
  {nvjpeg}.
  So [`--decode gpu`](images.md#decoding-on-a-gpu) gains little.
"""

MEASUREMENTS = """
## Beside measurements

One {gpu}, driver for {driver}, {cores} CPU cores, {date}.
*bound* is the model's least time; for a trained network in 16 bits it is that of the lowered graph's engine. PyTorch
ran as a CUDA graph unless it says otherwise. All data were on the GPU.

"""

MEASUREMENTS_END = """
- At batch 64 the measured time is {low:.1f} to {high:.1f} times the bound. For fp16 in the lowered form, channels last,
  the factor is {same} for all three networks: the model orders them correctly, and its scale is off. Neither program
  fuses as TensorRT does, so each moves more bytes than the kernel list has; how much of the factor is that, and how
  much is bandwidth that kernels do not reach, was not measured. Until an engine is timed, take a quarter of a limit
  as the expectation.
- At batch 1 and 8 launches and short kernels dominate, and the bound says little. Without a CUDA graph a batch of 8
  takes {eager:.1f} times as long.
- ONNX Runtime adds {host_low:.1f} to {host_high:.1f} ms for arrays in ordinary host memory; the same {megabytes:.1f} MB
  from pinned memory took {pinned:.2f} ms.
- In PyTorch the lowered form is faster than the trained network only if it is channels last.

The loop that runs engines (`runners/execution.py`: pinned memory, a stream for uploads, CUDA graphs) ran on the same
machine with PyTorch in TensorRT's place: {streamed_network}, lowered, fp16, uint8 input, batch {streamed_batch}, images
already in pinned memory.

| how | ms per batch | images/s | GPU alone, ms |
|---|---|---|---|
{streamed}
- With batches in flight a batch takes {streamed_share:.1%} of the GPU's own time: the GPU is what limits it.
- A batch of 1 took {streamed_one:g} ms with its CUDA graph and {unstreamed_one:g} ms without, one of 8
  {streamed_eight:g} and {unstreamed_eight:g} ms.

No TensorRT engine was timed: TensorRT could not be installed on that machine, and TensorRT-RTX 1.7.1 refuses the GPU
("The engine cannot run on this GPU, which has compute capability 9.0").

## Measuring it

    smlp profile my-fp16.onnx                                    # kernels and bytes of a graph, without a GPU
    smlp benchmark my.engine --end-to-end photos/ -o speed.json  # the whole run, its stages, and the GPU alone

`--end-to-end` tells how long the network ran, how long it waited, and what decoding takes alone
([Benchmark](benchmark.md)). Compare *decoding alone* with the tables first. [Testing on a GPU](gpu-testing.md) has one
command that collects everything.

## Not measured

- Any engine, on any GPU; and every GPU in the tables except the H100.
- Power and clock limits: a T4 or L4 at its power limit stays below its peak rate.
- Reading files: the model takes them from the system's cache.
- Images of other sizes: the time of a core grows with the pixels of the file, the rest stays.
- Two GPUs, or several processes on one.
"""


def _networks() -> Iterator[str]:
    yield "| network | operations | fp32 | fp16 | fp16 on sm75 |\n|---|---|---|---|---|\n"
    for name in VARIANTS:
        cells = [
            bytes_per_image(name, graph, architecture) / 1e6
            for graph, architecture in (("lowered fp32", "sm89"), ("fp16", "sm89"), ("fp16", "sm75"))
        ]
        yield f"| {name} | {operations(name) / 1e9:.1f} G | {' | '.join(f'{cell:.0f} MB' for cell in cells)} |\n"


def _limits() -> Iterator[str]:
    yield "| GPU | GB/s | fp16 Tflop/s | PCIe | bus float32 | bus uint8 "
    yield "".join(f"| {name.removeprefix('smlpnet_')}: memory | arithmetic " for name in VARIANTS)
    yield f"|\n{'|---' * (6 + 2 * len(VARIANTS))}|\n"
    for board in BOARDS:
        found = {name: limits(board, name) for name in VARIANTS}
        any_network = next(iter(found.values()))
        yield f"| {board.gpu.name}, {board.architecture} | {board.gpu.bandwidth:g} | {board.gpu.peak['fp16']:g} "
        yield f"| {board.pcie}.0 | {_round(any_network.bus_float32)} | {_round(any_network.bus_uint8)} "
        yield "".join(f"| {_round(limit.memory)} | {_round(limit.arithmetic)} " for limit in found.values()) + "|\n"


def _bottlenecks() -> Iterator[str]:
    yield f"| GPU | network | bound, images/s | cores | one process | {' | '.join(f'{n} cores' for n in CORES)} |\n"
    yield f"{'|---' * (5 + len(CORES))}|\n"
    for board in BOARDS:
        for name in VARIANTS:
            found = limits(board, name)
            rates = (in_one_process(), *(cores * per_core() for cores in CORES))
            yield f"| {board.gpu.name} | {name} | {_round(found.network)} | {math.ceil(found.network / per_core())} "
            yield (
                "".join(f"| {stage}, {_round(rate)} " for stage, rate in (bottleneck(found, n) for n in rates)) + "|\n"
            )


def _measured() -> Iterator[str]:
    yield "| software | network | how | batch | ms | images/s | bound, ms | times the bound |\n"
    yield f"{'|---' * 8}|\n"
    for kind in ("pytorch", "onnxruntime"):
        for row in MEASURED[kind]["rows"]:
            least = least_milliseconds(row)
            rate = row["batch"] / row["milliseconds"] * 1e3
            yield f"| {MEASURED[kind]['software']} | {row['variant']} | {row['how']} | {row['batch']} "
            yield f"| {row['milliseconds']} | {_round(rate)} | {least:.2f} | {row['milliseconds'] / least:.1f} |\n"


def _round(value: float) -> str:
    """Three digits, which is more than the model is worth."""
    digits = max(0, math.floor(math.log10(value)) - 2)
    return f"{round(value / 10**digits) * 10**digits:,}"


def _conclusions() -> dict[str, Any]:
    """What the text under the measurements says in figures."""
    torch_rows, ort_rows = MEASURED["pytorch"]["rows"], MEASURED["onnxruntime"]["rows"]
    large = [row for row in (*torch_rows, *ort_rows) if row["batch"] == 64]
    factors = [row["milliseconds"] / least_milliseconds(row) for row in large]
    best = [row["milliseconds"] / least_milliseconds(row) for row in large if "channels last" in row["how"]]
    eight = {row["how"]: row["milliseconds"] for row in torch_rows if row["batch"] == 8}
    host = [row["from_host"] - row["milliseconds"] for row in ort_rows]
    return {
        "low": min(factors),
        "high": max(factors),
        "same": f"{min(best):.1f} to {max(best):.1f}",
        "eager": eight["trained, fp16, without a CUDA graph"] / eight["trained, fp16"],
        "host_low": min(host),
        "host_high": max(host),
        "megabytes": MEASURED["copy"]["bytes"] / 1e6,
        "pinned": MEASURED["copy"]["milliseconds"],
        **_about_the_loop(),
    }


def _about_the_loop() -> dict[str, Any]:
    """What the text about the loop that runs engines says in figures."""
    loop = MEASURED["execution"]
    rows = "".join(
        f"| {row['how']} | {row['milliseconds']:g} | {row['images_per_second']:,} | {loop['gpu_milliseconds']:g} |\n"
        for row in loop["rows"]
    )
    return {
        "streamed_network": loop["variant"],
        "streamed_batch": loop["batch"],
        "streamed": rows,
        "streamed_share": loop["rows"][0]["milliseconds"] / loop["gpu_milliseconds"],
        "streamed_one": loop["graphs"]["1"],
        "streamed_eight": loop["graphs"]["8"],
        "unstreamed_one": loop["no_graphs"]["1"],
        "unstreamed_eight": loop["no_graphs"]["8"],
    }


def _about_the_cpu() -> dict[str, Any]:
    """What the text about preparing images says in figures."""
    networks = [(board, limits(board, name)) for board in BOARDS for name in VARIANTS]
    closest, found = min(networks, key=lambda pair: pair[1].bus_float32 / pair[1].network)
    whole, alone = (
        prepared("processes", MEASURED["cores"], what=what)["cpu_milliseconds"] for what in ("load_image", "decode")
    )
    counts = (1, 2, 4, 8, 16)
    return {
        "closest": found.bus_float32 / found.network,
        "closest_gpu": closest.gpu.name,
        "threads": MEASURED["pixels"]["threads"],
        "as_uint8": MEASURED["pixels"]["uint8_images_per_second"],
        "as_float32": MEASURED["pixels"]["float32_images_per_second"],
        "threads_rates": ", ".join(str(prepared("threads", count)["images_per_second"]) for count in counts),
        "process_rates": ", ".join(str(prepared("processes", count)["images_per_second"]) for count in counts),
        "preparing": whole,
        "decoding": alone,
        "share": alone / whole,
        "gain": whole / (whole - alone),
        "nvjpeg": ";\n  ".join(
            f"{row['with_copy_back']:g} ms for {row['image']} (Pillow: {row['pillow']:g})"
            for row in MEASURED["nvjpeg"]["rows"]
        ),
        "per_core": per_core(),
        "cores": MEASURED["cores"],
    }


def page() -> str:
    """The page."""
    cpu, copy = _about_the_cpu(), MEASURED["copy"]
    return "".join(
        [
            HEADING.format(float32=FLOAT32_BYTES, uint8=UINT8_BYTES, **cpu),
            *_networks(),
            NETWORKS,
            LIMITS.format(efficiency=bus_efficiency(), copy=copy["bytes"] / copy["milliseconds"] / 1e6),
            *_limits(),
            SOURCES,
            *(f"- {board.gpu.name}: {board.gpu.source}\n" for board in BOARDS),
            BOTTLENECK.format(**cpu),
            *_bottlenecks(),
            BOTTLENECK_END.format(**cpu),
            MEASUREMENTS.format(**{key: MEASURED[key] for key in ("gpu", "driver", "cores", "date")}),
            *_measured(),
            MEASUREMENTS_END.format(**_conclusions()),
        ]
    )


def main() -> None:
    """Write the page."""
    TARGET.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
