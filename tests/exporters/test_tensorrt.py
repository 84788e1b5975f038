from __future__ import annotations

import os
import signal
import threading
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.errors import BuildError, MissingDependencyError, UsageError
from smlp_deploy.exporters import tensorrt
from smlp_deploy.exporters.half import to_half
from smlp_deploy.exporters.kernels import summarize
from smlp_deploy.exporters.tensorrt import BuildOptions, TensorRT, check_alone, find_backend
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.pipeline.export import Export
from tests.support.tensorrt_binding import VERSIONS, FakeTensorRT

SM89 = BuildOptions(architectures=("sm89",))


@pytest.fixture(scope="session")
def graph(digits_export: Export) -> bytes:
    """The bundled model in fp16."""
    return bytes(to_half(onnx.load(digits_export.path), "fp16").SerializeToString())


@pytest.fixture(scope="session")
def rtx() -> TensorRT:
    return TensorRT.load("tensorrt-rtx")


class TestEveryBinding:
    """The adapter on fakes that have exactly the names of real versions."""

    @pytest.mark.parametrize("version", VERSIONS)
    def test_builds_with_every_option(self, version: str) -> None:
        module: Any = FakeTensorRT(version)
        adapter = TensorRT(module)
        steps: list[tuple[str, int, int]] = []
        options = BuildOptions(
            profile=BatchProfile(min=1, opt=4, max=16),
            architectures=("sm80", "sm89") if adapter.ahead_of_time else (),
            workspace_gib=0.5,
            optimization_level=2,
            timing_cache=b"cache",
            version_compatible=True,
            hardware_compatible=not adapter.ahead_of_time,
        )
        engine = adapter.build(b"graph", options, progress=lambda *step: steps.append(step))
        assert engine.plan == b"plan"
        assert engine.timing_cache == b"cache+"
        assert engine.memory == ("Max Scratch Memory: 12 bytes",)
        assert summarize(engine.kernels, batch=4).compute_by_precision == {"Half": 1}
        assert steps[0] == ("Building engine", 1, 2)
        assert adapter.ahead_of_time == version.startswith("tensorrt_rtx")
        strongly_typed = 1 << module.names["NetworkDefinitionCreationFlag"].index("STRONGLY_TYPED")
        assert ("create_network", strongly_typed) in module.calls
        assert ("set_shape", "images", (1, 3, 8, 8), (4, 3, 8, 8), (16, 3, 8, 8)) in module.calls

    @pytest.mark.parametrize("version", [version for version in VERSIONS if version.startswith("tensorrt-")])
    @pytest.mark.parametrize(
        ("option", "level"),
        [
            ("hardware_compatible", "AMPERE_PLUS"),
            ("same_compute_capability", "SAME_COMPUTE_CAPABILITY"),
            ("tf32", None),
        ],
    )
    def test_engines_for_more_gpus_than_this_one(self, version: str, option: str, level: str | None) -> None:
        module: Any = FakeTensorRT(version)
        chosen_options: dict[str, Any] = {option: True}
        TensorRT(module).build(b"graph", BuildOptions(**chosen_options))
        chosen = module.config.get("hardware_compatibility_level")
        assert chosen == (None if level is None else module.names["HardwareCompatibilityLevel"].index(level))

    def test_a_tensorrt_that_has_no_such_engines_says_so(self) -> None:
        module: Any = FakeTensorRT(VERSIONS[0])
        module.names["HardwareCompatibilityLevel"] = ["NONE", "AMPERE_PLUS"]
        with pytest.raises(UsageError, match=r"TensorRT \S+ has no such engines · --same-capability · update TensorRT"):
            TensorRT(module).build(b"graph", BuildOptions(same_compute_capability=True))

    @pytest.mark.parametrize("version", VERSIONS)
    def test_tf32_is_cleared_unless_it_is_asked_for(self, version: str) -> None:
        cleared = {}
        for tf32 in (True, False):
            module: Any = FakeTensorRT(version)
            TensorRT(module).build(b"graph", BuildOptions(tf32=tf32))
            cleared[tf32] = ("clear_flag", module.names["BuilderFlag"].index("TF32")) in module.calls
        assert cleared == {True: False, False: True}

    @pytest.mark.parametrize("version", VERSIONS)
    def test_says_what_the_parser_refused(self, version: str) -> None:
        module: Any = FakeTensorRT(version, fail="parse")
        with pytest.raises(BuildError, match=r"Loop node 'blocks\.1/loop': no importer"):
            TensorRT(module).build(b"graph", BuildOptions())

    @pytest.mark.parametrize("version", VERSIONS)
    def test_says_why_the_build_failed(self, version: str) -> None:
        module: Any = FakeTensorRT(version, fail="build")
        with pytest.raises(BuildError, match="could not build it: out of memory"):
            TensorRT(module).build(b"graph", BuildOptions())

    def test_without_a_gpu_there_is_no_builder(self) -> None:
        module: Any = FakeTensorRT("tensorrt-11.4", fail="builder")
        with pytest.raises(BuildError, match="need an NVIDIA GPU and driver"):
            TensorRT(module).build(b"graph", BuildOptions())

    @pytest.mark.parametrize("version", VERSIONS)
    def test_a_driver_too_old_for_a_builder(self, version: str) -> None:
        module: Any = FakeTensorRT(version, fail="driver")
        with pytest.raises(
            BuildError, match=r"^cannot create TensorRT's Builder: .*too old.* · update the driver;"
        ) as e:
            TensorRT(module).build(b"graph", BuildOptions())
        assert "\n" not in str(e.value)

    def test_a_driver_too_old_for_a_runtime(self) -> None:
        module: Any = FakeTensorRT("tensorrt-10.16", fail="runtime")
        with pytest.raises(BuildError, match=r"cannot create TensorRT's Runtime: .*too old.* · update the driver;"):
            TensorRT(module).build(b"graph", BuildOptions())

    def test_another_type_error_is_not_blamed_on_the_driver(self) -> None:
        module: Any = FakeTensorRT("tensorrt-10.16")
        module.make_Builder = lambda: lambda: None
        with pytest.raises(TypeError, match="positional argument"):
            TensorRT(module).build(b"graph", BuildOptions())

    @pytest.mark.parametrize("version", [version for version in VERSIONS if version.startswith("tensorrt-")])
    @pytest.mark.parametrize("batch", [-1, 4])
    def test_shapes_are_those_of_the_optimal_batch(self, version: str, batch: int) -> None:
        module: Any = FakeTensorRT(version, batch=batch)
        profile = BatchProfile.fixed(4) if batch == 4 else BatchProfile(min=1, opt=4, max=16)
        engine = TensorRT(module).build(b"graph", BuildOptions(profile=profile))
        assert [call for call in module.calls if call[0] == "set_input_shape"] == [
            ("set_input_shape", "images", (4, 3, 8, 8))
        ]
        summary = summarize(engine.kernels, batch=4)
        assert summary.bytes_unknown == 0
        assert summary.bytes_per_image > 0

    @pytest.mark.parametrize("version", [version for version in VERSIONS if version.startswith("tensorrt-")])
    def test_a_context_that_does_not_fit_in_memory(self, version: str) -> None:
        module: Any = FakeTensorRT(version, fail="memory")
        engine = TensorRT(module).build(b"graph", BuildOptions(profile=BatchProfile(min=1, opt=4, max=16)))
        summary = summarize(engine.kernels, batch=4)
        assert engine.plan == b"plan"
        assert (summary.bytes_per_image, summary.bytes_unknown) == (0, summary.count)
        assert summary.compute_by_precision == {"Half": 1}

    def test_a_list_of_kernels_that_cannot_be_read(self, caplog: pytest.LogCaptureFixture) -> None:
        module: Any = FakeTensorRT("tensorrt-11.4", fail="inspect")
        engine = TensorRT(module).build(b"graph", BuildOptions())
        assert (engine.plan, engine.kernels) == (b"plan", ())
        assert "list of them cannot be read: Expecting value" in caplog.text

    def test_an_engine_that_does_not_load_is_an_error(self) -> None:
        module: Any = FakeTensorRT("tensorrt-10.13", fail="load")
        with pytest.raises(BuildError, match="cannot be loaded again"):
            TensorRT(module).build(b"graph", BuildOptions())

    def test_a_fixed_batch_needs_the_same_profile(self) -> None:
        module: Any = FakeTensorRT("tensorrt-11.4", batch=4)
        with pytest.raises(UsageError, match="takes exactly 4 images"):
            TensorRT(module).build(b"graph", BuildOptions())
        assert TensorRT(module).build(b"graph", BuildOptions(profile=BatchProfile.fixed(4))).plan == b"plan"

    def test_a_name_that_a_version_lacks_would_be_noticed(self) -> None:
        module: Any = FakeTensorRT("tensorrt-11.4")
        with pytest.raises(AttributeError):
            _ = module.ComputeCapability
        with pytest.raises(AttributeError):
            module.make_Builder()(None).platform_has_fast_fp16()


class TestTheRealThing:
    """TensorRT-RTX builds with no GPU."""

    def test_tf32_is_set_until_it_is_cleared(self, rtx: TensorRT) -> None:
        flag = rtx._trt.BuilderFlag.TF32
        config = rtx._trt.Builder(rtx._log.handle).create_builder_config()
        assert config.get_flag(flag)
        rtx._configure(config, SM89, detailed=False)
        assert not config.get_flag(flag)

    def test_an_fp16_engine_has_fp16_kernels(self, rtx: TensorRT, graph: bytes) -> None:
        phases: set[str] = set()
        engine = rtx.build(graph, SM89, progress=lambda phase, done, total: phases.add(phase))
        summary = summarize(engine.kernels, batch=8)
        assert len(engine.plan) > 100_000
        assert summary.share("fp16") == 1
        assert all(
            name.startswith(("blocks.", "embeddings.", "head", "cast/", "mean")) or "/" not in name
            for kernel in engine.kernels
            for name in kernel.nodes
        )
        assert any("Weights Memory" in line for line in engine.memory)
        assert phases

    def test_architectures(self, rtx: TensorRT) -> None:
        assert set(tensorrt.DEFAULT_ARCHITECTURES) | {tensorrt.ALONE} <= set(rtx.architectures())

    def test_a_workspace_too_small(self, rtx: TensorRT, graph: bytes) -> None:
        with pytest.raises(BuildError, match=r"could not build it: .+ raise --workspace"):
            rtx.build(graph, BuildOptions(architectures=("sm89",), workspace_gib=1e-5))

    def test_an_operator_it_does_not_know(self, rtx: TensorRT) -> None:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in ("images", "logits")]
        node = helper.make_node("Frobnicate", ["images"], ["logits"], name="blocks.0/odd", domain="elsewhere")
        model = helper.make_model(
            helper.make_graph([node], "g", values[:1], values[1:]),
            opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)],
            ir_version=10,
        )
        with pytest.raises(BuildError, match=r"Frobnicate node 'blocks\.0/odd'"):
            rtx.build(model.SerializeToString(), BuildOptions(profile=BatchProfile.fixed(1), architectures=("sm89",)))

    def test_a_truncated_graph(self, rtx: TensorRT, graph: bytes) -> None:
        with pytest.raises(BuildError, match="cannot parse the graph"):
            rtx.build(graph[: len(graph) // 2], SM89)

    def test_ctrl_c_cancels(self, rtx: TensorRT, graph: bytes) -> None:
        def interrupt(phase: str, done: int, total: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            rtx.build(graph, SM89, progress=interrupt)
        assert signal.getsignal(signal.SIGINT) is before

    def test_a_build_in_another_thread(self, rtx: TensorRT, graph: bytes) -> None:
        plans: list[bytes] = []
        thread = threading.Thread(target=lambda: plans.append(rtx.build(graph, SM89).plan))
        thread.start()
        thread.join()
        assert plans


class TestFlavours:
    def test_auto_takes_rtx_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: None)
        monkeypatch.setattr(tensorrt, "find_spec", lambda name: object())
        assert find_backend("auto") == "tensorrt-rtx"

    def test_auto_takes_tensorrt_with_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tensorrt, "find_gpu", lambda: GpuDevice(name="L4", architecture="sm89", driver=12080))
        monkeypatch.setattr(tensorrt, "find_spec", lambda name: object())
        assert find_backend("auto") == "tensorrt"

    @pytest.mark.parametrize("target", ["auto", "tensorrt", "tensorrt-rtx"])
    def test_none_installed_names_the_extra(self, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r'not installed.*pip install "smlp-deploy\[rtx\]"'):
            find_backend(target)

    def test_sm75_only_by_itself(self) -> None:
        check_alone(["sm75"])
        check_alone(["sm80", "sm89"])
        with pytest.raises(UsageError, match="build sm75 by itself"):
            check_alone(["sm75", "sm89"])
