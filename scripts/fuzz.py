"""Mutated files through the public entry points, in child processes; whatever is not a one-line refusal is a finding.

python -m scripts.fuzz --minutes 20                            all kinds, on two processes
python -m scripts.fuzz --inputs 5000 --kind png --kind onnx    so many inputs, of these kinds only
python -m scripts.fuzz --replay 0:1234 --kind png              make input 1234 of seed 0 again, examine it, save it
python -m scripts.fuzz --check artifacts/fuzz/png/*.png        examine files; the folder's name is the kind

An input is made from the seed, its kind and its index alone (and the installed libraries, which write the files that
are mutated). Two thirds of them are edited along their format, so that checksums and lengths still fit and what lies
behind the first check is reached; the rest, and some of these, are damaged as bytes. Each is given to

    images                      load_image; every eighth with the seven after it and a good one to Classifier.classify
    pth, safetensors, card      load_checkpoint, describe, one inference (card: the JSON beside a good .pth)
    onnx, metadata              inspect_file, open_runner, infer, classify (metadata: only what smlp wrote inside)
    engine                      read_manifest, inspect_file, for a stand-in engine that every second JSON is about
    table                       read_table

What is read must also be writable again. Findings are:

    traceback   an exception that is not an SmlpError
    crash       the child died
    hang        one input took longer than --limit seconds
    memory      the resident set grew by more than the kind's bound, in MiB: see KINDS
    records     another number of records than inputs, another order, or a good image without its result
    message     an error that is empty, longer than 2,000 characters or has control characters in it

They are told apart by kind, exception and the innermost line in smlp_deploy. The smallest input of each is saved under
--output as KIND/SEED-INDEX.SUFFIX; tests/data/fuzz holds those found so far, and test_fuzz.py examines them again.
The exit code is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import smlp_deploy
from scripts.fuzz_inputs import IMAGES, KINDS, STAND_IN_ENGINE, build_corpus, make_input, read_corpus
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
BATCH = 8
CHUNK = 40
LONGEST_MESSAGE = 2000
HEADROOM = 3 << 30  # bytes that a child may allocate beyond what it starts with
INPUTS_PER_CHILD = 20_000
START_S = 120.0
GRACE_S = 15.0


# -------------------------------------------------------------------------------------------------- in a child process


@dataclass(frozen=True)
class Verdict:
    """What became of one input.

    Attributes:
        what: "accepted", "refused", or the finding.
        detail: the error's text, for a person.
        exception: its type.
        where: the innermost line in smlp_deploy, as file:line.
        grew: MiB by which the resident set grew.
    """

    what: str
    detail: str = ""
    exception: str = ""
    where: str = ""
    grew: int = 0

    @property
    def is_finding(self) -> bool:
        return self.what not in ("accepted", "refused")


class Broken(Exception):  # noqa: N818
    """The package did something it never may."""

    def __init__(self, what: str, detail: str) -> None:
        super().__init__(detail)
        self.what = what


class Examiner:
    """Drives the entry points with one file at a time, and watches.

    Args:
        folder: with the corpus; a folder of its own in there takes the inputs.
        kinds: those that will be asked for.
        seed: of the inputs.
    """

    def __init__(self, folder: Path, kinds: Sequence[str], seed: int) -> None:
        self.seed = seed
        self.corpus = read_corpus(folder, kinds)
        self.beside = folder / "beside"
        self.good_image = self.beside / "good.png"
        self.work = Path(tempfile.mkdtemp(dir=folder, prefix="work"))
        self.classifier = Classifier.open(self.beside / "good.pth")
        for kind in kinds:  # so that what is loaded or kept once is not the first input's
            for content in self.corpus[kind]:
                self.examine(kind, content)

    def examine_made(self, kind: str, index: int) -> Verdict:
        """Examine input `index`."""
        neighbours = range(index + 1, index + BATCH) if kind in IMAGES and index % BATCH == 0 else ()
        others = [make_input(self.corpus, kind, self.seed, other) for other in neighbours]
        return self.examine(kind, make_input(self.corpus, kind, self.seed, index), others)

    def examine(self, kind: str, content: bytes, others: Sequence[bytes] = ()) -> Verdict:
        """Give `content` to everything that takes its kind; for an image with `others` in one batch, if there are."""
        path = self._written(f"input{KINDS[kind].suffix}", content)
        paths = [self._written(f"other{i}{KINDS[kind].suffix}", other) for i, other in enumerate(others)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        verdict = Verdict("accepted")
        for step in self.steps(kind, path, paths):
            verdict = _judged(step, verdict)
            if verdict.is_finding:
                break
        grew = (memory("VmHWM") - before) >> 20
        if grew > KINDS[kind].memory and not verdict.is_finding:
            verdict = Verdict("memory", f"grew by {grew} MiB, then was {verdict.what}: {verdict.detail}")
        return replace(verdict, grew=grew)

    def _written(self, name: str, content: bytes) -> Path:
        path = self.work / name
        path.unlink(missing_ok=True)  # the last one of this name may still be mapped
        path.write_bytes(content)
        return path

    def steps(self, kind: str, path: Path, others: Sequence[Path]) -> tuple[Callable[[], object], ...]:
        """What is called, one after the other, whether or not the one before refused."""
        if kind in IMAGES:
            return (lambda: self._load_image(path), *((lambda: self._classify(path, others),) if others else ()))
        if kind in ("onnx", "metadata"):
            return (lambda: _facts(path), lambda: self._run_graph(path))
        if kind == "engine":
            engine = self._written(path.name.removesuffix(".json"), STAND_IN_ENGINE)
            return (lambda: read_manifest(engine).to_json().encode(), lambda: _facts(engine))
        if kind == "table":
            return (lambda: read_table(path).to_json().encode(),)
        if kind == "card":
            path = self._written(path.with_suffix(".pth").name, (self.beside / "good.pth").read_bytes())
        return (lambda: self._run_checkpoint(path), lambda: _facts(path))

    def _load_image(self, path: Path) -> None:
        preprocessing = self.classifier.runner.metadata.preprocessing
        image = load_image(path, preprocessing)
        wanted = (3, preprocessing.image_size, preprocessing.image_size)
        if image.shape != wanted or image.dtype != np.float32 or not np.isfinite(image).all():
            raise Broken("records", f"an image became {image.dtype} {image.shape}")

    def _classify(self, path: Path, others: Sequence[Path]) -> None:
        paths = [path, *others[: BATCH // 2], self.good_image, *others[BATCH // 2 :]]
        records = list(self.classifier.classify(paths, batch_size=BATCH, workers=1))
        _check_records(records, paths)
        if records[paths.index(self.good_image)].error is not None:
            raise Broken("records", f"a good image got {records[paths.index(self.good_image)].error}")

    def _run_graph(self, path: Path) -> None:
        with open_runner(path) as runner:
            size, classes = runner.metadata.preprocessing.image_size, len(runner.metadata.labels)
            runner.metadata.to_json().encode()
            if size <= 256:  # else the next lines see to it
                logits = runner.infer(np.zeros((2, 3, size, size), np.float32))
                if logits.shape != (2, classes) or logits.dtype != np.float32:
                    raise Broken("records", f"logits are {logits.dtype} {logits.shape}, labels {classes}")
            _check_records(list(Classifier(runner).classify([self.good_image], workers=1)), [self.good_image])

    def _run_checkpoint(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        size = checkpoint.config.image_size
        with torch.inference_mode():
            checkpoint.network()(torch.zeros(1, 3, size, size))
        describe(checkpoint).to_json().encode()


def _facts(path: Path) -> None:
    json.dumps(inspect_file(path)).encode()


def _check_records(records: Sequence[Prediction], paths: Sequence[Path]) -> None:
    if [record.path for record in records] != [str(path) for path in paths]:
        raise Broken("records", f"{len(records)} records for {len(paths)} inputs, or in another order")
    for record in records:
        if record.error is not None:
            _check_message(record.error)


def _check_message(message: str) -> None:
    odd = [c for c in message if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    if odd or not message or len(message) > LONGEST_MESSAGE:
        raise Broken("message", f"{len(message)} characters, {len(odd)} of them odd: {message[:200]!r}")


def _judged(step: Callable[[], object], before: Verdict) -> Verdict:
    try:
        step()
    except KeyboardInterrupt:
        raise
    # Rust's panics are no Exceptions.
    except BaseException as error:
        return _verdict_of(error)
    return before


def _verdict_of(error: BaseException) -> Verdict:
    what, cause = "traceback", error
    if isinstance(error, SmlpError):
        try:
            _check_message(str(error))
            return Verdict("refused", str(error), type(error).__name__)
        except Broken as broken:
            cause = broken
    if isinstance(cause, Broken):
        what = cause.what
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
    where = f"{Path(frames[-1].filename).relative_to(PACKAGE)}:{frames[-1].lineno}" if frames else ""
    text = "".join(traceback.format_exception(error)) if what == "traceback" else str(cause)
    return Verdict(what, text[-4000:], type(error).__name__, where)


def memory(name: str) -> int:
    """Bytes of this process, as the kernel counts them: VmRSS, VmHWM, VmData."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(name)


@dataclass(frozen=True)
class Task:
    """Inputs `first` to `first + count` of a kind; or the content of a file."""

    kind: str
    first: int = 0
    count: int = 1
    content: bytes | None = None


@dataclass(frozen=True)
class Setup:
    """What a child is told at its start."""

    folder: Path
    kinds: tuple[str, ...]
    seed: int = 0
    limit: float = 10.0
    examiner: type[Examiner] = Examiner


def serve(connection: Connection, setup: Setup, core: int, log: Path) -> None:
    """A child's life: examine what the connection asks for until it closes. Its output goes to `log`."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        faulthandler.enable(output)
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
        examiner = setup.examiner(setup.folder, setup.kinds, setup.seed)
        limits = {resource.RLIMIT_DATA: memory("VmData") + HEADROOM, resource.RLIMIT_FSIZE: 64 << 20}
        for number, limit in {**limits, resource.RLIMIT_CORE: 0}.items():
            resource.setrlimit(number, (limit, limit))
        connection.send(Verdict("accepted"))
        while True:
            try:
                task: Task = connection.recv()
            except EOFError:
                return
            for index in range(task.first, task.first + task.count):
                faulthandler.dump_traceback_later(setup.limit, exit=True, file=output)
                if task.content is None:
                    verdict = examiner.examine_made(task.kind, index)
                else:
                    verdict = examiner.examine(task.kind, task.content)
                faulthandler.cancel_dump_traceback_later()
                connection.send(verdict)


# ------------------------------------------------------------------------------------------------ around the children


class Child:
    """A process that examines inputs, started anew whenever one kills it.

    Args:
        setup: what it is told.
        number: of this child, which decides its core.
    """

    def __init__(self, setup: Setup, number: int = 0) -> None:
        self._setup = setup
        cores = sorted(os.sched_getaffinity(0))
        self._core = cores[number % len(cores)]
        self._log = setup.folder / f"child-{number}.log"
        self._process: multiprocessing.process.BaseProcess | None = None
        self._served = 0

    def verdicts(self, task: Task) -> Iterator[Verdict]:
        """One verdict per input of `task`, in their order."""
        done = 0
        while done < task.count:
            self._ensure()
            self._connection.send(replace(task, first=task.first + done, count=task.count - done))
            while done < task.count:
                verdict = self._received(self._setup.limit + GRACE_S)
                done += 1
                self._served += 1
                yield verdict
                if self._process is None:
                    break

    def _ensure(self) -> None:
        if self._served >= INPUTS_PER_CHILD:
            self.close()
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, self._setup, self._core, self._log), daemon=True)
        self._process.start()
        other.close()
        self._served = 0
        if self._received(START_S).is_finding:
            raise RuntimeError(f"a child does not start:\n{self._log.read_text()}")

    def _received(self, seconds: float) -> Verdict:
        try:
            if self._connection.poll(seconds):
                verdict: Verdict = self._connection.recv()
                return verdict
        except (EOFError, ConnectionResetError):
            pass
        return self._post_mortem()

    def _post_mortem(self) -> Verdict:
        """What the log of a child that died or hangs says; the child is gone then."""
        assert self._process is not None
        self._process.join(2)
        code = self._process.exitcode
        self.close()
        log = self._log.read_text(errors="replace")[-4000:]
        hung = code is None or "Timeout (" in log
        frame = re.search(rf'File "{re.escape(PACKAGE)}/([^"]+)", line (\d+)', log)
        where = f"{frame[1]}:{frame[2]}" if frame else ""
        return Verdict("hang" if hung else "crash", f"exit code {code}\n{log}", "" if hung else f"exit {code}", where)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._connection.close()
            self._process.join(1)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None


class Schedule:
    """Hands out inputs to whoever asks, each kind by its weight, until they or the time are used up."""

    def __init__(self, kinds: Sequence[str], *, inputs: int | None, seconds: float | None) -> None:
        self.handed = dict.fromkeys(kinds, 0)
        self._left = math.inf if inputs is None else inputs
        self._end = math.inf if seconds is None else time.monotonic() + seconds
        self._lock = threading.Lock()

    def next(self) -> Task | None:
        with self._lock:
            count = int(min(self._left, CHUNK, max(1, self._left // len(self.handed))))
            if count == 0 or time.monotonic() > self._end:
                return None
            kind = min(self.handed, key=lambda kind: self.handed[kind] / KINDS[kind].weight)
            task = Task(kind, self.handed[kind], count)
            self.handed[kind] += count
            self._left -= count
            return task

    def stop(self) -> None:
        """No more after what was handed out."""
        self._left = 0


@dataclass
class Count:
    """Inputs of one kind by what became of them, and the most MiB that one took."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    findings: int = 0
    most_mib: int = 0


@dataclass(frozen=True)
class Finding:
    """One way to break the package: its smallest input so far, and how many there were."""

    kind: str
    verdict: Verdict
    path: Path
    size: int
    replay: str
    times: int = 1


@dataclass
class Tally:
    """What was found; threads write to it one at a time."""

    kinds: Sequence[str]
    output: Path
    counts: dict[str, Count] = field(init=False)
    findings: dict[tuple[str, ...], Finding] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.counts = {kind: Count() for kind in self.kinds}

    def add(self, kind: str, name: str, verdict: Verdict, content: Callable[[], bytes]) -> None:
        """Count a verdict; of a finding, keep the input if it is the smallest."""
        with self.lock:
            count = self.counts[kind]
            count.inputs += 1
            count.accepted += verdict.what == "accepted"
            count.refused += verdict.what == "refused"
            count.findings += verdict.is_finding
            count.most_mib = max(count.most_mib, verdict.grew)
            if verdict.is_finding:
                self._keep(kind, name, verdict, content())

    def _keep(self, kind: str, name: str, verdict: Verdict, content: bytes) -> None:
        key = (kind, verdict.what, verdict.exception, verdict.where)
        known = self.findings.get(key)
        if known is not None:
            self.findings[key] = replace(known, times=known.times + 1)
            if known.size <= len(content):
                return
            known.path.unlink(missing_ok=True)
        path = self.output / kind / f"{name.replace(':', '-')}{KINDS[kind].suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        replay = f"python -m scripts.fuzz --replay {name} --kind {kind}"
        self.findings[key] = Finding(kind, verdict, path, len(content), replay, known.times + 1 if known else 1)


def fuzz(setup: Setup, schedule: Schedule, tally: Tally, *, jobs: int) -> None:
    """Have `jobs` children examine what `schedule` hands out. Ctrl-C ends it early and well."""
    corpus = read_corpus(setup.folder, setup.kinds)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        child = Child(setup, number)
        try:
            while task := schedule.next():
                for index, verdict in enumerate(child.verdicts(task), task.first):
                    content = partial(make_input, corpus, task.kind, setup.seed, index)
                    tally.add(task.kind, f"{setup.seed}:{index}", verdict, content)
        except BaseException as error:  # given to the main thread
            failures.append(error)
            schedule.stop()
        finally:
            child.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(jobs)]
    for thread in threads:
        thread.start()
    try:
        _watch(threads, tally)
    except KeyboardInterrupt:
        schedule.stop()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _watch(threads: Sequence[threading.Thread], tally: Tally) -> None:
    console = Console(stderr=True)
    text = TextColumn("{task.completed} inputs, {task.fields[findings]} findings")
    with Progress(BarColumn(), text, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("fuzzing", total=None, findings=0)
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.5) if threads[0].is_alive() else time.sleep(0.1)
            done = sum(count.inputs for count in tally.counts.values())
            progress.update(bar, completed=done, findings=len(tally.findings))


def check_files(setup: Setup, files: Sequence[tuple[str, Path]]) -> list[Verdict]:
    """Verdicts on files of these kinds, from one child."""
    child = Child(setup)
    try:
        return [v for kind, path in files for v in child.verdicts(Task(kind, content=path.read_bytes()))]
    finally:
        child.close()


def replay(setup: Setup, kind: str, index: int) -> Verdict:
    """The verdict on input `index`, from a child of its own."""
    child = Child(setup)
    try:
        return next(child.verdicts(Task(kind, index)))
    finally:
        child.close()


# ----------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    kinds = tuple(options.kind or KINDS)
    with tempfile.TemporaryDirectory(prefix="smlp-fuzz-") as name:
        build_corpus(Path(name), kinds)
        seed = options.replay[0] if options.replay else options.seed
        setup = Setup(Path(name), kinds, seed, options.limit)
        if options.check:
            return _show(options.check, check_files(setup, [(path.parent.name, path) for path in options.check]))
        if options.replay:
            return _replay(setup, options.replay[1], options.output)
        started = time.monotonic()
        seconds = None if options.minutes is None else 60 * options.minutes
        tally = Tally(kinds, options.output)
        fuzz(setup, Schedule(kinds, inputs=options.inputs, seconds=seconds), tally, jobs=options.jobs)
    _report(tally, seed, time.monotonic() - started, options.json)
    return 1 if tally.findings else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after these (20, if there is no --inputs)")
    parser.add_argument("--inputs", type=int, help="stop after so many")
    parser.add_argument("--jobs", type=int, default=2, help="child processes (2)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this one; may be given again")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds that one input may take (10)")
    parser.add_argument("--output", type=Path, default=Path("artifacts/fuzz"), help="where findings are saved")
    parser.add_argument("--json", type=Path, help="write the counts and findings to this file, too")
    parser.add_argument(
        "--replay", type=_seed_and_index, metavar="SEED:INDEX", help="one input again; needs one --kind"
    )
    parser.add_argument("--check", type=Path, nargs="+", metavar="KIND/FILE", help="examine these files")
    options = parser.parse_args(arguments)
    if options.replay and len(options.kind or ()) != 1:
        parser.error("--replay needs one --kind")
    if options.check:
        unknown = {path.parent.name for path in options.check} - set(KINDS)
        if unknown:
            parser.error(f"--check takes files in folders named like their kind, not {', '.join(sorted(unknown))}")
        options.kind = sorted({path.parent.name for path in options.check})
    if options.minutes is None and options.inputs is None:
        options.minutes = 20.0
    return options


def _seed_and_index(text: str) -> tuple[int, int]:
    seed, _, index = text.partition(":")
    return int(seed), int(index)


def _replay(setup: Setup, index: int, output: Path) -> int:
    (kind,) = setup.kinds
    path = output / kind / f"{setup.seed}-{index}{KINDS[kind].suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(make_input(read_corpus(setup.folder, setup.kinds), kind, setup.seed, index))
    return _show([path], [replay(setup, kind, index)])


def _show(paths: Sequence[Path], verdicts: Sequence[Verdict]) -> int:
    for path, verdict in zip(paths, verdicts, strict=True):
        print(f"{path}: {verdict.what} {verdict.exception} {verdict.where} (+{verdict.grew} MiB)\n{verdict.detail}")
    return 1 if any(verdict.is_finding for verdict in verdicts) else 0


def _report(tally: Tally, seed: int, seconds: float, target: Path | None) -> None:
    counts = {kind: asdict(count) for kind, count in tally.counts.items()}
    names = list(asdict(Count()))
    total = {name: (max if name == "most_mib" else sum)(count[name] for count in counts.values()) for name in names}
    table = Table("kind", *names, title=f"seed {seed}, {seconds:.0f} s")
    for kind, count in {**counts, "all": total}.items():
        table.add_row(kind, *(str(count[name]) for name in names))
    Console().print(table)
    for finding in tally.findings.values():
        verdict = finding.verdict
        print(f"\n{finding.kind}: {verdict.what} {verdict.exception} {verdict.where}, {finding.times} times")
        print(f"{verdict.detail}\n  {finding.path}\n  {finding.replay}")
    if target is not None:
        findings = [{**asdict(finding), "path": str(finding.path)} for finding in tally.findings.values()]
        document = {"seed": seed, "seconds": round(seconds), "kinds": counts, "all": total, "findings": findings}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
