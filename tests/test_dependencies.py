from __future__ import annotations

from pathlib import Path

import pytest

from smlp_deploy import dependencies
from smlp_deploy.dependencies import installed_version, require, require_onnxruntime
from smlp_deploy.errors import MissingDependencyError


def test_what_is_installed_passes() -> None:
    require("json", purpose="to test", extra="none")
    require_onnxruntime()


def test_what_is_missing_is_named_with_the_extra() -> None:
    with pytest.raises(
        MissingDependencyError, match=r'no_such_module not installed, needed to export.*"smlp-deploy\[export\]"'
    ):
        require("json", "no_such_module", purpose="to export", extra="export")


def test_no_onnxruntime_names_both_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'"smlp-deploy\[cpu\]" or "smlp-deploy\[gpu\]"'):
        require_onnxruntime()


def test_two_onnxruntimes_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"both installed.*pip uninstall -y onnxruntime onnxruntime-gpu"):
        require_onnxruntime()


def test_versions() -> None:
    assert installed_version("numpy")
    assert installed_version("no-such-distribution") is None
