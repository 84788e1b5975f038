from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fakes import FakeRunner
from smlp_deploy import engine
from smlp_deploy.engine import Graph, build_engine, check_precision, prepare_graph
from smlp_deploy.errors import ArtifactError, BuildError, UsageError
from smlp_deploy.export import Export
from smlp_deploy.exporters.graph import save_graph
from smlp_deploy.exporters.kernels import KernelSummary
from smlp_deploy.exporters.tensorrt import BuildOptions
from smlp_deploy.files import sha256_of
from smlp_deploy.metadata import BatchProfile, EngineCard
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from smlp_deploy.runners.tensorrt import TensorRTRunner

SM89 = BuildOptions(architectures=("sm89",), profile=BatchProfile(min=1, opt=4, max=8))


def test_an_engine_is_written_with_its_facts(digits_export: Export, tmp_path: Path) -> None:
    graph = prepare_graph(digits_export.path, "fp16")
    assert graph.parity is not None
    assert graph.parity.passed
    result = build_engine(graph, tmp_path / "x.engine", SM89, flavour="tensorrt-rtx")
    card = EngineCard.from_json(result.card_path.read_text(), where=result.card_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.engine", "x.engine.json"]
    assert card.engine_sha256 == sha256_of(result.path)
    assert (card.onnx_file, card.onnx_sha256) == (digits_export.path.name, sha256_of(digits_export.path))
    assert card.metadata == graph.metadata
    assert card.metadata.precision == "fp16"
    assert card.flavour == "tensorrt-rtx"
    assert card.profile == SM89.profile
    assert card.architectures == ("sm89",)
    assert card.kernels["compute_by_precision"].keys() == {"Half"}
    assert card.ran_here is (result.parity is not None)
    assert card.graph_parity is not None
    assert card.graph_parity["passed"] is True
    assert card.memory


@pytest.mark.parametrize(("precision", "element"), [(None, "Float"), ("bf16", "BFloat16")])
def test_other_precisions(digits_export: Export, tmp_path: Path, precision: str | None, element: str) -> None:
    graph = prepare_graph(digits_export.path, precision)
    result = build_engine(graph, tmp_path / "x.engine", SM89, flavour="tensorrt-rtx")
    assert result.summary.compute_by_precision.keys() == {element}


def test_a_build_without_the_kernels_asked_for_fails_and_leaves_no_file(
    digits_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a precision flag that TensorRT no longer has would do: the graph is still fp32.
    monkeypatch.setattr(engine, "to_half", lambda model, precision: model)
    graph = prepare_graph(digits_export.path, "fp16")
    with pytest.raises(BuildError, match=r"no kernel computes in fp16: \{'Float': 31\}"):
        build_engine(graph, tmp_path / "x.engine", SM89, flavour="tensorrt-rtx")
    assert not list(tmp_path.iterdir())


class TestWhereTheEngineRuns:
    """On a stand-in for the GPU: ONNX Runtime runs the graph that the engine was built from."""

    @pytest.fixture
    def graph(self, digits_export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Graph:
        graph = prepare_graph(digits_export.path, "fp16")
        save_graph(graph.model, graph.metadata, tmp_path / "half.onnx")
        monkeypatch.setattr(engine, "check_machine", lambda path, card: None)
        return graph

    def test_it_is_compared_with_its_source(
        self, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TensorRTRunner, "load", lambda path, card: OnnxRuntimeRunner(tmp_path / "half.onnx"))
        result = build_engine(graph, tmp_path / "x.engine", SM89, flavour="tensorrt-rtx")
        card = EngineCard.from_json(result.card_path.read_text(), where=result.card_path)
        assert card.ran_here is True
        assert card.engine_parity is not None
        assert card.engine_parity["passed"] is True
        assert card.engine_parity["artifact_sha256"] == sha256_of(result.path)

    def test_one_that_computes_something_else_is_kept_under_a_failed_name(
        self, graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with OnnxRuntimeRunner(tmp_path / "half.onnx") as half:
            wrong = FakeRunner(lambda batch: -half.infer(batch), graph.metadata)
            monkeypatch.setattr(TensorRTRunner, "load", lambda path, card: wrong)
            with pytest.raises(
                BuildError, match=r"run on this GPU it computes something else: cosine.*x\.engine\.failed"
            ):
                build_engine(graph, tmp_path / "x.engine", SM89, flavour="tensorrt-rtx")
        assert {path.name for path in tmp_path.iterdir()} == {"half.onnx", "x.engine.failed"}


def test_an_interrupted_build_leaves_the_old_engine(digits_export: Export, tmp_path: Path) -> None:
    target = tmp_path / "x.engine"
    target.write_text("old")

    def interrupt(phase: str, done: int, total: int) -> None:
        import signal

        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engine(prepare_graph(digits_export.path, None), target, SM89, flavour="tensorrt-rtx", progress=interrupt)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.engine"]


def test_a_half_graph_cannot_be_built_in_another_precision(digits_export: Export, tmp_path: Path) -> None:
    from smlp_deploy.exporters.graph import save_graph

    graph = prepare_graph(digits_export.path, "fp16")
    save_graph(graph.model, graph.metadata, tmp_path / "half.onnx")
    assert prepare_graph(tmp_path / "half.onnx", "fp16").parity is None
    with pytest.raises(UsageError, match=r"the graph is fp16 .* bf16 was asked for"):
        prepare_graph(tmp_path / "half.onnx", "bf16")


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
    with pytest.raises(ArtifactError, match="in bf16 it computes something else: cosine"):
        prepare_graph(tmp_path / "x.onnx", "bf16")


def test_a_graph_of_another_tool_is_refused(digits_export: Export, tmp_path: Path) -> None:
    model = onnx.load(digits_export.path)
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="smlp-deploy did not write it"):
        prepare_graph(tmp_path / "x.onnx", "fp16")


def test_precision_is_checked_by_kernels() -> None:
    summary = KernelSummary(batch=1, count=2, by_kind={}, compute_by_precision={"Float": 2}, bytes_per_image=0)
    check_precision(summary, "fp32")
    with pytest.raises(BuildError, match="no kernel computes in bf16"):
        check_precision(summary, "bf16")
