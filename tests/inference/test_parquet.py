from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smlp_deploy import __version__, dependencies
from smlp_deploy.errors import MissingDependencyError, RecordsError, SmlpError
from smlp_deploy.inference import parquet
from smlp_deploy.inference.classify import Prediction, Score
from smlp_deploy.inference.facts import Facts, Listing
from smlp_deploy.inference.records import RunIdentity
from smlp_deploy.inference.resume import RecordFile, sha256_of_json
from tests.support.fakes import metadata

UNDECODABLE = os.fsdecode(b"a\\b\xff.jpg")
RECORDS = (
    Prediction('odd "図",\n\x1b.jpg', (Score(3, "cat", 1 / 3), Score(1, "\N{PILE OF POO}", 5e-324))),
    Prediction(UNDECODABLE, error="damaged image: \x1b"),
    Prediction("c\r\nd.jpg", (Score(0, "dog", 1.0), Score(2, "", 0.0))),
)


@pytest.fixture
def identity(tmp_path: Path) -> RunIdentity:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"abc")
    return RunIdentity.of(model, metadata(), provider="cpu", kind="parquet", topk=2, batch_size=2)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.parquet"


def run(
    target: Path, identity: RunIdentity, records: tuple[Prediction, ...] = RECORDS, *, resume: bool = False
) -> None:
    listing = Listing(Path(record.path) for record in records)
    with RecordFile.open(target, identity, resume=resume) as file:
        file.skip(listing)
        for number, _ in enumerate(listing, start=file.done):
            file.write(records[number])
        parquet.conclude(file, Facts.of(identity, listing, failed=1))


def test_the_columns_have_their_types(target: Path, identity: RunIdentity) -> None:
    run(target, identity)
    schema = pq.read_schema(target)
    score = pa.struct(
        [
            pa.field("index", pa.int32(), nullable=False),
            pa.field("label", pa.string(), nullable=False),
            pa.field("probability", pa.float64(), nullable=False),
        ]
    )
    assert schema.remove_metadata() == pa.schema(
        [
            pa.field("path", pa.string(), nullable=False),
            pa.field("path_bytes", pa.binary()),
            pa.field("predictions", pa.list_(pa.field("element", score, nullable=False))),
            pa.field("error", pa.string()),
        ]
    )
    assert sorted(target.parent.iterdir()) == [target]


def test_the_columns_have_their_types_even_if_every_image_failed(target: Path, identity: RunIdentity) -> None:
    run(target, identity, RECORDS[1:2])
    assert pq.read_schema(target).field("predictions").type.value_type.num_fields == 3
    run(target.with_name("none.parquet"), identity, ())
    assert pq.read_table(target.with_name("none.parquet")).num_rows == 0


def test_rows_are_the_records(target: Path, identity: RunIdentity) -> None:
    run(target, identity)
    assert pq.read_table(target).to_pylist() == [
        {
            "path": 'odd "図",\n\x1b.jpg',
            "path_bytes": None,
            "predictions": [
                {"index": 3, "label": "cat", "probability": 1 / 3},
                {"index": 1, "label": "\N{PILE OF POO}", "probability": 5e-324},
            ],
            "error": None,
        },
        # The escape alone could also be a name's own; the bytes say that it is not.
        {
            "path": r"a\b\xff.jpg",
            "path_bytes": b"a\\b\xff.jpg",
            "predictions": None,
            "error": "damaged image: \x1b",
        },
        {
            "path": "c\r\nd.jpg",
            "path_bytes": None,
            "predictions": [
                {"index": 0, "label": "dog", "probability": 1.0},
                {"index": 2, "label": "", "probability": 0.0},
            ],
            "error": None,
        },
    ]


def test_text_that_utf8_cannot_encode_is_escaped(target: Path, identity: RunIdentity) -> None:
    run(target, identity, (Prediction("\ud800.jpg", error="\ud800"), Prediction("a", (Score(0, "\udcff", 1.0),))))
    first, second = pq.read_table(target).to_pylist()
    assert first["path"] == first["error"] + ".jpg" == r"\xed\xa0\x80.jpg"
    assert second["predictions"][0]["label"] == r"\xff"


def test_the_file_says_what_it_is_of(target: Path, identity: RunIdentity) -> None:
    run(target, identity)
    found = {key.decode(): value.decode() for key, value in pq.read_metadata(target).metadata.items()}
    assert found["smlp.version"] == __version__
    assert found["smlp.model_sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert found["smlp.preprocessing_sha256"] == sha256_of_json(asdict(metadata().preprocessing))
    run_facts = json.loads(found["smlp.run"])
    assert run_facts["run"]["topk"] == 2
    assert (run_facts["images"], run_facts["failed"], run_facts["listing"]["images"]) == (3, 1, 3)
    assert parquet.read_facts(target) == Facts.of(
        identity, exhausted(Listing(Path(record.path) for record in RECORDS)), failed=1
    )


def exhausted(listing: Listing) -> Listing:
    assert list(listing)
    return listing


@pytest.mark.parametrize(
    "content",
    [b"", b"PAR1", b"no parquet at all" * 9, None],
)
def test_another_file_has_no_facts(target: Path, content: bytes | None) -> None:
    if content is None:
        pq.write_table(pa.table({"a": [1]}), target)
    else:
        target.write_bytes(content)
    with pytest.raises(RecordsError, match=r"is not a Parquet file of smlp predict · .*x\.parquet"):
        parquet.read_facts(target)


def test_rows_are_written_in_groups_and_not_held(
    target: Path, identity: RunIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP", 10)
    monkeypatch.setattr(parquet, "_READ", 5)
    read, write = parquet._row, parquet.write_batches
    lines: list[bytes] = []
    seen: list[int] = []

    def reading(line: bytes) -> dict[str, Any]:
        lines.append(line)
        return read(line)

    def writing(path: Path, batches: Iterable[Any], facts: Facts) -> None:
        write(path, (seen.append(len(lines)) or batch for batch in batches), facts)  # type: ignore[func-returns-value]

    monkeypatch.setattr(parquet, "_row", reading)
    monkeypatch.setattr(parquet, "write_batches", writing)
    records = tuple(replace(RECORDS[0], path=f"{number}.jpg") for number in range(95))
    run(target, identity, records)
    file = pq.ParquetFile(target)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [10] * 9 + [5]
    assert [row["path"] for row in file.read().to_pylist()] == [record.path for record in records]
    assert seen == [*range(10, 100, 10), 95]


@pytest.mark.parametrize("until", range(4))
def test_it_goes_on_where_it_stopped(target: Path, identity: RunIdentity, until: int) -> None:
    run(target, identity)
    whole = target.read_bytes()
    target.unlink()

    def stopping() -> Iterator[None]:
        with RecordFile.open(target, identity, resume=False) as file:
            for record in RECORDS[:until]:
                file.write(record)
                file.flush()
            raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        next(stopping())
    assert not target.exists()
    run(target, identity, resume=True)
    assert target.read_bytes() == whole
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_to_write_it_keeps_the_records(
    target: Path, identity: RunIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    target.write_bytes(b"of an earlier run")

    def full(line: bytes) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "_row", full)
        with pytest.raises(SmlpError, match=r"cannot write: No space left on device · .*x\.parquet"):
            run(target, identity)
    assert target.read_bytes() == b"of an earlier run"
    assert {path.name for path in target.parent.iterdir()} == {
        "x.parquet",
        "x.parquet.partial",
        "x.parquet.partial.json",
    }
    run(target, identity, resume=True)
    assert pq.read_table(target).num_rows == 3


class TestDependency:
    def test_what_is_missing_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dependencies, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r'pyarrow not installed.* "smlp-deploy\[parquet\]"'):
            parquet.require_parquet()

    def test_importing_the_module_does_not_load_it(self) -> None:
        script = "import sys, smlp_deploy.inference.parquet; print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
        assert "pyarrow" not in loaded.split()
