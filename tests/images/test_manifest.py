"""Listings as Parquet files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smlp_deploy.errors import UsageError
from smlp_deploy.images import manifest
from smlp_deploy.images.find import count_images, find_images
from smlp_deploy.images.manifest import read_manifest


def written(folder: Path, columns: dict[str, Any]) -> Path:
    path = folder / "photos.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_the_column_of_paths_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_ROWS", 2)
    names = ["b.jpg", "./a é.jpg", "s3://photos/x.jpg", "c\n.jpg", "b.jpg"]
    path = written(tmp_path, {"label": [1, 2, 3, 4, 5], "path": names})
    assert list(read_manifest(str(path))) == names
    assert list(find_images([f"@{path}"], ())) == names
    assert count_images([f"@{path}"]) == 5


def test_names_that_are_not_utf8_come_from_their_own_column(tmp_path: Path) -> None:
    path = written(tmp_path, {"path": ["a.jpg", "\\xff.jpg"], "path_bytes": [None, b"\xff.jpg"]})
    assert list(read_manifest(str(path))) == ["a.jpg", os.fsdecode(b"\xff.jpg")]


def test_rows_without_a_path_are_skipped_as_blank_lines_are(tmp_path: Path) -> None:
    path = written(tmp_path, {"path": ["a.jpg", None, "", "b.jpg"]})
    assert list(find_images([f"@{path}"], ())) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("columns", [{"file": ["a.jpg"]}, {"path": [1]}])
def test_no_column_of_paths(tmp_path: Path, columns: dict[str, Any]) -> None:
    path = written(tmp_path, columns)
    with pytest.raises(UsageError, match=r"has no column `path` of strings · .*photos\.parquet"):
        list(find_images([f"@{path}"], ()))


def test_what_is_no_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "photos.parquet").write_bytes(b"a.jpg\n")
    with pytest.raises(UsageError, match=r"cannot be read as a Parquet file: .* · .*photos\.parquet"):
        list(find_images([f"@{tmp_path / 'photos.parquet'}"], ()))
