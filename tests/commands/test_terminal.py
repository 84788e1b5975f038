"""What people see: in a terminal of 80 columns, and in a pipe."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer.main
from rich.console import Console
from rich.progress import Progress
from typer.testing import CliRunner

from scripts.captures import COLUMNS, VERBS, in_terminal, plain
from smlp_deploy.cli import command_line
from smlp_deploy.commands import progress, tables
from smlp_deploy.commands.tables import show_benchmark, show_divergence, show_parity
from smlp_deploy.doctor import Finding
from smlp_deploy.evaluation.benchmark import BatchTiming, Benchmark, ModelTiming
from smlp_deploy.evaluation.layers import DivergenceReport, PointReport
from smlp_deploy.evaluation.parity import GateResult
from smlp_deploy.evaluation.profile import GraphProfile
from smlp_deploy.exporters.kernels import Kernel, KernelSummary, KernelTensor, summarize
from smlp_deploy.pipeline.export import Export

COLOR = re.compile(r"\x1b\[[\d;]*3[1-7][\d;]*m")


def test_times_of_a_gpu_are_shown_beside_those_of_the_clock(capsys: pytest.CaptureFixture[str]) -> None:
    times = {"median": 0.002, "p90": 0.002, "p95": 0.002, "p99": 0.003, "spread": 0.01, "images_per_second": 500.0}
    timing = BatchTiming(batch=1, stable=False, rounds=((0.002,),), ratio=None, gpu_median=0.0005, **times)
    model = ModelTiming(
        name="x",
        precision="fp16",
        load=1,
        first=0.1,
        peak_memory=None,
        batches=(timing,),
        gpu="NVIDIA L4",
        gpu_memory=30_200_000,
    )
    environment = {"CPU": "a CPU", "GPU": "NVIDIA L4, sm89", "GPU clock, MHz": "1980 (1755 to 1980)"}
    show_benchmark(Benchmark(environment=environment, models=(model,), left_out=("torch.compile: no compiler",)))
    out = capsys.readouterr().out
    assert "GPU: NVIDIA L4, sm89\nGPU clock, MHz: 1980 (1755 to 1980)\n" in out
    assert "a CPU" not in out
    assert "1 at batch 1: 0.5 ms by CUDA events, without transfers" in out
    assert "1: 30 MB of GPU memory for buffers and scratch, beside the weights" in out
    assert "not stable when timing began: 1 at batch 1" in out
    assert "left out: torch.compile: no compiler" in out


def test_findings_are_a_table_in_a_terminal_and_a_line_each_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    detail = "an engine for sm89, which this machine does not have; it has another one"
    findings = [Finding(name="artifacts/[red]x.engine", status="warning", detail=detail, fix="build it again")]
    shown = {}
    for is_terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=is_terminal, width=COLUMNS, color_system=None, highlight=False)
        monkeypatch.setattr(tables, "stdout", lambda console=console: console)
        tables.show_findings(findings)
        shown[is_terminal] = stream.getvalue().splitlines()
    assert max(map(len, shown[True])) <= COLUMNS
    assert "artifacts/[red]x.engine" in shown[True][0]
    assert "try: build it again" in shown[True][-1]
    assert shown[False] == [f"warning artifacts/[red]x.engine  {detail}", f"{'':33}try: build it again"]


@pytest.mark.parametrize(
    ("unknown", "bytes_read", "moved"),
    [
        (0, 1_500_000, "1.5 MB read and written per image (estimate, from the kernels' shapes)"),
        (2, 500_000, "at least 0.5 MB read and written per image (estimate, from the shapes of 3 kernels)"),
        (5, 0, "bytes read and written: unknown"),
    ],
)
def test_kernels_of_unknown_bytes_are_told(
    unknown: int, bytes_read: int, moved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tables.show_kernels(
        KernelSummary(
            batch=4,
            count=5,
            by_kind={"gemm": 3, "Myelin": 2},
            compute_by_precision={"Half": 3, "unknown": 2},
            bytes_per_image=bytes_read,
            bytes_unknown=unknown,
        )
    )
    assert capsys.readouterr().err.splitlines() == [
        "5 kernels at batch 4: 3 gemm, 2 Myelin",
        "convolutions and matrix products: 3 in Half, 2 unknown",
        moved,
    ]


def test_a_profile_shows_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [KernelTensor(shape=(batch, 500, 1000), element="Half") for batch in (4, -1)]
    kernels = [Kernel(name="k", kind="gemm", inputs=(), outputs=(tensor,), nodes=()) for tensor in tensors]
    profile = GraphProfile(
        source=Path("x.onnx"),
        precision="fp16",
        architecture="sm89",
        kernels=tuple(kernels),
        summary=summarize(kernels, batch=4),
        macs=1,
    )
    tables.show_profile(profile, top=2)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["4.00", "Half", "gemm", "4x500x1000"] in lines
    assert ["?", "Half", "gemm", "?x500x1000"] in lines
    total = "2 kernels (bytes of 1 unknown), 4 MB read and written; convolutions and products: 2 in Half"
    assert total in " ".join(out.split())


@pytest.mark.parametrize("growth", [None, 0.0123, 1.0, 12345.0])
def test_error_growth_fits_the_narrowest_terminal(
    growth: float | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {"error": 1.2e-3, "worst_error": 3.4e-3, "max_abs": 0.1}
    point = PointReport(
        name="stage 3 block 12 token mixing", worst_image="ILSVRC2012_val_00000001.JPEG", growth=None, **numbers
    )
    point = replace(point, growth=growth)
    names = {"reference": "a", "candidate": "b", "precision": "fp32"}
    report = DivergenceReport(**names, images=1, unreadable=(), max_error=1e-5, points=(point,), layers=())
    show_divergence(report)
    assert f" {point.worst_image} 3.4e-03 " in capsys.readouterr().out  # whole in a pipe
    console = Console(highlight=False, width=COLUMNS, force_terminal=True, color_system=None)
    monkeypatch.setattr(tables, "stdout", lambda: console)
    show_divergence(report)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert lines[2].rstrip().endswith("over")


@pytest.mark.parametrize(
    ("value", "limit", "shown"),
    [
        (1.0, "at least 100.00% of 43 inputs", "100.00%"),
        (0.99999, "at least 100.00% of 43 inputs", "99.99%"),
        (0.9767, "at least 99.00% of 43 inputs", "97.67%"),
        (0.99812, "at least 0.99", "0.998"),
        (float("nan"), "at least 99.00% of 0 inputs", ""),
    ],
)
def test_a_gate_is_shown_in_the_unit_of_its_limit(
    value: float, limit: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = GateResult(name="top-1", passed=True, limit=limit, measured=value)
    show_parity(SimpleNamespace(gates=[gate], failures=[], unreadable=[]), on_stderr=False)  # type: ignore[arg-type]
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.removeprefix("top-1  passed").removesuffix(limit).strip() == shown


def test_nothing_is_cut_or_wrapped_in_a_pipe(digits_export: Export, tmp_path: Path, digit_images: list[Path]) -> None:
    folder = tmp_path / ("a-folder-with-a-long-name-" * 8)
    folder.mkdir()
    model, image = folder / "digits.onnx", folder / digit_images[0].name
    shutil.copy(digits_export.path, model)
    shutil.copy(digit_images[0], image)

    def piped(*command: str | Path) -> list[str]:
        words = [sys.executable, "-m", "smlp_deploy", *map(str, command)]
        environment = {**os.environ, "COLUMNS": "40"}
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
        assert "…" not in done.stdout
        return done.stdout.splitlines()

    _, line = piped("predict", "-m", model, image)
    assert line.startswith(f"{image}  0 ")
    assert line.count("%") == 5
    facts = dict(row.strip().split(maxsplit=1) for row in piped("inspect", model))
    assert facts["file"] == str(model)
    assert facts["metadata.labels"] == ", ".join("0123456789")
    (top1,) = [row for row in piped("verify", model) if row.startswith("top-1")]
    assert top1.endswith("inputs whose margin exceeds the difference")
    (folder / "set.csv").write_text(f"path,label\n{image.name},0\n")
    rows = piped("eval", folder / "set.csv", "-m", model)
    assert any(f"{model.name} " in row and row.split()[0] == "1" for row in rows)


def test_a_count_shows_total_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(completed=50, total=200.0, speed=12.34, description="images", time_remaining=15.0)
    task.finished = False
    task.elapsed = 4.0
    assert progress._Count().render(task).plain == "50 of 200 images, 12.3/s"  # type: ignore[arg-type]
    assert progress._TimeLeft().render(task).plain == "left: 0:00:15"  # type: ignore[arg-type]
    task.total = task.speed = task.time_remaining = None
    assert progress._Count().render(task).plain == "50 images"  # type: ignore[arg-type]
    assert progress._TimeLeft().render(task).plain == ""  # type: ignore[arg-type]


def test_predict_counts_of_how_many(model: Path, digit_images: list[Path], tmp_path: Path) -> None:
    command: list[str | Path] = ["predict", "--model", model.name, "-o", "x.jsonl", "--batch", "1", *digit_images * 5]
    shown = in_terminal(*command, folder=tmp_path)[1]
    assert re.search(r"\d+ of 60 images", shown)


def test_a_stage_of_unknown_length_claims_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=COLUMNS, color_system=None)
    shown = Progress(console=console)
    monkeypatch.setattr(progress, "_progress", lambda *columns: shown)
    with progress.building("first") as show:
        (task,) = shown.tasks
        show("reading", 3, 4)
        assert (task.description, task.completed, task.total) == ("reading", 3, 4)
        show("converting", 0, 0)
        assert (task.description, task.completed, task.total) == ("converting", 0, None)


@pytest.fixture
def model(digits_export: Export, tmp_path: Path) -> Path:
    return Path(shutil.copy(digits_export.path, tmp_path / "digits.onnx"))


@pytest.mark.parametrize("verb", VERBS[1:])
def test_help_fits_80_columns_and_nothing_is_cut(verb: str, tmp_path: Path) -> None:
    code, shown = plain(verb, "--help", folder=tmp_path)
    assert code == 0
    assert max(map(len, shown.splitlines())) <= COLUMNS
    assert "…" not in shown
    assert "--quiet" in shown


def test_help_shows_what_to_write_and_no_types() -> None:
    root = typer.main.get_command(command_line())
    for name, verb in root.commands.items():  # type: ignore[attr-defined]
        context = typer.Context(verb, info_name=name)
        shown = CliRunner().invoke(command_line(), [name, "--help"]).output
        assert not re.search("<(bool|str|path|int|float|list|text)", shown), name
        for parameter in verb.get_params(context):
            states_default = re.search(r"\bDefault\b", parameter.help or "")
            default = parameter._extract_default_help_str(ctx=context)
            twice = states_default and parameter.show_default and default not in (None, False)
            assert not twice, (name, parameter.name)


def test_colours_are_left_out_where_that_is_asked_for(tmp_path: Path) -> None:
    colourful, plain = (in_terminal("exprot", folder=tmp_path, **asked)[1] for asked in ({}, {"NO_COLOR": "1"}))
    assert COLOR.search(colourful)
    assert not COLOR.search(plain)


def test_the_next_command_is_shown_in_a_terminal_and_not_in_a_pipe(
    model: Path, digit_images: list[Path], tmp_path: Path
) -> None:
    command = ("predict", "--model", model.name, digit_images[0])
    shown = in_terminal(*command, folder=tmp_path)[1]
    assert "next: smlp verify digits.onnx" in shown
    piped = subprocess.run(
        [sys.executable, "-m", "smlp_deploy", *map(str, command)], cwd=tmp_path, capture_output=True, text=True
    )
    assert "\x1b" not in piped.stdout + piped.stderr
    assert piped.stderr == "1 image, 0 failed\n"


def test_quiet_leaves_results_and_errors(model: Path, digit_images: list[Path], tmp_path: Path) -> None:
    command = ("predict", "-q", "--model", model.name, digit_images[0])
    code, shown = plain(*command, folder=tmp_path)
    assert code == 0
    heading, line = shown.splitlines()
    assert heading.startswith("image ")
    assert digit_images[0].name in line
    code, shown = plain("verify", "--quiet", "absent.onnx", folder=tmp_path)
    assert code == 5
    assert shown.startswith("error: no such file · absent.onnx")


def test_the_shell_completes_verbs_and_options(tmp_path: Path) -> None:
    def completed(words: str, position: int) -> list[str]:
        environment = {"_SMLP_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        run = subprocess.run(
            [sys.executable, "-c", "from smlp_deploy.cli import main; main()"],
            env={**os.environ, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        return run.stdout.split()

    assert completed("smlp ex", 1) == ["export"]
    assert completed("smlp export --prec", 2) == ["--precision"]
    assert completed("smlp export --precision f", 3) == ["fp32", "fp16"]
