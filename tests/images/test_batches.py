from __future__ import annotations

import os
from pathlib import Path

import pytest

from smlp_deploy.images import batches as module
from smlp_deploy.images.batches import available_cores

AFFINITY = 64


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of 64 cores whose control groups are files in this folder."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(AFFINITY)), raising=False)
    monkeypatch.setattr(module, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(module, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


# The process's /proc/self/cgroup; files below /sys/fs/cgroup; cores that may be used.
LIMITS = {
    "a container": ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
    "a container with half a core": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "a container with one and a half": ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
    "a container with more than the host": ("0::/\n", {"cpu.max": "10000000 100000\n"}, AFFINITY),
    "a container without a limit": ("0::/\n", {"cpu.max": "max 100000\n"}, AFFINITY),
    "a container in the host's namespace": ("0::/docker/1f2e\n", {"cpu.max": "300000 100000\n"}, 3),
    "a service": ("0::/a.slice/b.service\n", {"a.slice/b.service/cpu.max": "400000 100000\n"}, 4),
    "a service in a smaller slice": (
        "0::/a.slice/b.service\n",
        {"a.slice/cpu.max": "500000 100000\n", "a.slice/b.service/cpu.max": "600000 100000\n"},
        5,
    ),
    "a service of an odd name": ("0::/a\r:b\x0b.slice\n", {"a\r:b\x0b.slice/cpu.max": "700000 100000\n"}, 7),
    "another service's limit": ("0::/a.slice\n", {"a.slice/b.service/cpu.max": "100000 100000\n"}, AFFINITY),
    "version 1": (
        "3:memory:/docker/1f2e\n2:cpu,cpuacct:/docker/1f2e\n1:cpuset:/docker/1f2e\n0::/\n",
        {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "version 1 without a limit": (
        "1:cpu:/\n",
        {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
        AFFINITY,
    ),
    "version 1 of another controller": (
        "1:cpuset:/\n",
        {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
        AFFINITY,
    ),
    "no control groups": (None, {}, AFFINITY),
    "control groups that are not mounted": ("0::/a\n", {}, AFFINITY),
}


@pytest.mark.parametrize("name", LIMITS)
def test_cores_that_may_be_used(name: str, system: Path) -> None:
    own, files, cores = LIMITS[name]
    if own is not None:
        (system / "own").write_bytes(own.encode())
    for path, text in files.items():
        file = system / "cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    # Above the root nothing counts.
    (system / "cpu.max").write_text("100000 100000\n")
    assert available_cores() == cores


def test_cores_here() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
