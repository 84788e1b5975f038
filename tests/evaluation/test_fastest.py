from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smlp_deploy.errors import ArtifactError
from smlp_deploy.evaluation import fastest
from smlp_deploy.evaluation.fastest import compare_speed
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.runners.placement import ANYWHERE, Placement
from tests.support.fakes import Exported, FakeRunner, metadata


class Runtime:
    """Takes the place of the runtimes: a run of a file takes as long as its name says, by a clock of its own."""

    def __init__(self) -> None:
        self.now = 0.0
        self.opened: list[str] = []
        self.metadata: dict[str, ModelMetadata] = {}

    def open(self, path: Path, *, placement: Placement) -> FakeRunner:
        self.opened.append(path.name)
        if path.name.startswith("broken"):
            raise ArtifactError("damaged", where=path)
        seconds = float(path.stem.split("-")[0])

        def run(batch: FloatArray) -> FloatArray:
            self.now += seconds * len(batch)
            return np.zeros((len(batch), 4), np.float32)

        return FakeRunner(run, self.metadata.get(path.name, metadata()))


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(fastest, "open_runner", runtime.open)
    monkeypatch.setattr("smlp_deploy.evaluation.fastest.time.perf_counter", lambda: runtime.now)
    return runtime


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setattr("smlp_deploy.files.user_cache_path", lambda _: cache)
    return cache


def files(folder: Path, *names: str) -> list[Path]:
    paths = [folder / name for name in names]
    for path in paths:
        path.write_text(path.name)
    return paths


def names(speeds: list[fastest.Speed]) -> list[str]:
    return [speed.path.name for speed in speeds]


def test_the_fastest_comes_first(runtime: Runtime, tmp_path: Path) -> None:
    runtime.metadata["1-b.onnx"] = replace(metadata(batch=3), precision="int8", form="gpu", input="uint8")
    speeds = compare_speed(files(tmp_path, "2-a.onnx", "1-b.onnx", "3-c.onnx"), ANYWHERE)
    assert names(speeds) == ["1-b.onnx", "2-a.onnx", "3-c.onnx"]
    assert [speed.seconds for speed in speeds] == pytest.approx([1, 2, 3])


def test_other_networks_and_broken_files_do_not_count(runtime: Runtime, tmp_path: Path) -> None:
    runtime.metadata["1-b.onnx"] = replace(metadata(), labels=("a", "b", "c", "d"))
    runtime.metadata["1-c.onnx"] = replace(metadata(), checkpoint_sha256="0" * 64)
    paths = files(tmp_path, "2-a.onnx", "1-b.onnx", "1-c.onnx", "broken.onnx")
    assert names(compare_speed(paths, ANYWHERE)) == ["2-a.onnx"]


def test_a_newest_file_that_is_broken_is_an_error(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        compare_speed(files(tmp_path, "broken.onnx", "1-a.onnx"), ANYWHERE)


def test_a_file_is_measured_once_until_it_or_its_placement_changes(runtime: Runtime, tmp_path: Path) -> None:
    paths = files(tmp_path, "2-a.onnx", "1-b.onnx")
    first = compare_speed(paths, ANYWHERE)
    assert compare_speed(paths, ANYWHERE) == first
    assert runtime.opened == ["2-a.onnx", "1-b.onnx"]
    paths[1].write_text("exported again")
    compare_speed(paths, ANYWHERE)
    assert runtime.opened == ["2-a.onnx", "1-b.onnx", "1-b.onnx"]
    compare_speed(paths, Placement(provider="cuda"))
    assert runtime.opened[3:] == ["2-a.onnx", "1-b.onnx"]


@pytest.mark.parametrize("content", ["", "[]", '{"x": 3}', '{"x": ["y", "z"]}', "\0"])
def test_a_damaged_cache_is_made_anew(runtime: Runtime, tmp_path: Path, cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / "speed.json").write_text(content)
    paths = files(tmp_path, "2-a.onnx", "1-b.onnx")
    first = compare_speed(paths, ANYWHERE)
    assert names(first) == ["1-b.onnx", "2-a.onnx"]
    assert compare_speed(paths, ANYWHERE) == first
    assert len(runtime.opened) == 2


def test_without_a_cache_each_command_measures(runtime: Runtime, tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    paths = files(tmp_path, "2-a.onnx", "1-b.onnx")
    assert compare_speed(paths, ANYWHERE) == compare_speed(paths, ANYWHERE)
    assert len(runtime.opened) == 4


def test_real_files(exported: Exported, tmp_path: Path) -> None:
    paths = [Path(shutil.copy(exported(*options).path, tmp_path)) for options in (("fp32",), ("fp16",), ("fp32", 2))]
    speeds = compare_speed(paths, ANYWHERE)
    assert {speed.path for speed in speeds} == set(paths)
    assert all(speed.seconds > 0 for speed in speeds)
