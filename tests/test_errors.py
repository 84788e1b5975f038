from __future__ import annotations

import inspect
import re
import signal
from pathlib import Path

import pytest

from smlp_deploy import errors
from smlp_deploy.cli import main
from smlp_deploy.errors import SmlpError, StoppedError, printable
from smlp_deploy.pipeline.export import Export
from tests.support.processes import at_open, run_verb

PAGE = Path(__file__).parent.parent / "docs" / "predictions.md"
NOT_OF_AN_ERROR = {0: "done", 1: "a bug", 141: "a closed pipe"}

BUG = "from smlp_deploy.models import variants\nvariants.VARIANTS = None\n"
CLOSED = "import os\ntheirs, ours = os.pipe()\nos.close(theirs)\nos.dup2(ours, 1)\n"


def documented() -> list[int]:
    """The codes of the page's table, in its order."""
    table = PAGE.read_text(encoding="utf-8").split("| exit code | means |")[1].split("\n\n")[0]
    return [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]


def test_the_page_has_each_code_once() -> None:
    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, SmlpError)]
    stopped = {StoppedError("stopped", signal=number).exit_code for number in (signal.SIGINT, signal.SIGTERM)}
    of_an_error = {kind.exit_code for kind in kinds if kind is not StoppedError} | stopped
    assert documented() == sorted(of_an_error | NOT_OF_AN_ERROR.keys())


@pytest.mark.parametrize("code", documented())
def test_each_kind_of_failure_has_its_code(code: int, digits_export: Export, tmp_path: Path) -> None:
    empty, damaged = tmp_path / "empty", tmp_path / "damaged.onnx"
    empty.mkdir()
    damaged.write_bytes(b"damaged")
    cases: dict[int, tuple[list[str | Path], str, str]] = {
        0: (["models"], "", ""),
        1: (["models"], "AttributeError: 'NoneType' object has no attribute 'values'", BUG),
        2: (["export", "--fromat", "onnx"], "No such option: --fromat", ""),
        3: (["merge", empty, "-o", tmp_path / "all.jsonl"], "has no shards", ""),
        4: (["predict", "-m", digits_export.path, tmp_path / "absent.jpg"], "1 image, 1 failed", ""),
        5: (["inspect", damaged], "not an ONNX file", ""),
        6: (["export", "-o", damaged / "x.onnx"], "cannot write: File exists", ""),
        130: (["inspect", damaged], "stopped by Ctrl-C", at_open(tmp_path, signal.SIGINT)),
        141: (["models"], "", CLOSED),
        143: (["inspect", damaged], "stopped by SIGTERM", at_open(tmp_path, signal.SIGTERM)),
    }
    arguments, said, before = cases[code]
    found, err = run_verb(*arguments, before=before)
    assert found == code, err
    assert said in err
    assert bool(err) is bool(said)
    assert ("Traceback (most recent call last)" in err) is (code == 1)


@pytest.mark.parametrize(
    "kind", [kind for kind in SmlpError.__subclasses__() if kind is not StoppedError], ids=lambda kind: kind.__name__
)
def test_an_error_ends_the_command_line_with_its_code(
    kind: type[SmlpError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, *, ema: bool) -> None:
        raise kind("it failed", where=path)

    path = tmp_path / "x.onnx"
    path.touch()
    monkeypatch.setattr("smlp_deploy.inspect_file.inspect_file", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(path)])
    assert stopped.value.code == kind.exit_code
    assert capsys.readouterr().err == f"error: it failed · {path}\n"


def test_a_message_says_what_where_and_what_next() -> None:
    error = SmlpError("no such file", where="a/b.onnx", fix="export it")
    assert str(error) == "no such file · a/b.onnx · export it"
    assert str(SmlpError("no such file")) == "no such file"


def test_a_message_is_one_line_whatever_a_file_is_called() -> None:
    assert str(SmlpError("empty", where="a\nb\x1b[31m\udcff")) == r"empty · a\nb\x1b[31m\udcff"


def test_a_text_from_a_file_does_not_make_it_endless() -> None:
    assert len(str(SmlpError("x" * 5000, where="a.json"))) < 600


def test_printable_leaves_other_scripts_alone() -> None:
    assert printable("Straße 図.jpg") == "Straße 図.jpg"
