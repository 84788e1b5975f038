"""docs/tutorial.md, run from top to bottom: its files are written, its commands give what the page shows."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "tutorial.md"
LONGEST = 300
"""Seconds that one command may take before it is stopped; nothing is measured."""
_BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_NOISE = 1e-3
"""Errors below this depend on the processor; they only need to stay below it."""


@dataclass
class Command:
    """A command of a console block, and the lines that the page shows below it."""

    text: str
    shown: list[str] = field(default_factory=list)


def commands_of(block: str) -> Iterator[Command]:
    current: Command | None = None
    for line in block.splitlines():
        if line.startswith("$ "):
            if current:
                yield current
            current = Command(line[2:])
        else:
            assert current, f"{line!r} belongs to no command"
            if current.text.endswith("\\"):
                current.text = f"{current.text[:-1]}{line.strip()}"
            else:
                current.shown.append(line)
    if current:
        yield current


def is_same(shown: str, real: str) -> bool:
    """Whether two lines have the same words, and numbers that differ by at most 5%."""
    words = [_NUMBER.sub("#", " ".join(line.split())) for line in (shown, real)]
    numbers = [[float(number) for number in _NUMBER.findall(line)] for line in (shown, real)]
    return words[0] == words[1] and all(
        math.isclose(a, b, rel_tol=0.05) or max(a, b) < _NOISE for a, b in zip(*numbers, strict=True)
    )


def missing_line(shown: list[str], real: list[str]) -> str | None:
    """The first line that the page shows and the command does not print, in the order of the page.

    Lines follow each other directly, unless three dots stand between them.
    """
    rest = iter(real)
    anywhere = True
    for line in shown:
        if line == "...":
            anywhere = True
            continue
        candidates = rest if anywhere else itertools.islice(rest, 1)
        if not any(is_same(line, other) for other in candidates):
            return line
        anywhere = False
    return None


class Shell:
    """Runs commands in a folder in which `smlp` and `python` are those under test; at most one in the background."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.code = 0
        self.background: subprocess.Popen[str] | None = None
        tools = folder / "bin"
        tools.mkdir()
        python = shlex.quote(sys.executable)
        for name, line in (("python", f'{python} "$@"'), ("smlp", f'{python} -m smlp_deploy "$@"')):
            (tools / name).write_text(f"#!/bin/sh\nexec {line}\n")
            (tools / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
            "NO_COLOR": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def run(self, command: str, *, speaks: bool = True) -> list[str]:
        """What the command prints on both streams; its exit code is then in `code`.

        Of one in the background its first line, if it `speaks`.
        """
        if command == "echo $?":
            code, self.code = self.code, 0
            return [str(code)]
        if command == "kill %1":
            self.code = 0
            assert self.stop() == -signal.SIGTERM
            return []
        if command.endswith("&"):
            self.background = self._open(f"exec {command.removesuffix('&')}")
            return [self._first_line(self.background)] if speaks else []
        process = self._open(command)
        shown, _ = process.communicate(timeout=LONGEST)
        self.code = process.returncode
        return shown.splitlines()

    def _open(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=self.environment,
            text=True,
        )

    def _first_line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        patience = Timer(LONGEST, process.kill)
        patience.start()
        line = process.stdout.readline()
        patience.cancel()
        return line.rstrip("\n")

    def stop(self) -> int | None:
        """End what runs in the background; its exit code."""
        if self.background is None:
            return None
        self.background.terminate()
        self.background.communicate(timeout=LONGEST)
        code, self.background = self.background.returncode, None
        return code


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    for folder in ("examples", "images"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shell = Shell(tmp_path)
    yield shell
    shell.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_every_command_of_the_tutorial_gives_what_the_page_shows(shell: Shell) -> None:
    page = PAGE.read_text(encoding="utf-8").replace("8000", str(free_port()))
    blocks = _BLOCK.findall(page)
    assert {language for language, _, _ in blocks} == {"python", "console"}
    for language, title, text in blocks:
        if language == "python":
            (shell.folder / title).write_text(text, encoding="utf-8")
            continue
        commands = list(commands_of(text))
        for command, following in itertools.zip_longest(commands, commands[1:]):
            real = shell.run(command.text, speaks=bool(command.shown))
            printed = "\n".join(real)
            assert (missing := missing_line(command.shown, real)) is None, f"no {missing!r} from {command}:\n{printed}"
            asked = following is not None and following.text == "echo $?"
            assert asked or shell.code == 0, f"exit code {shell.code} from {command}:\n{printed}"
    assert {"digits.ckpt", "names.txt"} <= {path.name for path in shell.folder.iterdir()}
    assert shell.background is None


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        (["seven 93.3%"], ["one 93.3%"]),
        (["seven 93.3%"], ["seven 53.3%"]),
        (["difference 2.6e-06"], ["difference 0.2"]),
        (["a", "b"], ["a", "x", "b"]),
        (["a", "...", "b"], ["b", "a"]),
        (["a"], []),
    ],
)
def test_output_that_differs_is_noticed(shown: list[str], real: list[str]) -> None:
    assert missing_line(shown, real) is not None


@pytest.mark.parametrize(
    ("shown", "real"),
    [
        (["seven  93.3%"], ["note: x", "seven 93.2%"]),
        (["difference 2.6e-06"], ["difference 7.1e-07"]),
        (["a", "...", "b"], ["a", "x", "b", "next: y"]),
        (["a", "...", "b"], ["a", "b"]),
        (["..."], []),
    ],
)
def test_output_that_is_alike_passes(shown: list[str], real: list[str]) -> None:
    assert missing_line(shown, real) is None


def test_a_command_may_go_on_over_several_lines() -> None:
    block = "$ smlp export \\\n      my.pth\nshown\n$ echo $?\n1\n"
    assert list(commands_of(block)) == [Command("smlp export my.pth", ["shown"]), Command("echo $?", ["1"])]
