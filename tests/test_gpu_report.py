"""The report of a machine with a GPU, collected on one without."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import gpu_report
from scripts.gpu_report import Outcome, Step, count_tests, engine_steps, first_steps, run, summary, timing_steps

ROOT = Path(__file__).parent.parent
JUNIT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><failure message="wrong"/></testcase>
<testcase name="c"><skipped message="no GPU"/></testcase><testcase name="d"><skipped message="no GPU"/></testcase>
<testcase name="e"><error message="fixture"/></testcase>
</testsuite></testsuites>"""


def test_both_streams_are_in_the_log(tmp_path: Path) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    outcome = run(Step("both", (sys.executable, "-c", code)), tmp_path)
    assert outcome.code == 3
    assert sorted((tmp_path / "both.txt").read_text().split()) == ["err", "out"]


def test_a_program_that_is_not_there_is_reported(tmp_path: Path) -> None:
    outcome = run(Step("absent", (str(tmp_path / "absent"),)), tmp_path)
    assert outcome.code is None
    assert "No such file" in (tmp_path / "absent.txt").read_text()
    assert "| absent | did not start |" in summary([outcome], tmp_path)


def test_tests_are_counted_with_the_reasons_of_skips(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(JUNIT)
    kinds, reasons = count_tests(tmp_path / "tests.xml")
    assert kinds == {"passed": 1, "failed": 2, "skipped": 2}
    assert reasons == {"no GPU": 2}
    text = summary([Outcome(Step("tests", ()), 1, 2.4)], tmp_path)
    assert "| tests | 1 | 2 |" in text
    assert "Tests: 1 passed, 2 failed, 2 skipped." in text
    assert "- skipped 2: no GPU" in text


def test_every_option_that_a_step_gives_exists(tmp_path: Path) -> None:
    from tests.test_docs import verbs

    (tmp_path / "digits.onnx").touch()
    (tmp_path / "x.engine").touch()
    (tmp_path / "x.engine.json").write_text(json.dumps({"ran_here": True}))
    steps = [*first_steps(tmp_path), *engine_steps(tmp_path, ["tensorrt"]), *timing_steps(tmp_path, ["cuda"])]
    commands = [step.command[3:] for step in steps if step.command[:3] == gpu_report.SMLP]
    assert [command[0] for command in commands] == ["doctor", "export", *["build-engine"] * 2, *["benchmark"] * 2]
    for verb, *words in commands:
        assert {word for word in words if word.startswith("-")} <= verbs()[verb]


def test_only_engines_that_ran_here_are_timed(tmp_path: Path) -> None:
    (tmp_path / "digits.onnx").touch()
    for name, ran in (("ran", True), ("elsewhere", False)):
        (tmp_path / f"{name}.engine").touch()
        (tmp_path / f"{name}.engine.json").write_text(json.dumps({"ran_here": ran}))
    (step,) = timing_steps(tmp_path, [])
    assert str(tmp_path / "ran.engine") in step.command
    assert str(tmp_path / "elsewhere.engine") not in step.command


def test_nothing_is_timed_without_an_onnx_file(tmp_path: Path) -> None:
    assert not list(timing_steps(tmp_path, ["cuda"]))


def test_a_step_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_report, "first_steps", lambda _: [Step("bad", (sys.executable, "-c", "1/0"))])
    monkeypatch.setattr(gpu_report, "engine_steps", lambda *_: [Step("good", (sys.executable, "-c", "print(7)"))])
    assert gpu_report.main([str(tmp_path / "report")]) == 1
    assert "ZeroDivisionError" in (tmp_path / "report" / "bad.txt").read_text()
    assert (tmp_path / "report" / "good.txt").read_text() == "7\n"
    assert "| bad | 1 |" in capsys.readouterr().out
    assert "| good | 0 |" in (tmp_path / "report" / "summary.md").read_text()


def test_a_run_without_a_passed_test_is_not_a_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "first_steps", lambda _: [])
    monkeypatch.setattr(gpu_report, "engine_steps", lambda *_: [])
    assert gpu_report.main([str(tmp_path / "report")]) == 1


@pytest.mark.parametrize(
    ("extra", "others"),
    [
        ("gpu", "decode-gpu,export"),
        ("gpu-cu12", "decode-gpu-cu12,export"),
        ("tensorrt", "decode-gpu,export,cpu"),
        ("rtx", "decode-gpu-cu12,export,cpu"),
        ("rtx-cu13", "decode-gpu,export,cpu"),
    ],
)
def test_make_installs_one_onnx_runtime_and_packages_of_one_cuda(extra: str, others: str) -> None:
    import subprocess

    command = ["make", "--dry-run", "--always-make", "test-gpu", f"GPU_EXTRA={extra}"]
    plan = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f'".[{extra},{others}]" pytest' in plan
    assert "-m scripts.gpu_report" in plan
