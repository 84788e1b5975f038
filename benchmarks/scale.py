"""A long run in shards beside short ones: images per second, memory, and that every row is there once.

    python -m benchmarks.scale [--images N] [--shards N] [--short N] [--folder FOLDER] [--json FILE]

The images are hard links of the digits in `images/`, so a million of them take no space. Shards run one after the
other, and before each one a run over `--short` images, so that other load on the machine affects both alike. Rates are
those of whole commands, from start to exit; memory is the largest resident size of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "smlp_deploy" / "data" / "smlpnet_digits.onnx"
LINKS = 10_000
"""Images in a folder, and links to a copy of a file, of which file systems allow 65,000 or fewer."""


class Measured(NamedTuple):
    """One command.

    Attributes:
        images: that it classified.
        seconds: from its start to its exit.
        megabytes: its largest resident size.
    """

    images: int
    seconds: float
    megabytes: float

    @property
    def rate(self) -> float:
        return self.images / self.seconds


def link_images(folder: Path, images: int) -> Path:
    """Make so many images below a folder; returns their listing."""
    sources = sorted((ROOT / "images").glob("*.jpg"))
    listing = folder / "listing.txt"
    with listing.open("w") as lines:
        for first in range(0, images, LINKS):
            inner = folder / f"{first // LINKS:05d}"
            inner.mkdir()
            for number in range(first, min(first + LINKS, images)):
                path, copy = inner / f"{number:08d}.jpg", inner / f"copy-{number % len(sources)}"
                if not copy.exists():
                    copy.write_bytes(sources[number % len(sources)].read_bytes())
                os.link(copy, path)
                lines.write(f"{path}\n")
    return listing


def run(images: int, *options: str | Path) -> Measured:
    """Run smlp with these options."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "smlp_deploy", *map(str, options), "--quiet"]
    process = subprocess.Popen(command, cwd=ROOT)  # noqa: S603
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, options))} exited with {process.returncode}")
    return Measured(images, time.perf_counter() - began, usage.ru_maxrss / 1024)


def measure(folder: Path, images: int, shards: int, short: int) -> dict[str, list[Measured]]:
    """The short runs, the shards and their merge, of images below a folder that is empty."""
    listing = link_images(folder, images)
    beginning = folder / "beginning.txt"
    with listing.open() as lines, beginning.open("w") as few:
        few.writelines(line for line, _ in zip(lines, range(short), strict=False))
    runs: dict[str, list[Measured]] = {"short": [], "shard": []}
    each = [images // shards + (number < images % shards) for number in range(shards)]
    for number, share in enumerate(each, start=1):
        runs["short"].append(run(short, "predict", f"@{beginning}", "-m", MODEL, "-o", folder / "short.parquet"))
        command = ("predict", f"@{listing}", "-m", MODEL, "--shard", f"{number}/{shards}", "-o", folder / "out")
        runs["shard"].append(run(share, *command))
        shown = ", ".join(
            f"{kind} {found[-1].rate:.0f} images/s, {found[-1].megabytes:.0f} MB" for kind, found in runs.items()
        )
        print(f"{number} of {shards}: {shown}", file=sys.stderr, flush=True)
    runs["merge"] = [run(images, "merge", folder / "out", "-o", folder / "all.parquet")]
    check(listing, folder / "all.parquet")
    return runs


def check(listing: Path, merged: Path) -> None:
    """Check that every image of the listing has one row, in its order, without an error."""
    file = pq.ParquetFile(merged)
    with listing.open() as lines:
        for batch in file.iter_batches(columns=["path", "error"]):
            names = [next(lines).removesuffix("\n") for _ in range(batch.num_rows)]
            assert batch.column("path").to_pylist() == names
            assert pc.count(batch.column("error")).as_py() == 0
        assert not lines.readline(), "images without a row"


def table_of(runs: dict[str, list[Measured]]) -> Table:
    table = Table("command", "runs", "images each", "images/s (median)", "least and most", "MB (most)", box=None)
    for kind, found in runs.items():
        rates = [one.rate for one in found]
        table.add_row(
            kind,
            str(len(found)),
            str(found[0].images),
            f"{median(rates):.0f}",
            f"{min(rates):.0f} to {max(rates):.0f}",
            f"{max(one.megabytes for one in found):.0f}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--short", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="Where to work; by default a temporary folder.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        runs = measure(Path(folder), options.images, options.shards, options.short)
    Console().print(table_of(runs))
    ratio = median(shard.rate / short.rate for short, shard in zip(runs["short"], runs["shard"], strict=True))
    print(f"a shard has {ratio:.2f} of the rate of the short run before it; every image has one row")
    if options.json:
        written: dict[str, Any] = {kind: [one._asdict() for one in found] for kind, found in runs.items()}
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
