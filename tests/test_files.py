from __future__ import annotations

import errno
import hashlib
import os
import pwd
from pathlib import Path

import pytest

from smlp_deploy.errors import ArtifactError, SmlpError
from smlp_deploy.files import (
    alone,
    cache_folder,
    check_writable,
    folder_beside,
    read_file,
    read_text,
    replacing,
    sha256_of,
    write_text,
)


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


class TestReading:
    def read(self, path: Path) -> bytes:
        return read_file(path, limit=4, error=ArtifactError, fix="correct it")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"four")
        assert self.read(tmp_path / "x") == b"four"

    def test_what_is_no_file_or_too_large_is_one_line_and_never_waited_for(self, tmp_path: Path) -> None:
        (tmp_path / "large").write_bytes(b"large")
        os.mkfifo(tmp_path / "fifo")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        for name, reason in {
            "absent": "no such file",
            "large": "is larger than 4 bytes",
            "fifo": "is not a regular file",
            "loop": "cannot read it: Too many levels of symbolic links",
            "": "is a directory",
            "a\0b": "cannot read it: ",
        }.items():
            with pytest.raises(ArtifactError) as caught:
                self.read(tmp_path / name)
            assert caught.value.what.startswith(reason)
            assert caught.value.fix == "correct it"

    def test_what_has_no_stated_size_is_read_no_further(self) -> None:
        # /proc files claim to be empty.
        with pytest.raises(ArtifactError, match="changed while it was read"):
            self.read(Path("/proc/self/status"))

    def test_a_generous_limit_costs_no_memory(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"four")
        assert read_file(tmp_path / "x", limit=1 << 60, error=ArtifactError, fix="") == b"four"

    def test_text(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes("ä".encode())
        assert read_text(tmp_path / "x", error=ArtifactError, fix="") == "ä"
        (tmp_path / "x").write_bytes(b"\xff")
        with pytest.raises(ArtifactError, match="is not UTF-8 text"):
            read_text(tmp_path / "x", error=ArtifactError, fix="")


def test_a_device_is_not_replaced_and_a_full_disk_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SmlpError, match="it is not a regular file"):
        write_text(tmp_path / "fifo", "")

    def no_room() -> None:
        with replacing(tmp_path / "x"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SmlpError, match=r"cannot write: No space left on device · .*x · make room"):
        no_room()
    assert [path.name for path in tmp_path.iterdir()] == ["fifo"]


UNWRITABLE = Path("/sys/x.json")
"""In a file system where nobody can create files, not even root."""


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no sysfs here")
class TestUnwritable:
    def test_it_is_one_line(self) -> None:
        for write in (check_writable, lambda path: write_text(path, "")):
            with pytest.raises(
                SmlpError, match=r"^cannot write: Permission denied · /sys/x\.json · choose another path"
            ):
                write(UNWRITABLE)

    def test_a_folder_too(self) -> None:
        message = r"^cannot write: (Operation not permitted|Permission denied) · /sys/x\.json"
        with pytest.raises(SmlpError, match=message), folder_beside(UNWRITABLE):
            pytest.fail("made")

    def test_the_lock_too(self) -> None:
        with pytest.raises(SmlpError, match=r"^cannot write: Permission denied · /sys/x\.json"), alone(UNWRITABLE):
            pytest.fail("locked")


def test_of_a_folder_stays_what_was_moved_out(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    for content in ("first", "second"):
        with folder_beside(target) as folder:
            (folder / "left").mkdir()
            (folder / content).write_text(content)
            if content == "first":
                folder.rename(target)
            else:
                (folder / content).rename(target / content)
    assert contents(target) == ["first", "left", "second"]
    assert contents(tmp_path / "new") == ["folder"]


def test_a_folder_is_removed_after_an_error(tmp_path: Path) -> None:
    def full() -> None:
        with folder_beside(tmp_path / "folder") as folder:
            (folder / "part").write_text("")
            raise OSError(errno.EXDEV, "Invalid cross-device link")

    with pytest.raises(SmlpError, match=r"^cannot write: Invalid cross-device link · .*folder · choose another path"):
        full()
    assert contents(tmp_path) == []


def test_checking_leaves_nothing_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "x.json")
    assert contents(tmp_path / "new") == []


def test_there_is_no_cache_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # no entry for this user
    with pytest.raises(SmlpError, match=r"^no home directory for the cache · set HOME or XDG_CACHE_HOME$"):
        cache_folder("weights")
