from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, cast

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from smlp_deploy import dependencies
from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.cli import main
from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.errors import ArtifactError, BuildError, CheckError, UsageError
from smlp_deploy.evaluation.parity import prove
from smlp_deploy.exporters.kernels import KernelSummary, summarize
from smlp_deploy.exporters.pixels import take_pixels
from smlp_deploy.exporters.tensorrt import BuildOptions, Engine, TensorRT
from smlp_deploy.files import BUNDLED_CHECKPOINT, sha256_of
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.images.defaults import bundled_images
from smlp_deploy.metadata import BatchProfile, EngineManifest, Preprocessing
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline import build as engine
from smlp_deploy.pipeline import precision
from smlp_deploy.pipeline.build import Prepared, build_prepared, check_precision, prepare_graph
from smlp_deploy.pipeline.export import Export, export_checkpoint
from smlp_deploy.pipeline.precision import to_input
from smlp_deploy.pipeline.verify import verify_layers
from smlp_deploy.runners import tensorrt as runners
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from smlp_deploy.runners.tensorrt import TensorRTRunner, read_manifest
from tests.support.cuda_runtime import CudaBench
from tests.support.fakes import Exported, FakeRunner
from tests.support.gpu import gpu

Prepare = Callable[..., Prepared]
SM89 = BuildOptions(architectures=("sm89",), profile=BatchProfile(min=1, opt=4, max=8))


@pytest.fixture(scope="module")
def prepare(digits_export: Export) -> Prepare:
    """`prepare_graph` of the bundled model, with each precision and input once."""
    return cache(partial(prepare_graph, digits_export.graph))


@pytest.mark.usefixtures("built_once")
def test_an_engine_is_written_with_its_facts(digits_export: Export, prepare: Prepare, tmp_path: Path) -> None:
    graph = prepare("fp16")
    assert graph.parity is not None
    assert graph.parity.passed
    result = build_prepared(graph, tmp_path / "x.engine", SM89, backend="tensorrt-rtx")
    manifest = EngineManifest.from_json(result.manifest_path.read_text(), where=result.manifest_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.engine", "x.engine.json"]
    assert manifest.engine_sha256 == sha256_of(result.path)
    assert (manifest.onnx_file, manifest.onnx_sha256) == (digits_export.path.name, sha256_of(digits_export.path))
    assert manifest.metadata == graph.graph.metadata
    assert manifest.metadata.precision == "fp16"
    assert manifest.backend == "tensorrt-rtx"
    assert manifest.profile == SM89.profile
    assert manifest.architectures == ("sm89",)
    assert manifest.kernels["compute_by_precision"].keys() == {"Half"}
    assert manifest.ran_here is (result.parity is not None)
    assert manifest.graph_parity is not None
    assert manifest.graph_parity["passed"] is True
    assert manifest.memory


def test_a_source_that_is_swapped_while_it_is_built_no_longer_matters(
    digits_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "x.onnx"
    shutil.copy(digits_export.path, source)
    build, built = TensorRT.build, []

    def swap_and_build(tensorrt: TensorRT, graph: bytes, options: BuildOptions, **keywords: Any) -> Engine:
        source.write_bytes(b"another graph")
        built.append(graph)
        return build(tensorrt, graph, options, **keywords)

    monkeypatch.setattr(TensorRT, "build", swap_and_build)
    with pytest.raises(SystemExit) as stop:
        main(["build-engine", str(source), "--gpu-arch", "sm89", "--quiet", "-o", str(tmp_path / "x.engine")])
    assert stop.value.code == 0
    assert built == [to_input(digits_export.graph, "uint8").content]
    assert read_manifest(tmp_path / "x.engine").onnx_sha256 == sha256_of(digits_export.path)


class TestInput:
    @pytest.mark.usefixtures("built_once")
    @pytest.mark.parametrize(
        ("precision", "elements"),
        [(None, {"Float"}), ("fp16", {"Half"}), ("bf16", {"BFloat16"}), ("int8", {"Int8", "Half"})],
    )
    def test_engines_take_pixels_and_were_compared_with_the_file_of_floats(
        self, digits_export: Export, prepare: Prepare, tmp_path: Path, precision: str | None, elements: set[str]
    ) -> None:
        prepared = prepare(precision)
        assert prepared.source is digits_export.graph
        assert prepared.parity is not None
        assert prepared.parity.passed
        assert prepared.parity.candidate.endswith(f"{precision or 'fp32'}-uint8.onnx")
        assert prepared.graph.metadata.precision == (precision or "fp32")
        pixels = build_prepared(prepared, tmp_path / "x.engine", SM89, backend="tensorrt-rtx")
        manifest = read_manifest(tmp_path / "x.engine")
        assert manifest.metadata.input == "uint8"
        assert manifest.graph_parity is not None
        assert pixels.summary.compute_by_precision.keys() == elements
        floats = prepare(precision, wanted_input="float32")
        other = build_prepared(floats, tmp_path / "y.engine", SM89, backend="tensorrt-rtx")
        assert read_manifest(tmp_path / "y.engine").metadata.input == "float32"
        assert pixels.summary.count <= other.summary.count + 1
        assert pixels.summary.bytes_per_image < other.summary.bytes_per_image

    def test_a_file_that_takes_pixels_is_built_as_it_is(self, exported: Exported) -> None:
        for name in ("fp32", "fp16"):
            pixels = to_input(exported(name).graph, "uint8")
            prepared = prepare_graph(pixels, None)
            assert prepared.graph is prepared.source is pixels
            assert prepared.parity is None
            with pytest.raises(
                UsageError, match=r"takes uint8 and cannot take float32 again · .* give the float32-input"
            ):
                prepare_graph(pixels, None, wanted_input="float32")
        pixels = to_input(exported("fp32").graph, "uint8")
        for name in ("fp16", "int8"):
            with pytest.raises(UsageError, match=r"takes uint8 and cannot be .* give the float32-input file"):
                prepare_graph(pixels, name)

    def test_a_wrong_normalization_is_refused(self, digits_export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(model: onnx.ModelProto, preprocessing: Preprocessing) -> onnx.ModelProto:
            return take_pixels(model, replace(preprocessing, mean=(0.9, 0.9, 0.9)))

        monkeypatch.setattr(precision, "take_pixels", wrong)
        with pytest.raises(CheckError, match="parity failed in fp32 with uint8 input: difference"):
            prepare_graph(digits_export.graph, None)


def test_a_build_without_the_kernels_asked_for_fails_and_leaves_no_file(
    digits_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a precision flag that TensorRT no longer has would do: the graph is still fp32.
    monkeypatch.setattr(precision, "to_half", lambda model, precision: model)
    graph = prepare_graph(Graph.read(digits_export.path), "fp16")
    with pytest.raises(BuildError, match=r"no kernel computes in fp16: \{'Float': 43\}"):
        build_prepared(graph, tmp_path / "x.engine", SM89, backend="tensorrt-rtx")
    assert not list(tmp_path.iterdir())


H100 = GpuDevice(name="NVIDIA H100 80GB HBM3", architecture="sm90", driver=13000)


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(
    ("architecture", "device", "reason"),
    [
        (
            "sm90",
            None,
            "this GPU is sm90 (NVIDIA H100 80GB HBM3), for which tensorrt-rtx has no kernels; TensorRT has, with "
            "--target tensorrt",
        ),
        ("sm75", None, "this GPU is sm75 (NVIDIA H100 80GB HBM3); build for it with --gpu-arch sm75"),
        ("sm89", "1", "this GPU is sm90 (NVIDIA H100 80GB HBM3), for which"),
    ],
)
def test_an_engine_for_another_gpu_is_not_run_and_says_why(
    digits_export: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    architecture: str,
    device: str | None,
    reason: str,
) -> None:
    gpus = (replace(H100, architecture=architecture), replace(H100, index=1))
    monkeypatch.setattr(dependencies, "list_gpus", lambda: gpus)
    chosen: list[GpuDevice | None] = []
    monkeypatch.setattr(engine, "use_gpu", chosen.append)
    path = tmp_path / "x.engine"
    arguments = ["build-engine", str(digits_export.path), "--gpu-arch", "sm89", "-o", str(path)]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, *(["--device", device] if device else [])])
    assert stop.value.code == 0
    assert chosen == [gpus[1] if device else None]
    said = " ".join(capsys.readouterr().err.split())
    assert f"built ahead of time by tensorrt-rtx for sm89; not run here: {reason}" in said
    assert read_manifest(path).ran_here is False


@pytest.mark.parametrize("chosen", [None, replace(H100, name="NVIDIA L4", architecture="sm89", index=1)])
def test_the_manifest_names_the_gpu_that_it_was_built_on(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: GpuDevice | None
) -> None:
    graph = prepare(None)
    built = Engine(plan=b"plan", kernels=(), memory=(), timing_cache=None)
    adapter = SimpleNamespace(version="10.16.1", build=lambda *_, **__: built, architectures=tuple)
    monkeypatch.setattr(TensorRT, "load", lambda _: adapter)
    monkeypatch.setattr(engine, "find_gpu", lambda: H100)
    monkeypatch.setattr(engine, "use_gpu", lambda _: None)
    result = build_prepared(graph, tmp_path / "x.engine", BuildOptions(), backend="tensorrt", gpu=chosen)
    assert result.not_run == "tensorrt not installed, needed to run tensorrt engines"
    manifest = read_manifest(result.path)
    gpu = chosen or H100
    assert (manifest.gpu, manifest.architectures) == (gpu.name, (gpu.architecture,))


@pytest.mark.usefixtures("built_once")
class TestWhereTheEngineRuns:
    """On a fake GPU: ONNX Runtime runs the graph that the engine was built from."""

    @pytest.fixture
    def prepared(self, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> Prepared:
        monkeypatch.setattr(engine, "check_machine", lambda path, manifest, gpu: None)
        return prepare("fp16")

    def test_it_is_compared_with_its_source(
        self, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        where: list[object] = []

        def load(plan: bytes, path: Path, manifest: EngineManifest, gpu: GpuDevice | None) -> OnnxRuntimeRunner:
            where.append(gpu)
            return OnnxRuntimeRunner(prepared.graph)

        monkeypatch.setattr(TensorRTRunner, "load", load)
        monkeypatch.setattr(engine, "use_gpu", where.append)
        result = build_prepared(prepared, tmp_path / "x.engine", SM89, backend="tensorrt-rtx", gpu=H100)
        assert where == [H100, H100]
        manifest = EngineManifest.from_json(result.manifest_path.read_text(), where=result.manifest_path)
        assert manifest.ran_here is True
        assert manifest.engine_parity is not None
        assert manifest.engine_parity["passed"] is True
        assert manifest.engine_parity["artifact_sha256"] == sha256_of(result.path)

    def test_one_that_computes_something_else_is_kept_under_a_failed_name(
        self, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with OnnxRuntimeRunner(prepared.graph) as half:
            wrong = FakeRunner(lambda batch: -half.infer(batch), prepared.graph.metadata)
            monkeypatch.setattr(TensorRTRunner, "load", lambda *_: wrong)
            with pytest.raises(CheckError, match=r"parity failed on this GPU: cosine.*x\.engine\.failed"):
                build_prepared(prepared, tmp_path / "x.engine", SM89, backend="tensorrt-rtx")
        assert {path.name for path in tmp_path.iterdir()} == {"x.engine.failed", "x.engine.failed.json"}
        manifest = read_manifest(tmp_path / "x.engine.failed")
        assert manifest.ran_here is True
        assert manifest.engine_parity is not None
        assert manifest.engine_parity["passed"] is False

    @pytest.mark.parametrize("error", [OSError("libcudart.so.12: cannot open"), ArtifactError("it does not load")])
    def test_one_that_cannot_be_run_is_not_lost(
        self, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
    ) -> None:
        there = []

        def load(plan: bytes, path: Path, manifest: EngineManifest, gpu: GpuDevice | None) -> None:
            assert read_manifest(tmp_path / "x.engine.untried") == manifest
            assert (tmp_path / "x.engine.untried").read_bytes() == plan
            there.append(plan)
            raise error

        (tmp_path / "x.engine").write_bytes(b"an older one")
        monkeypatch.setattr(TensorRTRunner, "load", load)
        with pytest.raises(BuildError, match=r"could not be run on this GPU: .*(cannot open|load) · .*engine\.failed"):
            build_prepared(prepared, tmp_path / "x.engine", SM89, backend="tensorrt-rtx")
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"x.engine", "x.engine.failed", "x.engine.failed.json"}
        assert (tmp_path / "x.engine").read_bytes() == b"an older one"
        assert [(tmp_path / "x.engine.failed").read_bytes()] == there
        assert read_manifest(tmp_path / "x.engine.failed").ran_here is False

    def test_one_whose_try_is_interrupted_is_kept(
        self,
        prepared: Prepared,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def load(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(TensorRTRunner, "load", load)
        with pytest.raises(KeyboardInterrupt):
            build_prepared(prepared, tmp_path / "x.engine", SM89, backend="tensorrt-rtx")
        assert {path.name for path in tmp_path.iterdir()} == {"x.engine.untried", "x.engine.untried.json"}
        assert "it is kept as" in caplog.text


class TestTf32:
    """Products with 10 binary digits: only on request, and by gates of their own."""

    def test_it_is_for_fp32(self, exported: Exported, tmp_path: Path) -> None:
        prepared = prepare_graph(exported("fp16").graph, None)
        with pytest.raises(UsageError, match="TF32 is for fp32 engines; this one is fp16 · --tf32"):
            build_prepared(prepared, tmp_path / "x.engine", replace(SM89, tf32=True), backend="tensorrt-rtx")

    @pytest.mark.usefixtures("built_once")
    def test_its_manifest_says_so(self, prepare: Prepare, tmp_path: Path) -> None:
        prepared = prepare(None)
        for tf32, arithmetic in ((True, "tf32"), (False, "fp32")):
            path = tmp_path / f"{arithmetic}.engine"
            build_prepared(prepared, path, replace(SM89, tf32=tf32), backend="tensorrt-rtx")
            assert read_manifest(path).arithmetic == arithmetic

    def test_its_gates_are_its_own(self, digits_export: Export, tmp_path: Path) -> None:
        """Noise of TF32's size fails the gates of fp32, and passes those of TF32."""
        with OnnxRuntimeRunner(digits_export.graph) as reference:
            rng = np.random.default_rng(0)

            def noisy(batch: FloatArray) -> FloatArray:
                logits = reference.infer(batch)
                logits += np.float32(1e-3) * logits.std() * rng.standard_normal(logits.shape, np.float32)
                return logits

            candidate = FakeRunner(noisy, digits_export.graph.metadata)
            assert not prove(reference, candidate, bundled_images()).passed
            candidate.arithmetic = "tf32"
            report = prove(reference, candidate, bundled_images())
        assert report.passed, report.failures
        assert report.precision == "tf32"


def engine_of(source: Path, folder: Path, precision: str = "fp32", **changes: Any) -> Path:
    """An engine in name, with the facts that a build from `source` would write; the file is copied beside it."""
    path = folder / "x.engine"
    path.write_bytes(b"an engine")
    beside = folder / "source.onnx"
    shutil.copy(source, beside)
    metadata = Graph.read(beside).metadata
    values: dict[str, Any] = {
        "engine_sha256": sha256_of(path),
        "metadata": replace(metadata, precision=precision),
        "onnx_file": beside.name,
        "onnx_sha256": sha256_of(beside),
        "backend": "tensorrt-rtx",
        "version": TensorRT.load("tensorrt-rtx").version,
        "profile": SM89.profile,
        "architectures": SM89.architectures,
        "ran_here": False,
    }
    engine_manifest_path(path).write_text(EngineManifest(**values | changes).to_json())
    return path


class Workshop:
    """A GPU where a build gives the graph itself as the plan, once `change` was made to it, and ONNX Runtime runs that.

    `build` is the real build.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bench: CudaBench) -> None:
        self.bench = bench
        self.change: Callable[[onnx.ModelProto], None] = lambda model: None
        self.options: list[BuildOptions] = []
        self.build = TensorRT.build

        def stand_in(tensorrt: TensorRT, graph: bytes, options: BuildOptions) -> Engine:
            self.options.append(options)
            model = onnx.ModelProto.FromString(graph)
            self.change(model)
            return Engine(plan=model.SerializeToString(), kernels=(), memory=(), timing_cache=None)

        monkeypatch.setattr(TensorRT, "build", stand_in)

    @property
    def sizes(self) -> list[int]:
        """Of the batches that ran."""
        return [work.amount for work in self.bench.trace if work.name == "execute"]


def perturb(name: str) -> Callable[[onnx.ModelProto], None]:
    """Add noise to a weight, of a tenth of its deviation."""

    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
        values = numpy_helper.to_array(tensor)
        noise = np.random.default_rng(0).standard_normal(values.shape) * 0.1 * values.std()
        tensor.CopyFrom(numpy_helper.from_array((values + noise).astype(values.dtype), name))

    return change


class TestLayerByLayer:
    @pytest.fixture
    def workshop(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
        with gpu() as bench:
            yield Workshop(monkeypatch, bench)

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_its_blocks_are_compared_with_those_of_its_onnx_file(
        self, digits_export: Export, exported: Exported, tmp_path: Path, workshop: Workshop, precision: str
    ) -> None:
        report = verify_layers(engine_of(digits_export.path, tmp_path, precision))
        expected = verify_layers(exported(precision).path, reference=digits_export.path)
        assert report.first_over is None
        assert report.precision == precision
        assert report.candidate == "tensorrt-rtx x.engine (rebuilt with trace points)"
        assert report.reference == "onnxruntime (CPU) source.onnx"
        assert [point.name for point in report.points] == [point.name for point in expected.points]
        errors = [point.error for point in report.points]
        assert errors == pytest.approx([point.error for point in expected.points], rel=0.05, abs=1e-6)
        assert (min(errors) > 1e-5) is (precision == "fp16")

    @pytest.mark.parametrize(
        ("precision", "weight", "where"),
        [
            ("fp32", "blocks.3.hidden.weight", "stage 2 block 2"),
            ("fp32", "blocks.2.mixing.width", "stage 2 block 1 token mixing"),
            ("fp16", "embeddings.2.weight_fp16", "stage 3 embedding"),
        ],
    )
    def test_the_block_of_a_perturbed_weight_is_named(
        self, digits_export: Export, tmp_path: Path, workshop: Workshop, precision: str, weight: str, where: str
    ) -> None:
        workshop.change = perturb(weight)
        over = verify_layers(engine_of(digits_export.path, tmp_path, precision)).first_over
        assert over is not None
        assert over.name == where

    def test_it_is_built_as_its_json_says(self, digits_export: Export, tmp_path: Path, workshop: Workshop) -> None:
        options = BuildOptions(
            profile=BatchProfile(min=3, opt=4, max=5),
            architectures=("sm80", "sm89"),
            workspace_gib=0.5,
            optimization_level=2,
            timing_cache=b"cache",
            version_compatible=True,
        )
        path = engine_of(
            digits_export.path,
            tmp_path,
            profile=options.profile,
            architectures=options.architectures,
            options=engine._other_options(options),
        )
        images = bundled_images()[:7]
        assert verify_layers(path, images=images).images == 7
        assert workshop.options == [replace(options, timing_cache=None)]
        assert workshop.sizes == [5, 3]

    def test_tensorrt_builds_for_the_gpu_at_hand(
        self, digits_export: Export, tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TensorRT.load("tensorrt-rtx"), "ahead_of_time", False)
        verify_layers(engine_of(digits_export.path, tmp_path), images=bundled_images()[:1])
        assert workshop.options[0].architectures == ()

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_an_engine_of_pixels(
        self, digits_export: Export, tmp_path: Path, workshop: Workshop, precision: str
    ) -> None:
        made = replace(digits_export.graph.metadata, precision=precision, input="uint8")
        report = verify_layers(engine_of(digits_export.path, tmp_path, metadata=made))
        expected = verify_layers(engine_of(digits_export.path, tmp_path, precision))
        assert report.first_over is None
        errors = [point.error for point in report.points]
        assert errors == pytest.approx([point.error for point in expected.points], rel=0.1, abs=1e-6)
        assert workshop.sizes == [8, 8, 2] * 2

    def test_an_int8_engine_of_pixels(
        self, digits_export: Export, prepare: Prepare, tmp_path: Path, workshop: Workshop
    ) -> None:
        graph = prepare("int8").graph
        report = verify_layers(engine_of(digits_export.path, tmp_path, metadata=graph.metadata))
        assert graph.metadata.input == "uint8"
        assert report.first_over is None

    def test_an_int8_file(self, exported: Exported, tmp_path: Path, workshop: Workshop) -> None:
        report = verify_layers(engine_of(exported("int8").path, tmp_path, "int8"))
        assert [point.error for point in report.points] == pytest.approx([0] * 15, abs=1e-5)

    def test_an_engine_that_was_quantized_while_it_was_built(
        self, digits_export: Export, prepare: Prepare, digits: Checkpoint, tmp_path: Path, workshop: Workshop
    ) -> None:
        graph = prepare("int8")
        path = engine_of(digits_export.path, tmp_path, metadata=graph.graph.metadata)
        report = verify_layers(path)
        assert report.first_over is None
        assert report.points[-1].error > 1e-3
        made = graph.graph.metadata
        other = replace(made, quantization={**made.quantization, "layers_in_half": ["x"]})
        path = engine_of(digits_export.path, tmp_path, metadata=other)
        message = r"was quantized during the build, and its manifest does not state the ranges · .*x\.engine · write"
        with pytest.raises(ArtifactError, match=message):
            verify_layers(path)

    def test_one_of_another_network_quantized_while_it_was_built(
        self, micro_pth: Path, tmp_path: Path, workshop: Workshop
    ) -> None:
        micro = load_checkpoint(micro_pth)
        source = export_checkpoint(micro, describe(micro), tmp_path / "micro.onnx").path
        with pytest.raises(ArtifactError, match="its manifest does not state the ranges"):
            verify_layers(engine_of(source, tmp_path, "int8"))
        assert not workshop.options

    def test_the_onnx_file_is_missing_or_another(
        self, digits_export: Export, tmp_path: Path, workshop: Workshop
    ) -> None:
        path = engine_of(digits_export.path, tmp_path)
        (tmp_path / "source.onnx").unlink()
        fix = r"give the ONNX file that x\.engine was built from with --reference, or build the engine again"
        with pytest.raises(ArtifactError, match=rf"^no such file · .*source\.onnx · {fix}$"):
            verify_layers(path)
        assert verify_layers(path, reference=digits_export.path).first_over is None
        model = onnx.load(digits_export.path)
        perturb("blocks.3.hidden.weight")(model)
        onnx.save(model, tmp_path / "source.onnx")
        other = rf"^is not the source\.onnx that x\.engine was built from · .*source\.onnx · {fix}$"
        with pytest.raises(ArtifactError, match=other):
            verify_layers(path)
        with pytest.raises(ArtifactError, match=r"is not the source\.onnx that x\.engine was built from"):
            verify_layers(path, reference=BUNDLED_CHECKPOINT)
        assert len(workshop.options) == 1

    @pytest.mark.parametrize("name", ["", "..", "elsewhere/source.onnx", "so\0urce.onnx"])
    def test_a_json_cannot_name_a_file_elsewhere(
        self, digits_export: Export, tmp_path: Path, workshop: Workshop, name: str
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        shutil.copy(digits_export.path, tmp_path / "elsewhere" / "source.onnx")
        path = engine_of(digits_export.path, tmp_path, onnx_file=name)
        (tmp_path / "source.onnx").unlink()
        with pytest.raises(ArtifactError, match=r"is a directory|no such file|cannot read it"):
            verify_layers(path)

    def test_an_onnx_file_that_cannot_be_read_is_one_clear_line(
        self, digits_export: Export, tmp_path: Path, workshop: Workshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened = Path.open

        def refused(path: Path, *arguments: Any, **options: Any) -> IO[Any]:
            if path.name == "source.onnx":
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return cast(IO[Any], opened(path, *arguments, **options))

        path = engine_of(digits_export.path, tmp_path)
        monkeypatch.setattr(Path, "open", refused)  # a real one would not stop root
        with pytest.raises(ArtifactError, match=r"cannot read it: Permission denied · .*source\.onnx"):
            verify_layers(path)

    def test_options_of_a_later_version_are_refused(
        self, digits_export: Export, tmp_path: Path, workshop: Workshop
    ) -> None:
        path = engine_of(digits_export.path, tmp_path, options={"sparse": True})
        with pytest.raises(ArtifactError, match=r"options unknown to this version: sparse · .*x\.engine"):
            verify_layers(path)

    def test_without_a_gpu_it_is_one_clear_line(
        self, digits_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(runners, "find_gpu", lambda: None)
        path = engine_of(digits_export.path, tmp_path)
        (tmp_path / "source.onnx").unlink()
        with pytest.raises(SystemExit) as stop:
            main(["verify", str(path), "--layers"])
        assert stop.value.code == 6
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: needs an NVIDIA GPU and driver; none was found · ")

    def test_on_the_command_line(
        self, digits_export: Export, tmp_path: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = str(engine_of(digits_export.path, tmp_path))
        with pytest.raises(SystemExit) as stop:
            main(["verify", path, "--layers", "--quiet"])
        assert stop.value.code == 0
        workshop.change = perturb("blocks.3.hidden.weight")
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["verify", path, "--layers", "--reference", str(digits_export.path), "--quiet"])
        assert stop.value.code == 3
        assert "at stage 2 block 2: error" in capsys.readouterr().err

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
    def test_tensorrt_rtx_builds_the_second_engine(
        self,
        exported: Exported,
        tmp_path: Path,
        workshop: Workshop,
        monkeypatch: pytest.MonkeyPatch,
        precision: str,
    ) -> None:
        source = exported("int8" if precision == "int8" else "fp32").path
        engines: list[Engine] = []

        def build_and_stop(tensorrt: TensorRT, graph: bytes, options: BuildOptions) -> Engine:
            engines.append(workshop.build(tensorrt, graph, options))
            raise BuildError("built")

        monkeypatch.setattr(TensorRT, "build", build_and_stop)
        with pytest.raises(BuildError, match="built"):
            verify_layers(engine_of(source, tmp_path, precision))
        (built,) = engines
        assert len(built.plan) > 100_000
        assert summarize(built.kernels, batch=4).share(precision)
        written = [tensor.shape for k in built.kernels for tensor in k.outputs if tensor.element == "Float"]
        for shape, points in {(4, 40, 8, 8): 5, (4, 80, 4, 4): 7, (4, 160, 2, 2): 3}.items():
            assert written.count(shape) == points or precision == "fp32"  # whose other kernels write Float too


def test_an_interrupted_build_leaves_the_old_engine(prepare: Prepare, tmp_path: Path) -> None:
    target = tmp_path / "x.engine"
    target.write_text("old")

    def interrupt(phase: str, done: int, total: int) -> None:
        import signal

        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_prepared(
            prepare(None),
            target,
            SM89,
            backend="tensorrt-rtx",
            progress=interrupt,
        )
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.engine"]


def test_a_half_graph_cannot_be_built_in_another_precision(prepare: Prepare) -> None:
    half = prepare("fp16").graph
    assert prepare_graph(half, "fp16").parity is None
    for other in ("bf16", "int8"):
        with pytest.raises(UsageError, match=rf"the graph is fp16 .* {other} was requested"):
            prepare_graph(half, other)


def test_a_graph_that_half_precision_ruins_is_refused(digits_export: Export, tmp_path: Path) -> None:
    # A constant added to every token and taken off again by the head: nothing in fp32, but bf16 loses the rest.
    model = onnx.load(digits_export.path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    shift = np.float32(4096)
    for name, change in (
        ("blocks.5.out.bias", np.full(160, shift)),
        ("head.bias", -shift * numpy_helper.to_array(weights["head.weight"]).sum(axis=1)),
    ):
        changed = (numpy_helper.to_array(weights[name]) + change).astype(np.float32)
        weights[name].CopyFrom(numpy_helper.from_array(changed, name))
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(CheckError, match="parity failed in bf16: cosine"):
        prepare_graph(Graph.read(tmp_path / "x.onnx"), "bf16")


def test_a_graph_of_another_tool_is_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="smlp-deploy did not write it"):
        prepare_graph(Graph.read(tmp_path / "x.onnx"), "fp16")


def test_precision_is_checked_by_kernels() -> None:
    summary = KernelSummary(batch=1, count=2, by_kind={}, compute_by_precision={"Float": 2}, bytes_per_image=0)
    check_precision(summary, "fp32")
    with pytest.raises(BuildError, match="no kernel computes in bf16"):
        check_precision(summary, "bf16")


@pytest.mark.parametrize(
    ("count", "compute", "words"),
    [
        (3, {"Float": 2, "unknown": 1}, "2 in Float, 1 unknown"),
        (1, {"unknown": 1}, "1 unknown"),
        (0, {}, "unknown"),
    ],
)
def test_an_engine_of_unknown_precision_is_kept_with_a_warning(
    count: int, compute: dict[str, int], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_precision(
        KernelSummary(batch=1, count=count, by_kind={}, compute_by_precision=compute, bytes_per_image=0), "bf16"
    )
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    message = "TensorRT does not say whether the engine computes in bf16 (convolutions and matrix products: {})"
    assert record.getMessage() == message.format(words)


@pytest.mark.parametrize("compute", [{"Half": 1, "unknown": 5}, {"Half": 1, "Float": 5}])
def test_one_kernel_in_the_requested_precision_is_enough(
    compute: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    check_precision(
        KernelSummary(batch=1, count=6, by_kind={}, compute_by_precision=compute, bytes_per_image=0), "fp16"
    )
    assert not caplog.records


def test_an_engine_of_known_kernels_without_any_that_computes_is_refused() -> None:
    with pytest.raises(BuildError, match=r"no kernel computes in fp16: \{\}"):
        check_precision(
            KernelSummary(batch=1, count=2, by_kind={"kgen": 2}, compute_by_precision={}, bytes_per_image=0), "fp16"
        )


def test_a_manifest_written_before_bytes_could_be_unknown_still_loads(digits_export: Export, tmp_path: Path) -> None:
    before = {"batch": 4, "count": 2, "by_kind": {"gemm": 2}, "compute_by_precision": {"Half": 2}, "bytes_per_image": 9}
    path = engine_of(digits_export.path, tmp_path, kernels=before)
    assert read_manifest(path).kernels == before
