"""Regenerate docs/screens/*.png: reports of the bundled model on the held-out digits, as a browser shows them.

python -m scripts.screenshots
"""

from __future__ import annotations

import io
import os
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import sync_playwright

from scripts.digits import ROOT, write_held_out
from smlp_deploy.evaluation.accuracy import evaluate
from smlp_deploy.evaluation.benchmark import run_benchmark
from smlp_deploy.evaluation.worker import Target
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.images.dataset import find_labelled_images
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline.export import export_checkpoint
from smlp_deploy.reports import Origin, benchmark_page, evaluation_page
from smlp_deploy.runners import open_runner

SCREENS = ROOT / "docs" / "screens"
WIDTH, HEIGHT = 1000, 1300


def export_digits() -> list[Path]:
    """The bundled model in fp32 and int8."""
    checkpoint = load_checkpoint(BUNDLED_CHECKPOINT)
    metadata = describe(checkpoint)
    paths = {precision: Path(f"digits-{precision}.onnx") for precision in ("fp32", "int8")}
    for precision, path in paths.items():
        export_checkpoint(checkpoint, replace(metadata, precision=precision), path)
    return list(paths.values())


def eval_page(paths: list[Path]) -> str:
    """The accuracy report; its paths are relative to the current folder."""
    write_held_out(Path("held-out"))
    with open_runner(paths[0]) as first, open_runner(paths[1]) as second:
        samples = find_labelled_images(Path("held-out"), first.metadata.labels)
        return evaluation_page(Origin.of(["eval", "held-out"], paths), evaluate([first, second], samples))


def speed_page(paths: list[Path]) -> str:
    models = [*paths, BUNDLED_CHECKPOINT]
    return benchmark_page(Origin.of(["benchmark"], models), run_benchmark([Target(path=path) for path in models]))


def shoot(html: str, target: Path) -> None:
    """Write a picture of the top of a page."""
    page_file = Path(f"{target.stem}.html").absolute()
    page_file.write_text(html, encoding="utf-8")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=found, args=arguments) as browser:
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(page_file.as_uri())
        taken = page.screenshot()
    Image.open(io.BytesIO(taken)).quantize(256).save(target, optimize=True)


def main() -> None:
    SCREENS.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        paths = export_digits()
        shoot(eval_page(paths), SCREENS / "eval.png")
        shoot(speed_page(paths), SCREENS / "benchmark.png")


if __name__ == "__main__":
    main()
