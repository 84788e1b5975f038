from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from fakes import metadata
from smlp_deploy.errors import ArtifactError
from smlp_deploy.exporters.graph import graph_facts, load_graph, save_graph


def small_graph() -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("images", "logits")]
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [3], bytes(12), raw=True)
    graph = helper.make_graph(
        [helper.make_node("Add", ["images", "weight"], ["logits"])], "g", values[:1], values[1:], [weight]
    )
    return helper.make_model(graph, producer_name="test", opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_facts_are_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    save_graph(small_graph(), metadata(), path)
    facts = graph_facts(path)
    assert facts.metadata == metadata()
    assert (facts.opset, facts.producer, facts.weight_bytes) == (20, "test", 12)
    assert (facts.inputs, facts.outputs) == (("images float batchx3",), ("logits float batchx3",))
    assert facts.operators == {"Add": 1}


def test_a_graph_of_another_tool_has_no_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save(small_graph(), path)
    assert graph_facts(path).metadata is None


def test_an_invalid_graph_is_not_written(tmp_path: Path) -> None:
    model = small_graph()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(onnx.checker.ValidationError):
        save_graph(model, metadata(), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"this is no protobuf", b"\x08\x0a"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        load_graph(path)


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        load_graph(tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="is a directory"):
        load_graph(tmp_path)
