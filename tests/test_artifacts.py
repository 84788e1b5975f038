from __future__ import annotations

import os
from pathlib import Path

import pytest

from fakes import metadata
from smlp_deploy.artifacts import default_path, failed_path, newest_artifact, parity_path


def test_names() -> None:
    assert default_path(metadata()) == Path("artifacts/fake-fp32.onnx")
    assert default_path(metadata(batch=4)) == Path("artifacts/fake-fp32-batch4.onnx")
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
