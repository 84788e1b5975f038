"""sMLPNet on this CPU: our artifacts beside PyTorch and the unlowered baseline, and beside the CPU's own limit.

    python -m benchmarks.cpu [VARIANT ...] [--batch N ...] [--rounds N] [--processes N] [--cores N] [--json FILE]
    python -m benchmarks.cpu [VARIANT ...] --counters

Each variant gets the seeded weights of `tests/support/recipe.py`. Every row has a process of its own and only one runs
at a time, in turns, so that other load on the machine affects all alike. Our rows run as `smlp predict` runs them; the
others through each library's own interface, on as many threads. The limit is what one matrix product of 3072 x 3072 x
3072 in PyTorch does in a second, over the network's multiplications and additions. At batch 1 cores wait for each other
hundreds of times an image, and where a virtual machine's host has them can make all runs of some minutes a third
slower: take several processes with --processes.

With --counters, OpenVINO's own time for each kind of operation in our files, in place of the comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from smlp_deploy.images.batches import FloatArray, available_cores

SEED = 1
LIMIT = 3072
"""Rows and columns of the matrices whose product is the limit."""
FILES = ("unlowered", "fp32", "gpu-fp32", "fp16", "bf16", "int8")


class Row(NamedTuple):
    """What is timed: a backend, and the file it runs (of `FILES`), or what PyTorch computes in."""

    name: str
    backend: str
    subject: str


ROWS = (
    Row("OpenVINO, unlowered, its default", "openvino-default", "unlowered"),
    Row("OpenVINO, unlowered, fp32", "openvino-fp32", "unlowered"),
    Row("ONNX Runtime, unlowered", "onnxruntime-plain", "unlowered"),
    Row("PyTorch, fp32", "pytorch", "float32"),
    Row("PyTorch, bf16", "pytorch", "bfloat16"),
    Row("torch.compile, fp32", "compile", "float32"),
    Row("torch.compile, bf16", "compile", "bfloat16"),
    Row("smlp fp32, ONNX Runtime", "onnxruntime", "fp32"),
    Row("smlp fp32, OpenVINO", "openvino", "fp32"),
    Row("smlp fp32 for GPUs, ONNX Runtime", "onnxruntime", "gpu-fp32"),
    Row("smlp fp32 for GPUs, OpenVINO", "openvino", "gpu-fp32"),
    Row("smlp fp16, OpenVINO", "openvino", "fp16"),
    Row("smlp bf16, OpenVINO", "openvino", "bf16"),
    Row("smlp int8, ONNX Runtime", "onnxruntime", "int8"),
    Row("smlp int8, OpenVINO", "openvino", "int8"),
    Row("limit, fp32", "limit", "float32"),
    Row("limit, bf16", "limit", "bfloat16"),
)


def write_files(variant: str, folder: Path, subjects: set[str]) -> None:
    """Write the weights, those of `FILES` in `subjects`, and the operations of an image to `work.json`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from smlp_deploy.exporters.onnx import export_onnx, export_unlowered
    from smlp_deploy.graphs.file import Graph
    from smlp_deploy.images.defaults import bundled_images
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.description import describe
    from smlp_deploy.models.variants import VARIANTS
    from smlp_deploy.pipeline.precision import Int8Options, plan_quantization, to_precision
    from tests.support.recipe import recipe_weights

    weights = folder / "weights.pth"
    torch.save(recipe_weights(VARIANTS[variant].config, SEED), weights)
    checkpoint = load_checkpoint(weights)

    def save(name: str, graph: Graph) -> None:
        graph.save(folder / f"{name}.onnx")

    def lowered(form: str) -> Graph:
        metadata = replace(describe(checkpoint), form=form)
        return export_onnx(checkpoint.network(), metadata, path=folder / "lowered.onnx")

    fp32 = lowered("cpu")
    save("fp32", fp32)
    if "unlowered" in subjects:
        save("unlowered", export_unlowered(checkpoint.network(), describe(checkpoint), path=folder / "unlowered.onnx"))
    if "gpu-fp32" in subjects:
        save("gpu-fp32", lowered("gpu"))
    for precision in sorted(subjects & {"fp16", "bf16"}):
        save(precision, to_precision(fp32, precision))
    if "int8" in subjects:
        quantization = plan_quantization(fp32, Int8Options(images=tuple(bundled_images())))
        save("int8", to_precision(fp32, "int8", quantization=quantization))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        checkpoint.network()(torch.zeros(1, 3, checkpoint.config.image_size, checkpoint.config.image_size))
    (folder / "work.json").write_text(json.dumps(counter.get_total_flops()))


def runnable(row: Row, folder: Path, cores: int) -> Callable[[FloatArray], object]:
    """What computes the logits of a batch, loaded from a folder that `write_files` filled."""
    path = folder / f"{row.subject}.onnx"
    if row.backend in ("pytorch", "compile", "limit"):
        return _pytorch(row, folder, cores)
    if row.backend == "onnxruntime":
        from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

        return OnnxRuntimeRunner.open(path).infer
    if row.backend == "openvino":
        from smlp_deploy.runners.openvino import OpenVinoRunner

        return OpenVinoRunner.open(path).infer
    if row.backend == "onnxruntime-plain":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda batch: session.run(None, {"images": batch})
    import openvino

    hint = {"INFERENCE_PRECISION_HINT": "f32"} if row.backend == "openvino-fp32" else {}
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": cores, **hint})
    return lambda batch: compiled([batch])


def _pytorch(row: Row, folder: Path, cores: int) -> Callable[[FloatArray], object]:
    import torch

    torch.set_num_threads(cores)
    dtype = getattr(torch, row.subject)
    if row.backend == "limit":
        left, right = torch.randn(2, LIMIT, LIMIT, dtype=torch.float32).to(dtype)
        return lambda _: left @ right
    from smlp_deploy.models.checkpoint import load_checkpoint

    network = load_checkpoint(folder / "weights.pth").network().to(dtype)
    if row.backend == "compile":
        network = cast(Any, torch.compile(network))

    def run(batch: FloatArray) -> object:
        with torch.inference_mode():
            return network(torch.from_numpy(batch).to(dtype))

    return run


def serve(row: Row, folder: Path, cores: int) -> None:
    """Time one run for each line on standard input, a batch size.

    A run that is not timed precedes each: the threads of the row before may still wait busily for work.
    """
    run = runnable(row, folder, cores)
    batches: dict[int, FloatArray] = {}
    for line in sys.stdin:
        size = int(line)
        if size not in batches:
            batches[size] = np.random.default_rng(size).standard_normal((size, 3, 224, 224), dtype=np.float32)
        run(batches[size])
        started = time.perf_counter()
        run(batches[size])
        print(time.perf_counter() - started, flush=True)


class Server:
    """A process that times one row."""

    def __init__(self, row: Row, folder: Path, cores: int) -> None:
        self.row = row
        command = (sys.executable, "-m", "benchmarks.cpu", "--row", row.name, "--folder", str(folder))
        environment = os.environ | {"OMP_NUM_THREADS": str(cores), "XDG_CACHE_HOME": str(folder / "cache")}
        self._process = subprocess.Popen(  # noqa: S603
            (*command, "--cores", str(cores)), env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, batch: int) -> None:
        """Start a run."""
        stdin = cast(IO[str], self._process.stdin)
        stdin.write(f"{batch}\n")
        stdin.flush()

    def answer(self) -> float:
        """The seconds of the run that was asked for.

        Raises:
            RuntimeError: the process ended instead.
        """
        line = cast(IO[str], self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"{self.row.name} ended with status {self._process.wait()}")
        return float(line)

    def close(self) -> None:
        cast(IO[str], self._process.stdin).close()
        self._process.wait()


@contextmanager
def servers(rows: Iterable[Row], folder: Path, cores: int) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        started = []
        for row in rows:
            server = Server(row, folder, cores)
            stack.callback(server.close)
            started.append(server)
        yield started


def measure(
    rows: Sequence[Row], folder: Path, batches: Sequence[int], *, rounds: int, cores: int, processes: int
) -> Iterator[dict[str, Any]]:
    """The seconds of every run: for each process and batch size a dict with the row's name, the size and the runs."""
    for _ in range(processes):
        with servers(rows, folder, cores) as started:
            for batch in batches:
                for name, runs in take_turns(started, batch, rounds=rounds).items():
                    yield {"row": name, "batch": batch, "seconds": runs}


def take_turns(started: Sequence[Server], batch: int, *, rounds: int) -> dict[str, list[float]]:
    """The seconds of each row's runs with one batch size."""
    for server in started:
        server.ask(batch)  # all at once: they warm up, and torch.compile compiles
    for server in started:
        server.answer()
    seconds: dict[str, list[float]] = {server.row.name: [] for server in started}
    for _ in range(rounds):
        for server in started:
            server.ask(batch)
            seconds[server.row.name].append(server.answer())
    return seconds


def milliseconds(row: str, batch: int, seconds: Sequence[float], operations: float) -> float:
    """Of an image, by the median; for a limit those of as many operations as an image takes."""
    if row.startswith("limit"):
        return 1e3 * operations * median(seconds) / (2 * LIMIT**3)
    return 1e3 * median(seconds) / batch


def show(variant: str, results: Sequence[dict[str, Any]], operations: float) -> None:
    """A line for each row, with the milliseconds of an image at each batch size and their share of the first row's."""
    batches = sorted({result["batch"] for result in results})
    seconds: dict[tuple[str, int], list[float]] = {}
    for result in results:
        seconds.setdefault((result["row"], result["batch"]), []).extend(result["seconds"])
    figures = {(row, batch): milliseconds(row, batch, runs, operations) for (row, batch), runs in seconds.items()}
    table = Table(box=None, pad_edge=False, title=f"{variant}, milliseconds for an image (ratio to the first row)")
    for heading in ("", *(f"batch {batch}" for batch in batches)):
        table.add_column(heading, justify="right" if heading else "left")
    first = results[0]["row"]
    for name in dict.fromkeys(result["row"] for result in results):
        cells = (
            f"{figures[name, batch]:.1f} ({figures[name, batch] / figures[first, batch]:.2f})" for batch in batches
        )
        table.add_row(name, *cells)
    Console(highlight=False, width=110).print(table)


def show_counters(variant: str, folder: Path, batch: int, cores: int) -> None:
    """OpenVINO's time for each kind of operation, in the files that it runs differently."""
    import openvino

    core = openvino.Core()
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
    native = "bf16" if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    for name, hint in (("fp32", "f32"), ("bf16", native), ("int8", "f32"), ("int8", native)):
        model = core.read_model(folder / f"{name}.onnx")
        model.reshape([batch, *images.shape[1:]])
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": cores, "PERF_COUNT": True}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        total: Counter[str] = Counter()
        runs = 5
        for run in range(runs + 2):
            request.infer([images])
            for info in request.profiling_info if run >= 2 else ():
                total[f"{info.node_type} {info.exec_type}"] += info.real_time.total_seconds() / runs
        print(f"{variant} {name} in {hint}: {1e3 * sum(total.values()) / batch:.1f} ms for an image")
        for kind, seconds in total.most_common(14):
            print(f"  {1e3 * seconds / batch:7.2f}  {kind}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sMLPNet on this CPU, beside PyTorch and the unlowered baseline.")
    parser.add_argument("variants", nargs="*", default=["smlpnet_tiny"], metavar="VARIANT")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processes", type=int, default=1, help="Of each row, one after another.")
    parser.add_argument("--cores", type=int, default=available_cores())
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="TEXT", help="Leave out rows with this in the name."
    )
    parser.add_argument("--counters", action="store_true")
    parser.add_argument("--json", type=Path, help="Also write every run's seconds here.")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    if arguments.row:
        serve(next(row for row in ROWS if row.name == arguments.row), arguments.folder, arguments.cores)
        return
    rows = [row for row in ROWS if not any(text in row.name for text in arguments.without)]
    document: dict[str, Any] = {"cores": arguments.cores, "variants": {}}
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_files(variant, folder, set(FILES) if arguments.counters else {row.subject for row in rows})
            if arguments.counters:
                show_counters(variant, folder, arguments.batch[0], arguments.cores)
                continue
            operations = json.loads((folder / "work.json").read_text())
            results: list[dict[str, Any]] = []
            document["variants"][variant] = {"operations": operations, "runs": results}
            for result in measure(
                rows,
                folder,
                arguments.batch,
                rounds=arguments.rounds,
                cores=arguments.cores,
                processes=arguments.processes,
            ):
                results.append(result)
                if arguments.json:  # after each, because a run takes long and may be stopped
                    arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        show(variant, results, operations)


if __name__ == "__main__":
    main()
