"""Collect what to report from a machine with a GPU: checks, tests, engines and timings, in one folder.

    python -m scripts.gpu_report [FOLDER]

`make test-gpu` installs an environment and runs this in it. A step that fails does not stop the others; the exit code
is 1 if one did. docs/gpu-testing.md says what is in the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "images"
SMLP = (sys.executable, "-m", "smlp_deploy")
BACKENDS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Each backend and its module."""
PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: of its log, without `.txt`.
        command: with all arguments.
    """

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a step; no code means that it did not start."""

    step: Step
    code: int | None
    seconds: float


def run(step: Step, folder: Path) -> Outcome:
    """Run a step with both of its streams in a log."""
    started = time.monotonic()
    with (folder / f"{step.name}.txt").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(step.command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, check=False).returncode  # noqa: S603
        except OSError as error:
            log.write(f"{step.command[0]}: {error.strerror}\n")
            code = None
    return Outcome(step, code, time.monotonic() - started)


def first_steps(folder: Path) -> Iterator[Step]:
    """The machine, its packages, the checks of doctor, and the tests."""
    if nvidia_smi := shutil.which("nvidia-smi"):
        yield Step("nvidia-smi", (nvidia_smi, "--query"))
    yield Step("packages", (sys.executable, "-m", "pip", "freeze"))
    yield Step("doctor", (*SMLP, "doctor"))
    tests = (sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-ra", f"--junit-xml={folder / 'tests.xml'}")
    yield Step("tests", (*tests, "tests/test_gpu.py", "tests/images/test_gpu_decode.py"))


def engine_steps(folder: Path, backends: Sequence[str]) -> Iterator[Step]:
    """The bundled model as an ONNX file, then in fp32 and fp16 as an engine of each backend."""
    yield Step("export", (*SMLP, "export", "--quiet", "-o", str(folder / "digits.onnx")))
    for backend in backends:
        for precision in ("fp32", "fp16"):
            target = folder / f"{backend}-{precision}.engine"
            command = ("build-engine", str(folder / "digits.onnx"), f"--{precision}", "--target", backend)
            yield Step(target.stem, (*SMLP, *command, "-o", str(target)))


def timing_steps(folder: Path, providers: Sequence[str]) -> Iterator[Step]:
    """The ONNX file on each provider, and the engines that ran here, from files to records."""
    onnx = folder / "digits.onnx"
    if not onnx.is_file():
        return
    for provider in providers:
        yield _timing(folder, f"benchmark-{provider}", (str(onnx), "--provider", provider))
    if engines := [str(path) for path in sorted(folder.glob("*.engine")) if ran_here(path)]:
        yield _timing(folder, "benchmark-engines", tuple(engines))


def _timing(folder: Path, name: str, arguments: tuple[str, ...]) -> Step:
    report = ("--end-to-end", str(IMAGES), "-o", str(folder / f"{name}.json"))
    return Step(name, (*SMLP, "benchmark", *arguments, *report))


def ran_here(engine: Path) -> bool:
    """Whether an engine was compared with its ONNX file on this GPU."""
    manifest = json.loads(engine.with_name(engine.name + ".json").read_text(encoding="utf-8"))
    return bool(manifest["ran_here"])


def installed_backends() -> list[str]:
    return [backend for backend, module in BACKENDS.items() if find_spec(module) is not None]


def listed_providers() -> list[str]:
    """The GPU providers that the installed ONNX Runtime lists."""
    if find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    listed = onnxruntime.get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider in listed]


def count_tests(report: Path) -> tuple[Counter[str], Counter[str]]:
    """How many tests passed, failed or were skipped, and how often each reason was given for the latter."""
    if not report.is_file():
        return Counter(), Counter()
    kinds, reasons = Counter[str](), Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314 - pytest has just written it
        skipped = case.find("skipped")
        broken = case.find("failure") is not None or case.find("error") is not None
        kinds["failed" if broken else "passed" if skipped is None else "skipped"] += 1
        if skipped is not None:
            reasons[skipped.get("message", "")] += 1
    return kinds, reasons


def summary(outcomes: Sequence[Outcome], folder: Path) -> str:
    """What happened, as Markdown."""
    lines = ["| step | exit code | seconds |", "|---|---|---|"]
    for outcome in outcomes:
        code = "did not start" if outcome.code is None else outcome.code
        lines.append(f"| {outcome.step.name} | {code} | {outcome.seconds:.0f} |")
    kinds, reasons = count_tests(folder / "tests.xml")
    counted = ", ".join(f"{kinds[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    lines += ["", f"Tests: {counted}."]
    lines += [f"- skipped {count}: {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every step; 1 if one failed or no test passed."""
    parser = argparse.ArgumentParser(description="Collect what to report from a machine with a GPU.")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "gpu-report")
    folder: Path = parser.parse_args(arguments).folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    outcomes: list[Outcome] = []
    stages: tuple[Callable[[], Iterable[Step]], ...] = (  # each looks at what the one before has left
        lambda: first_steps(folder),
        lambda: engine_steps(folder, installed_backends()),
        lambda: timing_steps(folder, listed_providers()),
    )
    for steps in stages:
        for step in steps():
            print(step.name, flush=True)
            outcomes.append(run(step, folder))
    text = summary(outcomes, folder)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nin {folder}")
    kinds, _ = count_tests(folder / "tests.xml")
    return int(any(outcome.code != 0 for outcome in outcomes) or not kinds["passed"])


if __name__ == "__main__":
    sys.exit(main())
