from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
import torch
import typer.main
from PIL import Image
from rich.console import Console

from smlp_deploy import __version__, dependencies, files, reports
from smlp_deploy.cli import command_line, main
from smlp_deploy.commands import tables
from smlp_deploy.errors import GpuError, SmlpError
from smlp_deploy.files import DATA_FOLDER
from smlp_deploy.images import defaults
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import METADATA_KEY
from smlp_deploy.models import pretrained
from smlp_deploy.pipeline.export import Export
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from tests.support.fakes import Exported
from tests.support.processes import Forked, after_bytes, at_open, run_verb, with_traces
from tests.support.recipe import CASES, config_of, recipe_weights


class Outcome(NamedTuple):
    code: int | str | None
    out: str
    err: str


class Smlp:
    """Runs the command line in this process, in a folder of the test's own."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str | Path) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = self._capture.readouterr()
        assert "Traceback" not in err
        return Outcome(caught.value.code, out, err)


@pytest.fixture
def smlp(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Smlp:
    monkeypatch.chdir(tmp_path)
    return Smlp(capsys)


@pytest.fixture
def artifact(digits_export: Export, tmp_path: Path) -> Path:
    path = tmp_path / "artifacts" / "digits-fp32.onnx"
    path.parent.mkdir()
    shutil.copy(digits_export.path, path)
    return path


def one_error(outcome: Outcome) -> str:
    """The one line on stderr that says what is wrong."""
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.err.endswith(line + "\n")
    return line


def test_help_of_every_verb(smlp: Smlp) -> None:
    top = smlp("--help")
    assert top.code == 0
    for verb in (
        "models",
        "download",
        "inspect",
        "export",
        "build-engine",
        "profile",
        "verify",
        "predict",
        "merge",
        "eval",
        "benchmark",
        "doctor",
    ):
        assert verb in top.out
        outcome = smlp(verb, "--help")
        assert outcome.code == 0
        assert "Usage: smlp" in outcome.out
        assert outcome.err == ""


def test_version(smlp: Smlp) -> None:
    for option in ("--version", "-V"):
        assert smlp(option) == (0, f"smlp-deploy {__version__}\n", "")


def test_debug_shows_the_traceback_and_the_logs_and_nothing_else_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    (tmp_path / "x.json").write_text("{")
    command = ["eval", str(tmp_path), "--mapping", str(tmp_path / "x.json")]
    (tmp_path / "cat").mkdir()
    for arguments, shown in ((["--debug", *command], True), (command, False)):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        err = capsys.readouterr().err
        assert caught.value.code == 2
        assert err.splitlines()[-1].startswith("error: cannot read the mapping: ")
        assert ("Traceback (most recent call last)" in err) is shown
        assert ("JSONDecodeError" in err) is shown  # the cause, which the message is made of
        if shown:
            logging.getLogger("PIL").debug("a library says this")
            assert "DEBUG PIL: a library says this" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--fromat", "onnx"], "No such option: --fromat · did you mean --format? · smlp export --help"),
        (["exprot"], "No such command 'exprot'. Did you mean 'export'?"),
        (["export", "--opset", "99"], "Invalid value for '--opset'"),
        (["export", "--format", "h5"], "Invalid value for '--format'"),
        (["export", "--mean", "1,2"], "'1,2' is not three numbers · --mean · for example 0.5,0.5,0.5"),
        (
            ["benchmark", "--batch-sizes", "1,x"],
            "'1,x' is not a list of batch sizes · --batch · for example 1,8,32",
        ),
        (["benchmark", "--workers", "2"], "is for --end-to-end · --workers · add --end-to-end IMAGES"),
        (["verify", "x.onnx", "--layers", "--min-cosine", "1"], "the gate of --layers is --max-error"),
        (["verify", "x.json", "--layers", "--reference", "a"], "is a saved report, so nothing is run · x.json"),
        (["verify", "x.json", "--layers", "--max-error", "inf"], "is not a finite number · --max-error"),
        (["verify", "x.onnx", "--images", "@/dev/null"], "no image found · --images @/dev/null"),
        (["benchmark", "--reference", "x.pth"], "is for --baseline · --reference · add --baseline"),
        (["export", "--max-drop", "1"], "calibration is for int8 · add --int8"),
        (["build-engine", "--int8", "--fp16"], "fp16 and int8 contradict each other"),
        (["export", "--fp16", "--bf16"], "bf16 and fp16 contradict each other"),
        (["export", "-o", "x.pt"], "an ONNX file's name ends in .onnx · x.pt"),
        (["export", "smlpnet_tny"], "no variant is called 'smlpnet_tny' · did you mean smlpnet_tiny?"),
        (["export", "--labels", "absent.txt"], "no such file"),
        (["download", "resnet50"], "no variant is called 'resnet50' · variants: smlpnet_tiny"),
        (["predict"], "Missing argument"),
        (["predict", "--device", "cpu", "--model", "x.engine", "a.jpg"], "an engine runs only on a GPU · x.engine"),
        (["predict", "--device", "cpu", "--provider", "cuda", "a.jpg"], "--provider cuda contradicts --device cpu"),
        (["predict", "--provider", "cuda", "--model", "x.pth", "a.jpg"], "only ONNX files take a provider · x.pth"),
        (["predict", "--runtime", "openvino", "--provider", "cuda", "a.jpg"], "openvino contradicts --provider cuda"),
        (["benchmark", "x.onnx", "--runtime", "openvino", "--device", "cuda"], "openvino contradicts --device cuda"),
        (["eval", "data", "--runtime", "openvino", "-m", "x.pth"], "only ONNX files take a runtime · x.pth"),
        (["predict", "--runtime", "openvino", "--model", "x.engine", "a.jpg"], "only ONNX files take a runtime"),
        (["verify", "x.json", "--layers", "--runtime", "openvino"], "is a saved report, so nothing is run · x.json"),
        (["eval", "data", "--device", "cuda:1", "--provider", "cpu"], "--provider cpu contradicts --device cuda:1"),
        (["eval", "data", "--provider", "cuda", "-m", "x.pth"], "only ONNX files take a provider · x.pth"),
        (["eval", "data", "--device", "cpu", "-m", "a.onnx", "-m", "x.engine"], "an engine runs only on a GPU"),
        (["verify", "x.engine", "--device", "cpu"], "an engine runs only on a GPU · x.engine · leave out --device cpu"),
        (["verify", "x.engine", "--layers", "--provider", "cuda"], "only ONNX files take a provider · x.engine"),
        (["verify", "x.json", "--layers", "--device", "cpu"], "is a saved report, so nothing is run · x.json"),
        (["benchmark", "a.onnx", "x.engine", "--device", "cpu"], "an engine runs only on a GPU · x.engine"),
        (["predict", "--batch", "0", "a.jpg"], "Invalid value for '--batch'"),
        (["eval", "data", "--batch-size", "0"], "Invalid value for '--batch'"),
        (["benchmark", "--batch", "1,x"], "'1,x' is not a list of batch sizes · --batch · for example 1,8,32"),
        (["export", "--format", "engine"], "--format engine · smlp build-engine [ONNX|CHECKPOINT]"),
        (["build-engine", "--gpu-arch", "sm90"], "sm90 (H100 and H200) is for --target tensorrt only · --gpu-arch"),
        (["predict", "-o", "x.txt", "a.jpg"], "no format has this suffix · x.txt"),
        (["predict", "--shard", "1/4", "a.jpg"], "shards go to a folder · --shard · add -o out/"),
        (["predict", "--shard", "5/4", "-o", "out", "a.jpg"], "'5/4' is not a shard · --shard · for example 1/4"),
        (
            ["predict", "--shard", "1/4", "-o", "/dev/null/x", "--format", "csv", "a.jpg"],
            "are Parquet or JSONL · --format",
        ),
        (["predict", "--shard", "1/4", "-o", "out", "--html", "p.html", "a.jpg"], "a page shows all images · --html"),
        (["merge", "absent", "-o", "all.parquet"], "is not a folder · absent"),
        (["merge", "."], "Missing option '-o' / '--output'"),
        (["predict", "--format", "parquet", "a.jpg"], "Parquet goes to a file · --format parquet · add -o"),
        (["predict", "@absent", "a.jpg"], "cannot read the list of images · @absent"),
        (
            ["predict", "https://example.org/a.jpg"],
            "is a URL, and images are read from files · https://example.org/a.jpg",
        ),
        (["predict", "photos/*.jpg"], "no file matches this pattern · photos/*.jpg"),
        (["predict", "/proc/self/fdinfo"], "no images in this folder · /proc/self/fdinfo"),
        (["export", "--int8", "--calibration-table", "absent.json"], "no such file"),
        (["export", "--crop-pct", "3"], "crop-pct 3.0 is outside 0.05 to 1"),
        (["export", "--std", "0,1,1"], "not three positive numbers"),
        (["build-engine", "--min-batch", "9", "--opt-batch", "8"], "9, 8, 64 is not in order · --min-batch, --opt-b"),
        (["inspect", "x.txt"], "neither a checkpoint, an ONNX file nor an engine · x.txt"),
        ([], "no verb given"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(smlp: Smlp, arguments: list[str], message: str) -> None:
    outcome = smlp(*arguments)
    assert outcome.code == 2
    assert message in one_error(outcome)


def test_every_verb_has_json() -> None:
    root = typer.main.get_command(command_line())
    for name, verb in root.commands.items():  # type: ignore[attr-defined]
        assert "--json" in {option for parameter in verb.params for option in parameter.opts}, name


@pytest.mark.parametrize("verb", [["eval", "data"], ["verify", "x.onnx"], ["export"], ["build-engine"]])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("97", "97 is a percentage · --min-top1 · write 0.97"),
        ("97.5", "97.5 is a percentage · --min-top1 · write 0.975"),
        ("1.5", "1.5 is a percentage · --min-top1 · write 0.015"),
        ("-0.1", "-0.1 is not a share from 0 to 1 · --min-top1"),
        ("nan", "nan is not a share from 0 to 1 · --min-top1"),
    ],
)
def test_min_top1_is_a_share_in_every_verb(smlp: Smlp, verb: list[str], given: str, message: str) -> None:
    outcome = smlp(*verb, "--min-top1", given)
    assert outcome.code == 2
    assert message in one_error(outcome)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["export", "smlpnet_tiny"], 2, "no weights were ever released for smlpnet_tiny"),
        (["download", "smlpnet_tiny"], 2, "no weights were ever released for smlpnet_tiny"),
        (["export", "absent.pth"], 5, "no such file · absent.pth"),
        (["predict", "--model", "absent.onnx", "a.jpg"], 5, "no such file · absent.onnx"),
        (["predict", "--model", "absent.engine", "a.jpg"], 5, "no such file · absent.engine"),
        (["verify", "absent.onnx"], 5, "no such file · absent.onnx"),
        (["inspect", "absent.onnx"], 5, "no such file · absent.onnx"),
        (["inspect", "absent.pth"], 5, "no such file · absent.pth"),
        (["predict", "--device", "cuda", "a.jpg"], 6, "no NVIDIA GPU and driver was found, or CUDA_VISIBLE_DEVICES"),
        (["benchmark", "x.onnx", "--device", "7"], 6, "no NVIDIA GPU and driver was found"),
    ],
)
def test_an_error_of_ours_is_one_line(smlp: Smlp, arguments: list[str], code: int, message: str) -> None:
    outcome = smlp(*arguments)
    assert outcome.code == code
    assert message in one_error(outcome)
    assert outcome.out == ""


def test_a_provider_that_is_not_installed(smlp: Smlp, artifact: Path) -> None:
    outcome = smlp("predict", "--model", artifact, "--provider", "cuda", "a.jpg")
    assert outcome.code == 6
    assert "has no CUDAExecutionProvider" in one_error(outcome)


_SLOW = ("torch", "onnxruntime", "onnx", "openvino")
_MANY = f"""
import json, sys
from smlp_deploy.cli import main
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as stopped:
        loaded = [name for name in {_SLOW} if name in sys.modules]
        print(json.dumps([stopped.code, loaded]))
"""


def test_usage_errors_come_before_anything_slow(tmp_path: Path) -> None:
    missing = {
        "export --int8 --calibration-data absent": (2, "no such file or folder · --calibration-data absent"),
        "export --int8 --calibration-table absent.json": (2, "no such file · absent.json"),
        "export --parity-images absent.jpg": (2, "no such file or folder · --parity-images absent.jpg"),
        "export --labels absent.txt": (2, "no such file · absent.txt"),
        "export --mean 123,117,104": (2, "mean 123,117,104: for pixels from 0 to 255"),
        "export --crop-pct 3": (2, "crop-pct 3.0 is outside 0.05 to 1"),
        "export -o folder/x.onnx": (6, "cannot write"),
        "export absent.pth": (5, "no such file · absent.pth"),
        "export smlpnet_tny": (2, "no variant is called 'smlpnet_tny'"),
        "export smlpnet_tiny": (2, "no weights were ever released for smlpnet_tiny"),
        "build-engine absent.onnx": (5, "no such file · absent.onnx"),
        "build-engine absent.pth": (5, "no such file · absent.pth"),
        "build-engine --int8 --calibration-data absent": (2, "no such file or folder · --calibration-data absent"),
        "build-engine -o folder/x.engine": (6, "cannot write"),
        "build-engine --timing-cache folder": (2, "cannot read the timing cache"),
        "verify absent.onnx": (5, "no such file · absent.onnx"),
        "verify absent.onnx --layers": (5, "no such file · absent.onnx"),
        "verify file.onnx --reference absent.pth": (5, "no such file · absent.pth"),
        "verify file.onnx --images absent": (2, "no such file or folder · --images absent"),
        "verify file.onnx --layers --images absent": (2, "no such file or folder · --images absent"),
        "verify file.onnx --layers --save folder": (6, "cannot write"),
        "predict -m absent.pth a.jpg": (5, "no such file · absent.pth"),
        "predict -m file.pth -o folder --format csv a.jpg": (6, "cannot write"),
        "eval absent -m file.pth": (2, "no such file · absent"),
        "eval classes -m absent.pth": (5, "no such file · absent.pth"),
        "eval classes -m file.pth --mapping absent.json": (2, "no such file · absent.json"),
        "eval classes -m file.pth -o folder": (6, "cannot write"),
        "benchmark absent.pth": (5, "no such file · absent.pth"),
        "benchmark file.onnx --baseline --reference absent.pth": (5, "no such file · absent.pth"),
        "benchmark file.onnx --end-to-end absent": (2, "no such file or folder · --end-to-end absent"),
        "inspect absent.pth": (5, "no such file · absent.pth"),
    }
    for name in ("folder/x.onnx", "folder/x.engine", "classes/a"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("file.onnx", "file.pth"):
        (tmp_path / name).touch()
    command = [sys.executable, "-c", _MANY, json.dumps([line.split() for line in missing])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    shown = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    for (line, (code, message)), error, result in zip(missing.items(), shown, done.stdout.splitlines(), strict=True):
        assert error.startswith(f"error: {message}"), line
        assert json.loads(result)[0] == code, line
        assert json.loads(result)[1] == [], line


class TestModels:
    def test_table(self, smlp: Smlp) -> None:
        outcome = smlp("models")
        assert outcome.code == 0
        rows = {line.split()[0]: line for line in outcome.out.splitlines()}
        assert "24.1 M" in rows["smlpnet_tiny"]
        assert "10.31 G" in rows["smlpnet_small"]
        assert "83.4 %" in rows["smlpnet_base"]
        assert "never released" in rows["smlpnet_tiny"]
        assert "https://github.com/microsoft/SPACH/releases/download/v1.0/" in outcome.out

    def test_json(self, smlp: Smlp) -> None:
        facts = {variant["name"]: variant for variant in json.loads(smlp("models", "--json").out)}
        assert facts["smlpnet_tiny"]["parameters"] == 24123584
        assert facts["smlpnet_tiny"]["weights_url"] is None
        assert facts["smlpnet_base"]["weights_url"].endswith("/smlp_b.pth")


def test_download_json(smlp: Smlp, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Path("smlp_s.pth")
    weights.write_bytes(b"weights")
    monkeypatch.setattr(pretrained, "fetch_weights", lambda variant, progress: weights)
    outcome = smlp("download", "smlpnet_small", "--json")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    expected = {"variant": "smlpnet_small", "path": "smlp_s.pth", "bytes": 7, "sha256": sha256}
    assert (outcome.code, json.loads(outcome.out)) == (0, expected)


class TestExport:
    def test_the_bundled_model_by_default(self, smlp: Smlp) -> None:
        outcome = smlp("export", "--format", "onnx")
        assert outcome.code == 0
        assert outcome.out == "artifacts/smlpnet_digits-fp32.onnx\n"
        assert "using the bundled digits model" in outcome.err
        assert json.loads(Path("artifacts/smlpnet_digits-fp32.parity.json").read_text())["passed"]
        # With no model named, predict now finds it.
        image = Path(__file__).parent.parent / "images" / "digit-7-3504.jpg"
        prediction = smlp("predict", image)
        assert "using artifacts/smlpnet_digits-fp32.onnx" in prediction.err

    def test_a_file_that_takes_pixels_has_a_name_of_its_own(
        self, smlp: Smlp, artifact: Path, digit_images: list[Path]
    ) -> None:
        outcome = smlp("export", "--uint8-input")
        assert (outcome.code, outcome.out) == (0, "artifacts/smlpnet_digits-fp32-uint8.onnx\n")
        assert json.loads(smlp("inspect", "--json", outcome.out.strip()).out)["metadata"]["input"] == "uint8"
        arguments: list[str | Path] = ["--format", "jsonl", "--topk", "1", *digit_images]
        pixels, floats = (
            [
                json.loads(line)["predictions"][0]
                for line in smlp("predict", "--model", path, *arguments).out.splitlines()
            ]
            for path in (outcome.out.strip(), artifact)
        )
        assert [found["label"] for found in pixels] == [found["label"] for found in floats]
        probabilities = [found["probability"] for found in floats]
        assert [found["probability"] for found in pixels] == pytest.approx(probabilities, abs=1e-5)
        assert smlp("verify", outcome.out.strip()).code == 0
        # It cannot be converted, so an engine is built from the other one, though this one is newer.
        engine = smlp("build-engine", "--fp16", "--gpu-arch", "sm89")
        assert (engine.code, engine.out) == (0, "artifacts/smlpnet_digits-fp16.engine\n")
        assert json.loads(Path("artifacts/smlpnet_digits-fp16.engine.json").read_text())["onnx_file"] == artifact.name
        refused = smlp("build-engine", outcome.out.strip(), "--fp16", "--gpu-arch", "sm89")
        assert refused.code == 2
        assert "the graph takes uint8 and cannot be converted to fp16 · " in one_error(refused)
        assert one_error(refused).endswith("give the float32-input file")

    def test_a_file_for_cpus_has_a_name_of_its_own(self, smlp: Smlp, one_block: Path) -> None:
        forms = {}
        for options, name in (
            ((), "one_block-fp16"),
            (("--for", "gpu"), "one_block-fp16"),
            (("--for", "cpu"), "one_block-fp16-cpu"),
        ):
            outcome = smlp("export", one_block, *options, "--fp16")
            assert (outcome.code, outcome.out) == (0, f"artifacts/{name}.onnx\n")
            forms[options] = json.loads(smlp("inspect", "--json", outcome.out.strip()).out)["metadata"]["form"]
            assert smlp("verify", outcome.out.strip(), "--reference", one_block).code == 0
        assert forms == {(): "gpu", ("--for", "gpu"): "gpu", ("--for", "cpu"): "cpu"}
        assert smlp("export", one_block, "--for", "tpu").code == 2

    def test_options_reach_the_file(self, smlp: Smlp, micro_pth: Path) -> None:
        Path("labels.txt").write_text("\n".join("abcdefghij"))
        options = ["--labels", "labels.txt", "--mean", "0.1,0.2,0.3", "--std", "1,2,0.5", "--crop-pct", "0.9"]
        outcome = smlp(
            "export", micro_pth, *options, "--interpolation", "bilinear", "--batch", "4", "-o", "deep/x.onnx"
        )
        assert outcome.code == 0
        assert "note:" not in outcome.err
        prop = next(prop for prop in onnx.load("deep/x.onnx").metadata_props if prop.key == METADATA_KEY)
        metadata = json.loads(prop.value)
        assert metadata["labels"] == list("abcdefghij")
        assert metadata["batch"] == 4
        assert metadata["preprocessing"] == {
            "crop_pct": 0.9,
            "image_size": 32,
            "interpolation": "bilinear",
            "mean": [0.1, 0.2, 0.3],
            "std": [1, 2, 0.5],
        }

    def test_half_precision(self, smlp: Smlp) -> None:
        outcome = smlp("export", "--half")
        assert (outcome.code, outcome.out) == (0, "artifacts/smlpnet_digits-fp16.onnx\n")
        assert "fp16 range" in outcome.err

    def test_int8(self, smlp: Smlp) -> None:
        outcome = smlp("export", "--int8", "--max-drop", "1")
        assert (outcome.code, outcome.out) == (0, "artifacts/smlpnet_digits-int8.onnx\n")
        assert "12 layers in int8, 0 left in half precision" in outcome.err
        table = Path("artifacts/smlpnet_digits-int8.calibration.json")
        again = smlp("export", "--int8", "--calibration-table", table, "-o", "again.onnx")
        assert again.code == 0
        assert json.loads(Path("again.calibration.json").read_text()) == json.loads(table.read_text())

    def test_what_is_assumed_is_said(self, smlp: Smlp, micro_pth: Path) -> None:
        outcome = smlp("export", micro_pth)
        assert "micro.pth states no labels; its 10 classes are named by index" in outcome.err
        assumed = "mean 0.485,0.456,0.406, std 0.229,0.224,0.225, crop 0.875, interpolation bicubic"
        assert f"micro.pth states no preprocessing; ImageNet's is assumed: {assumed}" in outcome.err

    def test_what_an_option_says_is_not_assumed(self, smlp: Smlp, micro_pth: Path) -> None:
        outcome = smlp("export", micro_pth, "--mean", "0,0,0", "--interpolation", "bilinear")
        assumed = "ImageNet's is assumed: std 0.229,0.224,0.225, crop 0.875\n"
        assert f"micro.pth states no preprocessing; {assumed}" in outcome.err

    def test_a_note_is_said_once_and_names_an_option_that_is_there(
        self, smlp: Smlp, micro_pth: Path, digit_images: list[Path]
    ) -> None:
        dataset = Path("set.csv")
        dataset.write_text(f"path,label\n{digit_images[0]},0\n")
        outcome = smlp("eval", dataset, "-m", micro_pth, "-m", micro_pth)
        assert outcome.code == 0
        labels, preprocessing = [line for line in outcome.err.splitlines() if line.startswith("note: ")]
        assert labels.endswith("are named by index (smlp export --labels FILE names them)")
        assert "states no preprocessing" in preprocessing

    def test_a_failed_parity_says_which_gate_and_image(self, smlp: Smlp, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(defaults, "bundled_images", list)
        outcome = smlp("export")
        assert outcome.code == 3
        assert "parity failed: images · artifacts/smlpnet_digits-fp32.onnx.failed" in one_error(outcome)
        assert "images: no real image was compared" in outcome.err
        assert not Path("artifacts/smlpnet_digits-fp32.onnx").exists()

    def test_hostile_checkpoints_run_nothing(self, smlp: Smlp) -> None:
        class Runs:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.system, ("touch proof",)

        torch.save({"model": recipe_weights(config_of(CASES["micro"]), 1), "args": Runs()}, "beside.pth")
        assert json.loads(smlp("inspect", "--json", "beside.pth").out)["not_built"] == ["posix.system"]
        assert smlp("export", "beside.pth").code == 0
        torch.save({"model": Runs()}, "hostile.pth")
        outcome = smlp("export", "hostile.pth")
        assert outcome.code == 5
        assert "its weights are a posix.system, which is not built" in one_error(outcome)
        assert not Path("proof").exists()

    def test_json(self, smlp: Smlp, micro_pth: Path) -> None:
        outcome = smlp("export", micro_pth, "--json", "--quiet")
        assert (outcome.code, outcome.err) == (0, "")
        found = json.loads(outcome.out)
        assert found["path"] == "artifacts/micro-fp32.onnx"
        assert found["parity"] == json.loads(Path(found["report"]).read_text())


class TestBuildEngine:
    def test_json(self, smlp: Smlp, artifact: Path) -> None:
        found = json.loads(smlp("build-engine", artifact, "--gpu-arch", "sm89", "--json").out)
        assert found["path"] == "artifacts/smlpnet_digits-fp32.engine"
        manifest = json.loads(Path(found["manifest"]).read_text())
        assert found["kernels"] == manifest["kernels"]
        assert (found["parity"], found["not_run"]) == (None, "no NVIDIA GPU and driver was found")

    def test_the_newest_fp32_file_by_default(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("build-engine", "--fp16", "--gpu-arch", "sm89")
        assert (outcome.code, outcome.out) == (0, "artifacts/smlpnet_digits-fp16.engine\n")
        assert "using artifacts/digits-fp32.onnx, the newest fp32 file" in outcome.err
        assert "convolutions and matrix products: 43 in Half" in outcome.err
        assert "built ahead of time by tensorrt-rtx for sm89; not run here: no NVIDIA GPU and driver was" in outcome.err
        no_gpu = smlp("predict", "--model", "artifacts/smlpnet_digits-fp16.engine", "a.jpg")
        assert no_gpu.code == 6
        assert "needs an NVIDIA GPU and driver; none was found" in one_error(no_gpu)
        # Without --model, predict still takes the ONNX file.
        found = smlp("predict", "absent.jpg").err
        assert "using artifacts/digits-fp32.onnx" in found
        assert "engine skipped: needs an NVIDIA GPU and driver; none was found" in found

    def test_pixels_by_default_and_floats_on_request(self, smlp: Smlp, artifact: Path) -> None:
        for options, name, taken in (([], "fp32", "uint8"), (["--float-input"], "fp32-float32", "float32")):
            outcome = smlp("build-engine", "--gpu-arch", "sm89", *options)
            assert (outcome.code, outcome.out) == (0, f"artifacts/smlpnet_digits-{name}.engine\n")
            manifest = json.loads(Path(f"artifacts/smlpnet_digits-{name}.engine.json").read_text())
            assert manifest["metadata"]["input"] == taken
            assert (manifest["graph_parity"] is None) is (taken == "float32")

    def test_with_nothing_there_one_is_exported_first(self, smlp: Smlp, micro_pth: Path) -> None:
        outcome = smlp("build-engine", micro_pth, "--fp16", "--gpu-arch", "sm75", "--batch", "2")
        assert (outcome.code, outcome.out) == (0, "artifacts/micro-fp16.engine\n")
        assert "exporting artifacts/micro-fp32.onnx first" in outcome.err
        exported = json.loads(smlp("inspect", "--json", "artifacts/micro-fp32.onnx").out)
        assert exported["metadata"]["form"] == "gpu"
        assert not Path("artifacts/micro-fp32-cpu.onnx").exists()
        assert json.loads(Path("artifacts/micro-fp16.engine.json").read_text())["profile"]["max"] == 2

    def test_in_int8_for_sm75_products_are_in_int8(self, smlp: Smlp) -> None:
        outcome = smlp("build-engine", "--int8", "--gpu-arch", "sm75", "--batch", "1")
        assert (outcome.code, outcome.out) == (0, "artifacts/smlpnet_digits-int8.engine\n")
        assert "exporting artifacts/smlpnet_digits-fp32.onnx first" in outcome.err
        assert " in Int8" in outcome.err

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["--fp16", "--bf16"], 2, "bf16 and fp16 contradict each other"),
            (["--min-batch", "9", "--opt-batch", "8"], 2, "batch profile 9, 8, 64 is not in order"),
            (["--gpu-arch", "sm75,sm89"], 2, "build sm75 by itself"),
            (["--batch", "4", "--max-batch", "8"], 2, "--batch contradicts --max-batch"),
            (["--hardware-compatible"], 2, "tensorrt-rtx builds for the architectures of --gpu-arch"),
            (["--same-capability"], 2, "tensorrt-rtx builds for the architectures of --gpu-arch · --same-capability"),
            (["--device", "cpu"], 2, "an engine runs only on a GPU · --device cpu · leave it out"),
            (["--device", "cuda"], 6, "no NVIDIA GPU and driver was found, or CUDA_VISIBLE_DEVICES hides it"),
            (["-o", "x.onnx"], 2, "an engine's name ends in .engine"),
            (["--gpu-arch", "sm42"], 2, "no architecture is called 'sm42'"),
            (["--fp16", "--workspace", "0.00001"], 6, "raise --workspace"),
            (["--target", "tensorrt"], 6, "tensorrt not installed"),
            (["cut.onnx"], 5, "not an ONNX file"),
            (["absent.onnx"], 5, "no such file"),
        ],
    )
    def test_an_error_is_one_line_and_leaves_no_file(
        self, smlp: Smlp, artifact: Path, arguments: list[str], code: int, message: str
    ) -> None:
        Path("cut.onnx").write_bytes(artifact.read_bytes()[:100_000])
        outcome = smlp("build-engine", *arguments)
        assert outcome.code == code
        assert message in one_error(outcome)
        assert not list(Path().rglob("*.engine*"))


class TestProfile:
    def test_table(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("profile", artifact, "--top", "3")
        assert outcome.code == 0
        assert "74 kernels" in outcome.out
        assert "best case (an estimate; nothing was run)" in outcome.out
        assert "RTX 4090" in outcome.out

    def test_json(self, smlp: Smlp, artifact: Path) -> None:
        (found,) = json.loads(smlp("profile", artifact, "--json", "--batch", "2").out)
        assert found["summary"]["batch"] == 2
        assert len(found["kernels"]) == found["summary"]["count"]

    def test_side_by_side(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("profile", artifact, "--compare", artifact)
        assert "ratio" in outcome.out
        assert "1.00" in outcome.out

    def test_an_unknown_architecture(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("profile", artifact, "--gpu-arch", "sm1")
        assert outcome.code == 2
        assert "no architecture is called 'sm1'" in one_error(outcome)


class TestVerifyAndInspect:
    def test_verify(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("verify", artifact)
        assert outcome.code == 0
        assert "difference" in outcome.out

    def test_verify_json_on_own_images(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        outcome = smlp("verify", artifact, "--json", "--images", digit_images[0].parent)
        report = json.loads(outcome.out)
        assert report["passed"]
        assert report["images"] == 12

    def test_gates_of_ones_own(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("verify", artifact, "--max-difference", "1e-12", "--min-cosine", "0.5", "--json")
        assert outcome.code == 3
        assert "parity failed: difference · " in one_error(outcome)
        assert json.loads(outcome.out)["bounds"] == {"cosine": 0.5, "difference": 1e-12, "top1": 1.0}
        outcome = smlp("export", "--max-difference", "1e-12")
        assert outcome.code == 3
        assert "parity failed: difference" in one_error(outcome)
        outcome = smlp("build-engine", artifact, "--fp16", "--min-cosine", "1")
        assert outcome.code == 3
        assert "parity failed in fp16: cosine" in one_error(outcome)
        assert smlp("verify", artifact, "--min-top1", "1.5").code == 2

    def test_verify_block_by_block(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("verify", artifact, "--layers", "--save", "x.json")
        assert (outcome.code, outcome.err) == (0, "")
        assert "stage 3 block 1 token mixing" in outcome.out
        judged = smlp("verify", "x.json", "--layers", "--max-error", "1e-9", "--json")
        assert judged.code == 3
        assert "at stage 1 embedding: error" in one_error(judged)
        assert json.loads(judged.out)["max_error"] == 1e-9
        assert "add --layers" in one_error(smlp("verify", artifact, "--save", "y.json"))

    def test_verify_fails_on_a_changed_file(self, smlp: Smlp, artifact: Path) -> None:
        model = onnx.load(artifact)
        next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias").raw_data = bytes(40)
        onnx.save(model, artifact)
        outcome = smlp("verify", artifact)
        assert outcome.code == 3
        assert "FAILED" in outcome.out
        assert "parity failed: difference" in one_error(outcome)

    def test_inspect(self, smlp: Smlp, artifact: Path, micro_pth: Path) -> None:
        assert "smlpnet_digits.safetensors" in smlp("inspect", artifact).out
        assert json.loads(smlp("inspect", "--json", artifact).out)["metadata"]["labels"] == list("0123456789")
        assert json.loads(smlp("inspect", "--json", micro_pth).out)["parameters"] == 73190


class TestPredict:
    def test_table(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        outcome = smlp("predict", *digit_images)
        assert outcome.code == 0
        assert len(outcome.out.splitlines()) == 13
        assert "12 images, 0 failed" in outcome.err

    def test_of_several_files_of_a_model_the_fastest_is_taken(
        self, smlp: Smlp, exported: Exported, artifact: Path, digit_images: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "user_cache_path", lambda _: Path("cache").absolute())
        shutil.copy(exported("bf16").path, artifact.with_name("digits-bf16.onnx"))
        outcome = smlp("predict", digit_images[0])
        assert outcome.code == 0
        (said,) = [line for line in outcome.err.splitlines() if line.startswith("note: no model given")]
        assert "the fastest here of the 2 files of the newest model" in said
        assert "digits-bf16.onnx" in said
        assert "digits-fp32.onnx" in said
        assert smlp("predict", digit_images[0]).err == outcome.err  # measured once

    def test_the_bundled_checkpoint_without_artifacts(self, smlp: Smlp, digit_images: list[Path]) -> None:
        outcome = smlp("predict", "--format", "jsonl", "--topk", "1", digit_images[0])
        assert json.loads(outcome.out)["predictions"][0]["label"] == "0"
        assert "using the bundled digits model" in outcome.err

    def test_json_is_one_record_a_line(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        records = smlp("predict", "--json", "-m", artifact, *digit_images[:2]).out
        assert records == smlp("predict", "--format", "jsonl", "-m", artifact, *digit_images[:2]).out
        assert [json.loads(line)["path"] for line in records.splitlines()] == list(map(str, digit_images[:2]))
        refused = smlp("predict", "--json", "--format", "csv", "-m", artifact, digit_images[0])
        assert "contradicts --json · --format csv" in one_error(refused)

    def test_six_files_six_records(self, smlp: Smlp, artifact: Path, photo: Image.Image) -> None:
        folder = Path("mixed")
        folder.mkdir()
        photo.save(folder / "a.jpg")
        whole = (folder / "a.jpg").read_bytes()
        (folder / "b.jpg").write_bytes(whole[:4000])
        (folder / "c.jpg").write_text("text")
        (folder / "d.jpg").touch()
        photo.convert("CMYK").save(folder / "e.jpg")
        Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(folder / "f.png")
        outcome = smlp("predict", "--format", "jsonl", folder)
        assert outcome.code == 4
        records = [json.loads(line) for line in outcome.out.splitlines()]
        assert [record["path"] for record in records] == [
            f"mixed/{name}" for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.png")
        ]
        assert ["error" in record for record in records] == [False, True, True, True, False, False]
        assert "6 images, 3 failed" in outcome.err
        assert smlp("predict", "--allow-errors", folder).code == 0

    def test_a_file_of_records_appears_whole(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        outcome = smlp("predict", "-o", "out/records.csv", *digit_images)
        assert (outcome.code, outcome.out) == (0, "")
        with Path("out/records.csv").open(newline="") as stream:
            assert [row["path"] for row in csv.DictReader(stream)] == [str(path) for path in digit_images]
        assert [path.name for path in Path("out").iterdir()] == ["records.csv"]

    def test_records_have_the_paths_that_were_given(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        shutil.copytree(digit_images[0].parent, "photos")
        name = digit_images[0].name
        given = [f"./photos/{name}", f"photos//{name}", f"photos/../photos/{name}"]
        command: list[str | Path] = ["predict", "-o", "x.jsonl", *given, "./photos/", f"./photos/{name[:-5]}?.jpg"]
        assert smlp(*command).code == 0
        records = Path("x.jsonl").read_text()
        expected = [*given, *(f"./photos/{path.name}" for path in digit_images), f"./photos/{name}"]
        assert [json.loads(line)["path"] for line in records.splitlines()] == expected

    def test_a_dead_gpu_ends_the_run_which_goes_on_with_the_paths_that_were_given(
        self, smlp: Smlp, artifact: Path, digit_images: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        shutil.copytree(digit_images[0].parent, "photos")
        command: list[str | Path] = [
            "predict",
            "--batch-size",
            "3",
            "-o",
            "x.jsonl",
            "./photos/",
            f"photos//{digit_images[0].name}",
        ]
        run, batches = OnnxRuntimeRunner.infer, []

        def dying(runner: OnnxRuntimeRunner, batch: FloatArray) -> FloatArray:
            batches.append(len(batch))
            if len(batches) > 2:
                raise GpuError("an illegal memory access was encountered")
            return run(runner, batch)

        with monkeypatch.context() as patch:
            patch.setattr(OnnxRuntimeRunner, "infer", dying)
            outcome = smlp(*command)
        assert outcome.code == 6
        assert one_error(outcome) == (
            "error: an illegal memory access was encountered, after 6 images · x.jsonl.partial · "
            "the same command with --resume continues"
        )
        assert batches == [3, 3, 3]
        changed = smlp(*command[:-2], "photos", "--resume")
        assert changed.code == 2
        assert f"image 1 was ./photos/{digit_images[0].name}, now it is photos/" in one_error(changed)
        assert smlp(*command, "--resume").code == 0
        paths = [json.loads(line)["path"] for line in Path("x.jsonl").read_text().splitlines()]
        assert paths == [*(f"./photos/{path.name}" for path in digit_images), f"photos//{digit_images[0].name}"]

    def test_a_list_of_images(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        Path("list.txt").write_text("\n".join(map(str, digit_images)))
        assert len(smlp("predict", "--format", "jsonl", "@list.txt").out.splitlines()) == 12

    def test_names_cannot_disturb_the_terminal(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("predict", "a\x1b[31m\n[bold]b.jpg")
        assert r"a\x1b[31m\n[bold]b.jpg" in outcome.out
        assert len(outcome.out.splitlines()) == 2

    def test_topk_beyond_the_classes_is_all_of_them(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        command: list[str | Path] = ["predict", "-m", artifact, "--format", "jsonl", digit_images[0], "--topk"]
        outcome = smlp(*command, "11")
        assert outcome.code == 0
        assert outcome.err == "note: the model has 10 classes, so --topk is 10 in place of 11\n1 image, 0 failed\n"
        all_of_them = smlp(*command, "10")
        assert (all_of_them.out, all_of_them.err) == (outcome.out, "1 image, 0 failed\n")

    @pytest.mark.parametrize("option", ["--batch", "--batch-size"])
    def test_the_batch_size_has_two_names(
        self, smlp: Smlp, artifact: Path, digit_images: list[Path], monkeypatch: pytest.MonkeyPatch, option: str
    ) -> None:
        run, batches = OnnxRuntimeRunner.infer, []

        def counted(runner: OnnxRuntimeRunner, batch: FloatArray) -> FloatArray:
            batches.append(len(batch))
            return run(runner, batch)

        monkeypatch.setattr(OnnxRuntimeRunner, "infer", counted)
        assert smlp("predict", "-m", artifact, option, "5", *digit_images).code == 0
        assert batches == [5, 5, 2]

    def test_a_finished_file_is_not_resumed(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        command: list[str | Path] = ["predict", "-m", artifact, "-o", "x.jsonl", "--resume"]
        assert smlp(*command, *digit_images).code == 0
        before = Path("x.jsonl").read_bytes()
        again = smlp(*command, digit_images[0])
        said = "x.jsonl is complete, so there is nothing to resume; delete it to run again\n"
        assert again == (0, "", said)
        assert Path("x.jsonl").read_bytes() == before
        Path("x.jsonl").unlink()
        assert smlp(*command, digit_images[0]).err == "1 image, 0 failed, written to x.jsonl\n"


class TestParquet:
    def test_the_suffix_or_the_format_asks_for_it(self, smlp: Smlp, artifact: Path, digit_images: list[Path]) -> None:
        images = [*digit_images[:2], Path("absent.jpg")]
        records = smlp("predict", "--allow-errors", "--format", "jsonl", *images).out.splitlines()
        assert smlp("predict", "-o", "x.parquet", *images).code == 4
        assert smlp("predict", "--allow-errors", "-o", "y", "--format", "parquet", *images).code == 0
        rows = pq.read_table("x.parquet").to_pylist()
        expected = [{"path_bytes": None, "predictions": None, "error": None} | json.loads(line) for line in records]
        assert rows == expected == pq.read_table("y").to_pylist()

    def test_a_listing_on_standard_input_is_dealt_without_its_length(
        self, smlp: Smlp, artifact: Path, digit_images: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in (1, 2):
            monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{path}\n" for path in digit_images)))
            outcome = smlp("predict", "-", "--shard", f"{number}/2", "--batch-size", "5", "-o", "out")
            count = (7, 5)[number - 1]
            path = f"out/part-0000{number}-of-00002.parquet"
            assert outcome.err.endswith(f"shard {number}/2: {count} images, 0 failed, written to {path}\n")
        merged = smlp("merge", "out", "-o", "all.parquet", "--json")
        assert merged.err == "12 images, 0 failed, of 2 shards, written to all.parquet\n"
        assert json.loads(merged.out) == {"path": "all.parquet", "images": 12, "failed": 0, "shards": 2}
        paths = pq.read_table("all.parquet").column("path").to_pylist()
        assert paths == list(map(str, digit_images))

    def test_a_finished_shard_of_another_model_is_wrong_usage(
        self, smlp: Smlp, artifact: Path, digit_images: list[Path], micro_pth: Path
    ) -> None:
        command: list[str | Path] = ["predict", digit_images[0], "--shard", "1/1", "-o", "out", "--resume"]
        assert smlp(*command).code == 0
        again = smlp(*command)
        assert (again.code, "shard 1/1 is finished already: 1 image, 0 failed, in out/part-" in again.err) == (0, True)
        other = smlp(*command, "-m", micro_pth)
        assert (other.code, "is of another run: " in one_error(other)) == (2, True)

    def test_without_pyarrow_no_image_is_read(
        self, smlp: Smlp, digit_images: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dependencies, "find_spec", lambda name: None if name == "pyarrow" else find_spec(name))
        outcome = smlp("predict", "-o", "x.parquet", *digit_images)
        assert outcome == (
            6,
            "",
            'error: pyarrow not installed, needed to write Parquet files · pip install "smlp-deploy[parquet]"\n',
        )
        assert not list(Path().iterdir())


class TestPages:
    """`--html` of every verb that has it; what is on the pages is examined in tests/reports."""

    @pytest.mark.parametrize(
        ("arguments", "title"),
        [
            (["predict", "images", "--allow-errors"], "Predictions"),
            (["eval", "labelled"], "Accuracy"),
            (["verify", "artifacts/digits-fp32.onnx"], "Parity"),
            (["verify", "artifacts/digits-fp32.onnx", "--layers"], "Layer by layer"),
            (["benchmark", "--batch-sizes", "1", "--rounds", "1"], "Speed"),
            (["profile", "artifacts/digits-fp32.onnx"], "Kernels"),
        ],
    )
    def test_a_page_is_written_beside_the_results(
        self, smlp: Smlp, artifact: Path, digit_images: list[Path], arguments: list[str], title: str
    ) -> None:
        for folder in (Path("images"), Path("labelled/7")):
            folder.mkdir(parents=True)
            shutil.copy(digit_images[8], folder / "<b>7.jpg")
        Path("images/damaged.jpg").write_bytes(b"no image")
        outcome = smlp(*arguments, "--html", "page.html")
        assert outcome.code == 0
        assert outcome.out
        assert "page written to page.html" in outcome.err
        page = Path("page.html").read_text()
        assert f"<h1>{title}</h1>" in page
        assert f"smlp {arguments[0]} " in page
        assert "--html page.html" in page
        assert files.sha256_of(artifact) in page
        assert "<b>7.jpg" not in page
        if arguments[0] in ("predict", "eval"):
            assert "&lt;b&gt;7.jpg" in page

    def test_results_are_shown_even_if_the_page_fails(
        self, smlp: Smlp, artifact: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> str:
            raise SmlpError("no room for it", where="page.html")

        monkeypatch.setattr(reports, "parity_page", fail)
        outcome = smlp("verify", artifact, "--html", "page.html")
        assert outcome.code == 6
        assert "cosine       passed" in outcome.out
        assert one_error(outcome) == "error: no room for it · page.html"

    def test_a_closed_pipe_costs_no_page(self, artifact: Path, digit_images: list[Path], tmp_path: Path) -> None:
        command = [sys.executable, "-m", "smlp_deploy", "verify", str(artifact), "--html", "page.html"]
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            process.stdout.close()
        assert "<h1>Parity</h1>" in (tmp_path / "page.html").read_text()

    def test_a_failed_proof_has_its_page(self, smlp: Smlp, artifact: Path) -> None:
        outcome = smlp("verify", artifact, "--max-difference", "1e-12", "--html", "page.html")
        assert outcome.code == 3
        assert "FAILED" in Path("page.html").read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["predict", "a.jpg", "--html", "page.txt"], "a page's name ends in .html · page.txt"),
            (["predict", "a.jpg", "--html", "p.html", "--resume", "-o", "x.jsonl"], "the images of one run · --html"),
            (["profile", "a.onnx", "--html", "p.html", "--compare", "b.onnx"], "a page shows one file · --html"),
            (["eval", "set", "-o", "p.html", "--html", "p.html"], "given for two outputs · p.html"),
        ],
    )
    def test_what_cannot_be_a_page_is_refused_before_anything_is_done(
        self, smlp: Smlp, arguments: list[str], message: str
    ) -> None:
        outcome = smlp(*arguments)
        assert outcome.code == 2
        assert message in one_error(outcome)


def test_benchmark(smlp: Smlp, artifact: Path, digit_images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    in_80_columns = lambda: Console(highlight=False, width=80, force_terminal=True, color_system=None)  # noqa: E731
    monkeypatch.setattr(tables, "stdout", in_80_columns)
    monkeypatch.setattr("smlp_deploy.evaluation.benchmark._TURN_SECONDS", 0.05)
    outcome = smlp(
        *("benchmark", artifact, artifact, "--batch", "2", "--rounds", "2"),
        *("--end-to-end", digit_images[0].parent, "-o", "report.json"),
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert max(map(len, outcome.out.splitlines())) <= 80
    assert "12 files to records, 0 failed; batch 2" in outcome.out
    report = json.loads(Path("report.json").read_text())
    assert [model["precision"] for model in report["models"]] == ["fp32", "fp32"]
    assert json.loads(smlp("benchmark", artifact, "--batch-sizes", "1", "--rounds", "1", "--json").out)["models"]


def test_undecodable_names_survive_the_whole_way(artifact: Path, tmp_path: Path, digit_images: list[Path]) -> None:
    name = os.fsdecode(b"\xff\xfe.jpg")
    shutil.copy(digit_images[0], tmp_path / name)
    command = [sys.executable, "-m", "smlp_deploy", "predict", "--format", "jsonl", "-m", str(artifact), ".", "-"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, input=b"\xff\xfe.jpg\n", check=True)
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == [f"./{name}", name]


def test_an_image_on_standard_input(artifact: Path, tmp_path: Path, digit_images: list[Path]) -> None:
    command = [
        sys.executable,
        "-m",
        "smlp_deploy",
        "predict",
        "--format",
        "jsonl",
        "-m",
        str(artifact),
        "-",
        "--topk=1",
    ]
    content = digit_images[3].read_bytes()
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, input=content, check=True)
    (record,) = map(json.loads, result.stdout.splitlines())
    assert (record["path"], record["predictions"][0]["label"]) == ("-", digit_images[3].name.split("-")[1])
    assert result.stderr == b"1 image, 0 failed\n"


class TestEval:
    @pytest.fixture
    def dataset(self, tmp_path: Path, digit_images: list[Path]) -> Path:
        for path in digit_images:
            folder = tmp_path / "set" / path.name.split("-")[1]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder)
        (tmp_path / "set" / "3" / "bad.jpg").write_text("no image")
        return tmp_path / "set"

    def test_models_side_by_side(self, smlp: Smlp, artifact: Path, dataset: Path) -> None:
        outcome = smlp("eval", dataset, "-m", artifact, "-m", artifact, "-o", "report.json")
        assert (outcome.code, outcome.err) == (0, "")
        assert "12 images, 1 unreadable; classes named by label" in outcome.out
        assert "1 and 2" in outcome.out
        assert "100.00%" in outcome.out
        assert "9 taken for 8: 1" in outcome.out
        report = json.loads(Path("report.json").read_text())
        assert report["models"][0]["top1"]["count"] == 11

    def test_a_bound_fails(self, smlp: Smlp, artifact: Path, dataset: Path) -> None:
        outcome = smlp("eval", dataset, "-m", artifact, "--min-top1", "0.95", "--json")
        assert outcome.code == 3
        assert "top-1 is 0.9167 (11 of 12), below 0.95" in one_error(outcome)
        assert json.loads(outcome.out)["evaluated"] == 12
        assert smlp("eval", dataset, "-m", artifact, "--min-top1", "0.9").code == 0

    def test_a_finished_report_is_not_resumed_and_its_bound_still_holds(
        self, smlp: Smlp, artifact: Path, dataset: Path
    ) -> None:
        command: list[str | Path] = ["eval", dataset, "-m", artifact, "-o", "report.json", "--resume"]
        assert smlp(*command).code == 0
        before = Path("report.json").read_bytes()
        said = "report.json is complete, so there is nothing to resume; delete it to run again\n"
        assert smlp(*command) == (0, "", said)
        assert smlp(*command, "--min-top1", "0.9") == (0, "", said)
        below = smlp(*command, "--min-top1", "0.95")
        assert (below.code, below.out) == (3, "")
        assert "top-1 is 0.9167 (11 of 12), below 0.95" in one_error(below)
        assert Path("report.json").read_bytes() == before
        Path("report.json").write_text("{}")
        assert "is not a report of smlp eval · report.json" in one_error(smlp(*command, "--min-top1", "0.9"))

    def test_what_cannot_be_evaluated(self, smlp: Smlp, artifact: Path, dataset: Path) -> None:
        assert "add -o report.json" in one_error(smlp("eval", dataset, "-m", artifact, "--resume"))
        assert "no such file" in one_error(smlp("eval", "absent", "-m", artifact))
        flat = smlp("eval", dataset / "7", "-m", artifact)
        assert flat.code == 2
        assert "has images, but no class folders that say what is on them" in one_error(flat)
        (dataset / "ten").mkdir()
        assert "'ten' is not the label" in one_error(smlp("eval", dataset, "-m", artifact))


@pytest.mark.usefixtures("packages_asked_once")
class TestDoctor:
    def test_lines(self, smlp: Smlp) -> None:
        outcome = smlp("doctor")
        assert outcome.code == 0
        assert re.search(r"^ok +onnxruntime +onnxruntime \d", outcome.out, re.MULTILINE)

    def test_json_and_a_damaged_artifact(self, smlp: Smlp, artifact: Path) -> None:
        artifact.write_bytes(b"damaged")
        outcome = smlp("doctor", "--json")
        assert outcome.code == 3
        broken = [finding for finding in json.loads(outcome.out)["findings"] if finding["status"] == "error"]
        assert [finding["name"] for finding in broken] == ["artifacts/digits-fp32.onnx"]


class TestInterruptions:
    """Commands in processes of their own."""

    @pytest.mark.parametrize(
        ("verb", "folder", "times", "number", "fresh"),
        [
            ("export", None, 1, signal.SIGTERM, False),
            ("export", None, 2, signal.SIGINT, True),
            ("export", "parity", 5, signal.SIGINT, False),
            ("export --int8", "calibration", 100, signal.SIGTERM, False),
            ("build-engine --gpu-arch sm89", None, 1, signal.SIGINT, False),
            ("build-engine --gpu-arch sm89", None, 2, signal.SIGTERM, True),
            ("build-engine --gpu-arch sm89 --fp16", "parity", 5, signal.SIGTERM, False),
        ],
    )
    def test_no_partial_files_are_left(
        self,
        artifact: Path,
        micro_pth: Path,
        tmp_path: Path,
        traces: Path,
        verb: str,
        folder: str | None,
        times: int,
        number: signal.Signals,
        fresh: bool,
    ) -> None:
        """The signal comes when a file is made or written, or an image is read to calibrate with or to prove on."""
        command, *options = verb.split()
        source, name = (artifact, "x.engine") if command == "build-engine" else (micro_pth, "x.onnx")
        target = tmp_path / "out" / name
        if "--int8" in options:
            options += ["--calibration-data", str(DATA_FOLDER / "calibration")]
        before = at_open(DATA_FOLDER / folder if folder else target.parent, number, times=times)
        if command == "export":
            before += with_traces(traces)
        code, err = run_verb(command, source, *options, "-o", target, before=before, fresh=fresh)
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        assert code == 128 + number
        assert err.splitlines()[-1] == f"error: stopped by {name}; no partial files left"
        assert not list(target.parent.glob("*"))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
    def test_an_evaluation_goes_on_where_it_was_stopped(
        self, artifact: Path, tmp_path: Path, digit_images: list[Path], number: signal.Signals
    ) -> None:
        dataset, target = tmp_path / "set.csv", tmp_path / "report.json"
        partial = tmp_path / "report.json.partial"
        rows = [f"{path},{path.name.split('-')[1]}" for path in digit_images] + ["absent.jpg,3"]
        dataset.write_text("\n".join(["path,label", *rows * 40]))
        models: list[str | Path] = ["-m", artifact, "-m", artifact]
        arguments = ["eval", dataset, *models, "--batch-size", "7", "-o", target]
        assert run_verb(*arguments) == (0, "")
        expected = target.read_bytes()
        target.unlink()
        code, err = run_verb(*arguments, before=after_bytes(number, 5000))
        whole = partial.read_bytes().count(b"\n")
        if number == signal.SIGKILL:
            assert code == -number
        else:
            assert code == 128 + number
            assert whole % 7 == 0
            (line,) = err.splitlines()
            assert line.endswith(f" after {whole} images · {partial} · the same command with --resume continues")
        assert 0 < whole < 13 * 40
        assert not target.exists()
        assert "add --resume, or delete it to start over" in run_verb(*arguments)[1]
        assert run_verb(*arguments, "--resume") == (0, "")
        assert target.read_bytes() == expected
        assert not partial.exists()

    def test_two_exports_at_once_leave_one_whole_file(self, micro_pth: Path, tmp_path: Path, traces: Path) -> None:
        target = tmp_path / "out" / "x.onnx"
        export = ["export", str(micro_pth), "-o", str(target)]
        before = with_traces(traces)
        both = [Forked(*export, before=before) for _ in range(2)]
        assert [process.wait()[0] for process in both] == [0, 0]
        assert sorted(path.name for path in target.parent.iterdir()) == ["x.onnx", "x.parity.json"]
        assert run_verb("verify", target, "--reference", micro_pth, "--quiet") == (0, "")

    def test_a_full_disk_is_one_line_and_leaves_nothing(
        self, digits_export: Export, tmp_path: Path, traces: Path
    ) -> None:
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
        code, err = run_verb("export", "-o", tmp_path / "out" / "x.onnx", before=with_traces(traces) + limit)
        assert code == 6
        assert err.splitlines()[-1] == (f"error: cannot write: File too large · {tmp_path}/out/x.onnx · make room")
        assert not list((tmp_path / "out").iterdir())

    def test_a_closed_pipe_ends_quietly(self, artifact: Path, digit_images: list[Path]) -> None:
        for kind in ("jsonl", "csv", "table"):
            command = [sys.executable, "-m", "smlp_deploy", "predict", "-m", str(artifact), "--format", kind]
            command += ["--batch-size", "1", *map(str, digit_images * 20)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                assert process.stderr is not None
                assert process.stdout.readline()
                process.stdout.close()
                assert process.stderr.read() == ""
            assert process.returncode == 141

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
    @pytest.mark.parametrize("kind", ["jsonl", "csv", "table"])
    def test_no_room_for_standard_output(self, artifact: Path, digit_images: list[Path], kind: str) -> None:
        command = [sys.executable, "-m", "smlp_deploy", "predict", "-m", str(artifact), "--format", kind]
        with Path("/dev/full").open("w") as full:
            process = subprocess.run(
                [*command, *map(str, digit_images)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert process.returncode == 6
        assert process.stderr == "error: cannot write: No space left on device · standard output\n"

    def test_a_signal_while_waiting_for_names_finishes_what_was_named(
        self, artifact: Path, digit_images: list[Path]
    ) -> None:
        command = [sys.executable, "-m", "smlp_deploy", "predict", "-m", str(artifact), "--format", "jsonl", "-"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdin is not None
            room = fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, 4096)
            for path in digit_images:
                print(path, file=process.stdin, flush=True)
            # Blank lines name nothing. Once twice as many as the pipe holds are written, all the names were read.
            process.stdin.write("\n" * 2 * room)
            process.stdin.flush()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate()
        assert process.returncode == 143
        assert [json.loads(line)["path"] for line in out.splitlines()] == list(map(str, digit_images))
        assert err == "error: stopped by SIGTERM after 12 images\n"
