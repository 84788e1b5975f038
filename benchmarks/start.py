"""Time and memory of whole commands, beside an earlier version: a cold start, exports, and a long run.

    python -m benchmarks.start [--before CHECKOUT] [--rounds N] [--only NAME ...] [--json FILE]

Each command is a process of its own, and versions take turns. *wall* is the time that a user waits; *cpu* is less
sensitive to what else the machine does. Memory is the largest resident size of the process. The networks are the
bundled model and smlpnet_tiny with seeded weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
IMAGES = sorted((ROOT / "images").glob("*.jpg"))
PHOTO = ROOT / "smlp_deploy" / "data" / "parity" / "chelsea.jpg"
CALIBRATION, MANY = 64, 10_000

BARE = """
import sys
import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
with Image.open(sys.argv[2]) as image:
    pixels = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BICUBIC), np.float32)
batch = np.ascontiguousarray(((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None])
logits = session.run(None, {"images": batch})[0][0]
probabilities = np.exp(logits - logits.max())
probabilities /= probabilities.sum()
for index in np.argsort(-probabilities)[:5]:
    print(index, probabilities[index])
"""
"""The least that classifies one image from an ONNX file."""

TYPER = f"""
import sys
from pathlib import Path
from typing import Annotated
import typer

app = typer.Typer()

@app.command()
def predict(image: Path, model: Annotated[Path | None, typer.Option()] = None) -> None:
    sys.argv[1:] = [str(model), str(image)]
    exec(compile({BARE!r}, "bare", "exec"), {{}})

app()
"""
"""The same behind a command line of two parameters."""

SEEDED = """
import sys
import torch
from tests.support.recipe import CASES, config_of, recipe_weights

case = CASES["smlpnet_tiny"]
torch.save({"model": recipe_weights(config_of(case), case["seed"])}, sys.argv[1])
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """Each command, by name, and the files that it needs."""
    tiny, digits, photos, many = folder / "tiny.pth", folder / "digits-fp32.onnx", folder / "photos", folder / "many"
    run([sys.executable, "-c", SEEDED, str(tiny)], ROOT, folder)
    smlp = [sys.executable, "-m", "smlp_deploy"]
    run([*smlp, "export", "-o", str(digits)], ROOT, folder)
    run([*smlp, "export", str(tiny), "-o", str(folder / "tiny-fp32.onnx")], ROOT, folder)
    photos.mkdir()
    for number in range(CALIBRATION):
        shutil.copy(PHOTO, photos / f"{number}.jpg")
    for name, count in (("few", 100), ("many", MANY)):
        (folder / name).mkdir()
        for number in range(count):
            source = IMAGES[number % len(IMAGES)]
            copy = folder / f"source-{source.name}"
            if not copy.exists():
                shutil.copy(source, copy)
            os.link(copy, folder / name / f"{number}.jpg")
    predict = [*smlp, "predict", "--format", "jsonl", "--model"]
    return {
        "bare script": [sys.executable, "-c", BARE, str(digits), str(IMAGES[0])],
        "bare script behind typer": [sys.executable, "-c", TYPER, str(IMAGES[0]), "--model", str(digits)],
        "predict one image": [*smlp, "predict", str(IMAGES[0]), "--model", str(digits)],
        "export tiny": [*smlp, "export", str(tiny), "-o", str(folder / "x.onnx")],
        "export tiny in int8": [
            *(*smlp, "export", str(tiny), "--int8", "--calibration-data", str(photos)),
            *("-o", str(folder / "y.onnx")),
        ],
        "predict 64 photos with tiny": [*predict, str(folder / "tiny-fp32.onnx"), str(photos)],
        "predict 100 digits": [*predict, str(digits), str(folder / "few")],
        f"predict {MANY:,} digits": [*predict, str(digits), str(many)],
    }


def run(command: list[str], code: Path, folder: Path) -> dict[str, float]:
    """Run a command with the package of a checkout; seconds, CPU seconds, and the peak of its memory in MB."""
    environment = os.environ | {"PYTHONPATH": str(code.absolute())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as they are for users
    started = time.perf_counter()
    with (folder / "errors").open("w+") as errors:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)  # noqa: S603
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{command} ended with {process.returncode}: {errors.read()}")
    seconds = time.perf_counter() - started
    return {"wall": seconds, "cpu": usage.ru_utime + usage.ru_stime, "megabytes": usage.ru_maxrss / 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of whole commands.")
    parser.add_argument("--before", type=Path, help="A checkout of an earlier version.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="Beginnings of the commands' names.")
    parser.add_argument("--json", type=Path, help="Write every run to this file.")
    arguments = parser.parse_args()
    versions = ({"before": arguments.before} if arguments.before else {}) | {"now": ROOT}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = {
            what: command
            for what, command in commands(folder).items()
            if not arguments.only or what.startswith(tuple(arguments.only))
        }
        for _ in range(arguments.rounds):
            for what, command in wanted.items():
                for version, code in versions.items():
                    if what.startswith("bare") and version == "before":  # it is the same in both
                        continue
                    measured = run(command, code, folder)
                    found.setdefault(what, {}).setdefault(version, []).append(measured)
                    print(f"{what}, {version}: {measured}", file=sys.stderr)
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def show(found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Medians, and the medians of the ratios to the version before, as a table."""
    print("| command | version | wall s | CPU s | peak MB |\n|---|---|---|---|---|")
    for what, versions in found.items():
        first: list[Any] = next(iter(versions.values()))
        for version, runs in versions.items():
            cells = []
            for name in ("wall", "cpu", "megabytes"):
                ratio = median(this[name] / other[name] for this, other in zip(runs, first, strict=True))
                middle = median(this[name] for this in runs)
                cells.append(f"{middle:.3g} ({ratio:.2f})" if len(versions) > 1 else f"{middle:.3g}")
            print(f"| {what} | {version} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
