"""A short run of scripts/fuzz.py, the cases it has found so far, and that it sees each kind of finding."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TypeVar

import hypothesis
import numpy as np
import onnx
import pytest
from hypothesis import strategies as st

from scripts import fuzz
from scripts.fuzz_corpus import build_corpus, read_corpus
from scripts.fuzz_inputs import KINDS, inputs
from smlp_deploy.errors import SmlpError

T = TypeVar("T")
FOUND = tuple(sorted(path for path in (Path(__file__).parent / "data" / "fuzz").glob("*/*") if path.is_file()))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder, tuple(KINDS))
    return folder


def forget_verdicts(corpus: Path) -> None:
    for log in corpus.glob("verdicts-*"):
        log.unlink()


@pytest.fixture
def setup(corpus: Path, tmp_path: Path) -> fuzz.Setup:
    forget_verdicts(corpus)
    return fuzz.Setup(folder=corpus, output=tmp_path / "found")


@pytest.fixture(scope="module")
def verdicts(corpus: Path) -> dict[Path, fuzz.Verdict]:
    """What becomes of the cases found so far."""
    forget_verdicts(corpus)
    kinds = tuple({path.parent.name for path in FOUND})
    checked = fuzz.fuzz(fuzz.Setup(folder=corpus, output=corpus / "found", kinds=kinds, files=FOUND))
    return dict(zip(FOUND, checked, strict=True))


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_case_found_before_stays_solved(verdicts: dict[Path, fuzz.Verdict], path: Path) -> None:
    assert verdicts[path].kind == path.parent.name
    assert not verdicts[path].is_finding, verdicts[path].detail


def test_a_short_run_finds_nothing(setup: fuzz.Setup) -> None:
    verdicts = fuzz.fuzz(replace(setup, seed=2022, inputs=250))
    assert [verdict.detail for verdict in verdicts if verdict.is_finding] == []
    assert len(verdicts) == 250
    for kind in KINDS:
        assert {verdict.what for verdict in verdicts if verdict.kind == kind} == {"accepted", "refused"}, kind


def drawn(strategy: st.SearchStrategy[T], *, seed: int, count: int) -> list[T]:
    values: list[T] = []

    @hypothesis.settings(database=None, deadline=None)
    @hypothesis.given(strategy)
    def collect(value: T) -> None:
        values.append(value)

    rng = Random(seed)
    while len(values) < count:
        collect.hypothesis.fuzz_one_input(rng.randbytes(4096))  # type: ignore[attr-defined]
    return values


def test_inputs_follow_from_the_seed(corpus: Path) -> None:
    for kind, files in read_corpus(corpus, tuple(KINDS)).items():
        made = drawn(inputs(kind, files), seed=1, count=30)
        assert made == drawn(inputs(kind, files), seed=1, count=30)
        assert made != drawn(inputs(kind, files), seed=2, count=30)
        new = {*made} - {(content,) for content in files}
        assert len(new) > 24, f"{len(new)} of {kind}"


def edits(corpus: Path, kind: str) -> list[bytes]:
    """Files of a kind, edited along its format."""
    (files,) = read_corpus(corpus, (kind,)).values()
    edited = st.sampled_from(files).flatmap(st.composite(KINDS[kind].edit))
    return drawn(edited, seed=3, count=60)


def test_checksums_of_an_edited_png_fit(corpus: Path) -> None:
    for content in edits(corpus, "png"):
        at = 8
        while at < len(content):
            (length,) = struct.unpack_from(">I", content, at)
            (checksum,) = struct.unpack_from(">I", content, at + 8 + length)
            assert checksum == zlib.crc32(content[at + 4 : at + 8 + length])
            at += 12 + length


def test_checksums_of_an_edited_pth_fit(corpus: Path) -> None:
    for content in edits(corpus, "pth"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert archive.testzip() is None


def test_an_edited_onnx_file_parses(corpus: Path) -> None:
    models = [onnx.ModelProto.FromString(content) for content in edits(corpus, "onnx")]
    assert sum(len(model.graph.node) > 0 for model in models) > 0.9 * len(models)


def test_most_headers_of_edited_safetensors_parse(corpus: Path) -> None:
    contents = edits(corpus, "safetensors")
    lengths = [int.from_bytes(content[:8], "little") for content in contents]
    assert sum(n <= len(content) for content, n in zip(contents, lengths, strict=True)) > 0.6 * len(contents)


class TwoLinesError(SmlpError):
    def __str__(self) -> str:
        return "one line\nand another"


class Panic(BaseException):
    pass


def fail(error: BaseException) -> object:
    raise error


def hang() -> None:
    while True:
        pass


FAULTS: dict[str, Callable[[Path], object]] = {
    "traceback": lambda _: fail(ValueError("a bug")),
    "traceback of a panic": lambda _: fail(Panic()),
    "message": lambda _: fail(TwoLinesError("")),
    "message that is too long": lambda _: fail(SmlpError("x", where="y" * 3000)),
    "records": lambda _: fail(fuzz.Broken("records", "one for two")),
    "files": lambda path: path.with_name("left").touch(),
    "memory": lambda _: np.ones(200 << 20, np.uint8).sum(),
    "refused": lambda _: fail(SmlpError("one line")),
    "hang": lambda _: hang(),
    "accepted": lambda _: None,
    "crash": lambda _: os.abort(),
}


class Faulty(fuzz.Examiner):
    """Whatever the file says happens."""

    def steps(self, kind: str, paths: Sequence[Path]) -> tuple[Callable[[], object], ...]:
        return (partial(FAULTS.get(paths[0].read_text(), lambda _: None), paths[0]),)


def test_every_kind_of_finding_is_seen(setup: fuzz.Setup, tmp_path: Path) -> None:
    files = []
    for fault in FAULTS:
        files.append(tmp_path / "table" / f"{fault}.json")
        files[-1].parent.mkdir(exist_ok=True)
        files[-1].write_text(fault)
    checked = fuzz.fuzz(replace(setup, kinds=("table",), limit=2.0, files=tuple(files)), examiner=Faulty)
    assert [verdict.what for verdict in checked] == [fault.split()[0] for fault in FAULTS]


class Planted(fuzz.Examiner):
    """Three bugs, one of which ends the process."""

    def steps(self, kind: str, paths: Sequence[Path]) -> tuple[Callable[[], object], ...]:
        content = paths[0].read_bytes()
        if b"minmax" not in content:
            return (os.abort,) if b"percentile" in content else (lambda: fail(ValueError(len(content))),)
        return (lambda: fail(KeyError()),) if b"images" not in content else ()


def test_planted_bugs_are_found_and_shrunk(setup: fuzz.Setup) -> None:
    verdicts = fuzz.fuzz(replace(setup, kinds=("table",), seed=1, inputs=600), examiner=Planted)
    assert len(verdicts) >= 600
    saved = {path.name: path.read_bytes() for path in (setup.output / "table").iterdir()}
    assert set(saved) == {"traceback-ValueError.json", "traceback-KeyError.json"}
    assert len(saved["traceback-ValueError.json"]) < 10
    smallest = min(int(v.detail.split()[-1]) for v in verdicts if v.exception == "ValueError")
    assert len(saved["traceback-ValueError.json"]) == smallest
    assert b"minmax" in saved["traceback-KeyError.json"]


def test_a_run_reports_counts_and_findings_that_can_be_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "fuzz", partial(fuzz.fuzz, examiner=Planted))
    assert fuzz.main(["--kind", "table", "--inputs", "60", "--seed", "9", "--output", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "seed 9" in shown
    (saved,) = tmp_path.glob("table/*ValueError*")
    assert f"python -m scripts.fuzz --check {saved}" in shown
    assert fuzz.main(["--check", str(saved)]) == 1
    assert capsys.readouterr().out.startswith(f"{saved}: traceback ValueError")
    monkeypatch.undo()
    assert fuzz.main(["--check", str(saved)]) == 0
    assert capsys.readouterr().out.startswith(f"{saved}: refused ArtifactError")
