from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO

import pytest

import smlp_deploy
from smlp_deploy.__main__ import run

RUN = """
import atexit, os, sys
import smlp_deploy.cli
from smlp_deploy.__main__ import run

class Held:
    def __del__(self, write=os.write):
        write(1, b"freed")

held = Held()

def command():
    atexit.register(print, "handler")
    print("output")
    {end}

smlp_deploy.cli.main = command
run()
"""


SMLP = "runpy.run_module('smlp_deploy', run_name='__main__', alter_sys=True)"


def ended(end: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """A process whose command does `end` last."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", RUN.format(end=end)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment)


@pytest.mark.parametrize("code", [0, 1, 7])
def test_exit_handlers_run_and_nothing_is_freed_after_them(code: int) -> None:
    found = ended(f"sys.exit({code})")
    assert (found.returncode, found.stdout, found.stderr) == (code, "output\nhandler\n", "")


def test_a_bug_ends_as_python_ends_it() -> None:
    found = ended("raise KeyError('lost')")
    assert found.returncode == 1
    assert found.stdout == "output\nhandler\nfreed"
    assert found.stderr.splitlines()[-1] == "KeyError: 'lost'"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_at_the_end_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        found = ended("sys.exit(0)", stdout=full)
    assert found.returncode == 120, "Python's own, for that"
    assert "No space left on device" in found.stderr


def test_threads_are_waited_for() -> None:
    late = "lambda: (threading.main_thread().join(), print('thread'))"
    thread = f"import threading; threading.Thread(target={late}).start()"
    found = ended(f"{thread}; sys.exit(0)")
    assert (found.returncode, found.stdout) == (0, "output\nthread\nhandler\n")


def test_it_is_what_smlp_runs() -> None:
    command = [sys.executable, "-c", "import runpy, sys; sys.argv[1:] = ['--version']; " + SMLP]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, f"smlp-deploy {smlp_deploy.__version__}\n", "")
    (script,) = entry_points(group="console_scripts", name="smlp")
    assert script.load() is run
