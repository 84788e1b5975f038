from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from smlp_deploy import dependencies
from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.dependencies import find_gpu
from smlp_deploy.errors import ArtifactError, ConfigError, GpuError, GpuMemoryError, MissingDependencyError, UsageError
from smlp_deploy.files import sha256_of
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import BatchProfile, EngineManifest
from smlp_deploy.runners import open_runner, tensorrt
from smlp_deploy.runners.cuda import Cuda
from smlp_deploy.runners.tensorrt import (
    TensorRTRunner,
    TracingTensorRTRunner,
    check_machine,
    read_manifest,
    runtime_cache_path,
    system,
)
from tests.support.cuda_gpu import CudaFault
from tests.support.cuda_names import cudaError_t
from tests.support.cuda_runtime import CudaBench
from tests.support.fakes import metadata
from tests.support.gpu import L4, gpu
from tests.support.graphs import smallest_classifier
from tests.support.tensorrt_binding import VERSIONS


def card_of(path: Path, **changes: Any) -> EngineManifest:
    values: dict[str, Any] = {
        "engine_sha256": sha256_of(path),
        "metadata": metadata(),
        "onnx_file": "x.onnx",
        "onnx_sha256": "0" * 64,
        "backend": "tensorrt-rtx",
        "version": "1.7.1.116",
        "profile": BatchProfile(min=2, opt=3, max=4),
        "architectures": ("sm89",),
        "ran_here": False,
    }
    return EngineManifest(**values | changes)


def engine_in(folder: Path, model: onnx.ModelProto | None = None, **changes: Any) -> Path:
    path = folder / "x.engine"
    path.write_bytes((model or smallest_classifier()).SerializeToString())
    engine_manifest_path(path).write_text(card_of(path, **changes).to_json())
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return engine_in(tmp_path)


def load(engine: Path, version: str = "tensorrt_rtx-1.7") -> TensorRTRunner:
    backend = "tensorrt-rtx" if version.startswith("tensorrt_rtx") else "tensorrt"
    return TensorRTRunner.load(engine.read_bytes(), engine, replace(read_manifest(engine), backend=backend))


Schedule = Literal["late", "eager"]


def BINDINGS(test: Any) -> Any:  # noqa: N802
    return pytest.mark.parametrize("version", VERSIONS)(pytest.mark.parametrize("schedule", ["late", "eager"])(test))


def batch_of(size: int) -> FloatArray:
    return np.random.default_rng(size).standard_normal((size, 3, 8, 8), dtype=np.float32)


def sums(batch: FloatArray) -> FloatArray:
    """The logits of `smallest_classifier`."""
    return np.repeat(batch.reshape(len(batch), -1).sum(axis=1)[:, None], 4, axis=1)


def executed(bench: CudaBench) -> list[int]:
    """The sizes of the batches that ran."""
    return [work.amount for work in bench.trace if work.name == "execute"]


@BINDINGS
def test_batches_fit_the_profile_and_logits_are_copies(engine: Path, version: str, schedule: Schedule) -> None:
    with gpu(version, schedule=schedule) as bench:
        with load(engine, version) as runner:
            first = runner.infer(batch_of(9))
            runner.infer(batch_of(9) * 2)
            assert runner.metadata == metadata()
        np.testing.assert_allclose(first, sums(batch_of(9)), rtol=1e-4, atol=1e-4)
        assert executed(bench) == [4, 4, 2] * 2


@BINDINGS
def test_graphs_are_captured_and_only_then_named(engine: Path, version: str, schedule: Schedule) -> None:
    with gpu(version, schedule=schedule) as bench:
        with load(engine, version) as runner:
            names = []
            for number in range(4):
                batch = batch_of(4) + np.float32(number)
                np.testing.assert_allclose(runner.infer(batch), sums(batch), rtol=1e-4, atol=1e-3)
                names.append(runner.name)
            allocations = bench.allocations
            runner.infer(batch_of(4))
            assert bench.allocations == allocations
        backend = "tensorrt-rtx" if version.startswith("tensorrt_rtx") else "tensorrt"
        assert names == [f"{backend} x.engine"] + [f"{backend} (CUDA graphs) x.engine"] * 3
        assert bench.calls["cudaGraphInstantiate"] == 1
        assert [work.in_graph for work in bench.trace if work.name == "execute"] == [False] + [True] * 4


class TestAnotherGpu:
    """The second of two; a call that works on the first is a fault of the bench."""

    SECOND = replace(L4, index=1)

    def load(self, engine: Path, version: str) -> TensorRTRunner:
        backend = "tensorrt-rtx" if version.startswith("tensorrt_rtx") else "tensorrt"
        manifest = replace(read_manifest(engine), backend=backend)
        return TensorRTRunner.load(engine.read_bytes(), engine, manifest, self.SECOND)

    @BINDINGS
    def test_all_is_on_it_whichever_thread_asks(self, engine: Path, version: str, schedule: Schedule) -> None:
        with gpu(version, schedule=schedule, devices=2) as bench:
            with self.load(engine, version) as runner:
                for _ in range(3):  # then as a graph
                    with ThreadPoolExecutor(max_workers=1) as pool:
                        logits = pool.submit(runner.infer, batch_of(6)).result()
                    np.testing.assert_allclose(logits, sums(batch_of(6)), rtol=1e-4, atol=1e-4)
                bench.runtime.cudaSetDevice(0)  # as another library may
                np.testing.assert_allclose(runner.infer(batch_of(2)), sums(batch_of(2)), rtol=1e-4, atol=1e-4)
                bench.runtime.cudaSetDevice(0)
                assert len(runner.gpu_seconds(batch_of(2), runs=2)) == 2
                bench.runtime.cudaSetDevice(0)
            assert {memory.device for memory in bench._memory if memory.side == "device"} == {1}

    def test_a_runner_that_does_not_choose_it_is_found(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Cuda, "use", lambda self: None)

        def program() -> None:
            with gpu(devices=2) as bench:
                bench.runtime.cudaSetDevice(1)
                with self.load(engine, "tensorrt_rtx-1.7") as runner, ThreadPoolExecutor(max_workers=1) as pool:
                    runner.infer(batch_of(4))
                    with suppress(ArtifactError, GpuError):
                        pool.submit(runner.infer, batch_of(4)).result()

        with pytest.raises(CudaFault, match="wrong device"):
            program()

    def test_it_is_opened_by_its_uuid(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        uuids = ("3f2a0000-0000-0000-0000-000000000001", "3f2b0000-0000-0000-0000-000000000002")
        gpus = tuple(replace(L4, index=i, uuid=f"GPU-{uuid}") for i, uuid in enumerate(uuids))
        monkeypatch.setattr(dependencies, "list_gpus", lambda: gpus)
        with gpu(devices=2) as bench:
            with open_runner(engine, device="GPU-3f2b") as runner:
                runner.infer(batch_of(4))
            assert bench.device == 1
            with pytest.raises(
                UsageError, match=r"an engine runs only on a GPU · .*x\.engine · leave out --device cpu"
            ):
                open_runner(engine, device="cpu")

    def test_a_gpu_it_was_not_built_for(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: L4)
        with pytest.raises(ArtifactError, match=r"was built for sm89, this GPU is sm75 \(NVIDIA T4\)"):
            TensorRTRunner.open(engine, gpu=replace(L4, name="NVIDIA T4", architecture="sm75"))


def test_without_a_capture_it_runs_and_says_nothing_of_graphs(engine: Path) -> None:
    with gpu() as bench:
        bench.fail("cudaGraphInstantiate", cudaError_t.cudaErrorStreamCaptureUnsupported)
        with load(engine) as runner:
            for _ in range(3):
                np.testing.assert_allclose(runner.infer(batch_of(4)), sums(batch_of(4)), rtol=1e-4, atol=1e-4)
            assert runner.name == "tensorrt-rtx x.engine"
        assert bench.calls["cudaGraphInstantiate"] == 1


def test_many_batch_sizes_do_not_pile_up(tmp_path: Path) -> None:
    engine = engine_in(tmp_path, profile=BatchProfile(min=1, opt=4, max=12))
    with gpu() as bench, load(engine) as runner:
        for size in (*range(1, 13), *range(1, 13)):
            for _ in range(3):
                np.testing.assert_allclose(runner.infer(batch_of(size)), sums(batch_of(size)), rtol=1e-4, atol=1e-4)
        assert bench.calls["cudaGraphInstantiate"] == 24
        assert bench.calls["cudaGraphExecDestroy"] >= 20


def pixel_classifier() -> onnx.ModelProto:
    """`smallest_classifier` of pixels N, 8, 8, 3."""
    model = smallest_classifier()
    pixels = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 8, 8, 3])
    model.graph.input[0].CopyFrom(pixels)
    model.graph.node[0].input[0] = "values"
    model.graph.node.insert(0, helper.make_node("Cast", ["images"], ["values"], to=TensorProto.FLOAT))
    return model


@BINDINGS
def test_an_engine_takes_pixels(tmp_path: Path, version: str, schedule: Schedule) -> None:
    taken = replace(metadata(), input="uint8")
    engine = engine_in(tmp_path, pixel_classifier(), metadata=taken)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    with gpu(version, schedule=schedule) as bench:
        with load(engine, version) as runner:
            logits = runner.infer(pixels)
            assert runner.metadata.input == "uint8"
        np.testing.assert_array_equal(logits, sums(pixels.astype(np.float32)))
        assert executed(bench) == [4, 4, 2]
        uploads = [work.amount for work in bench.trace if work.name == "H2D"]
        assert uploads == [4 * 192, 4 * 192, 2 * 192]


def test_an_engine_whose_manifest_states_another_input_is_refused(tmp_path: Path) -> None:
    engine = engine_in(tmp_path, pixel_classifier())
    wrong = r"takes uint8 Nx8x8x3, but its manifest says float32 Nx3x8x8 · .*x\.engine · build the engine again"
    with gpu(), pytest.raises(ArtifactError, match=wrong):
        load(engine)
    engine = engine_in(tmp_path, metadata=replace(metadata(), input="uint8"))
    with gpu(), pytest.raises(ArtifactError, match="takes float32 Nx3x8x8, but its manifest says uint8 Nx8x8x3"):
        load(engine)
    engine = engine_in(tmp_path, metadata=metadata(image_size=16))
    with gpu(), pytest.raises(ArtifactError, match="takes float32 Nx3x8x8, but its manifest says float32 Nx3x16x16"):
        load(engine)


def test_traced_values_are_copies_in_the_order_of_the_points(tmp_path: Path) -> None:
    points = ("stage 1 embedding", "stage 1 block 1 token mixing", "stage 1 block 1")
    model = smallest_classifier()
    for number, point in enumerate(points):
        factor = numpy_helper.from_array(np.full((1, 1, 1, 1), number + 1, np.float32), f"factor {number}")
        model.graph.initializer.append(factor)
        model.graph.node.append(helper.make_node("Mul", ["images", factor.name], [point]))
        model.graph.output.append(helper.make_tensor_value_info(point, TensorProto.FLOAT, ["batch", 3, 8, 8]))
    engine = engine_in(tmp_path, model)
    with gpu() as bench:
        manifest = read_manifest(engine)
        with TracingTensorRTRunner.load(engine.read_bytes(), engine, manifest) as runner:
            first = runner.trace(batch_of(9))
            runner.trace(batch_of(9) * 2)
            assert runner.name == "tensorrt-rtx x.engine (rebuilt with trace points)"
        assert executed(bench) == [4, 4, 2] * 2
        assert bench.calls["cudaGraphInstantiate"] == 0
    assert list(first) == list(points)
    for number, values in enumerate(first.values()):
        np.testing.assert_array_equal(values, batch_of(9) * (number + 1))


class TestWhatFails:
    def test_an_illegal_access_ends_everything(self, engine: Path) -> None:
        with gpu() as bench, load(engine) as runner:
            runner.infer(batch_of(4))
            bench.break_device(cudaError_t.cudaErrorIllegalAddress)
            with pytest.raises(GpuError, match="an illegal memory access was encountered"):
                runner.infer(batch_of(4))

    def test_a_driver_that_is_too_old_is_one_line(self, engine: Path) -> None:
        with (
            gpu(fail="driver"),
            pytest.raises(GpuError, match=r"driver is missing or too old .* update the driver"),
        ):
            load(engine)
        with gpu() as bench:
            bench.break_device(cudaError_t.cudaErrorInsufficientDriver)
            with pytest.raises(GpuError, match="update the NVIDIA driver"):
                load(engine)

    def test_too_little_memory_is_one_line_and_leaks_nothing(self, engine: Path) -> None:
        for call in range(1, 8):
            with gpu() as bench:
                bench.fail("cudaMalloc", cudaError_t.cudaErrorMemoryAllocation, call=call)
                try:
                    load(engine).close()
                except GpuMemoryError as error:
                    assert "the GPU's memory is full" in str(error)  # noqa: PT017

    def test_an_engine_that_does_not_load_here(self, engine: Path) -> None:
        with gpu(fail="load"), pytest.raises(ArtifactError, match=r"cannot load it on this GPU.*built for sm89"):
            load(engine)

    def test_code_in_an_engine_is_allowed_only_if_it_was_built_so(self, tmp_path: Path) -> None:
        engine = engine_in(tmp_path, options={"version_compatible": True})
        with gpu(version_compatible=True), load(engine) as runner:
            assert len(runner.infer(batch_of(4))) == 4
        engine = engine_in(tmp_path)
        with gpu(version_compatible=True), pytest.raises(ArtifactError, match="cannot load it on this GPU"):
            load(engine)

    def test_log_lines_stay_out_of_the_records(self, engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with gpu(), load(engine) as runner:
            runner.infer(batch_of(4))
        assert capsys.readouterr().out == ""


def test_the_gpu_is_timed_between_two_events(engine: Path) -> None:
    with gpu() as bench, load(engine) as runner:
        assert runner.gpu_seconds(batch_of(4), runs=3) == pytest.approx([0.001] * 3, rel=0.1)
        assert runner.gpu_seconds(batch_of(5), runs=1) == []
        assert executed(bench) == [4] * 4


def test_the_next_batch_is_uploaded_while_one_is_computed(engine: Path) -> None:
    with gpu() as bench, load(engine) as runner:
        execution = runner._opened
        for number in range(6):
            execution.submit(batch_of(4) * np.float32(number))
            if number:
                found = execution.collect()["logits"].copy()
                np.testing.assert_allclose(found, sums(batch_of(4) * np.float32(number - 1)), rtol=1e-4, atol=1e-4)
        execution.collect()
        uploads = [work for work in bench.trace if work.name == "H2D"]
        runs = [work for work in bench.trace if work.name == "execute"]
        assert [run.overlaps(upload) for run, upload in zip(runs[2:-1], uploads[3:], strict=True)] == [True] * 3


def test_without_a_gpu_it_is_one_clear_line(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: None)
    with pytest.raises(GpuError, match=r"needs an NVIDIA GPU and driver.*x\.engine · use the ONNX file"):
        open_runner(engine)


def test_an_engine_that_the_json_is_not_about_is_never_loaded(engine: Path) -> None:
    engine.write_bytes(b"another engine")
    with pytest.raises(ArtifactError, match="does not match the sha256 in its manifest"):
        open_runner(engine)


def test_a_missing_or_damaged_json(engine: Path) -> None:
    manifest = engine_manifest_path(engine)
    manifest.write_text('{"schema": 2}')
    with pytest.raises(ConfigError, match="metadata is damaged"):
        read_manifest(engine)
    manifest.write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"is not UTF-8 text · .*x\.engine\.json"):
        read_manifest(engine)
    manifest.unlink()
    with pytest.raises(ArtifactError, match=r"no such file · .*x\.engine\.json · build the engine again"):
        read_manifest(engine)


def test_a_truncated_engine_is_never_loaded(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="does not match the sha256 in its manifest"):
        open_runner(engine)


def test_only_regular_files_of_sensible_size_are_read(engine: Path) -> None:
    manifest = engine_manifest_path(engine)
    with manifest.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match=r"is larger than 4194304 bytes · .*x\.engine\.json"):
        read_manifest(engine)
    engine.unlink()
    os.mkfifo(engine)
    with pytest.raises(ArtifactError, match=r"is not a regular file · .*x\.engine "):
        read_manifest(engine)


def test_an_engine_that_cannot_be_read_is_one_clear_line(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(tensorrt, "sha256_of", refused)  # a real one would not stop root
    with pytest.raises(ArtifactError, match=r"cannot read it: Permission denied · .*x\.engine"):
        read_manifest(engine)


class TestTheMachine:
    @pytest.fixture(autouse=True)
    def a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: L4)

    def test_another_flavour_names_the_extra(self, engine: Path) -> None:
        with pytest.raises(MissingDependencyError, match=r"tensorrt not installed.*smlp-deploy\[gpu\]"):
            check_machine(engine, card_of(engine, backend="tensorrt", version="11.4"))

    def test_another_major_version_is_refused(self, engine: Path) -> None:
        with pytest.raises(MissingDependencyError, match=r"built by tensorrt-rtx 2\.0, but 1\..* is installed"):
            check_machine(engine, card_of(engine, version="2.0"))

    def test_the_same_release_passes(self, engine: Path) -> None:
        check_machine(engine, card_of(engine))

    @pytest.mark.parametrize("version", ["1.7.1.115", "1.7.0.116", "1.6.1.116"])
    def test_another_release_of_the_same_major_version_is_refused(self, engine: Path, version: str) -> None:
        with pytest.raises(MissingDependencyError, match=r"built by .*, but 1\.7\.1\.116 is installed"):
            check_machine(engine, card_of(engine, version=version))

    def test_a_version_compatible_engine_loads_in_later_releases(self, engine: Path) -> None:
        check_machine(engine, card_of(engine, version="1.6", options={"version_compatible": True}))
        with pytest.raises(MissingDependencyError, match=r"built by tensorrt-rtx 2\.0"):
            check_machine(engine, card_of(engine, version="2.0", options={"version_compatible": True}))

    def test_an_engine_of_another_system_is_refused(self, engine: Path) -> None:
        with pytest.raises(ArtifactError, match=r"was built on Windows AMD64, this is Linux .* build it again"):
            check_machine(engine, card_of(engine, system="Windows AMD64"))

    def test_another_gpu_of_the_same_architecture_is_a_warning(
        self, engine: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        check_machine(engine, card_of(engine, gpu="NVIDIA L4", system=system()))
        assert not caplog.text
        check_machine(engine, card_of(engine, gpu="NVIDIA GeForce RTX 4090"))
        assert "was built on NVIDIA GeForce RTX 4090, this GPU is NVIDIA L4" in caplog.text

    def test_an_engine_for_other_gpus_says_which(self, engine: Path) -> None:
        with pytest.raises(ArtifactError, match=r"built for sm80, sm86, this GPU is sm89 \(NVIDIA L4\)"):
            check_machine(engine, card_of(engine, architectures=("sm80", "sm86")))

    def test_a_hardware_compatible_engine_is_for_ampere_and_later(
        self, engine: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        manifest = card_of(engine, architectures=("sm80",), options={"hardware_compatible": True})
        check_machine(engine, manifest)
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: replace(L4, architecture="sm75"))
        with pytest.raises(ArtifactError, match="built for sm80, this GPU is sm75"):
            check_machine(engine, manifest)

    def test_an_engine_that_is_replaced_while_it_is_opened_is_not_loaded(
        self, engine: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plans: list[bytes] = []
        content = engine.read_bytes()

        def swap(path: Path, *_: object) -> None:
            engine.write_bytes(b"an untrusted engine")

        def execution(plan: bytes, *_: object, **__: object) -> None:
            plans.append(plan)

        monkeypatch.setattr(tensorrt, "check_machine", swap)
        monkeypatch.setattr(tensorrt, "_execution", execution)
        TensorRTRunner.open(engine)
        assert plans == [content]
        with pytest.raises(ArtifactError, match="does not match the sha256 in its manifest"):
            TensorRTRunner.open(engine)

    @pytest.mark.skipif(find_gpu() is not None, reason="with a driver the message is another")
    def test_an_engine_that_does_not_load_is_one_clear_line(self, engine: Path) -> None:
        with pytest.raises(GpuError, match=r"driver version is insufficient.* · update the NVIDIA driver"):
            open_runner(engine)

    @pytest.mark.parametrize("runner", [TensorRTRunner, TracingTensorRTRunner])
    def test_one_that_tensorrt_refuses_is_one_clear_line(self, engine: Path, runner: type[TensorRTRunner]) -> None:
        with (
            gpu(fail="load"),
            pytest.raises(ArtifactError, match=r"cannot load it on this GPU · .*x\.engine · it was built for sm89"),
        ):
            runner.load(engine.read_bytes(), engine, read_manifest(engine))

    def test_tensorrt_rtx_on_a_gpu_that_it_has_no_kernels_for(
        self, engine: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        with (
            gpu(architecture="sm90"),
            pytest.raises(ArtifactError, match=r"tensorrt-rtx 1\.7\S* cannot load it on this GPU"),
        ):
            load(engine)
        assert "does not support this compute capability" in caplog.text


class TestCompiledKernels:
    """TensorRT-RTX compiles kernels where they run."""

    @pytest.fixture
    def cache(self, engine: Path, tmp_path: Path) -> Path:
        """The file of the engine, in the directory `tmp_path / "cache"`."""
        with gpu(cache=tmp_path / "cache"):
            return runtime_cache_path(card_of(engine))

    @pytest.mark.parametrize("version", VERSIONS)
    def test_they_are_kept(self, version: str, engine: Path, cache: Path) -> None:
        with gpu(version, cache=cache.parents[1]), load(engine, version) as runner:
            runner.infer(batch_of(4))
        assert cache.exists() == version.startswith("tensorrt_rtx")
        if cache.exists():
            assert cache.read_bytes() == b"kernels"

    def test_those_of_an_engine_that_is_used_once_are_not(self, engine: Path, cache: Path) -> None:
        with (
            gpu(cache=cache.parents[1]),
            TracingTensorRTRunner.load(engine.read_bytes(), engine, read_manifest(engine)) as runner,
        ):
            runner.infer(batch_of(4))
        assert not cache.exists()

    def test_those_of_another_environment_are_replaced(self, engine: Path, cache: Path) -> None:
        cache.parent.mkdir(parents=True)
        cache.write_bytes(b"of an older driver")
        with gpu(fail="deserialize", cache=cache.parents[1]), load(engine) as runner:
            runner.infer(batch_of(4))
        assert cache.read_bytes() == b"kernels"

    def test_a_cache_that_cannot_be_written_is_a_warning(
        self, engine: Path, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache.parents[1].write_text("in the way")
        with gpu(cache=cache.parents[1]), load(engine) as runner:
            runner.infer(batch_of(4))
        assert "compiled kernels were not cached: cannot write" in caplog.text

    def test_the_cache_is_of_one_engine_gpu_and_driver(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: L4)
        manifest = card_of(engine)
        path = runtime_cache_path(manifest)
        assert path.name == f"{manifest.engine_sha256[:32]}-NVIDIA-L4-12080.cache"
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: replace(L4, driver=13000))
        assert runtime_cache_path(manifest) != path
