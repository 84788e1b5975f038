"""Classification on a Ray cluster: Ray Data hands the shards of a listing to actors that have opened the model once.

The driver reads the listing and writes the shards' files, the same as those of `run_shard`; actors read and decode the
images. Paths and records travel, pixels do not. A shard's file appears whole or not at all, and finished shards are not
run again: that is the checkpoint. All nodes need this package in the same versions, and the model and the images under
the same names: in a folder that they share, or in an object store.
"""

from __future__ import annotations

import io
import json
import logging
import os
import platform
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from smlp_deploy.dependencies import require
from smlp_deploy.errors import GpuError, SmlpError, UsageError
from smlp_deploy.images.batches import available_cores
from smlp_deploy.images.remote import is_remote
from smlp_deploy.inference.classify import Classifier, Prediction
from smlp_deploy.inference.devices import Opened
from smlp_deploy.inference.facts import Listing
from smlp_deploy.inference.parquet import table_of
from smlp_deploy.inference.records import RunIdentity, record_of
from smlp_deploy.inference.resume import differences
from smlp_deploy.inference.shards import Shard, ShardRun, deal, finished_shard, write_shard
from smlp_deploy.interrupts import StopRequest
from smlp_deploy.runners.placement import Placement

logger = logging.getLogger(__name__)

LOCAL = "local"
"""The address of a cluster of this machine alone, which lives as long as the run."""

_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_USAGE_DISABLED": "1", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""No telemetry, and no lines of Ray's own on standard error: what ends the run is an error of ours."""

BATCHES_PER_SHARD = 4
MOST_SHARDS = 512
"""As many files as a merge can have open at a time on most systems."""


@dataclass(frozen=True, kw_only=True)
class ActorOptions:
    """The actors of a run.

    Attributes:
        model: the artifact or checkpoint.
        actors: how many; None for as many as fit.
        cpus: cores of each one.
        gpus: GPUs of each one.
        provider: see `Placement.of`.
        runtime: see `Placement.of`.
    """

    model: Path
    actors: int | None = None
    cpus: int = 1
    gpus: int = 0
    provider: str | None = None
    runtime: str = "auto"

    def placement(self) -> Placement:
        """Where the model runs, in the process of an actor; Ray shows it no GPUs but its own."""
        device = "cuda" if self.gpus and self.provider is None else None
        return Placement.of(device=device, provider=self.provider, runtime=self.runtime, threads=self.cpus)


class Cluster:
    """A Ray cluster on which the actors of a run fit; see `connect`."""

    def __init__(self, options: ActorOptions, actors: int) -> None:
        self._options, self._actors = options, actors

    def describe(self) -> Opened:
        """Open the model on one of the nodes.

        Raises:
            SmlpError: it cannot be used there.
        """
        import ray

        wanted = {"CPU": self._options.cpus, "GPU": self._options.gpus}
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        if busy := [kind for kind, number in wanted.items() if free.get(kind, 0) < number]:
            logger.warning("other work has all %ss of the cluster; waiting for it to end", " and ".join(busy))
        remote = ray.remote(num_cpus=self._options.cpus, num_gpus=self._options.gpus)(_describe)
        with _errors_of_actors():
            return ray.get(remote.remote(self._options))

    def run(
        self,
        identity: RunIdentity,
        images: Sequence[str],
        folder: Path,
        *,
        workers: int | None = None,
        resume: bool,
        stop: StopRequest,
        advance: Callable[[], None] = lambda: None,
    ) -> list[ShardRun]:
        """Classify images into shards' files.

        Args:
            identity: the format ("parquet" or "jsonl"), batch size, and all else that the records depend on.
            images: the whole listing.
            folder: for the files.
            workers: decoding threads of each actor; by default one per core of it.
            resume: skip shards that are finished.
            stop: checked after each shard.
            advance: called after each image.

        Returns:
            The shards, in their order.

        Raises:
            UsageError: a file there is of another run.
            StoppedError: a signal arrived; the shards that were finished are kept.
            SmlpError: a node cannot use the model, or a file cannot be written.
        """
        listing = Listing(images)
        for _ in listing:
            pass
        shards = shards_of(len(images), batch_size=identity.batch_size)
        runs: dict[Shard, ShardRun] = {}
        for shard in shards:
            if resume and (run := finished_shard(identity, listing, folder, shard=shard)):
                runs[shard] = run
        left = {shard.number: shard for shard in shards if shard not in runs}
        dealt = deal(images, left.values(), batch_size=identity.batch_size)
        lists = {shard.number: mine for shard, mine in dealt.items()}
        actor = _ActorArguments(self._options, identity, workers or self._options.cpus, Path.cwd())
        with _errors_of_actors(), closing(self._records(lists, actor)) as finished:
            for number, rows in finished:
                if number not in left:  # a shard that was run again after its node was lost
                    continue
                shard = left.pop(number)
                records = rows if identity.format == "parquet" else rows["text"].to_pylist()
                failed = sum(rows["failed"].to_pylist())
                runs[shard] = write_shard(records, identity, listing, folder, shard=shard, failed=failed)
                for _ in range(len(rows)):
                    advance()
                if stop:
                    break
        stop.report(sum(run.facts.images for run in runs.values()), partial=folder)
        if left:
            raise SmlpError(f"Ray ended without {len(left)} shards", where=folder, fix="run it again with --resume")
        return [runs[shard] for shard in shards]

    def _records(self, lists: Mapping[int, list[str]], actor: _ActorArguments) -> Generator[tuple[int, Any]]:
        """The number of each shard and its rows, in the order in which they are finished."""
        import ray

        if not lists:
            return
        _quiet()
        references: list[Any] = [ray.put(_table(number, names)) for number, names in lists.items()]
        records = ray.data.from_arrow_refs(references).map_batches(
            _Actor,
            batch_size=None,  # a whole block, which is a shard
            batch_format="pyarrow",
            fn_constructor_args=(actor,),
            compute=ray.data.ActorPoolStrategy(size=min(self._actors, len(lists))),
            num_cpus=self._options.cpus,
            num_gpus=self._options.gpus,
        )
        tables: Iterable[Any] = records.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for table in tables:
            yield table["shard"][0].as_py(), table


def shards_of(images: int, *, batch_size: int) -> list[Shard]:
    """The shards of so many images; the same on every cluster, so that any of them can continue a run."""
    batches = -(-images // batch_size)
    count = max(1, min(MOST_SHARDS, -(-batches // BATCHES_PER_SHARD)))
    return [Shard(number, count) for number in range(1, count + 1)]


@contextmanager
def connect(address: str, options: ActorOptions) -> Iterator[Cluster]:
    """A Ray cluster on which the actors of a run fit.

    Args:
        address: `HOST:PORT` of its head, "auto" for the cluster that this machine belongs to, or `LOCAL`.
        options: the actors.

    Raises:
        MissingDependencyError: Ray is not installed.
        UsageError: there is no cluster at the address, or the actors do not fit.
    """
    require("ray", "pyarrow", "pandas", purpose="for --ray", extra="ray")
    _check_answers(address)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    local: dict[str, Any] = {"num_cpus": available_cores(), "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    settings: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        with _without_native_lines():
            ray.init(address=address, **settings, **(local if address == LOCAL else {}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster there: {_first_line(error)}", where=f"--ray {address}") from None
    with redirect_stdout(cast(TextIO, _Log())):  # Ray prints what happens to nodes and actors
        try:
            nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
            yield Cluster(options, _fitting(options, [node["Resources"] for node in nodes if node["Alive"]]))
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Check that a machine answers at `HOST:PORT`, which Ray would try for minutes.

    Raises:
        UsageError: none does, or the address is of another kind.
    """
    if "://" in address:
        fix = "run this on a machine of the cluster, with --ray auto"
        raise UsageError("addresses of Ray Client do not run Ray Data", where=f"--ray {address}", fix=fix)
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        fix = "check the address of its head, and the network"
        raise UsageError(f"no Ray cluster answers there: {error}", where=f"--ray {address}", fix=fix) from None


class _Log(io.TextIOBase):
    """Hands lines to the log, which --debug shows."""

    def write(self, text: str) -> int:
        if text.strip():
            logger.debug("%s", text.strip())
        return len(text)


@contextmanager
def _without_native_lines() -> Iterator[None]:
    """Keep what Ray's native code says of its own start from standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _fitting(options: ActorOptions, nodes: Sequence[Mapping[str, float]]) -> int:
    """How many actors to start on nodes with these resources.

    Raises:
        UsageError: they do not fit: Ray would wait for ever, without a word.
    """
    fit = 0
    for node in nodes:
        by_gpu = [int(node.get("GPU", 0) // options.gpus)] if options.gpus else []
        fit += min([int(node.get("CPU", 0) // options.cpus), *by_gpu])
    wanted = options.actors or fit
    if wanted > fit or not fit:
        cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
        raise UsageError(
            f"{max(1, wanted)} actors with {options.cpus} CPUs and {options.gpus} GPUs each do not fit on the cluster",
            where=f"{len(nodes)} nodes with {cpus:g} CPUs and {gpus:g} GPUs in all",
            fix=f"--actors {fit}, or fewer CPUs or GPUs for each" if fit else "ask for fewer CPUs or GPUs for each",
        )
    return wanted


def _quiet() -> None:
    """Leave progress to this package, and stop Ray Data's log from going to standard error."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None  # a shard's records stay together
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextmanager
def _errors_of_actors() -> Iterator[None]:
    """Turn Ray's errors into ours: those that an actor raised, and those of the cluster."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        ours = next((one for one in _causes(error) if isinstance(one, SmlpError)), None)
        if ours is not None:
            raise ours from None
        raise GpuError(f"Ray: {_first_line(error)}", fix="see the cluster's logs; --resume continues") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# What follows runs on the nodes.


@dataclass(frozen=True)
class _ActorArguments:
    options: ActorOptions
    identity: RunIdentity
    workers: int
    folder: Path


def _describe(options: ActorOptions) -> Opened:
    placement = options.placement()
    with Classifier.open(options.model, placement=placement) as classifier:
        return Opened.of(classifier, options.model, placement)


class _Actor:
    """Classifies shards; opens the model for the first one, so that Ray hands on the error if it cannot."""

    def __init__(self, arguments: _ActorArguments) -> None:
        self._arguments = arguments
        self._classifier: Classifier | None = None

    def __call__(self, table: Any) -> Any:
        paths = [json.loads(text) for text in table["path"].to_pylist()]
        _enter(self._arguments.folder, paths)
        classifier = self._classifier = self._classifier or _open(self._arguments)
        predictions = classifier.classify(
            paths,
            batch_size=self._arguments.identity.batch_size,
            topk=self._arguments.identity.topk,
            workers=self._arguments.workers,
        )
        return self._rows(table["shard"][0].as_py(), list(predictions))

    def _rows(self, number: int, predictions: Sequence[Prediction]) -> Any:
        """Records as the file has them, made here because one driver would be too slow for a large cluster."""
        import pyarrow as pa

        lines = [json.dumps(record_of(prediction)) for prediction in predictions]
        rows = table_of(lines) if self._arguments.identity.format == "parquet" else pa.table({"text": lines})
        failed = pa.array([prediction.error is not None for prediction in predictions], pa.bool_())
        return rows.append_column("failed", failed).append_column("shard", _numbers(number, len(lines)))


def _open(arguments: _ActorArguments) -> Classifier:
    """The model, if its records are those that the run is to have."""
    options, wanted = arguments.options, arguments.identity
    placement = options.placement()
    classifier = Classifier.open(options.model, placement=placement)
    here = RunIdentity.of(
        options.model,
        classifier.metadata,
        provider=placement.kind_of(options.model, classifier.metadata),
        kind=wanted.format,
        topk=wanted.topk,
        batch_size=wanted.batch_size,
    )
    if different := next(differences(vars(wanted), vars(here)), None):
        classifier.close()
        fix = "install the same versions, and the same model, on all nodes"
        raise SmlpError(f"a node would give other records: {different}", where=platform.node(), fix=fix)
    return classifier


def _enter(folder: Path, paths: Iterable[str]) -> None:
    """Make relative paths mean what they mean to the driver."""
    if all(os.path.isabs(path) or is_remote(path) for path in paths):  # noqa: PTH117 - paths need not be valid
        return
    try:
        os.chdir(folder)
    except OSError as error:
        fix = "give absolute paths, or share the folder among all nodes"
        raise SmlpError(
            f"relative paths, and {platform.node()} cannot enter: {error.strerror}", where=folder, fix=fix
        ) from None


def _table(number: int, paths: Sequence[str]) -> Any:
    """A shard's paths, each as JSON: it is ASCII, whatever bytes a file's name has."""
    import pyarrow as pa

    return pa.table({"shard": _numbers(number, len(paths)), "path": [json.dumps(path) for path in paths]})


def _numbers(number: int, rows: int) -> Any:
    import pyarrow as pa

    return pa.array([number] * rows, pa.int32())
