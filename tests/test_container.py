"""The wheel in what a container is to it; `scripts/container.py` says what."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def has_namespaces() -> bool:
    if sys.platform != "linux" or os.getuid() != 0:
        return False
    return subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_namespaces(), reason="namespaces and mounts need root on Linux")
def test_the_first_minute_in_a_container() -> None:
    done = subprocess.run([sys.executable, "-m", "scripts.container"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right") > 10


@pytest.mark.parametrize("path", sorted((ROOT / "docker").glob("*.Dockerfile")), ids=lambda path: path.name)
def test_docker_files_install_extras_that_exist_and_run_as_a_user_without_rights(path: Path) -> None:
    text = path.read_text()
    (extras,) = re.findall(r"\.whl\)\[(.+)\]", text)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE)
    assert "Not built" in text


def test_the_workflow_runs_what_ci_runs_and_every_python_that_is_stated() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in text
    stated = re.findall(r"Python :: (3\.\d+)'", str(PROJECT["classifiers"]))
    (matrix,) = re.findall(r"python: \[(.*)\]", text)
    assert [version.strip('" ') for version in matrix.split(",")] == stated
