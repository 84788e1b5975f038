"""The wheel in what a container is to it; `scripts/container.py` says what."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def has_namespaces() -> bool:
    if sys.platform != "linux" or os.getuid() != 0:
        return False
    return subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_namespaces(), reason="namespaces and mounts need root on Linux")
def test_the_first_minute_in_a_container() -> None:
    done = subprocess.run([sys.executable, "-m", "scripts.container"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("right") > 10
