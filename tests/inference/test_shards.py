"""Shards of a listing: what each one has, that it is not run twice, and that merged they are the single run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smlp_deploy.errors import CheckError, RecordsError, SmlpError, StoppedError, UsageError
from smlp_deploy.inference import parquet
from smlp_deploy.inference.classify import Classifier
from smlp_deploy.inference.facts import Facts, Listing
from smlp_deploy.inference.merge import merge_shards
from smlp_deploy.inference.records import RunIdentity, record_of
from smlp_deploy.inference.shards import Shard, ShardRun, deal, run_shard, write_shard
from smlp_deploy.interrupts import StopRequest
from smlp_deploy.pipeline.export import Export
from tests.support.fakes import FakeRunner, metadata, quadrant_means
from tests.support.processes import Forked, after_bytes, run_verb

KINDS = ("parquet", "jsonl")
UNDECODABLE = os.fsdecode(b"\xff \n.png")


class TestShard:
    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(images=st.integers(0, 60), batch_size=st.integers(1, 7), count=st.integers(1, 9))
    def test_each_image_is_in_one_shard_with_the_batch_it_has_in_a_single_run(
        self, images: int, batch_size: int, count: int
    ) -> None:
        shards = [Shard(number, count) for number in range(1, count + 1)]
        dealt = [list(shard.of(iter(range(images)), batch_size=batch_size)) for shard in shards]
        assert sorted(image for one in dealt for image in one) == list(range(images))
        whole = {tuple(range(images))[i : i + batch_size] for i in range(0, images, batch_size)}
        assert {tuple(one[i : i + batch_size]) for one in dealt for i in range(0, len(one), batch_size)} == whole
        assert [len(one) for one in dealt] == [shard.size(images, batch_size=batch_size) for shard in shards]
        some = shards[::2]
        assert deal(range(images), some, batch_size=batch_size) == dict(zip(some, dealt[::2], strict=True))

    def test_the_listing_is_read_as_it_comes(self) -> None:
        read: list[int] = []

        def endless() -> Iterator[int]:
            number = 0
            while True:
                read.append(number)
                yield number
                number += 1

        images = Shard(2, 3).of(endless(), batch_size=2)
        assert [next(images) for _ in range(3)] == [2, 3, 8]
        assert read[-1] == 8

    def test_files_sort_by_number_and_say_how_many_there_are(self) -> None:
        assert Shard.parse("1/4") == Shard(1, 4)
        assert str(Shard(12, 345)) == "12/345"
        assert Shard(12, 345).file(Path("out"), "jsonl") == Path("out/part-00012-of-00345.jsonl")

    @pytest.mark.parametrize("text", ["", "1", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1/100000", "१/४", "1 /4"])
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(UsageError, match=r"is not a shard · --shard · for example 1/4"):
            Shard.parse(text)


class Runs:
    """Runs over twenty small images, some broken, by a fake network.

    Attributes:
        images: their paths.
        opened: paths whose images were read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model.onnx"
        self.model.write_bytes(b"weights")
        self.images = [folder / f"{number:02d}.png" for number in range(19)] + [folder / UNDECODABLE]
        for number, path in enumerate(self.images):
            if number % 6 == 4:
                path.write_bytes(b"no image")
            else:
                Image.new("RGB", (8, 8), (10 * number, 200 - number, number)).save(path)

    def identity(self, kind: str = "parquet", **changes: Any) -> RunIdentity:
        identity = RunIdentity.of(self.model, metadata(), provider="cpu", kind=kind, topk=3, batch_size=3)
        return replace(identity, **changes)

    def shard(
        self, number: int, folder: Path, *, identity: RunIdentity | None = None, count: int = 4, **options: Any
    ) -> ShardRun:
        images = options.pop("images", self.images)
        with Classifier(FakeRunner(quadrant_means)) as classifier:
            return run_shard(
                classifier, identity or self.identity(), images, folder, shard=Shard(number, count), **options
            )

    def all(self, folder: Path, kind: str = "parquet") -> list[Path]:
        return [self.shard(number, folder, identity=self.identity(kind)).path for number in range(1, 5)]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    (tmp_path / "images").mkdir()
    return Runs(tmp_path / "images")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize("kind", KINDS)
class TestMerged:
    def test_they_are_the_bytes_of_the_only_shard(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        parts = runs.all(out, kind)
        facts = merge_shards(out, tmp_path / f"all.{kind}").facts
        assert (facts.images, facts.failed, facts.shard) == (20, 3, None)
        whole = runs.shard(1, tmp_path / "whole", identity=runs.identity(kind), count=1)
        assert whole.facts.listing == facts.listing
        rows = read_rows(tmp_path / f"all.{kind}")
        assert rows == read_rows(whole.path)
        assert [row["path"] for row in rows][:19] == list(map(str, runs.images[:19]))
        assert {path.name for path in parts} == {path.name for path in out.iterdir()} - {
            f"{path.name}.json" for path in parts
        }

    def test_row_groups_are_as_large_as_in_a_single_run(
        self, runs: Runs, out: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parquet, "ROW_GROUP", 7)
        runs.all(out, kind)
        merge_shards(out, tmp_path / f"all.{kind}")
        if kind == "parquet":
            found = pq.read_metadata(tmp_path / "all.parquet")
            assert [found.row_group(i).num_rows for i in range(found.num_row_groups)] == [7, 7, 6]
        assert len(read_rows(tmp_path / f"all.{kind}")) == 20

    def test_more_shards_than_batches(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        for number in (1, 2, 3):
            run = runs.shard(number, out, identity=runs.identity(kind), count=3, images=runs.images[:4])
            assert run.facts.images == (3, 1, 0)[number - 1]
        assert merge_shards(out, tmp_path / f"all.{kind}").facts.images == 4
        assert len(read_rows(tmp_path / f"all.{kind}")) == 4

    def test_one_is_missing(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        parts = runs.all(out, kind)
        parts[1].unlink()
        parts[3].unlink()
        with pytest.raises(CheckError, match=r"shards 2/4, 4/4 are missing · .*out · run .*--shard 2/4.* --resume"):
            merge_shards(out, tmp_path / f"all.{kind}")

    def test_one_is_not_finished(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        runs.all(out, kind)[2].with_name(f"part-00003-of-00004.{kind}.partial").touch()
        with pytest.raises(CheckError, match="shard 3/4 is not finished"):
            merge_shards(out, tmp_path / f"all.{kind}")

    def test_one_is_there_twice(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        parts = runs.all(out, kind)
        for suffix in ("", ".json"):
            if (source := parts[0].with_name(parts[0].name + suffix)).exists():
                shutil.copy(source, parts[1].with_name(parts[1].name + suffix))
        with pytest.raises(CheckError, match=r"holds shard 1/4 .* part-00002-of-00004|holds shard 1/4 · .*part-00002"):
            merge_shards(out, tmp_path / f"all.{kind}")

    def test_records_that_are_not_the_listings(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        part = runs.all(out, kind)[1]
        if kind == "jsonl":
            lines = part.read_bytes().splitlines(keepends=True)
            part.write_bytes(b"".join([lines[1], *lines[1:]]))
        else:
            table = pq.read_table(part)
            pq.write_table(table.take([1, *range(1, table.num_rows)]).cast(table.schema), part)
        (tmp_path / f"all.{kind}").write_bytes(b"before")
        with pytest.raises(CheckError, match=r"records are not those of the listing · .*out"):
            merge_shards(out, tmp_path / f"all.{kind}")
        assert (tmp_path / f"all.{kind}").read_bytes() == b"before"

    def test_too_few_and_too_many_records(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        for wrong in ("few", "many"):
            part = runs.all(out, kind)[3]
            if kind == "jsonl":
                lines = part.read_bytes().splitlines(keepends=True)
                part.write_bytes(b"".join(lines[:-1] if wrong == "few" else [*lines, lines[-1]]))
            else:
                table = pq.read_table(part)
                changed = table.slice(1) if wrong == "few" else pa.concat_tables([table, table.slice(0, 1)])
                pq.write_table(changed, part)
            with pytest.raises(CheckError, match=r"records are not those of the listing · .*out"):
                merge_shards(out, tmp_path / f"all.{kind}")
            shutil.rmtree(out)

    def test_a_damaged_one(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        part = runs.all(out, kind)[1]
        content = bytearray(part.read_bytes())
        content[4:40] = b"\xff" * 36
        part.write_bytes(content)
        with pytest.raises(SmlpError, match=r"part-00002-of-00004|records are not those"):
            merge_shards(out, tmp_path / f"all.{kind}")
        assert not (tmp_path / f"all.{kind}").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "n"}, "model was"),
            ({"preprocessing": {"crop_pct": 0.5}}, "preprocessing crop pct was 1.0, now it is 0.5"),
            ({"topk": 2}, "topk was 3, now it is 2"),
            ({"batch_size": 2}, "batch size was 3, now it is 2"),
            ({"versions": {"smlp-deploy": "0"}}, "versions smlp-deploy was .*, now it is 0"),
        ],
    )
    def test_one_of_another_run(
        self, runs: Runs, out: Path, kind: str, tmp_path: Path, changes: dict[str, Any], message: str
    ) -> None:
        runs.all(out, kind)[2].unlink()
        identity = runs.identity(kind)
        if "preprocessing" in changes:
            changes = {"preprocessing": {**identity.preprocessing, **changes["preprocessing"]}}
        if "versions" in changes:
            changes = {"versions": {**identity.versions, **changes["versions"]}}
        runs.shard(3, out, identity=replace(identity, **changes))
        with pytest.raises(CheckError, match=rf"shards are of different runs: {message}.* · .*part-00003-of-00004"):
            merge_shards(out, tmp_path / f"all.{kind}")

    def test_one_of_other_images(self, runs: Runs, out: Path, kind: str, tmp_path: Path) -> None:
        runs.all(out, kind)
        runs.shard(4, out, identity=runs.identity(kind), images=runs.images[:-1], resume=False)
        with pytest.raises(CheckError, match="different runs: listing images was 20, now it is 19"):
            merge_shards(out, tmp_path / f"all.{kind}")


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_without_shards_or_with_several_sets(runs: Runs, out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a folder · .*out"):
        merge_shards(out, tmp_path / "all.parquet")
    out.mkdir()
    with pytest.raises(CheckError, match=r"has no shards · .*out"):
        merge_shards(out, tmp_path / "all.parquet")
    runs.shard(1, out, count=2)
    runs.shard(2, out, count=2)
    with pytest.raises(UsageError, match=r"the shards are Parquet · .*all\.jsonl · end it in \.parquet"):
        merge_shards(out, tmp_path / "all.jsonl")
    runs.shard(1, out, count=3)
    with pytest.raises(CheckError, match="has shards of 2 and of 3"):
        merge_shards(out, tmp_path / "all.parquet")
    (out / "part-00001-of-00003.parquet").unlink()
    runs.shard(2, out, count=2, identity=runs.identity("jsonl"))
    with pytest.raises(CheckError, match="has shards in JSONL and in Parquet"):
        merge_shards(out, tmp_path / "all.parquet")


@pytest.mark.parametrize("kind", KINDS)
class TestResume:
    def test_what_is_finished_is_not_run_again(self, runs: Runs, out: Path, kind: str) -> None:
        first = runs.shard(2, out, identity=runs.identity(kind))
        assert not first.skipped
        before = first.path.stat()
        second = runs.shard(2, out, identity=runs.identity(kind), resume=True)
        assert second == ShardRun(path=first.path, facts=first.facts, skipped=True)
        assert first.path.stat().st_mtime_ns == before.st_mtime_ns
        assert not runs.shard(2, out, identity=runs.identity(kind), resume=False).skipped

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"model": "n"}, "model was .*, now it is n"),
            ({"labels": "n"}, "labels was .*, now it is n"),
            ({"topk": 2}, "topk was 3, now it is 2"),
            ({"batch_size": 2}, "batch size was 3, now it is 2"),
            ({"provider": "cuda"}, "provider was cpu, now it is cuda"),
        ],
    )
    def test_another_models_shard_is_never_taken_for_done(
        self, runs: Runs, out: Path, kind: str, changes: dict[str, Any], message: str
    ) -> None:
        path = runs.shard(2, out, identity=runs.identity(kind)).path
        before = path.read_bytes()
        with pytest.raises(UsageError, match=rf"is of another run: {message} · .*part-00002-of-00004"):
            runs.shard(2, out, identity=runs.identity(kind, **changes), resume=True)
        assert path.read_bytes() == before

    def test_nor_one_of_other_images(self, runs: Runs, out: Path, kind: str) -> None:
        runs.shard(2, out, identity=runs.identity(kind))
        swapped = [runs.images[1], runs.images[0], *runs.images[2:]]  # both of shard 1
        with pytest.raises(UsageError, match="is of another run: listing sha256 was"):
            runs.shard(2, out, identity=runs.identity(kind), images=swapped, resume=True)

    def test_a_signal_ends_the_comparison_of_the_listing(self, runs: Runs, out: Path, kind: str) -> None:
        runs.shard(2, out, identity=runs.identity(kind))
        stop = StopRequest()

        def images() -> Iterator[Path]:
            yield runs.images[0]
            stop.receive(signal.SIGTERM)

        with pytest.raises(StoppedError, match="stopped by SIGTERM"):
            runs.shard(2, out, identity=runs.identity(kind), images=images(), stop=stop)

    def test_nor_one_of_which_nothing_is_known(self, runs: Runs, out: Path, kind: str) -> None:
        path = runs.shard(2, out, identity=runs.identity(kind)).path
        (path if kind == "parquet" else path.with_name(path.name + ".json")).write_bytes(b"{}")
        with pytest.raises(RecordsError, match=r"is not a .* of smlp predict · .*part-00002-of-00004"):
            runs.shard(2, out, identity=runs.identity(kind), resume=True)

    def test_what_was_stopped_goes_on(self, runs: Runs, out: Path, kind: str) -> None:
        whole = runs.shard(1, out / "whole", identity=runs.identity(kind), count=2).path.read_bytes()
        stop = StopRequest()
        count = 0

        def advance() -> None:
            nonlocal count
            count += 1
            if count == 5:
                stop.receive(signal.SIGTERM)

        with pytest.raises(StoppedError, match=r"after 6 images · .*part-00001-of-00002.*\.partial"):
            runs.shard(1, out, identity=runs.identity(kind), count=2, stop=stop, advance=advance)
        assert not (out / f"part-00001-of-00002.{kind}").exists()
        run = runs.shard(1, out, identity=runs.identity(kind), count=2, resume=True)
        assert (run.skipped, run.facts.images, run.path.read_bytes()) == (False, 11, whole)

    def test_a_records_file_after_which_it_was_killed_is_not_taken_for_done(
        self, runs: Runs, out: Path, kind: str
    ) -> None:
        """Between the shard's move to its name and the removal of its records."""
        path = runs.shard(2, out, identity=runs.identity(kind)).path
        path.with_name(path.name + ".partial").touch()
        assert not runs.shard(2, out, identity=runs.identity(kind), resume=True).skipped


def test_a_limit_on_open_files_is_one_line(runs: Runs, out: Path, tmp_path: Path) -> None:
    for number in range(1, 7):
        runs.shard(number, out, count=6)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:  # noqa: PTH123 - its number is the lowest that is free
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 4, limits[1]))
    try:
        with pytest.raises(SmlpError, match=r"cannot read: Too many open files · .*part-0000.* · .*ulimit -n"):
            merge_shards(out, tmp_path / "all.parquet")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not (tmp_path / "all.parquet").exists()


def test_other_formats_have_no_shards(runs: Runs, out: Path) -> None:
    with pytest.raises(UsageError, match="shards are Parquet or JSONL · csv"):
        runs.shard(1, out, identity=runs.identity("csv"))


def test_the_hash_of_a_listing_tells_names_apart() -> None:
    def sha256(*names: str) -> str:
        listing = Listing(map(Path, names))
        assert len(list(listing)) == listing.count == len(names)
        return listing.sha256

    assert sha256("ab", "c") == sha256("ab", "c")
    assert len({sha256("ab", "c"), sha256("a", "bc"), sha256("abc"), sha256("c", "ab"), sha256("\ud800", "b")}) == 5


@pytest.mark.parametrize("text", ["", "[]", "{}", "1", '{"run": 1}', "\xff", "[" * 99_999])
def test_other_json_is_not_facts(text: str, runs: Runs) -> None:
    with pytest.raises(ValueError, match=r"not the facts|Expecting"):
        Facts.from_json(text)
    facts = Facts.of(runs.identity(), Listing([]), failed=0, shard="1/2")
    assert Facts.from_json(facts.to_json()) == facts
    for key in ("run", "listing", "images", "shard"):
        with pytest.raises(ValueError, match=r"not the facts|Expecting"):
            Facts.from_json(json.dumps(json.loads(facts.to_json()) | {key: 1.5}))


@pytest.mark.parametrize("kind", KINDS)
class TestWrittenElsewhere:
    def written(self, runs: Runs, folder: Path, kind: str) -> ShardRun:
        identity, shard, listing = runs.identity(kind), Shard(2, 4), Listing(runs.images)
        images = list(listing)
        with Classifier(FakeRunner(quadrant_means)) as classifier:
            mine = shard.of(images, batch_size=identity.batch_size)
            found = list(classifier.classify(mine, batch_size=identity.batch_size, topk=identity.topk))
        lines = [json.dumps(record_of(prediction)) for prediction in found]
        rows = parquet.table_of(lines) if kind == "parquet" else lines
        failed = sum(prediction.error is not None for prediction in found)
        return write_shard(rows, identity, listing, folder, shard=shard, failed=failed)

    def test_it_is_the_file_of_a_shard_that_was_run_here(
        self, runs: Runs, out: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(parquet, "ROW_GROUP", 2)
        here = runs.shard(2, tmp_path / "here", identity=runs.identity(kind))
        there = self.written(runs, out, kind)
        assert there.path.read_bytes() == here.path.read_bytes()
        assert there.facts == here.facts
        assert there.facts.failed == 2
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in here.path.parent.iterdir())
        assert runs.shard(2, out, identity=runs.identity(kind)).skipped

    def test_an_interrupted_run_of_it_is_kept(self, runs: Runs, out: Path, kind: str) -> None:
        out.mkdir()
        partial = out / f"part-00002-of-00004.{kind}.partial"
        partial.write_text("records")
        with pytest.raises(
            UsageError, match=r"found an interrupted run · .*\.partial · finish it with --shard and --resume"
        ):
            self.written(runs, out, kind)
        assert partial.read_text() == "records"


class TestProcesses:
    """Four processes with the bundled model, as a scheduler starts them."""

    @pytest.fixture
    def folder(self, tmp_path: Path, digit_images: list[Path]) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        for number in range(90):
            path = folder / f"{number:02d} ,\n.jpg"
            if number % 9 == 3:
                path.write_text("no image")
            else:
                path.symlink_to(digit_images[number % len(digit_images)])
        (folder / os.fsdecode(b"\xff.jpg")).symlink_to(digit_images[0])
        return folder

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_killed_and_rerun_they_merge_to_the_rows_of_the_single_run(
        self, folder: Path, out: Path, tmp_path: Path, kind: str, digits_export: Export
    ) -> None:
        def command(output: Path, *options: str) -> list[str | Path]:
            settings = ["--batch-size", "4", "--topk", "3", "--allow-errors", *options]
            return ["predict", folder, "-m", digits_export.path, "-o", output, *settings]

        whole, merged = tmp_path / f"whole.{kind}", tmp_path / f"all.{kind}"
        assert run_verb(*command(whole))[0] == 0
        before = after_bytes(signal.SIGKILL, 3000)
        processes = [
            Forked(
                *command(out, "--shard", f"{number}/4", "--format", kind),
                before=before if number == 3 else "",
            )
            for number in (1, 2, 3, 4)
        ]
        codes, errors = zip(*(process.wait() for process in processes), strict=True)
        assert codes == (0, 0, -signal.SIGKILL, 0), errors
        assert "shard 1/4: 24 images, " in errors[0]
        code, err = run_verb("merge", out, "-o", merged)
        assert (code, "shard 3/4 is not finished" in err) == (3, True)
        for number in (1, 2, 3, 4):
            code, err = run_verb(*command(out, "--shard", f"{number}/4", "--format", kind, "--resume"))
            assert code == 0
            assert ("is finished already" in err) == (number != 3)
        code, err = run_verb("merge", out, "-o", merged)
        assert (code, err) == (0, f"91 images, 10 failed, of 4 shards, written to {merged}\n")
        assert merged.read_bytes() == whole.read_bytes()
        assert len(read_rows(merged)) == 91
