from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from smlp_deploy.errors import ArtifactError
from smlp_deploy.graphs.file import graph_facts, load_graph, save_graph
from tests.support.fakes import metadata


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
    assert load_graph(path) == small_graph()


def test_facts_are_told_of_what_smlp_deploy_would_not_run(tmp_path: Path) -> None:
    model, path = small_graph(), tmp_path / "x.onnx"
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["z"], body=body))
    model.graph.node.append(helper.make_node("Attention", ["images"], ["a"], domain="com.microsoft"))
    weight = model.graph.initializer.add(name="elsewhere", data_type=TensorProto.FLOAT, dims=[1 << 40])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="weights.bin")
    model.graph.input.add(name="unknown").type.tensor_type.elem_type = 12345
    model.graph.output.add(name="sequence").type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(model, path)
    facts = graph_facts(path)
    assert facts.operators == {"Add": 1, "Loop": 1, "Attention": 1}
    assert facts.inputs == ("images float batchx3", "unknown unknown ")
    assert facts.outputs == ("logits float batchx3", "sequence undefined ")
    with pytest.raises(ArtifactError, match="refused: its operator 'Loop' runs a graph inside the graph"):
        load_graph(path)


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
