"""A short run of scripts/fuzz.py, the cases it has found so far, and that it sees each kind of finding."""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import onnx
import pytest

from scripts import fuzz
from scripts.fuzz_inputs import KINDS, build_corpus, make_input, read_corpus
from smlp_deploy.errors import SmlpError

FOUND = sorted(path for path in (Path(__file__).parent / "data" / "fuzz").glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder, tuple(KINDS))
    return folder


@pytest.fixture(scope="module")
def verdicts(corpus: Path) -> dict[Path, fuzz.Verdict]:
    """What becomes of the cases found so far."""
    setup = fuzz.Setup(corpus, tuple({path.parent.name for path in FOUND}))
    return dict(zip(FOUND, fuzz.check_files(setup, [(path.parent.name, path) for path in FOUND]), strict=True))


@pytest.mark.parametrize("path", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_case_found_before_stays_solved(verdicts: dict[Path, fuzz.Verdict], path: Path) -> None:
    assert not verdicts[path].is_finding, verdicts[path].detail


def test_a_short_run_finds_nothing(corpus: Path, tmp_path: Path) -> None:
    kinds = tuple(KINDS)
    tally = fuzz.Tally(kinds, tmp_path)
    fuzz.fuzz(fuzz.Setup(corpus, kinds, seed=2022), fuzz.Schedule(kinds, inputs=400, seconds=None), tally, jobs=1)
    assert [finding.verdict.detail for finding in tally.findings.values()] == []
    assert sum(count.inputs for count in tally.counts.values()) == 400
    assert all(count.accepted + count.refused == count.inputs for count in tally.counts.values())
    assert all(count.accepted and count.refused for count in tally.counts.values())


def test_an_input_follows_from_seed_kind_and_index(corpus: Path) -> None:
    files = read_corpus(corpus, tuple(KINDS))
    for kind in KINDS:
        made = [make_input(files, kind, 1, index) for index in range(12)]
        assert made == [make_input(files, kind, 1, index) for index in range(12)]
        assert made != [make_input(files, kind, 2, index) for index in range(12)]
        assert len({*made, *files[kind]}) > 8 + len(files[kind])


def edits(corpus: Path, kind: str) -> list[bytes]:
    """The files of a kind, each edited a few times along its format."""
    (files,) = read_corpus(corpus, (kind,)).values()
    rng = Random(3)
    return [KINDS[kind].edit(rng, content) for content in files for _ in range(12)]


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
    for content in edits(corpus, "onnx"):
        assert onnx.ModelProto.FromString(content).graph.node


def test_most_headers_of_edited_safetensors_parse(corpus: Path) -> None:
    contents = edits(corpus, "safetensors")
    lengths = [int.from_bytes(content[:8], "little") for content in contents]
    fitting = [content[8 : 8 + n] for content, n in zip(contents, lengths, strict=True) if n <= len(content)]
    assert len(fitting) > 0.6 * len(contents)


def test_one_input_can_be_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--replay", "5:17", "--kind", "table", "--output", str(tmp_path / "out")]
    assert fuzz.main(arguments) in (0, 1)
    saved = tmp_path / "out" / "table" / "5-17.json"
    build_corpus(tmp_path / "corpus", ("table",))
    assert saved.read_bytes() == make_input(read_corpus(tmp_path / "corpus", ("table",)), "table", 5, 17)
    assert capsys.readouterr().out.startswith(f"{saved}: ")


class TwoLinesError(SmlpError):
    def __str__(self) -> str:
        return "one line\nand another"


class Panic(BaseException):
    pass


def fail(error: BaseException) -> Callable[[], object]:
    def step() -> None:
        raise error

    return step


def hang() -> None:
    while True:
        pass


FAULTS: dict[bytes, Callable[[], object]] = {
    b"traceback": fail(ValueError("a bug")),
    b"traceback of a panic": fail(Panic()),
    b"message": fail(TwoLinesError("")),
    b"message that is too long": fail(SmlpError("x", where="y" * 3000)),
    b"records": fail(fuzz.Broken("records", "one for two")),
    b"memory": lambda: np.ones(200 << 20, np.uint8).sum(),
    b"refused": fail(SmlpError("one line")),
    b"hang": hang,
    b"accepted": lambda: None,
    b"crash": os.abort,
}


class Faulty(fuzz.Examiner):
    """Whatever the file says happens."""

    def steps(self, kind: str, path: Path, others: Sequence[Path]) -> tuple[Callable[[], object], ...]:
        return (FAULTS.get(path.read_bytes(), lambda: None),)


def test_every_kind_of_finding_is_seen(tmp_path: Path) -> None:
    build_corpus(tmp_path, ("table",))
    child = fuzz.Child(fuzz.Setup(tmp_path, ("table",), limit=1.0, examiner=Faulty))
    try:
        seen = {fault: next(child.verdicts(fuzz.Task("table", content=fault))).what for fault in FAULTS}
    finally:
        child.close()
    assert seen == {fault: fault.decode().split()[0] for fault in FAULTS}


def test_findings_are_told_apart_and_the_smallest_input_is_kept(tmp_path: Path) -> None:
    tally = fuzz.Tally(("table",), tmp_path)
    one = fuzz.Verdict("traceback", exception="ValueError", where="metadata.py:1")
    other = fuzz.Verdict("traceback", exception="ValueError", where="metadata.py:2")
    for name, verdict, content in (
        ("0:1", one, b"long"),
        ("0:2", one, b"1"),
        ("0:3", one, b"22"),
        ("0:4", other, b"4"),
    ):
        tally.add("table", name, verdict, lambda content=content: content)  # type: ignore[misc]
    assert {path.name: path.read_bytes() for path in (tmp_path / "table").iterdir()} == {
        "0-2.json": b"1",
        "0-4.json": b"4",
    }
    assert [finding.times for finding in tally.findings.values()] == [3, 1]
    assert tally.counts["table"] == fuzz.Count(inputs=4, findings=4)


def test_a_run_reports_counts_and_exits_1_on_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(setup: fuzz.Setup, schedule: fuzz.Schedule, tally: fuzz.Tally, *, jobs: int) -> None:
        while task := schedule.next():
            tally.add(task.kind, f"{setup.seed}:{task.first}", fuzz.Verdict("hang", "it hangs"), lambda: b"{}")

    monkeypatch.setattr(fuzz, "fuzz", found)
    report = tmp_path / "report.json"
    arguments = ["--kind", "table", "--inputs", "1", "--seed", "9", "--output", str(tmp_path), "--json", str(report)]
    assert fuzz.main(arguments) == 1
    document = json.loads(report.read_text())
    assert document["seed"] == 9
    assert document["kinds"] == {
        "table": {"inputs": 1, "accepted": 0, "refused": 0, "findings": 1, "most_mib": 0},
    }
    assert "--replay 9:0 --kind table" in capsys.readouterr().out
