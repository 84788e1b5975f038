"""Ray: what fits on a cluster, and a real one of two nodes that loses its driver, and then a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from smlp_deploy.errors import MissingDependencyError, SmlpError, UsageError
from smlp_deploy.inference import cluster
from smlp_deploy.inference.cluster import ActorOptions, shards_of
from smlp_deploy.inference.records import RunIdentity
from smlp_deploy.inference.shards import Shard
from smlp_deploy.pipeline.export import Export
from tests.support.processes import at_open, on_all_cores, run_verb, start

IMAGES, BROKEN = 1200, 10
OPTIONS = ActorOptions(model=Path("x.onnx"))


class TestShards:
    @pytest.mark.parametrize(
        ("images", "batch_size", "count"),
        [(0, 32, 1), (1, 32, 1), (128, 32, 1), (129, 32, 2), (1200, 32, 10), (10**6, 32, 512), (10**6, 256, 512)],
    )
    def test_their_number_depends_on_the_images_alone(self, images: int, batch_size: int, count: int) -> None:
        assert shards_of(images, batch_size=batch_size) == [Shard(number, count) for number in range(1, count + 1)]


class TestFitting:
    NODES = ({"CPU": 4.0, "GPU": 2.0, "memory": 1e9}, {"CPU": 3.0}, {"memory": 1e9})

    @pytest.mark.parametrize(
        ("cpus", "gpus", "actors", "fit"),
        [(1, 0, None, 7), (2, 0, None, 3), (1, 1, None, 2), (4, 0, 1, 1), (3, 1, None, 1)],
    )
    def test_each_actor_is_on_one_node(self, cpus: int, gpus: int, actors: int | None, fit: int) -> None:
        options = ActorOptions(model=Path("x.onnx"), cpus=cpus, gpus=gpus, actors=actors)
        assert cluster._fitting(options, self.NODES) == fit

    def test_more_than_fit(self) -> None:
        options = ActorOptions(model=Path("x.onnx"), cpus=2, actors=4)
        with pytest.raises(UsageError) as error:
            cluster._fitting(options, self.NODES)
        assert str(error.value) == (
            "4 actors with 2 CPUs and 0 GPUs each do not fit on the cluster · 3 nodes with 7 CPUs and 2 GPUs in all · "
            "--actors 3, or fewer CPUs or GPUs for each"
        )

    def test_none_fits(self) -> None:
        options = ActorOptions(model=Path("x.onnx"), cpus=2, gpus=3)
        with pytest.raises(
            UsageError, match=r"1 actors with 2 CPUs and 3 GPUs .* · ask for fewer CPUs or GPUs for each"
        ):
            cluster._fitting(options, self.NODES)


class TestActor:
    def test_a_table_of_paths_becomes_one_of_records(
        self, digits_export: Export, digit_images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.jpg").symlink_to(digit_images[0])
        (tmp_path / os.fsdecode(b"\xff.jpg")).symlink_to(digit_images[1])
        monkeypatch.chdir(tmp_path.parent)
        options = ActorOptions(model=digits_export.path)
        actor = cluster._Actor(cluster._ActorArguments(options, identity(digits_export), 1, tmp_path))
        paths = ["a.jpg", os.fsdecode(b"\xff.jpg"), "gone.jpg"]
        table = actor(cluster._table(7, paths))
        records = [json.loads(text) for text in table["text"].to_pylist()]
        assert set(table["shard"].to_pylist()) == {7}
        assert [record["path"] for record in records] == paths
        assert [record.get("error") for record in records] == [None, None, "no such file or directory"]
        assert table["failed"].to_pylist() == [False, False, True]

    def test_a_node_with_other_versions_does_not_take_part(self, digits_export: Export) -> None:
        run = identity(digits_export)
        other = RunIdentity(**vars(run) | {"versions": {**run.versions, "pillow": "0.9"}})
        arguments = cluster._ActorArguments(ActorOptions(model=digits_export.path), other, 1, Path.cwd())
        with pytest.raises(SmlpError, match=r"a node would give other records: versions pillow was 0\.9, now it is"):
            cluster._Actor(arguments)(cluster._table(1, ["/a.jpg"]))

    def test_a_node_without_the_working_folder(self, digits_export: Export, tmp_path: Path) -> None:
        arguments = cluster._ActorArguments(
            ActorOptions(model=digits_export.path), identity(digits_export), 1, tmp_path / "gone"
        )
        with pytest.raises(SmlpError, match=r"relative paths, and .* cannot enter: No such file or directory"):
            cluster._Actor(arguments)(cluster._table(1, ["a.jpg"]))


def identity(export: Export) -> RunIdentity:
    return RunIdentity.of(export.path, export.graph.metadata, provider="cpu", kind="jsonl", topk=3, batch_size=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--ray", "127.0.0.1:1", "-o", "out"), "no Ray cluster answers there: "),
        (("--ray", "ray://127.0.0.1:1", "-o", "out"), "addresses of Ray Client do not run Ray Data"),
        (("--ray", "local"), "shards go to a folder · --ray · add -o out/"),
        (("--ray", "local", "-o", "out", "--devices", "0,1"), "contradicts --ray · --devices"),
        (("--ray", "local", "-o", "out", "--shard", "1/2"), "contradicts --ray · --shard"),
        (("--ray", "local", "-o", "out", "--decode", "gpu"), "contradicts --ray · --decode gpu"),
        (("--ray", "local", "-o", "out", "--format", "csv"), "shards are Parquet or JSONL · --format csv"),
        (("--actors", "2", "-o", "out"), "actors are Ray's · --actors, --actor-cpus, --actor-gpus · add --ray ADDRESS"),
    ],
)
def test_wrong_usage(digits_export: Export, options: tuple[str, ...], message: str) -> None:
    code, err = run_verb("predict", Path("images").absolute(), "-m", digits_export.path, *options)
    assert (code, err.count("\n"), err[: len(message) + 7]) == (2, 1, f"error: {message}")


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smlp_deploy.dependencies.is_installed", lambda module: module != "ray")
    with (
        pytest.raises(
            MissingDependencyError, match=r'ray not installed, needed for --ray · pip install "smlp-deploy\[ray\]"'
        ),
        cluster.connect("local", OPTIONS),
    ):
        pass


@dataclass
class Nodes:
    """A cluster's address, and the process of its second node."""

    address: str
    second: int


_NODES = """
import sys
from ray.cluster_utils import Cluster

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
second = nodes.add_node(num_cpus=1)
print(nodes.address, second.all_processes["raylet"][0].process.pid, flush=True)
sys.stdin.read()
nodes.shutdown()
"""


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two nodes on this machine, each with one CPU, started and stopped by a process of their own."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    command = [sys.executable, "-W", "ignore", "-c", _NODES]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        preexec_fn=on_all_cores,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        try:
            yield Nodes(line[-2], int(line[-1]))
        finally:
            process.communicate()


def test_a_cluster_that_loses_its_driver_and_then_a_node_gives_the_rows_of_one_machine(
    nodes: Nodes, digits_export: Export, digit_images: list[Path], tmp_path: Path
) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for number in range(IMAGES):
        path = folder / f"{number:04d} é.jpg"
        if number % (IMAGES // BROKEN) == 50:
            path.write_bytes(digit_images[0].read_bytes()[:200])
        else:
            path.symlink_to(digit_images[number % len(digit_images)])
    whole, merged = tmp_path / "whole.parquet", tmp_path / "all.parquet"
    command: list[str | Path] = ["predict", folder, "-m", digits_export.path, "--allow-errors"]
    assert run_verb(*command, "-o", whole) == (0, f"1200 images, 10 failed, written to {whole}\n")

    on_ray = [*command, "-o", out, "--ray", nodes.address]
    driver = start(*on_ray, before=at_open(out, signal.SIGKILL, times=30), preexec_fn=on_all_cores)
    _, err = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, err
    finished = len(list(out.glob("*.parquet")))
    assert 0 < finished < 10

    lose_a_node = at_open(out, signal.SIGKILL, times=15).replace("os.getpid()", str(nodes.second))
    driver = start(*on_ray, "--resume", before=lose_a_node, preexec_fn=on_all_cores)
    _, err = driver.communicate()
    assert (driver.returncode, err) == (
        0,
        f"1200 images, 10 failed, in 10 shards, {finished} of them finished before, written to {out}\n",
    )
    assert not Path(f"/proc/{nodes.second}/cmdline").exists() or not Path(f"/proc/{nodes.second}/cmdline").read_bytes()
    assert run_verb("merge", out, "-o", merged)[0] == 0
    assert merged.read_bytes() == whole.read_bytes()
