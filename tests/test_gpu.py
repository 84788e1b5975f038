"""What needs an NVIDIA GPU: engines that are built, loaded, compared and classified with."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from smlp_deploy import Classifier
from smlp_deploy.dependencies import TENSORRT_MODULES, find_gpu, list_gpus
from smlp_deploy.errors import ArtifactError, UsageError
from smlp_deploy.evaluation.benchmark import run_benchmark
from smlp_deploy.evaluation.clock import GpuClock
from smlp_deploy.evaluation.worker import Target
from smlp_deploy.exporters.tensorrt import DEFAULT_ARCHITECTURES, BuildOptions
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.pipeline.build import build_engine, prepare_graph
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.verify import verify_artifact, verify_layers
from smlp_deploy.runners import open_compiled, open_runner
from smlp_deploy.runners.base import GpuTimer
from smlp_deploy.runners.placement import Placement
from tests.support.fakes import Exported

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


class TestPyTorch:
    """A checkpoint on the GPU, in true fp32."""

    @pytest.fixture(autouse=True)
    def torch_with_cuda(self) -> None:
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this PyTorch does not see the GPU")

    def test_it_computes_what_the_cpu_computes(self) -> None:
        batch = noise()
        with open_runner(BUNDLED_CHECKPOINT) as on_cpu, open_runner(BUNDLED_CHECKPOINT, device="cuda") as on_gpu:
            expected = on_cpu.infer(batch)
            assert on_gpu.name == "pytorch (CUDA) smlpnet_digits.safetensors"
            assert np.abs(on_gpu.infer(batch) - expected).max() < 1e-4 * expected.std()

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile uses it itself
    def test_compiled_it_computes_the_same(self) -> None:
        batch = noise()
        placement = Placement.of(device="cuda")
        with open_runner(BUNDLED_CHECKPOINT) as on_cpu:
            expected = on_cpu.infer(batch)
        with open_compiled(BUNDLED_CHECKPOINT, placement=placement) as compiled:
            assert np.abs(compiled.infer(batch) - expected).max() < 1e-4 * expected.std()
            assert isinstance(compiled, GpuTimer)
            assert all(seconds > 0 for seconds in compiled.gpu_seconds(batch, runs=3))

    def test_memory_that_runs_out_is_one_clear_line_and_it_goes_on(self) -> None:
        with open_runner(BUNDLED_CHECKPOINT, device="cuda") as runner:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-4)
            try:
                with pytest.raises(ArtifactError, match="the GPU's memory is full"):
                    runner.infer(noise(4096))
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            assert np.isfinite(runner.infer(noise())).all()

    def test_its_half_arithmetic_is_near_that_of_the_cpu(self) -> None:
        from smlp_deploy.models.checkpoint import load_checkpoint
        from smlp_deploy.models.description import describe
        from smlp_deploy.runners.pytorch import HalfRunner

        checkpoint = load_checkpoint(BUNDLED_CHECKPOINT)
        metadata = describe(checkpoint)
        with HalfRunner(checkpoint, metadata) as on_cpu, HalfRunner(checkpoint, metadata, gpu=find_gpu()) as on_gpu:
            expected = on_cpu.infer(noise())
            assert np.abs(on_gpu.infer(noise()) - expected).max() < 1e-2 * expected.std()

    def test_a_benchmark_has_its_gpu_time_and_clock(self) -> None:
        gpu = find_gpu("cuda")
        assert gpu is not None
        targets = [Target(path=BUNDLED_CHECKPOINT, placement=Placement(gpu=gpu))]
        report = run_benchmark(targets, batch_sizes=(8,), rounds=2)
        (model,) = report.models
        assert model.batches[0].gpu_median is not None
        assert model.gpu == gpu.name
        with GpuClock(gpu) as clock:
            known = clock.now() is not None
        assert (model.gpu_clock is not None) == known
        if model.gpu_clock is not None and model.gpu_clock.most is not None:
            assert 0 < model.gpu_clock.low <= model.gpu_clock.median <= model.gpu_clock.high <= model.gpu_clock.most
            assert "GPU clock, MHz" in report.environment


class TestOnnxRuntime:
    """ONNX Runtime's CUDA provider."""

    @pytest.fixture(autouse=True)
    def onnxruntime_with_cuda(self) -> None:
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has no CUDA")

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_a_graph_passes_the_gates_of_its_precision(
        self, exported: Exported, precision: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        report = verify_artifact(exported(precision).path, placement=Placement.of(device="cuda"))
        assert report.passed, report.failures
        assert "onnxruntime:Default" not in capfd.readouterr().err

    def test_fp32_is_not_tf32(self, digits_export: Export) -> None:
        with open_runner(digits_export.path) as on_cpu, open_runner(digits_export.path, provider="cuda") as on_gpu:
            expected = on_cpu.infer(noise())
            assert np.abs(on_gpu.infer(noise()) - expected).max() < 2e-5 * expected.std()


def noise(size: int = 8) -> FloatArray:
    return np.random.default_rng(0).standard_normal((size, 3, 32, 32), dtype=np.float32)


def test_gpus_are_chosen_by_number_and_uuid() -> None:
    first = find_gpu()
    assert first is not None
    assert first.uuid
    for name in ("cuda", "cuda:0", "0", first.uuid, first.uuid[:12]):
        assert find_gpu(name) == first
    with pytest.raises(UsageError, match=first.uuid):
        find_gpu(str(len(list_gpus())))


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_cuda_visible_devices_is_honoured(hidden: str) -> None:
    first = find_gpu()
    assert first is not None
    script = "from smlp_deploy.dependencies import list_gpus; print(*(gpu.uuid for gpu in list_gpus()))"

    def seen(visible: str) -> list[str]:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
        return subprocess.check_output([sys.executable, "-c", script], env=environment, text=True).split()

    assert seen(hidden) == []
    if first.uuid.startswith("GPU-"):
        assert seen(first.uuid) == [first.uuid]


def test_an_engine_is_run_by_uuid(digits_export: Export, tmp_path: Path, backend: str) -> None:
    gpu = list_gpus()[-1]  # the second, if there are several
    options = BuildOptions(architectures=DEFAULT_ARCHITECTURES if backend == "tensorrt-rtx" else ())
    build_engine(prepare_graph(Graph.read(digits_export.path), None), tmp_path / "x.engine", options, backend=backend)
    with open_runner(tmp_path / "x.engine", device=gpu.uuid) as engine, open_runner(digits_export.path) as on_cpu:
        expected = on_cpu.infer(noise())
        assert np.abs(engine.infer(noise()) - expected).max() < 1e-4 * expected.std()
