"""Regenerate docs/terminal.md: what each verb prints in a terminal of 80 columns.

    python -m scripts.captures

The commands run one after the other in a new folder, with the bundled model and the README's images.
"""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.digits import ROOT, write_held_out
from smlp_deploy import cli

TARGET = ROOT / "docs" / "terminal.md"
COLUMNS = 80
VERBS = ("", *cli.VERBS)
COMMANDS = (
    "smlp models",
    "smlp export --format onnx",
    "smlp export --fp16 --quiet",
    "smlp export --int8",
    "smlp build-engine --fp16",
    "smlp inspect artifacts/smlpnet_digits-fp32.onnx",
    "smlp profile artifacts/smlpnet_digits-fp32.onnx --top 5",
    "smlp predict images/ --model artifacts/smlpnet_digits-fp32.onnx",
    "smlp predict images/ --model artifacts/smlpnet_digits-fp32.onnx --format jsonl --topk 1 -q",
    "smlp predict images/ --model artifacts/smlpnet_digits-fp32.onnx --shard 1/2 -o out/ --batch 4",
    "smlp predict images/ --model artifacts/smlpnet_digits-fp32.onnx --shard 2/2 -o out/ --batch 4",
    "smlp merge out/ -o all.parquet",
    "smlp verify artifacts/smlpnet_digits-fp32.onnx",
    "smlp verify artifacts/smlpnet_digits-int8.onnx --layers",
    "smlp eval held-out/ -m artifacts/smlpnet_digits-fp32.onnx -m artifacts/smlpnet_digits-fp16.onnx "
    "-m artifacts/smlpnet_digits-int8.onnx",
    "smlp benchmark artifacts/smlpnet_digits-fp32.onnx artifacts/smlpnet_digits-int8.onnx --rounds 5",
    "smlp doctor",
    "smlp exprot",
    "smlp export --fromat onnx",
    "smlp predict",
    "smlp export smlpnet_tny",
    "smlp predict images/absent.jpg",
    "smlp merge images/ -o all.parquet",
    "smlp verify broken.onnx",
    "smlp verify artifacts/smlpnet_digits-int8.onnx --min-cosine 0.9999",
    "smlp inspect images/",
    "smlp download resnet50",
    "smlp build-engine broken.onnx",
    "smlp profile broken.onnx",
    "smlp eval nowhere/",
    "smlp benchmark broken.onnx",
    "smlp benchmark --batch many",
    "smlp doctor --fix",
)
PIPED = (
    "smlp predict images/ --model artifacts/smlpnet_digits-fp32.onnx",
    "smlp verify artifacts/smlpnet_digits-fp32.onnx",
    "smlp doctor",
)
HEAD = """# What it looks like

Every verb in a terminal of 80 columns without colours, recorded by `python -m scripts.captures`. Times and paths are
those of one machine. In a pipe, progress and the lines that begin with `next:` are left out, and nothing is cut or
wrapped. Exit codes are in a table of their own ([predictions](predictions.md#output-and-exit-codes)).
"""


def in_terminal(*words: str | Path, folder: Path, **environment: str) -> tuple[int, str]:
    """The exit code of `smlp`, and what it shows in a terminal, stdout and stderr together."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("CI", "COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-m", "smlp_deploy", *map(str, words)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**inherited, "TERM": "xterm-256color", **environment},
        cwd=folder,
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux's signal that the other side is closed
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    return process.wait(), shown.decode().replace("\r\n", "\n")


def plain(*words: str | Path, folder: Path) -> tuple[int, str]:
    """The same in a terminal without colours or animated progress."""
    return in_terminal(*words, folder=folder, TERM="dumb", NO_COLOR="1")


def capture(command: str, folder: Path) -> str:
    """A command and its output, as an indented block."""
    shown = plain(*command.split()[1:], folder=folder)[1]
    shown = shown.strip("\n")
    return block(f"$ {command}", shown)


def capture_piped(command: str, folder: Path) -> str:
    """The same with both streams in one pipe."""
    words = [sys.executable, "-m", "smlp_deploy", *command.split()[1:]]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder, text=True)  # noqa: S603
    return block(f"$ {command} 2>&1 | cat", done.stdout)


def block(command: str, shown: str) -> str:
    return "".join(f"    {line.rstrip()}\n" for line in (command, *shown.splitlines()))


def main() -> None:
    parts = [HEAD]
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        shutil.copytree(ROOT / "images", folder / "images")
        write_held_out(folder / "held-out")
        (folder / "broken.onnx").write_bytes(b"not an ONNX file")
        helps = [" ".join(f"smlp {verb} --help".split()) for verb in VERBS]
        for title, commands in (("Results and errors", COMMANDS), ("Help", helps)):
            parts.append(f"## {title}\n")
            parts += [capture(command, folder) for command in commands]
        parts.insert(-len(helps) - 1, "## In a pipe\n")
        for command in PIPED:
            parts.insert(-len(helps) - 1, capture_piped(command, folder))
        text = (
            "\n".join(parts)
            .replace(str(folder), "~/project")
            .replace(sys.prefix, "~/project/.venv")
            .replace(str(Path.home()), "~")
        )
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
