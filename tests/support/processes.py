"""Commands in processes of their own, which get a signal at a point of their work, not after some time."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
"""Those that all tests together may use; each process of a parallel run has one of them."""

_CONTEXT = multiprocessing.get_context("forkserver")
# What is imported there is there in all commands; the fuzzer's children come from the same process.
_COMMANDS = [
    f"smlp_deploy.commands.{verb}" for verb in ("build_engine", "eval", "export", "predict", "sources", "verify")
]
_CONTEXT.set_forkserver_preload(
    ["scripts.fuzz", *_COMMANDS, "smlp_deploy.pipeline.build", "smlp_deploy.pipeline.export"]
)

_RUN = """
import runpy
runpy.run_module("smlp_deploy", run_name="__main__", alter_sys=True)
"""

_AT_OPEN = """
import os, sys

left = {times}

def see(event, arguments):
    global left
    if event == "open" and str(arguments[0]).startswith({folder!r}):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), {number})

sys.addaudithook(see)
"""

_WITH_TRACES = """
from pathlib import Path
from smlp_deploy.exporters import onnx
from tests.support.graphs import remembering

onnx._trace = remembering(onnx._trace, Path({folder!r}))
"""

_AFTER_BYTES = """
import io, os
from types import SimpleNamespace
from smlp_deploy.inference import resume

class File(io.FileIO):
    def write(self, data):
        room = {after} - self.tell()
        written = super().write(data[:room] if {torn} and 0 < room < len(data) else data)
        if 0 < room <= written:
            os.kill(os.getpid(), {number})
        return written

resume.io = SimpleNamespace(FileIO=File, StringIO=io.StringIO)
"""


def start(*arguments: str | Path, before: str = "", **settings: Any) -> subprocess.Popen[str]:
    """`smlp` with arguments, after the code `before`, which the functions below give; stderr is a pipe."""
    command = [sys.executable, "-c", before + _RUN, *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **{**pipes, "preexec_fn": allow_ctrl_c, "text": True, **settings})


class Forked:
    """`smlp` in a process forked from one that has imported it, which saves seconds; see `start` for the arguments."""

    def __init__(self, *arguments: str | Path, before: str = "") -> None:
        self._ours, theirs = _CONTEXT.Pipe(duplex=False)
        self._process = _CONTEXT.Process(target=_run, args=(theirs, [*map(str, arguments)], before))
        self._process.start()
        theirs.close()

    def wait(self) -> tuple[int | None, str]:
        """Its exit code and stderr."""
        with os.fdopen(os.dup(self._ours.fileno()), encoding="utf-8") as stream:
            err = stream.read()
        self._ours.close()
        self._process.join()
        return self._process.exitcode, err


def run_verb(*arguments: str | Path, before: str = "", fresh: bool = False) -> tuple[int | None, str]:
    """Exit code and stderr of `smlp`, forked, or in an interpreter of its own, whose end may go wrong, too."""
    if not fresh:
        return Forked(*arguments, before=before).wait()
    with start(*arguments, before=before) as process:
        err = process.communicate()[1]
    return process.returncode, err


def _run(stderr: Connection, arguments: list[str], before: str) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for source, target in ((null, 0), (null, 1), (stderr.fileno(), 2)):
        os.dup2(source, target)
    stderr.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a new interpreter does
    sys.argv[1:] = arguments
    exec(before, {})
    runpy.run_module("smlp_deploy", run_name="__main__", alter_sys=True)


def at_open(folder: Path, number: signal.Signals, *, times: int = 1) -> str:
    """Code that gives its process a signal just before it opens a file below a folder for the given time."""
    return _AT_OPEN.format(folder=str(folder), number=int(number), times=times)


def with_traces(folder: Path) -> str:
    """Code that has networks traced once for all processes; see `remembering`."""
    return _WITH_TRACES.format(folder=str(folder))


def after_bytes(number: signal.Signals, after: int) -> str:
    """Code that gives its process a signal once a file of records has grown to `after` bytes.

    SIGKILL comes in the middle of a record; other signals come after the batch in which that many bytes were passed.
    """
    return _AFTER_BYTES.format(after=after, number=int(number), torn=number == signal.SIGKILL)


def on_all_cores() -> None:
    """For processes that mostly wait, as those of a cluster; and what `allow_ctrl_c` does."""
    allow_ctrl_c()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES)


def allow_ctrl_c() -> None:
    """A shell has its background processes ignore it, and they pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
