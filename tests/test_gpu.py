"""What needs an NVIDIA GPU: engines that are built, loaded, compared and classified with."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from smlp_deploy import Classifier
from smlp_deploy.dependencies import TENSORRT_MODULES, find_gpu
from smlp_deploy.evaluation.benchmark import run_benchmark
from smlp_deploy.evaluation.worker import Target
from smlp_deploy.exporters.tensorrt import DEFAULT_ARCHITECTURES, BuildOptions
from smlp_deploy.graphs.file import Graph
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.pipeline.build import build_engine, prepare_graph
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.verify import verify_artifact, verify_layers

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU and driver here")]


@pytest.fixture(params=TENSORRT_MODULES)
def backend(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if find_spec(TENSORRT_MODULES[name]) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_computes_what_the_trained_network_computes(
    digits_export: Export, tmp_path: Path, backend: str, precision: str
) -> None:
    options = BuildOptions(
        profile=BatchProfile(min=1, opt=4, max=8),
        architectures=DEFAULT_ARCHITECTURES if backend == "tensorrt-rtx" else (),
    )
    target = tmp_path / "x.engine"
    build_engine(prepare_graph(Graph.read(digits_export.path), precision), target, options, backend=backend)
    report = verify_artifact(target)
    assert report.passed, report.failures


def test_an_engine_agrees_block_by_block(digits_export: Export, tmp_path: Path, backend: str) -> None:
    options = BuildOptions(architectures=DEFAULT_ARCHITECTURES if backend == "tensorrt-rtx" else ())
    build_engine(prepare_graph(Graph.read(digits_export.path), "fp16"), tmp_path / "x.engine", options, backend=backend)
    report = verify_layers(tmp_path / "x.engine", reference=digits_export.path)
    assert report.first_over is None, report.first_over
    assert len(report.points) == 3 + 2 * 6


def test_an_engine_classifies(digits_export: Export, digit_images: list[Path], tmp_path: Path, backend: str) -> None:
    options = BuildOptions(architectures=DEFAULT_ARCHITECTURES if backend == "tensorrt-rtx" else ())
    build_engine(prepare_graph(Graph.read(digits_export.path), "fp16"), tmp_path / "x.engine", options, backend=backend)
    with Classifier.open(tmp_path / "x.engine") as classifier:
        labels = [prediction.scores[0].label for prediction in classifier.classify(digit_images)]
    assert sum(label == path.name.split("-")[1] for label, path in zip(labels, digit_images, strict=True)) >= 11


def test_an_engine_is_timed_with_and_without_transfers(digits_export: Export, tmp_path: Path, backend: str) -> None:
    options = BuildOptions(architectures=DEFAULT_ARCHITECTURES if backend == "tensorrt-rtx" else ())
    build_engine(prepare_graph(Graph.read(digits_export.path), "fp16"), tmp_path / "x.engine", options, backend=backend)
    targets = [Target(path=digits_export.path), Target(path=tmp_path / "x.engine")]
    _, engine = run_benchmark(targets, batch_sizes=(8,), rounds=2).models
    (timing,) = engine.batches
    assert timing.gpu_median is not None
    assert 0 < timing.gpu_median < timing.median
