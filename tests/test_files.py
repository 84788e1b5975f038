from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from smlp_deploy.errors import SmlpError
from smlp_deploy.files import replacing, sha256_of, write_text


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "report.json"
    with replacing(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert contents(target.parent) == ["report.json"]


def write_half(target: Path) -> None:
    with replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    write_text(target, "old")
    with pytest.raises(KeyboardInterrupt):
        write_half(target)
    assert target.read_text() == "old"
    assert contents(tmp_path) == ["report.json"]


def test_a_file_moved_elsewhere_leaves_the_target_alone(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    write_text(target, "old")
    with replacing(target) as temporary:
        temporary.write_text("bad")
        temporary.replace(tmp_path / "model.onnx.failed")
    assert target.read_text() == "old"
    assert (tmp_path / "model.onnx.failed").read_text() == "bad"


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    ordinary, target = tmp_path / "ordinary", tmp_path / "target"
    ordinary.write_text("")
    write_text(target, "")
    assert target.stat().st_mode == ordinary.stat().st_mode


def test_a_folder_that_cannot_be_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SmlpError, match=r"cannot write: .*file/report\.json"):
        write_text(tmp_path / "file" / "report.json", "")


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(SmlpError, match="it is a directory"):
        write_text(tmp_path / "folder", "")


def test_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_of(path) == hashlib.sha256(b"abc").hexdigest()
