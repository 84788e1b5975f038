"""What needs an NVIDIA GPU: engines that are built, loaded, compared and classified with.

`make test-gpu` runs these tests and says which were skipped, and why. A GPU that fails in mid-run, and a run that
resumes after it, cannot be provoked on a healthy one: tests without a GPU plant such errors.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smlp_deploy import Classifier
from smlp_deploy.artifacts import engine_manifest_path, failed_path, untried_path
from smlp_deploy.dependencies import TENSORRT_MODULES, find_gpu, list_gpus
from smlp_deploy.errors import CheckError, GpuMemoryError, UsageError
from smlp_deploy.evaluation.benchmark import run_benchmark
from smlp_deploy.evaluation.clock import GpuClock
from smlp_deploy.evaluation.parity import prove
from smlp_deploy.evaluation.worker import Target
from smlp_deploy.exporters.tensorrt import ALONE, DEFAULT_ARCHITECTURES, BuildOptions, TensorRT
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.images.defaults import default_images
from smlp_deploy.metadata import BatchProfile, EngineManifest
from smlp_deploy.pipeline.build import build_prepared, prepare_graph
from smlp_deploy.pipeline.export import Export
from smlp_deploy.pipeline.precision import Int8Options
from smlp_deploy.pipeline.verify import verify_artifact, verify_layers
from smlp_deploy.runners import open_compiled, open_runner
from smlp_deploy.runners.base import GpuTimer, Runner, input_of
from smlp_deploy.runners.placement import Placement
from tests.support.fakes import Exported

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(find_gpu() is None, reason="no NVIDIA GPU and driver here")]


@pytest.fixture(params=TENSORRT_MODULES)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that is installed and serves this GPU."""
    name = str(request.param)
    if find_spec(TENSORRT_MODULES[name]) is None:
        pytest.skip(f"{name} is not installed")
    if name == "tensorrt-rtx" and architecture() not in TensorRT.load(name).architectures():
        pytest.skip(f"TensorRT-RTX does not serve this GPU's architecture, {architecture()}")
    return name


def architecture() -> str:
    gpu = find_gpu()
    assert gpu is not None
    return gpu.architecture


def architectures_of(backend: str) -> tuple[str, ...]:
    """What to build for: with TensorRT-RTX the default engine, if this GPU is among those that it is for."""
    if backend == "tensorrt":
        return ()
    return DEFAULT_ARCHITECTURES if architecture() in DEFAULT_ARCHITECTURES else (architecture(),)


def skip_before_ampere(what: str) -> None:
    if int(architecture()[2:]) < 80:
        pytest.skip(f"{what}: from Ampere (sm80) on; this GPU is {architecture()}")


def skip_unless_served(backend: str, precision: str) -> None:
    if precision == "bf16":
        skip_before_ampere("bf16")
    if precision == "fp32" and backend == "tensorrt-rtx" and architecture() == ALONE:
        pytest.skip("TensorRT-RTX has no fp32 matrix product for sm75")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_an_engine_computes_what_the_trained_network_computes(
    digits_export: Export, tmp_path: Path, backend: str, precision: str
) -> None:
    skip_unless_served(backend, precision)
    options = BuildOptions(
        profile=BatchProfile(min=1, opt=4, max=8),
        architectures=architectures_of(backend),
    )
    target = tmp_path / "x.engine"
    build_prepared(prepare_graph(Graph.read(digits_export.path), precision), target, options, backend=backend)
    report = verify_artifact(target)
    assert report.passed, report.failures


def test_an_engine_agrees_block_by_block(digits_export: Export, tmp_path: Path, backend: str) -> None:
    options = BuildOptions(architectures=architectures_of(backend))
    build_prepared(
        prepare_graph(Graph.read(digits_export.path), "fp16"), tmp_path / "x.engine", options, backend=backend
    )
    report = verify_layers(tmp_path / "x.engine", reference=digits_export.path)
    assert report.first_over is None, report.first_over
    assert len(report.points) == 3 + 2 * 6


def test_an_engine_classifies(digits_export: Export, digit_images: list[Path], tmp_path: Path, backend: str) -> None:
    options = BuildOptions(architectures=architectures_of(backend))
    build_prepared(
        prepare_graph(Graph.read(digits_export.path), "fp16"), tmp_path / "x.engine", options, backend=backend
    )
    with Classifier.open(tmp_path / "x.engine") as classifier:
        labels = [prediction.scores[0].label for prediction in classifier.classify(digit_images)]
    assert sum(label == path.name.split("-")[1] for label, path in zip(labels, digit_images, strict=True)) >= 11


def test_an_engine_is_timed_with_and_without_transfers(digits_export: Export, tmp_path: Path, backend: str) -> None:
    options = BuildOptions(architectures=architectures_of(backend))
    build_prepared(
        prepare_graph(Graph.read(digits_export.path), "fp16"), tmp_path / "x.engine", options, backend=backend
    )
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
        with open_runner(BUNDLED_CHECKPOINT) as on_cpu, open_runner(BUNDLED_CHECKPOINT, device="cuda") as on_gpu:
            expected = logits_of(on_cpu, noise())
            assert on_gpu.name == "pytorch (CUDA) smlpnet_digits.safetensors"
            assert np.abs(logits_of(on_gpu, noise()) - expected).max() < 1e-4 * expected.std()

    @pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.compile uses it itself
    def test_compiled_it_computes_the_same(self) -> None:
        placement = Placement.of(device="cuda")
        with open_runner(BUNDLED_CHECKPOINT) as on_cpu:
            expected = logits_of(on_cpu, noise())
        with open_compiled(BUNDLED_CHECKPOINT, placement=placement) as compiled:
            assert np.abs(logits_of(compiled, noise()) - expected).max() < 1e-4 * expected.std()
            assert isinstance(compiled, GpuTimer)
            assert all(seconds > 0 for seconds in compiled.gpu_seconds(taken_by(compiled, noise()), runs=3))

    def test_memory_that_runs_out_is_one_clear_line_and_it_goes_on(self) -> None:
        with open_runner(BUNDLED_CHECKPOINT, device="cuda") as runner:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-4)
            try:
                with pytest.raises(GpuMemoryError, match="the GPU's memory is full"):
                    logits_of(runner, noise(4096))
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0)
            assert np.isfinite(logits_of(runner, noise())).all()

    def test_its_half_arithmetic_is_near_that_of_the_cpu(self) -> None:
        from smlp_deploy.models.checkpoint import load_checkpoint
        from smlp_deploy.models.description import describe
        from smlp_deploy.runners.pytorch import HalfRunner

        checkpoint = load_checkpoint(BUNDLED_CHECKPOINT)
        metadata = describe(checkpoint)
        with HalfRunner(checkpoint, metadata) as on_cpu, HalfRunner(checkpoint, metadata, gpu=find_gpu()) as on_gpu:
            expected = logits_of(on_cpu, noise())
            assert np.abs(logits_of(on_gpu, noise()) - expected).max() < 1e-2 * expected.std()

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


def noise(images: int = 8) -> NDArray[np.uint8]:
    """Pixels; `logits_of` makes them what a runner takes."""
    return np.random.default_rng(images).integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)


def taken_by(runner: Runner, images: NDArray[np.uint8]) -> ImageArray:
    return input_of(runner, images, runner.metadata.preprocessing)


def logits_of(runner: Runner, images: NDArray[np.uint8]) -> FloatArray:
    return runner.infer(taken_by(runner, images))


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
    options = BuildOptions(architectures=architectures_of(backend))
    build_prepared(prepare_graph(Graph.read(digits_export.path), None), tmp_path / "x.engine", options, backend=backend)
    with open_runner(tmp_path / "x.engine", device=gpu.uuid) as engine, open_runner(digits_export.path) as on_cpu:
        expected = logits_of(on_cpu, noise())
        assert np.abs(logits_of(engine, noise()) - expected).max() < 1e-4 * expected.std()


PROFILE = BatchProfile(min=2, opt=4, max=6)


def built(source: Path, folder: Path, backend: str, precision: str = "fp16", **options: Any) -> Path:
    """An engine for batches of 2 to 6, which passed parity here."""
    target = folder / "x.engine"
    int8 = Int8Options(per_channel=backend == "tensorrt") if precision == "int8" else None
    build_options = BuildOptions(profile=PROFILE, architectures=architectures_of(backend), **options)
    result = build_prepared(
        prepare_graph(Graph.read(source), precision, int8=int8), target, build_options, backend=backend
    )
    assert result.parity is not None, "the engine did not run here"
    assert result.parity.passed, result.parity.failures
    return target


def manifest_of(engine: Path) -> EngineManifest:
    path = engine_manifest_path(engine)
    return EngineManifest.from_json(path.read_text(encoding="utf-8"), where=path)


class TestKindsOfEngines:
    def test_int8(self, digits_export: Export, tmp_path: Path, backend: str) -> None:
        engine = built(digits_export.path, tmp_path, backend, "int8")
        assert manifest_of(engine).kernels["compute_by_precision"].get("Int8")
        report = verify_artifact(engine)
        assert report.passed, report.failures

    def test_tf32(self, digits_export: Export, tmp_path: Path, backend: str) -> None:
        skip_before_ampere("TF32")
        engine = built(digits_export.path, tmp_path, backend, "fp32", tf32=True)
        assert manifest_of(engine).arithmetic == "tf32"
        report = verify_artifact(engine)
        assert report.passed, report.failures

    def test_version_compatible(self, digits_export: Export, tmp_path: Path, backend: str) -> None:
        engine = built(digits_export.path, tmp_path, backend, version_compatible=True)
        assert manifest_of(engine).options["version_compatible"] is True
        report = verify_artifact(engine)
        assert report.passed, report.failures

    def test_hardware_compatible(self, digits_export: Export, tmp_path: Path, backend: str) -> None:
        if backend != "tensorrt":
            pytest.skip("TensorRT-RTX builds for named architectures instead")
        skip_before_ampere("hardware compatibility")
        engine = built(digits_export.path, tmp_path, backend, hardware_compatible=True)
        assert manifest_of(engine).options["hardware_compatible"] is True
        report = verify_artifact(engine)
        assert report.passed, report.failures


class TestBuilding:
    def test_the_manifest_says_that_the_engine_ran_here(
        self, digits_export: Export, tmp_path: Path, backend: str
    ) -> None:
        manifest = manifest_of(built(digits_export.path, tmp_path, backend))
        assert manifest.ran_here is True
        assert manifest.engine_parity is not None
        assert manifest.engine_parity["passed"] is True
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.engine", "x.engine.json"]

    def test_an_engine_that_fails_parity_is_kept_under_another_name(
        self, digits_export: Export, tmp_path: Path, backend: str
    ) -> None:
        target = tmp_path / "x.engine"
        options = BuildOptions(profile=PROFILE, architectures=architectures_of(backend))
        prepared = prepare_graph(Graph.read(digits_export.path), "fp16")
        with pytest.raises(CheckError, match="parity failed on this GPU") as caught:
            build_prepared(prepared, target, options, backend=backend, bounds={"difference": 0.0})
        assert caught.value.where == str(failed_path(target))
        assert failed_path(target).is_file()
        assert not target.exists()
        assert not untried_path(target).exists()
        manifest = manifest_of(failed_path(target))
        assert manifest.ran_here is True
        assert manifest.engine_parity is not None
        assert manifest.engine_parity["passed"] is False


class TestRunning:
    @pytest.mark.parametrize("images", [1, 2, 3, 6, 7, 13])
    def test_any_number_of_images_runs_whatever_the_profile(
        self, digits_export: Export, tmp_path: Path, backend: str, images: int
    ) -> None:
        engine = built(digits_export.path, tmp_path, backend)
        with open_runner(engine) as runner, open_runner(digits_export.path) as reference:
            logits, expected = logits_of(runner, noise(images)), logits_of(reference, noise(images))
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= 0.05 * np.abs(expected).max()

    def test_sizes_that_come_again_run_as_cuda_graphs(
        self, digits_export: Export, tmp_path: Path, backend: str
    ) -> None:
        with open_runner(built(digits_export.path, tmp_path, backend)) as runner:
            first = logits_of(runner, noise(4))
            assert "CUDA graphs" not in runner.name
            again = [logits_of(runner, noise(4)) for _ in range(4)]
            assert "(CUDA graphs)" in runner.name
            other = logits_of(runner, noise(3))
            back = logits_of(runner, noise(4))
        assert len(other) == 3
        for logits in (*again, back):
            assert np.allclose(logits, first, rtol=0, atol=1e-2 * float(np.abs(first).max()))

    def test_gpu_time_is_that_of_each_run(self, digits_export: Export, tmp_path: Path, backend: str) -> None:
        with open_runner(built(digits_export.path, tmp_path, backend)) as runner:
            assert isinstance(runner, GpuTimer)
            seconds = runner.gpu_seconds(taken_by(runner, noise(4)), runs=20)
            assert len(seconds) == 20
            assert all(0 < time < 1 for time in seconds)
            assert runner.gpu_seconds(taken_by(runner, noise(7)), runs=3) == []

    def test_an_engine_is_opened_twice_at_once(self, digits_export: Export, tmp_path: Path, backend: str) -> None:
        engine = built(digits_export.path, tmp_path, backend)
        with open_runner(engine) as one, open_runner(engine) as other:
            pairs = [(logits_of(one, noise(n)), logits_of(other, noise(n))) for n in (2, 4, 2, 4, 2, 4)]
        for left, right in pairs:
            assert np.allclose(left, right, rtol=0, atol=1e-2 * float(np.abs(left).max()))


class TestOnnxRuntime:
    @pytest.fixture(params=["cuda", "tensorrt"])
    def provider(self, request: pytest.FixtureRequest) -> str:
        onnxruntime = pytest.importorskip("onnxruntime")
        name = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}[str(request.param)]
        if name not in onnxruntime.get_available_providers():
            pytest.skip(f"the installed ONNX Runtime has no {name}: it needs the extra gpu")
        if request.param == "tensorrt" and find_spec("tensorrt") is None:
            pytest.skip("TensorRT 10, which this provider loads, is not installed")
        return str(request.param)

    @pytest.mark.parametrize("precision", ["fp16", "fp32"])
    def test_a_provider_computes_what_the_cpu_computes(
        self, digits_export: Export, tmp_path: Path, provider: str, precision: str
    ) -> None:
        graph = prepare_graph(Graph.read(digits_export.path), precision).graph
        path = tmp_path / "x.onnx"
        path.write_bytes(graph.content)
        with open_runner(digits_export.path) as reference, open_runner(path, provider=provider) as candidate:
            assert provider.upper() in candidate.name
            report = prove(reference, candidate, default_images(graph.metadata))
        assert report.passed, report.failures

    def test_a_provider_classifies(self, digits_export: Export, digit_images: list[Path], provider: str) -> None:
        with Classifier.open(digits_export.path, provider=provider) as classifier:
            predictions = list(classifier.classify(digit_images))
        labels = [prediction.scores[0].label for prediction in predictions]
        assert sum(label == path.name.split("-")[1] for label, path in zip(labels, digit_images, strict=True)) >= 11
        assert all(math.isfinite(prediction.scores[0].probability) for prediction in predictions)


class TestOnnxRuntimeOnCuda:
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
            expected = logits_of(on_cpu, noise())
            assert np.abs(logits_of(on_gpu, noise()) - expected).max() < 2e-5 * expected.std()
