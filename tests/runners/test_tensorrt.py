from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.dependencies import GpuDevice, find_gpu
from smlp_deploy.errors import ArtifactError, ConfigError, MissingDependencyError
from smlp_deploy.files import sha256_of
from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import BatchProfile, EngineManifest
from smlp_deploy.runners import open_runner, tensorrt
from smlp_deploy.runners.tensorrt import (
    TensorRTRunner,
    TracingTensorRTRunner,
    check_machine,
    create_context,
    read_manifest,
    runtime_cache_path,
    system,
    time_executions,
)
from tests.support.fakes import metadata, quadrant_means
from tests.support.tensorrt_binding import VERSIONS, FakeTensorRT

L4 = GpuDevice(name="NVIDIA L4", architecture="sm89", driver=12080)


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


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "x.engine"
    path.write_bytes(b"an engine")
    engine_manifest_path(path).write_text(card_of(path).to_json())
    return path


class Buffers:
    """Runs nothing, but answers in one buffer that every run overwrites."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._buffer = np.zeros((64, 4), np.float32)

    def infer(self, feed_dict: Mapping[str, FloatArray]) -> Mapping[str, Any]:
        images = feed_dict["images"]
        self.sizes.append(len(images))
        self._buffer[: len(images)] = quadrant_means(images)
        return {"logits": self._buffer[: len(images)]}


def test_batches_fit_the_profile_and_logits_are_copies(engine: Path) -> None:
    session = Buffers()
    batch = np.random.default_rng(0).standard_normal((9, 3, 8, 8), dtype=np.float32)
    with TensorRTRunner(engine, read_manifest(engine), session) as runner:
        first = runner.infer(batch)
        runner.infer(batch * 2)
        assert runner.metadata == metadata()
        assert runner.name == "tensorrt-rtx (CUDA graphs) x.engine"
    np.testing.assert_array_equal(first, quadrant_means(batch))
    assert session.sizes == [4, 4, 2] * 2


class TracedBuffers(Buffers):
    """What comes out of three points too: the mean of each image, times the point's number."""

    def infer(self, feed_dict: Mapping[str, FloatArray]) -> Mapping[str, Any]:
        values = super().infer(feed_dict)["logits"]
        points = ("stage 1 embedding", "stage 1 block 1 token mixing", "stage 1 block 1")
        for i in range(len(points)):
            values[:, i] = feed_dict["images"].mean(axis=(1, 2, 3)) * (i + 1)
        return {"logits": values, **{name: values[:, i, None, None, None] for i, name in enumerate(points)}}


def test_traced_batches_fit_the_profile_and_values_are_copies(engine: Path) -> None:
    session = TracedBuffers()
    batch = np.random.default_rng(0).standard_normal((9, 3, 8, 8), dtype=np.float32)
    with TracingTensorRTRunner(engine, read_manifest(engine), session) as runner:
        first = runner.trace(batch)
        runner.trace(batch * 2)
        assert runner.name == "tensorrt-rtx (CUDA graphs) x.engine (rebuilt with trace points)"
    means = batch.mean(axis=(1, 2, 3)).reshape(9, 1, 1, 1)
    assert list(first) == ["stage 1 embedding", "stage 1 block 1 token mixing", "stage 1 block 1"]
    for i, values in enumerate(first.values()):
        np.testing.assert_allclose(values, means * (i + 1), rtol=1e-6)
    assert session.sizes == [4, 4, 2] * 2


def test_without_a_gpu_it_is_one_clear_line(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "find_gpu", lambda: None)
    with pytest.raises(ArtifactError, match=r"needs an NVIDIA GPU and driver.*x\.engine · use the ONNX file"):
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

        def swap(path: Path, manifest: EngineManifest) -> None:
            engine.write_bytes(b"an untrusted engine")

        def session(plan: bytes, *_: object, **__: object) -> None:
            plans.append(plan)

        monkeypatch.setattr(tensorrt, "check_machine", swap)
        monkeypatch.setattr(tensorrt, "_session", session)
        TensorRTRunner.open(engine)
        assert plans == [content]
        with pytest.raises(ArtifactError, match="does not match the sha256 in its manifest"):
            TensorRTRunner.open(engine)

    @pytest.mark.skipif(find_gpu() is not None, reason="with a driver the message is another")
    def test_an_engine_that_does_not_load_is_one_clear_line(self, engine: Path) -> None:
        with pytest.raises(ArtifactError, match=r"cannot load it on this GPU.*built for sm89"):
            open_runner(engine)

    @pytest.mark.skipif(find_gpu() is not None, reason="with a driver the message is another")
    def test_a_second_engine_that_does_not_load_is_one_clear_line(self, engine: Path) -> None:
        with pytest.raises(ArtifactError, match=r"cannot load it on this GPU · .*x\.engine · it was built for sm89"):
            TracingTensorRTRunner.load(b"another engine", engine, read_manifest(engine))


class TestExecutionContexts:
    """Contexts are made on fakes that have exactly the names of real versions."""

    @pytest.mark.parametrize("version", VERSIONS)
    def test_rtx_captures_graphs_and_keeps_its_kernels(self, version: str, tmp_path: Path) -> None:
        module = FakeTensorRT(version)
        path = tmp_path / "cache" / "x.cache"
        with ExitStack() as stack:
            create_context(module, module.engine(), lambda: path, stack)
        context = module.calls[-1]
        if not version.startswith("tensorrt_rtx"):
            assert context == ("create_execution_context",)
            assert not path.exists()
            return
        (config,) = context[1:]
        assert config.cuda_graph_strategy == module.names["CudaGraphStrategy"].index("WHOLE_GRAPH_CAPTURE")
        assert path.read_bytes() == b"kernels"
        with ExitStack() as stack:
            create_context(module, module.engine(), lambda: path, stack)
        assert ("deserialize", b"kernels") in module.calls

    @pytest.mark.parametrize("version", VERSIONS)
    def test_kernels_of_an_engine_that_is_used_once_are_not_kept(self, version: str) -> None:
        module = FakeTensorRT(version)
        with ExitStack() as stack:
            create_context(module, module.engine(), None, stack)
        names = [call[0] for call in module.calls]
        assert names == ["create_execution_context"]

    def test_kernels_of_another_environment_are_replaced(self, tmp_path: Path) -> None:
        module = FakeTensorRT("tensorrt_rtx-1.7", fail="deserialize")
        path = tmp_path / "x.cache"
        path.write_bytes(b"of an older driver")
        with ExitStack() as stack:
            create_context(module, module.engine(), lambda: path, stack)
        assert path.read_bytes() == b"kernels"

    def test_a_cache_that_cannot_be_written_is_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        module = FakeTensorRT("tensorrt_rtx-1.7")
        (tmp_path / "file").touch()
        with ExitStack() as stack:
            create_context(module, module.engine(), lambda: tmp_path / "file" / "x.cache", stack)
        assert "compiled kernels were not cached: cannot write" in caplog.text

    def test_the_cache_is_of_one_engine_gpu_and_driver(self, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: L4)
        manifest = card_of(engine)
        path = runtime_cache_path(manifest)
        assert path.name == f"{manifest.engine_sha256[:32]}-NVIDIA-L4-12080.cache"
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: replace(L4, driver=13000))
        assert runtime_cache_path(manifest) != path


class Runtime:
    """A CUDA runtime whose GPU takes 2 ms for each execution, by the events recorded on stream 5."""

    def __init__(self) -> None:
        self.handle = self
        self.events: list[str] = []
        self.milliseconds = 0.0
        self.times: dict[int | None, float] = {}

    def check(self, status: int) -> None:
        assert status == 0

    def execute_async_v3(self, stream: int) -> bool:
        self.milliseconds += 2
        return stream == 5

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.events.append(name)
            if name == "cudaEventCreate":
                arguments[0]._obj.value = len(self.events)
            elif name == "cudaEventRecord":
                assert arguments[1].value == 5
                self.times[arguments[0].value] = self.milliseconds
            elif name == "cudaEventElapsedTime":
                arguments[0]._obj.value = self.times[arguments[2].value] - self.times[arguments[1].value]
            return 0

        return call


def test_the_gpu_is_timed_between_two_events() -> None:
    cuda = Runtime()
    session = SimpleNamespace(stream=SimpleNamespace(ptr=5), context=cuda)
    assert time_executions(cuda, session, runs=3) == pytest.approx([0.002] * 3)
    each = ["cudaEventRecord", "cudaEventRecord", "cudaEventSynchronize", "cudaEventElapsedTime"]
    assert cuda.events == ["cudaEventCreate"] * 2 + each * 3 + ["cudaEventDestroy"] * 2


def test_a_batch_that_must_be_split_is_not_timed_on_the_gpu(engine: Path) -> None:
    session = Buffers()
    with TensorRTRunner(engine, read_manifest(engine), session) as runner:
        assert runner.gpu_seconds(np.zeros((5, 3, 8, 8), np.float32), runs=1) == []
    assert session.sizes == []
