"""Commands in processes of their own, which get a signal at a point of their work, not after some time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    """`smlp` with arguments, after the code `before`, which `at_open` or `after_bytes` gives; stderr is a pipe."""
    command = [sys.executable, "-c", before + _RUN, *map(str, arguments)]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **{**pipes, "preexec_fn": allow_ctrl_c, "text": True, **settings})


def at_open(folder: Path, number: signal.Signals, *, times: int = 1) -> str:
    """Code that gives its process a signal just before it opens a file below a folder for the given time."""
    return _AT_OPEN.format(folder=str(folder), number=int(number), times=times)


def after_bytes(number: signal.Signals, after: int) -> str:
    """Code that gives its process a signal once a file of records has grown to `after` bytes.

    SIGKILL comes in the middle of a record; other signals come after the batch in which that many bytes were passed.
    """
    return _AFTER_BYTES.format(after=after, number=int(number), torn=number == signal.SIGKILL)


def allow_ctrl_c() -> None:
    """A shell has its background processes ignore it, and they pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
