from __future__ import annotations

import csv
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from smlp_deploy.errors import SmlpError, UsageError
from smlp_deploy.inference.classify import Prediction, Score
from smlp_deploy.inference.records import RunIdentity
from smlp_deploy.inference.resume import RecordFile
from smlp_deploy.pipeline.export import Export
from tests.support.processes import Forked, after_bytes, run_verb

ODD_NAMES = [os.fsdecode(b"\xff.jpg"), 'a "b",\n\t\x1b.jpg', "c\r\nd.jpg", "\n", "図.jpg", "'", '"', "e,f"]
IDENTITY = RunIdentity(
    versions={"onnxruntime": "1", "torch": None},
    model="m",
    labels="l",
    preprocessing={"crop_pct": 0.9},
    provider="cpu",
    format="jsonl",
    topk=2,
    batch_size=4,
)


class Killed(BaseException):
    """Stands for whatever ends a run."""


def prediction(path: str, number: int) -> Prediction:
    if number % 5 == 3:
        return Prediction(path, error=f"damaged image: no. {number}")
    return Prediction(path, (Score(number % 3, f"label\n{number}", 0.5 + number / 1000), Score(7, 'b,"', 0.1)))


def run(
    target: Path, paths: list[str], identity: RunIdentity, *, resume: bool, until: int | None = None
) -> RecordFile[Prediction]:
    """A run over `paths` that ends after `until` records, if at all, in the middle of a batch perhaps."""
    with RecordFile.open(target, identity, resume=resume) as records:
        remaining = iter(map(Path, paths))
        records.skip(remaining)
        number = records.done
        for path in remaining:
            if number == until:
                records.flush()
                raise Killed
            records.write(prediction(os.fspath(path), number))
            number += 1
            if number % identity.batch_size == 0:
                records.flush()
    return records


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_run_that_is_not_stopped_leaves_one_file(tmp_path: Path, kind: str) -> None:
    target = tmp_path / f"x.{kind}"
    records = run(target, ODD_NAMES, replace(IDENTITY, format=kind), resume=False)
    assert (records.done, records.failed) == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    with target.open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        if kind == "csv":
            found = [row["path"] for row in csv.DictReader(stream)]
        else:
            found = [json.loads(line)["path"] for line in stream]
    assert found == ODD_NAMES


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    kind=st.sampled_from(["jsonl", "csv"]),
    names=st.lists(st.sampled_from([*ODD_NAMES, "a.jpg", "b/c.jpg"]), min_size=1, max_size=30),
    cut=st.floats(0, 1),
    data=st.data(),
)
def test_wherever_the_file_is_cut_it_ends_the_same(
    tmp_path_factory: pytest.TempPathFactory, kind: str, names: list[str], cut: float, data: st.DataObject
) -> None:
    identity = replace(IDENTITY, format=kind, batch_size=data.draw(st.integers(1, 6)))
    folder = tmp_path_factory.mktemp("cut")
    run(folder / "whole", names, identity, resume=False)
    target = folder / "x"
    with pytest.raises(Killed):
        run(target, [*names, "one more"], identity, resume=False, until=len(names))
    partial = folder / "x.partial"
    if partial.exists():
        os.truncate(partial, int(cut * partial.stat().st_size))
    records = run(target, names, identity, resume=True)
    assert target.read_bytes() == (folder / "whole").read_bytes()
    assert records.done % identity.batch_size == 0
    assert records.failed == sum(number % 5 == 3 for number in range(records.done))
    assert {path.name for path in folder.iterdir()} == {"whole", "x"}


class TestRefusals:
    @pytest.fixture
    def interrupted(self, tmp_path: Path) -> Path:
        target = tmp_path / "x.jsonl"
        with pytest.raises(Killed):
            run(target, list("abcdefghij"), IDENTITY, resume=False, until=9)
        return target

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "n"}, "model was m, now it is n"),
            ({"topk": 3}, "topk was 2, now it is 3"),
            ({"preprocessing": {"crop_pct": 1.0}}, "preprocessing crop pct was 0.9, now it is 1.0"),
            ({"labels": "k"}, "labels was l, now it is k"),
            ({"format": "csv"}, "format was jsonl, now it is csv"),
            ({"batch_size": 8}, "batch size was 4, now it is 8"),
            ({"provider": "cuda"}, "provider was cpu, now it is cuda"),
            ({"versions": {"onnxruntime": "2", "torch": None}}, "versions onnxruntime was 1, now it is 2"),
        ],
    )
    def test_another_run(self, interrupted: Path, changes: dict[str, Any], message: str) -> None:
        before = interrupted.with_name("x.jsonl.partial").read_bytes()
        with pytest.raises(UsageError, match=rf"cannot continue it: {message} · .*x\.jsonl\.partial · .*start over"):
            run(interrupted, list("abcdefghij"), replace(IDENTITY, **changes), resume=True)
        assert interrupted.with_name("x.jsonl.partial").read_bytes() == before

    def test_other_images(self, interrupted: Path) -> None:
        with pytest.raises(UsageError, match="image 3 was c, now it is X · "):
            run(interrupted, list("abXdefghij"), IDENTITY, resume=True)
        with pytest.raises(UsageError, match="image 4 was d, now it is missing · "):
            run(interrupted, list("abc"), IDENTITY, resume=True)
        assert run(interrupted, list("abcdefghij"), IDENTITY, resume=True).done == 8

    def test_beginning_anew_is_not_done_unasked(self, interrupted: Path) -> None:
        with pytest.raises(UsageError, match=r"found an interrupted run · .*x\.jsonl\.partial · add --resume"):
            run(interrupted, list("abcdefghij"), IDENTITY, resume=False)

    @pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"model": "m"}'])
    def test_a_run_of_which_nothing_is_known(self, interrupted: Path, text: str | None) -> None:
        beside = interrupted.with_name("x.jsonl.partial.json")
        beside.unlink() if text is None else beside.write_text(text)
        with pytest.raises(
            SmlpError, match=r"x\.jsonl\.partial\.json, which records its settings, is missing or damaged"
        ):
            run(interrupted, list("abcdefghij"), IDENTITY, resume=True)

    def test_a_file_that_another_process_is_writing(self, interrupted: Path) -> None:
        with (
            FileLock(interrupted.with_name(".x.jsonl.lock")),
            pytest.raises(SmlpError, match=r"another run is writing it · .*x\.jsonl"),
        ):
            run(interrupted, list("abcdefghij"), IDENTITY, resume=True)

    def test_nothing_but_a_file_is_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(SmlpError, match="it is a directory"):
            run(tmp_path / "folder", ["a"], IDENTITY, resume=False)
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(SmlpError, match="it is not a regular file"):
            run(tmp_path / "fifo", ["a"], IDENTITY, resume=False)


def test_a_run_stopped_before_its_first_batch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "x.jsonl", ["a"], IDENTITY, resume=True, until=0)
    assert not list(tmp_path.iterdir())


class Predict:
    """`smlp predict` over a folder of 600 odd files, in processes of its own that are stopped from outside."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self._model = model
        (folder / "images").mkdir()

    def arguments(self, target: Path, *options: str) -> list[str | Path]:
        shape = ["--batch-size", "3", "--topk", "2", "--allow-errors", *options]
        return ["predict", self.folder / "images", "-m", self._model, "-o", target, *shape]

    def finish(self, target: Path, *options: str, before: str = "") -> tuple[int | None, str]:
        """Exit code and stderr of a run that is left alone, after the code `before`."""
        return run_verb(*self.arguments(target, *options), before=before)

    def stop(self, target: Path, number: signal.Signals, *options: str, after: int) -> tuple[int | None, str]:
        """Exit code and stderr of a run that gets a signal once `after` bytes are written."""
        return self.finish(target, *options, before=after_bytes(number, after))


@pytest.fixture(scope="session")
def predict(tmp_path_factory: pytest.TempPathFactory, digits_export: Export, digit_images: list[Path]) -> Predict:
    predict = Predict(tmp_path_factory.mktemp("many"), digits_export.path)
    for number in range(600):
        path = predict.folder / "images" / f"{number:03d} ,\n.jpg"
        if number % 7 == 3:
            path.write_text("no image")
        else:
            path.symlink_to(digit_images[number % len(digit_images)])
    for kind in ("jsonl", "csv", "parquet"):
        code, err = predict.finish(predict.folder / f"whole.{kind}")
        assert (code, "600 images, 86 failed" in err) == (0, True), err
    return predict


@pytest.mark.parametrize(("kind", "kills"), [("jsonl", 20), ("csv", 6), ("parquet", 6)])
def test_killed_again_and_again_it_loses_and_doubles_nothing(
    predict: Predict, tmp_path: Path, kind: str, kills: int
) -> None:
    expected = (predict.folder / f"whole.{kind}").read_bytes()
    longest = (predict.folder / "whole.jsonl").stat().st_size
    rng = random.Random(kind)
    target = tmp_path / f"x.{kind}"
    partial = tmp_path / f"x.{kind}.partial"
    while kills:
        at = partial.stat().st_size if partial.exists() else 0
        code, _ = predict.stop(target, signal.SIGKILL, "--resume", after=at + 1 + rng.randrange(longest // 10))
        if code == -signal.SIGKILL:
            kills -= 1
        else:
            assert code == 0
            assert target.read_bytes() == expected
            target.unlink()
    code, err = predict.finish(target, "--resume")
    assert (code, "600 images, 86 failed" in err) == (0, True), err
    assert target.read_bytes() == expected


@pytest.mark.parametrize(("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_a_signal_finishes_the_batch_and_says_how_to_go_on(
    predict: Predict, tmp_path: Path, number: signal.Signals, name: str, code: int
) -> None:
    target = tmp_path / "x.jsonl"
    found, err = predict.stop(target, number, after=2000)
    assert found == code
    count = len((tmp_path / "x.jsonl.partial").read_text().splitlines())
    assert count % 3 == 0
    assert err.splitlines() == [
        f"error: stopped by {name} after {count} images · {target}.partial · the same command with --resume continues"
    ]
    found, err = predict.finish(target)
    assert (found, "add --resume, or delete it to start over" in err) == (2, True)
    assert predict.finish(target, "--resume")[0] == 0
    assert target.read_bytes() == (predict.folder / "whole.jsonl").read_bytes()


def test_a_full_disk_is_one_line_and_leaves_what_can_be_continued(predict: Predict, tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    target = tmp_path / "x.csv"
    code, err = predict.finish(target, before=limit)
    assert code == 6
    assert err.splitlines() == [
        f"error: cannot write: File too large · {target}.partial · free disk space, then continue with --resume"
    ]
    assert predict.finish(target, "--resume")[0] == 0
    assert target.read_bytes() == (predict.folder / "whole.csv").read_bytes()


def test_two_runs_at_once_do_not_mix(predict: Predict, tmp_path: Path) -> None:
    target = tmp_path / "x.jsonl"
    command = predict.arguments(target)
    both = [Forked(*command) for _ in range(2)]
    ended = [process.wait() for process in both]
    assert target.read_bytes() == (predict.folder / "whole.jsonl").read_bytes()
    refused = [(code, err) for code, err in ended if code]
    assert all(code == 6 and "another run is writing it" in err for code, err in refused)
    assert len(refused) <= 1  # none, where one was done before the other began
