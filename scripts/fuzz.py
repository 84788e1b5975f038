"""Mutated files through the public entry points, in child processes; whatever is not a one-line refusal is a finding.

python -m scripts.fuzz --minutes 20                            all kinds, on two processes
python -m scripts.fuzz --inputs 5000 --kind png --kind onnx    so many inputs, of these kinds only
python -m scripts.fuzz --check artifacts/fuzz/png/*.png        examine files again; the folder's name is the kind

Hypothesis makes the inputs out of real files (`fuzz_inputs.py`), most of them edited along their format so that what
lies behind the first check is reached, and shrinks what fails. Native decoders crash, hang and take memory, which it
cannot survive in one process: hence the children. Each input is given to

    images                         load_image, and up to eight in one batch with a good one to Classifier.classify
    pth, safetensors, sidecar      load_checkpoint, describe, one inference (sidecar: the JSON beside a good .pth)
    onnx, metadata                 inspect_file, open_runner, infer, classify (metadata: only what smlp wrote inside)
    engine                         read_manifest, inspect_file
    table                          read_table

What is read must also be writable again. Findings are:

    traceback   an exception that is not an SmlpError
    crash       the child died
    hang        one input took longer than --limit seconds
    memory      the resident set grew by more than the kind's bound, in MiB: see KINDS
    records     another number of records than inputs, another order, or a good image without its result
    message     an error that is empty, longer than 2,000 characters or has control characters in it
    files       something was left in the folder of the input, where temporary files belong too

They are told apart by kind, exception and the innermost line in smlp_deploy, and the smallest input of each is saved
under --output: KIND/WHAT. Those found so far are in tests/data/fuzz. The exit code is 1 if there are any.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase
from hypothesis.database import InMemoryExampleDatabase
from rich.console import Console
from rich.table import Table

import smlp_deploy
from scripts.fuzz_corpus import IMAGES, build_corpus, read_corpus
from scripts.fuzz_inputs import KINDS, inputs
from smlp_deploy.errors import SmlpError
from smlp_deploy.exporters.calibration import read_table
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.inference.classify import Classifier, Prediction
from smlp_deploy.inspect_file import inspect_file
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.tensorrt import read_manifest

PACKAGE = str(Path(smlp_deploy.__file__).parent)
LONGEST_MESSAGE = 2000
HEADROOM = 3 << 30  # bytes that a child may allocate beyond what it starts with
CHUNK = 100  # inputs of a kind of weight 1 in one search


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one input.

    Attributes:
        kind: of the input.
        what: "accepted", "refused", or the finding.
        detail: the error's text, for a person.
        exception: its type.
        where: the innermost line in smlp_deploy, as file:line.
        grew: MiB by which the resident set grew.
    """

    kind: str = ""
    what: str = "accepted"
    detail: str = ""
    exception: str = ""
    where: str = ""
    grew: int = 0

    @property
    def is_finding(self) -> bool:
        return self.what not in ("accepted", "refused")

    @property
    def key(self) -> tuple[str, ...]:
        """What tells a finding from others."""
        return self.kind, self.what, self.exception, self.where


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run.

    Attributes:
        folder: with the corpus; children keep their files there, and a log of verdicts.
        output: where findings are saved.
        kinds: of inputs to make, in turn.
        seed: of the inputs.
        inputs: how many each child examines.
        end: when to stop, by time.time.
        limit: seconds that one input may take.
        files: examine these and make none; each is in a folder named like its kind.
    """

    folder: Path
    output: Path
    kinds: tuple[str, ...] = tuple(KINDS)
    seed: int = 0
    inputs: float = float("inf")
    end: float = float("inf")
    limit: float = 10.0
    files: tuple[Path, ...] = ()


# -------------------------------------------------------------------------------------------------- in a child process


class Broken(Exception):  # noqa: N818
    """The package did something it never may."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(detail)
        self.what = what


class Found(Exception):  # noqa: N818
    """Tells Hypothesis that an input is a finding; each key has a class of its own, so that each is shrunk."""

    @staticmethod
    @cache
    def of(key: tuple[str, ...]) -> type[Found]:
        return type("Found", (Found,), {"key": key})


class Examiner:
    """Drives the entry points with one input at a time, and watches.

    Args:
        setup: of the run.
        number: of this child.
    """

    def __init__(self, setup: Setup, number: int) -> None:
        self.setup, self.work, self.beside = setup, setup.folder / f"work-{number}", setup.folder / "beside"
        self.log, self.corpus = setup.folder / f"verdicts-{number}.jsonl", read_corpus(setup.folder, setup.kinds)
        self.done, self.seed = read_verdicts(setup.folder, number), setup.seed * 1_000_003 + number
        self.work.mkdir(exist_ok=True)
        tempfile.tempdir = str(self.work)
        self.classifier = Classifier.open(self.beside / "good.pth")
        for kind in setup.kinds:  # so that what is loaded or kept once is not the first input's
            for content in self.corpus[kind]:
                self.examine(kind, (content,))

    def run(self) -> None:
        """Go on from what the log says was done."""
        for path in self.setup.files[len(self.done) :]:
            batch = (path, *sorted(path.parent.glob(f"{path.name}.[1-7]")))
            self.report(self.examine(path.parent.name, tuple(each.read_bytes() for each in batch)))
        if self.setup.files:
            return
        total = sum(KINDS[kind].weight for kind in self.setup.kinds)
        chunk = min(CHUNK, self.setup.inputs / total)
        for kind in itertools.cycle(self.setup.kinds):
            left = self.setup.inputs - len(self.done)
            if left <= 0 or time.time() > self.setup.end:
                return
            self.search(kind, int(max(1, min(left, chunk * KINDS[kind].weight))))

    def search(self, kind: str, count: int) -> None:
        """Examine inputs that Hypothesis makes, and those it shrinks findings to."""
        known = {verdict.key for verdict in self.done}

        @hypothesis.settings(
            phases=(Phase.reuse, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            deadline=None,  # which it would compare afterwards; faulthandler ends what hangs
            database=InMemoryExampleDatabase(),
            verbosity=hypothesis.Verbosity.quiet,
        )
        @hypothesis.given(inputs(kind, self.corpus[kind]))
        def examine(files: tuple[bytes, ...]) -> None:
            if time.time() > self.setup.end:
                raise KeyboardInterrupt
            verdict = self.examine(kind, files)
            self.report(verdict)
            if verdict.is_finding and verdict.key not in known:
                raise Found.of(verdict.key)

        start = len(self.done)
        rng = Random(self.seed + 64 * start)  # noqa: S311
        while len(self.done) < start + count:
            try:
                # Half of what its own generate phase makes are doublets of what it made before.
                examine.hypothesis.fuzz_one_input(rng.randbytes(4096))  # type: ignore[attr-defined]
            except Found:
                try:
                    examine()
                # They are reported; a flaky one fails only once.
                except* (Found, hypothesis.errors.Flaky):
                    pass
                known = {verdict.key for verdict in self.done}

    def report(self, verdict: Verdict) -> None:
        """Log a verdict, and save a finding's input."""
        self.done.append(verdict)
        record(self.setup, self.log, verdict, self.work)

    def examine(self, kind: str, files: tuple[bytes, ...]) -> Verdict:
        """Give an input to everything that takes its kind."""
        shutil.rmtree(self.work)  # files of the last one may still be mapped, so they are not written over
        self.work.mkdir()
        paths = [self.work / f"input{i}{KINDS[kind].suffix}" for i in range(len(files))]
        for path, content in zip(paths, files, strict=True):
            path.write_bytes(content)
        (self.work / "kind").write_text(kind)
        steps = self.steps(kind, paths)
        present = set(self.work.iterdir())
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, verdict, recursion = memory("VmRSS"), Verdict(), sys.getrecursionlimit()
        sys.setrecursionlimit(1000)  # Hypothesis raises it
        faulthandler.dump_traceback_later(self.setup.limit, exit=True, file=2)
        for step in (*steps, lambda: self._check_folder(present)):
            verdict = _judged(step, verdict)
            if verdict.is_finding:
                break
        faulthandler.cancel_dump_traceback_later()
        sys.setrecursionlimit(recursion)
        grew = (memory("VmHWM") - before) >> 20
        if grew > KINDS[kind].memory and not verdict.is_finding:
            verdict = Verdict(what="memory", detail=f"grew by {grew} MiB, then was {verdict.what}: {verdict.detail}")
        return replace(verdict, kind=kind, grew=grew)

    def steps(self, kind: str, paths: Sequence[Path]) -> tuple[Callable[[], object], ...]:
        """What is called, one after the other, whether or not the one before refused."""
        path = paths[0]
        if kind in IMAGES:
            return (lambda: self._load_image(path), lambda: self._classify(paths))
        if kind in ("onnx", "metadata"):
            return (lambda: _facts(path), lambda: self._run_graph(path))
        if kind == "engine":
            engine = path.with_suffix("")
            shutil.copy(self.beside / "x.engine", engine)
            return (lambda: read_manifest(engine).to_json().encode(), lambda: _facts(engine))
        if kind == "table":
            return (lambda: read_table(path).to_json().encode(),)
        if kind == "sidecar":
            path = path.with_suffix(".pth")
            shutil.copy(self.beside / "good.pth", path)
        return (lambda: self._run_checkpoint(path), lambda: _facts(path))

    def _load_image(self, path: Path) -> None:
        preprocessing = self.classifier.runner.metadata.preprocessing
        image = load_image(path, preprocessing)
        wanted = (3, preprocessing.image_size, preprocessing.image_size)
        if image.shape != wanted or image.dtype != np.float32 or not np.isfinite(image).all():
            raise Broken("records", f"an image became {image.dtype} {image.shape}")

    def _classify(self, paths: Sequence[Path]) -> None:
        middle, good = len(paths) // 2, self.beside / "good.png"
        _classify(self.classifier, [*paths[: middle + 1], good, *paths[middle + 1 :]])

    def _run_graph(self, path: Path) -> None:
        with open_runner(path) as runner:
            size, classes = runner.metadata.preprocessing.image_size, len(runner.metadata.labels)
            runner.metadata.to_json().encode()
            if size <= 256:  # else the next lines see to it
                logits = runner.infer(np.zeros((2, *runner.metadata.input_shape), runner.metadata.input))
                if logits.shape != (2, classes) or logits.dtype != np.float32:
                    raise Broken("records", f"logits are {logits.dtype} {logits.shape}, labels {classes}")
            _classify(Classifier(runner), [self.beside / "good.png"], any_result=True)

    def _run_checkpoint(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        size = checkpoint.config.image_size
        with torch.inference_mode():
            checkpoint.network()(torch.zeros(1, 3, size, size))
        describe(checkpoint).to_json().encode()

    def _check_folder(self, present: set[Path]) -> None:
        if more := set(self.work.iterdir()) - present:
            raise Broken("files", f"left behind: {', '.join(sorted(path.name for path in more))}")


def _facts(path: Path) -> None:
    json.dumps(inspect_file(path)).encode()


def _classify(classifier: Classifier, paths: Sequence[Path], *, any_result: bool = False) -> None:
    records: list[Prediction] = list(classifier.classify(paths, batch_size=8, workers=1))
    if [record.path for record in records] != [str(path) for path in paths]:
        raise Broken("records", f"{len(records)} records for {len(paths)} inputs, or in another order")
    for record in records:
        if record.error is not None:
            _check_message(record.error)
            if Path(record.path).name == "good.png" and not any_result:
                raise Broken("records", f"a good image got {record.error}")


def _check_message(message: str) -> None:
    odd = [c for c in message if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    if odd or not message or len(message) > LONGEST_MESSAGE:
        raise Broken("message", f"{len(message)} characters, {len(odd)} of them odd: {message[:200]!r}")


def _judged(step: Callable[[], object], before: Verdict) -> Verdict:
    try:
        try:
            step()
            return before
        except SmlpError as error:
            _check_message(str(error))
            return Verdict(what="refused", detail=str(error), exception=type(error).__name__)
    except KeyboardInterrupt:
        raise
    # Rust's panics are no Exceptions.
    except BaseException as error:
        source = error.__context__ if isinstance(error, Broken) and error.__context__ else error
        frames = [frame for frame in traceback.extract_tb(source.__traceback__) if frame.filename.startswith(PACKAGE)]
        where = f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else ""
        what = error.what if isinstance(error, Broken) else "traceback"
        text = str(error) if isinstance(error, Broken) else "".join(traceback.format_exception(error))
        return Verdict(what=what, detail=text[-4000:], exception=type(source).__name__, where=where)


def memory(name: str) -> int:
    """Bytes of this process, as the kernel counts them: VmRSS, VmHWM, VmData."""
    (line,) = re.findall(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(line) << 10


def serve(make: type[Examiner], setup: Setup, number: int) -> None:
    """A child's life."""
    with (setup.folder / f"child-{number}.log").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.enable(2)
    torch.set_num_threads(1)
    hypothesis.configuration.set_hypothesis_home_dir(setup.folder / "hypothesis")
    with suppress(KeyboardInterrupt):
        examiner = make(setup, number)
        (setup.folder / f"ready-{number}").touch()
        limits = {resource.RLIMIT_DATA: memory("VmData") + HEADROOM, resource.RLIMIT_FSIZE: 64 << 20}
        for resource_limit, most in {**limits, resource.RLIMIT_CORE: 0}.items():
            resource.setrlimit(resource_limit, (most, most))
        examiner.run()


# ------------------------------------------------------------------------------------------------ around the children


def record(setup: Setup, log: Path, verdict: Verdict, work: Path) -> None:
    """Append a verdict to the log; of a finding, keep the input that is in the folder `work` if it is the smallest."""
    with log.open("a") as file:
        file.write(json.dumps(asdict(verdict)) + "\n")
    if not verdict.is_finding or setup.files:
        return
    target = saved(setup, verdict)
    target.parent.mkdir(parents=True, exist_ok=True)
    made = sorted(work.glob(f"input*{KINDS[verdict.kind].suffix}"))
    kept = [path for path in (target, *target.parent.glob(f"{target.name}.?")) if path.exists()]
    if not kept or sum(path.stat().st_size for path in made) < sum(path.stat().st_size for path in kept):
        for path in kept:
            path.unlink()
        for i, path in enumerate(made):  # an image, and those that it needs beside it
            shutil.copy(path, target.with_name(target.name + f".{i}" * (i > 0)))


def saved(setup: Setup, verdict: Verdict) -> Path:
    """Where the smallest input of a finding is."""
    name = re.sub(r"\W+", "-", " ".join(filter(None, verdict.key[1:])))
    return setup.output / verdict.kind / f"{name}{KINDS[verdict.kind].suffix}"


def read_verdicts(folder: Path, number: int | str = "*") -> list[Verdict]:
    """What a child, or all of them, logged so far."""
    logs = sorted(folder.glob(f"verdicts-{number}.jsonl"))
    return [Verdict(**json.loads(line)) for log in logs for line in log.read_text().splitlines()]


def fuzz(setup: Setup, *, jobs: int = 1, examiner: type[Examiner] = Examiner) -> list[Verdict]:
    """The verdicts of `jobs` children, each started anew when an input kills it. Ctrl-C ends them early and well."""
    with ThreadPoolExecutor(jobs) as pool, Console(stderr=True).status("starting") as status:
        running = [pool.submit(_keep_running, setup, number, examiner) for number in range(jobs)]
        with suppress(KeyboardInterrupt):
            while wait(running, 1).not_done:
                status.update(f"{sum(log.read_bytes().count(10) for log in setup.folder.glob('*.jsonl'))} inputs")
    for each in running:
        each.result()
    return read_verdicts(setup.folder)


def _keep_running(setup: Setup, number: int, examiner: type[Examiner]) -> None:
    log, ready = setup.folder / f"child-{number}.log", setup.folder / f"ready-{number}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.fuzz"])  # most of a child's start is imports
    while True:
        ready.unlink(missing_ok=True)
        process = context.Process(target=serve, args=(examiner, setup, number), daemon=True)
        process.start()
        process.join()
        if process.exitcode == 0:
            return
        text = log.read_text(errors="replace")[-4000:]
        if (process.exitcode == 1 and "Timeout (" not in text) or not ready.exists():
            raise RuntimeError(f"a child failed:\n{text}")
        work = setup.folder / f"work-{number}"
        hung = "Timeout (" in text
        frame = re.search(rf'File "{re.escape(PACKAGE)}/([^"]+)", line (\d+)', text)
        verdict = Verdict(
            kind=(work / "kind").read_text(),
            what="hang" if hung else "crash",
            detail=f"exit code {process.exitcode}\n{text}",
            exception="" if hung else f"exit {process.exitcode}",
            where=f"{frame[1]}:{frame[2]}" if frame else "",
        )
        record(setup, setup.folder / f"verdicts-{number}.jsonl", verdict, work)


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    kinds = tuple(sorted({path.parent.name for path in options.check}) or options.kind or KINDS)
    with tempfile.TemporaryDirectory(prefix="smlp-fuzz-") as name:
        build_corpus(Path(name), kinds)
        started = time.time()
        setup = Setup(
            folder=Path(name),
            output=options.output,
            kinds=kinds,
            seed=options.seed,
            inputs=-(-options.inputs // options.jobs) if options.inputs else float("inf"),
            end=started + 60 * (options.minutes or (1e9 if options.inputs else 20)),
            limit=options.limit,
            files=tuple(options.check),
        )
        verdicts = fuzz(setup, jobs=1 if options.check else options.jobs)
    for path, verdict in zip(options.check, verdicts, strict=bool(options.check)):
        print(f"{path}: {verdict.what} {verdict.exception} {verdict.where} (+{verdict.grew} MiB)\n{verdict.detail}")
    if not options.check:
        _report(setup, verdicts, time.time() - started)
    return 1 if any(verdict.is_finding for verdict in verdicts) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the inputs; the same libraries make the same ones")
    parser.add_argument("--minutes", type=float, help="stop after these (20, if there is no --inputs)")
    parser.add_argument("--inputs", type=int, help="stop after so many")
    parser.add_argument("--jobs", type=int, default=2, help="child processes (2)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this one; may be given again")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that one input may take (10)")
    parser.add_argument("--output", type=Path, default=Path("artifacts/fuzz"), help="where findings are saved")
    parser.add_argument("--check", type=Path, nargs="+", default=[], metavar="KIND/FILE", help="examine these files")
    options = parser.parse_args(arguments)
    if unknown := {path.parent.name for path in options.check} - set(KINDS):
        parser.error(f"--check takes files in folders named like their kind, not {', '.join(sorted(unknown))}")
    return options


def _report(setup: Setup, verdicts: Sequence[Verdict], seconds: float) -> None:
    table = Table("kind", "inputs", "accepted", "refused", "findings", "most MiB")
    table.title = f"seed {setup.seed}, {seconds:.0f} s"
    for kind in (*setup.kinds, "all"):
        of = [verdict for verdict in verdicts if kind in (verdict.kind, "all")]
        accepted, refused = (sum(verdict.what == what for verdict in of) for what in ("accepted", "refused"))
        numbers = (len(of), accepted, refused, len(of) - accepted - refused, max((v.grew for v in of), default=0))
        table.add_row(kind, *map(str, numbers))
    Console().print(table)
    findings = {verdict.key: verdict for verdict in verdicts if verdict.is_finding}
    for key, verdict in findings.items():
        print(f"\n{' '.join(key)}, {sum(v.key == key for v in verdicts)} times\n{verdict.detail}")
        print(f"  python -m scripts.fuzz --check {saved(setup, verdict)}")


if __name__ == "__main__":
    sys.exit(main())
