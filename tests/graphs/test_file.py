from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from smlp_deploy.errors import ArtifactError
from smlp_deploy.graphs.file import Graph, graph_facts
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner
from tests.support.fakes import metadata
from tests.support.graphs import smallest_classifier


def test_what_is_written_is_what_is_held_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    graph = Graph.of(smallest_classifier(), metadata(), path=path)
    assert not path.exists()
    graph.save()
    assert path.read_bytes() == graph.content
    assert graph.sha256 == hashlib.sha256(graph.content).hexdigest()
    assert Graph.read(path) == graph
    assert graph.metadata == metadata()
    assert graph.model() == onnx.load(path)


def test_a_file_that_is_replaced_after_it_was_read_no_longer_matters(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    made = Graph.of(smallest_classifier(), metadata(), path=path)
    made.save()
    graph = Graph.read(path)
    path.write_bytes(b"something else")
    with OnnxRuntimeRunner(graph) as runner:
        logits = runner.infer(np.ones((2, 3, 8, 8), np.float32))
    assert logits.tolist() == [[192] * 4] * 2
    assert graph.sha256 == made.sha256


def test_facts_are_the_files(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    Graph.of(smallest_classifier(), metadata(), path=path).save()
    facts = graph_facts(path)
    assert facts.metadata == metadata()
    assert (facts.opset, facts.producer, facts.weight_bytes) == (17, "test", 3072)
    assert (facts.inputs, facts.outputs) == (("images float batchx3x8x8",), ("logits float batchx4",))
    assert facts.operators == {"Flatten": 1, "MatMul": 1}


def test_a_graph_of_another_tool_has_facts_but_is_not_computed_with(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save(smallest_classifier(), path)
    assert graph_facts(path).metadata is None
    with pytest.raises(ArtifactError, match=r"smlp-deploy did not write it · .*x\.onnx · export the checkpoint"):
        Graph.read(path)


def test_facts_are_told_of_what_smlp_deploy_would_not_run(tmp_path: Path) -> None:
    model, path = smallest_classifier(), tmp_path / "x.onnx"
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
    assert facts.operators == {"Flatten": 1, "MatMul": 1, "Loop": 1, "Attention": 1}
    assert facts.inputs == ("images float batchx3x8x8", "unknown unknown ")
    assert facts.outputs == ("logits float batchx4", "sequence undefined ")
    with pytest.raises(ArtifactError, match="refused: its operator 'Loop' runs a graph inside the graph"):
        Graph.read(path)


def test_an_invalid_graph_is_no_value(tmp_path: Path) -> None:
    model = smallest_classifier()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(onnx.checker.ValidationError):
        Graph.of(model, metadata(), path=tmp_path / "x.onnx")


def test_a_graph_that_is_not_what_its_metadata_says_is_no_value(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"its output has shape 1x4, but its metadata says 5 classes · .*x\.onnx · "
    ):
        Graph.of(smallest_classifier(), metadata(classes=5), path=tmp_path / "x.onnx")
    model = smallest_classifier()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((192, 4), np.inf, np.float32), "w"))
    with pytest.raises(ArtifactError, match=r"'w' has values that are NaN or infinite · .*nothing was written"):
        Graph.of(model, metadata(), path=tmp_path / "x.onnx")


@pytest.mark.parametrize("content", [b"", b"this is no protobuf", b"\x08\x0a"])
def test_what_is_no_onnx_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        Graph.read(path)


def test_an_absent_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        Graph.read(tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="is a directory"):
        Graph.read(tmp_path)
