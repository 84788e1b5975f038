from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from smlp_deploy.artifacts import default_path, engine_path, failed_path, newest_artifact, parity_path
from tests.support.fakes import metadata


def test_names() -> None:
    assert default_path(replace(metadata(), form="gpu")) == Path("artifacts/fake-fp32.onnx")
    assert default_path(replace(metadata(batch=4), form="gpu")) == Path("artifacts/fake-fp32-batch4.onnx")
    pixels = replace(metadata(batch=4), input="uint8")
    assert default_path(replace(pixels, form="gpu")) == Path("artifacts/fake-fp32-uint8-batch4.onnx")
    assert default_path(pixels) == Path("artifacts/fake-fp32-uint8-batch4-cpu.onnx")
    assert engine_path(replace(pixels, form="gpu")) == Path("artifacts/fake-fp32-batch4.engine")
    assert engine_path(pixels) == Path("artifacts/fake-fp32-batch4.engine")
    assert engine_path(metadata()) == Path("artifacts/fake-fp32-float32.engine")
    assert parity_path(Path("a/x-fp32.onnx")) == Path("a/x-fp32.parity.json")
    assert parity_path(failed_path(Path("a/x.onnx"))) == Path("a/x.onnx.parity.json")


def test_the_newest_good_artifact_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert newest_artifact() is None
    Path("artifacts").mkdir()
    for age, name in enumerate([".half.onnx", "broken.onnx.failed", "new.onnx", "old.onnx"]):
        path = Path("artifacts") / name
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    assert newest_artifact() == Path("artifacts/new.onnx")
    assert newest_artifact(without="new*") == Path("artifacts/old.onnx")
    assert newest_artifact("n*.onnx", without="*.onnx") is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`artifacts/` of an empty project, which is the working directory."""
    project = tmp_path / "project"
    (project / "artifacts").mkdir(parents=True)
    monkeypatch.chdir(project)
    return project / "artifacts"


def test_only_files_in_the_folder_are_picked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.engine").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.engine").touch()
    (folder / "absolute.engine").symlink_to(tmp_path / "elsewhere.engine")
    (folder / "relative.engine").symlink_to("../../elsewhere.engine")
    (folder / "hop.engine").symlink_to("absolute.engine")
    (folder / "loop.engine").symlink_to("loop.engine")
    (folder / "dangling.engine").symlink_to("gone.engine")
    (folder / "device.engine").symlink_to("/dev/null")
    (folder / "through.engine").symlink_to(tmp_path / "elsewhere" / "x.engine")
    (folder / "folder.engine").mkdir()
    os.mkfifo(folder / "pipe.engine")
    assert newest_artifact("*.engine") is None
    (folder / "real.engine").touch()
    os.utime(folder / "real.engine", (1, 1))
    assert newest_artifact("*.engine") == Path("artifacts/real.engine")


def test_a_link_within_the_folder_is_picked(folder: Path) -> None:
    (folder / "a.engine").touch()
    os.utime(folder / "a.engine", (1, 1))
    (folder / "latest.engine").symlink_to("a.engine")
    assert newest_artifact("*.engine") in (Path("artifacts/latest.engine"), Path("artifacts/a.engine"))
    (folder / "a.engine").rename(folder / ".hidden.engine")
    assert newest_artifact("*.engine") is None


def test_a_folder_that_is_a_link_itself_is_the_users_own_choice(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "kept")
    folder.symlink_to(tmp_path / "kept")
    (folder / "a.onnx").touch()
    assert newest_artifact() == Path("artifacts/a.onnx")
