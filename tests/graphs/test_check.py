from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from smlp_deploy.errors import ArtifactError, ConfigError, SmlpError
from smlp_deploy.graphs import check as onnxfile
from smlp_deploy.graphs.check import check_classifier, check_graph, read_onnx
from smlp_deploy.graphs.file import Graph, graph_facts
from smlp_deploy.metadata import METADATA_KEY, ModelMetadata, Preprocessing, SMLPNetConfig
from smlp_deploy.pipeline.export import Export
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

SIZE, CLASSES = 8, 4
METADATA = ModelMetadata(
    name="small",
    config=SMLPNetConfig(dim=4, depths=(1,), image_size=SIZE, num_classes=CLASSES),
    labels=tuple("abcd"),
    preprocessing=Preprocessing(image_size=SIZE),
)
Change = Callable[[ModelProto], None]


def classifier(*, batch: int | None = None) -> ModelProto:
    """The smallest graph that could be a classifier's: flatten, and one product with 3,072 bytes of weights."""
    weight = np.linspace(-1, 1, 3 * SIZE * SIZE * CLASSES, dtype=np.float32).reshape(-1, CLASSES)
    nodes = [
        helper.make_node("Reshape", ["images", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    of = batch or "batch"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [of, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [of, CLASSES])],
        [
            numpy_helper.from_array(np.array([-1, 3 * SIZE * SIZE]), "shape"),
            numpy_helper.from_array(weight, "weight"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: METADATA.to_json()})
    return model


def written(tmp_path: Path, model: ModelProto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def weight_of(model: ModelProto) -> TensorProto:
    tensors: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
    return tensors["weight"]


def prepend(model: ModelProto, *nodes: onnx.NodeProto) -> None:
    """Put nodes that make `entry` of `images` before the rest."""
    model.graph.node[0].input[0] = "entry"
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


def initializer(model: ModelProto, name: str, values: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))


def test_a_sound_file_runs(tmp_path: Path) -> None:
    path = written(tmp_path, classifier())
    batch = np.random.default_rng(0).standard_normal((5, 3, SIZE, SIZE), dtype=np.float32)
    with OnnxRuntimeRunner.open(path) as runner:
        found = runner.infer(batch)
    weight = numpy_helper.to_array(weight_of(classifier()))
    np.testing.assert_allclose(found, batch.reshape(5, -1) @ weight, rtol=1e-4, atol=1e-4)


def test_a_file_is_read_once_and_without_loss(digits_export: Export) -> None:
    content = digits_export.path.read_bytes()
    file = read_onnx(digits_export.path)
    assert file.content == content
    assert file.model() == onnx.load(digits_export.path)
    assert len(file.structure.SerializeToString()) < len(content) / 2
    assert [t.name for t in file.structure.graph.initializer] == [t.name for t in file.model().graph.initializer]
    assert file.metadata() == OnnxRuntimeRunner.open(digits_export.path).metadata


# --- what a graph must not hold ---------------------------------------------------------------------------------------


def external(model: ModelProto, location: str = "../secret") -> None:
    tensor = weight_of(model)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def control_flow(model: ModelProto, operator: str) -> None:
    body = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "body", [], [])
    prepend(model, helper.make_node(operator, ["images"], ["entry"], body=body))


def functions(model: ModelProto) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    opsets = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("own", "f", ["x"], ["y"], [node], opsets))


def hidden_constant(model: ModelProto) -> None:
    tensor = numpy_helper.from_array(np.array([np.nan], np.float32), "hidden")
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=tensor))


def without_values(model: ModelProto) -> None:
    weight_of(model).ClearField("raw_data")


def with_values(values: Any) -> Change:
    def change(model: ModelProto) -> None:
        weight_of(model).raw_data = np.asarray(values).tobytes()

    return change


def not_a_number(kind: type[Any], element: int, value: float) -> Change:
    def change(model: ModelProto) -> None:
        weight = np.zeros((3 * SIZE * SIZE, CLASSES), kind)
        weight[7, 1] = value
        weight_of(model).CopyFrom(numpy_helper.from_array(weight, "weight"))
        weight_of(model).data_type = element

    return change


def bfloat16_nan(model: ModelProto) -> None:
    tensor = weight_of(model)
    tensor.data_type = TensorProto.BFLOAT16
    tensor.raw_data = b"\xc0\x7f".rjust(2 * 3 * SIZE * SIZE * CLASSES, b"\0")


def as_floats(model: ModelProto) -> None:
    weight = numpy_helper.to_array(weight_of(model))
    weight_of(model).CopyFrom(helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.ravel()))


def setting(**values: Any) -> Change:
    def change(model: ModelProto) -> None:
        for name, value in values.items():
            setattr(model, name, value)

    return change


def opset(version: int) -> Change:
    def change(model: ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def operator(name: str, domain: str = "") -> Change:
    def change(model: ModelProto) -> None:
        prepend(model, helper.make_node(name, ["images"], ["entry"], domain=domain))

    return change


REFUSED_GRAPHS: dict[str, tuple[Change, str]] = {
    "external data": (external, "the values of 'weight' are in another file; smlp-deploy keeps all weights inside"),
    "absolute external data": (lambda model: external(model, "/etc/passwd"), "are in another file"),
    "loop": (lambda model: control_flow(model, "Loop"), "operator 'Loop' runs a graph inside the graph"),
    "if": (lambda model: control_flow(model, "If"), "operator 'If' runs a graph inside the graph"),
    "scan": (lambda model: control_flow(model, "Scan"), "operator 'Scan' runs a graph inside the graph"),
    "sequence map": (lambda model: control_flow(model, "SequenceMap"), "'SequenceMap' runs a graph inside"),
    "custom operator": (operator("Steal", "evil.corp"), "operator 'evil.corp.Steal' is not one that a classifier"),
    "contributed operator": (operator("FusedConv", "com.microsoft"), "'com.microsoft.FusedConv' is not one"),
    "unknown operator": (operator("NoSuchThing"), "operator 'NoSuchThing' is not one that a classifier"),
    "operator of chosen size": (operator("ConstantOfShape"), "operator 'ConstantOfShape' is not one"),
    "operator of unknown size": (operator("NonZero"), "operator 'NonZero' is not one"),
    "long operator": (operator("x" * 100_000), "operator 'x{119,}.*is not one"),
    "functions": (functions, "model-local functions"),
    "sparse weights": (lambda model: model.graph.sparse_initializer.add(), "sparse weights"),
    "opset too new": (opset(999), "operator set 999 is newer than the .* of this onnx.*upgrade onnx"),
    "no opset": (lambda model: model.ClearField("opset_import"), "does not state one format version"),
    "two opsets": (lambda model: model.opset_import.add(version=19), "does not state one format version"),
    "format too new": (setting(ir_version=1000), "format version 1000 is newer than .*upgrade onnx"),
    "no values": (without_values, "'weight' claims 192x4 values but has a different number"),
    "too few values": (with_values(np.zeros(500, np.float32)), "'weight' claims 192x4 values but has 2000 bytes"),
    "too many values": (with_values(np.zeros(900, np.float32)), "'weight' claims 192x4 values but has 3600 bytes"),
    "huge claim": (lambda model: weight_of(model).dims.extend([1 << 40]), "claims 192x4x1099511627776 values but has"),
    "negative claim": (lambda model: weight_of(model).dims.append(-1), "claims 192x4x-1 values but has"),
    "values as a list": (as_floats, "the values of 'weight' are not stored as raw data"),
    "strings": (lambda model: setattr(weight_of(model), "data_type", TensorProto.STRING), "has an element type"),
    "no such type": (lambda model: setattr(weight_of(model), "data_type", 12345), "has an element type"),
    "nan": (not_a_number(np.float32, TensorProto.FLOAT, np.nan), "'weight' has values that are NaN or infinite"),
    "infinity": (not_a_number(np.float32, TensorProto.FLOAT, -np.inf), "'weight' has values that are NaN"),
    "half nan": (not_a_number(np.float16, TensorProto.FLOAT16, np.nan), "'weight' has values that are NaN"),
    "double nan": (not_a_number(np.float64, TensorProto.DOUBLE, np.nan), "'weight' has values that are NaN"),
    "bfloat16 nan": (bfloat16_nan, "'weight' has values that are NaN"),
    "small nan": (
        lambda model: initializer(model, "bias", np.array([1, np.inf], np.float32)),
        "'bias' has values that are NaN",
    ),
    "nan in a constant": (hidden_constant, "'hidden' has values that are NaN"),
}


@pytest.mark.parametrize("case", REFUSED_GRAPHS)
def test_what_no_classifier_needs_is_refused_by_all_that_compute(tmp_path: Path, case: str) -> None:
    change, reason = REFUSED_GRAPHS[case]
    model = classifier()
    change(model)
    path = written(tmp_path, model)
    for load in (Graph.read, OnnxRuntimeRunner.open):
        with pytest.raises(ArtifactError, match=f"^refused: .*{reason}") as caught:
            load(path)
        assert str(caught.value).count(str(path)) == 1
        assert len(str(caught.value)) < 600
    # Facts are told of whatever can be parsed, and nothing is computed for them.
    assert graph_facts(path).metadata == METADATA


def test_a_name_that_is_no_text_is_refused_and_shown_escaped(tmp_path: Path) -> None:
    path = written(tmp_path, classifier())
    path.write_bytes(path.read_bytes().replace(b"flat", b"\xff\xfe\xfd\xfc").replace(b"MatMul", b"M\xff\xffMul"))
    with pytest.raises(ArtifactError, match="a name in it is not UTF-8"):
        Graph.read(path)
    assert r"M\xff\xffMul" in graph_facts(path).operators


def test_what_onnx_runtime_would_take_for_its_own_format_is_read_as_onnx(tmp_path: Path) -> None:
    # ONNX Runtime looks for ORTM in the fifth to eighth byte, which here are in the producer's name.
    path = written(tmp_path, classifier())
    path.write_bytes(b"\x12\x08AAORTMAA" + path.read_bytes())
    with OnnxRuntimeRunner.open(path) as runner:
        assert runner.infer(np.zeros((1, 3, SIZE, SIZE), np.float32)).tolist() == [[0, 0, 0, 0]]


# --- what the metadata must agree with --------------------------------------------------------------------------------


def input_shape(*dims: int | str, element: int = TensorProto.FLOAT) -> Change:
    def change(model: ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", element, dims))

    return change


def output_type(model: ModelProto) -> None:
    model.graph.node[1].output[0] = "wide"
    model.graph.node.append(helper.make_node("Cast", ["wide"], ["logits"], to=TensorProto.DOUBLE))
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.DOUBLE


def described(**values: Any) -> Change:
    def change(model: ModelProto) -> None:
        text = ModelMetadata(**{**{field: getattr(METADATA, field) for field in METADATA_FIELDS}, **values}).to_json()
        helper.set_model_props(model, {METADATA_KEY: text})

    return change


def both(first: Change, second: Change) -> Change:
    def change(model: ModelProto) -> None:
        first(model)
        second(model)

    return change


METADATA_FIELDS = ("name", "config", "labels", "preprocessing", "batch", "input")
FIVE = SMLPNetConfig(dim=4, depths=(1,), image_size=SIZE, num_classes=5)
LARGER = SMLPNetConfig(dim=4, depths=(1,), image_size=16, num_classes=CLASSES)

LIES: dict[str, tuple[Change, str]] = {
    "dynamic height": (input_shape("batch", 3, "height", SIZE), r"input is 'images float batchx3xheightx8'.*Nx3x8x8"),
    "another size": (input_shape("batch", 3, SIZE, 2 * SIZE), "input is 'images float batchx3x8x16'"),
    "one channel": (input_shape("batch", 1, SIZE, SIZE), "input is 'images float batchx1x8x8'"),
    "rank 3": (input_shape(3, SIZE, SIZE), "input is 'images float 3x8x8'"),
    "rank 5": (input_shape("batch", 3, SIZE, SIZE, 1), "input is"),
    "no shape": (lambda model: model.graph.input[0].type.tensor_type.ClearField("shape"), "input is 'images float '"),
    "no type": (lambda model: model.graph.input[0].ClearField("type"), "input is 'images undefined '"),
    "doubles": (input_shape("batch", 3, SIZE, SIZE, element=TensorProto.DOUBLE), "input is 'images double"),
    "output of doubles": (output_type, "output is 'logits double batchx4', expected float"),
    "two inputs": (lambda model: model.graph.input.add(name="more"), "it has 2 inputs and 1 outputs"),
    "no input": (lambda model: model.graph.ClearField("input"), "it has 0 inputs and 1 outputs"),
    "two outputs": (lambda model: model.graph.output.add(name="flat"), "it has 1 inputs and 2 outputs"),
    "fixed batch, unsaid": (
        input_shape(2, 3, SIZE, SIZE),
        "input is 'images float 2x3x8x8', but its metadata says.*Nx3x8x8",
    ),
    "five classes": (described(config=FIVE, labels=tuple("abcde")), "output has shape 1x4, but its metadata says 5"),
    "larger images": (
        described(config=LARGER, preprocessing=Preprocessing(image_size=16)),
        "but its metadata says float Nx3x16x16",
    ),
    "a batch that is not": (described(batch=4), "but its metadata says float 4x3x8x8"),
    "pixels that are not": (described(input="uint8"), "input is 'images float .*but its metadata says uint8 Nx8x8x3"),
    "pixels, unsaid": (
        input_shape("batch", SIZE, SIZE, 3, element=TensorProto.UINT8),
        "input is 'images uint8 batchx8x8x3', but its metadata says float Nx3x8x8",
    ),
    "pixels, channels first": (
        both(described(input="uint8"), input_shape("batch", 3, SIZE, SIZE, element=TensorProto.UINT8)),
        "input is 'images uint8 batchx3x8x8', but its metadata says uint8 Nx8x8x3",
    ),
    "normalized, channels last": (
        both(described(input="uint8"), input_shape("batch", SIZE, SIZE, 3)),
        "input is 'images float batchx8x8x3', but its metadata says uint8 Nx8x8x3",
    ),
    "output that nothing computes": (
        lambda model: setattr(model.graph.output[0], "name", "x"),
        "shapes do not fit|has",
    ),
    "unsorted": (lambda model: model.graph.node.append(model.graph.node.pop(0)), "its shapes do not fit together"),
}


@pytest.mark.parametrize("case", LIES)
def test_metadata_must_be_the_graphs(tmp_path: Path, case: str) -> None:
    change, reason = LIES[case]
    model = classifier()
    change(model)
    path = written(tmp_path, model)
    for load in (Graph.read, OnnxRuntimeRunner.open):
        with pytest.raises(ArtifactError, match=f"^refused: .*({reason})"):
            load(path)
    assert graph_facts(path).metadata is not None


def test_a_fixed_batch_that_is_stated_runs(tmp_path: Path) -> None:
    model = classifier(batch=3)
    described(batch=3)(model)
    with OnnxRuntimeRunner.open(written(tmp_path, model)) as runner:
        assert runner.infer(np.zeros((4, 3, SIZE, SIZE), np.float32)).shape == (4, CLASSES)


@pytest.mark.parametrize(
    ("metadata", "kind", "reason"),
    [
        (None, ArtifactError, "has no labels and preprocessing inside: .*smlp export"),
        ('{"schema": 2}', ConfigError, "metadata schema 2 is not 1.*upgrade smlp-deploy"),
        (METADATA.to_json().replace('"a", ', ""), ConfigError, "3 labels for 4 classes"),
        (METADATA.to_json().replace("0.875", "7"), ConfigError, "crop-pct 7 is outside"),
        (METADATA.to_json().replace('"small"', '"../../small"'), ConfigError, "cannot be part of a file name"),
        ("[" * 100_000, ConfigError, "metadata is damaged: nested more than 32 deep"),
        ("\udcff", ConfigError, "metadata is damaged"),
    ],
)
def test_metadata_that_cannot_be_used_are_refused(
    tmp_path: Path, metadata: str | None, kind: type[SmlpError], reason: str
) -> None:
    model = classifier()
    model.ClearField("metadata_props")
    content = model.SerializeToString()
    if metadata is not None:
        prop = onnx.StringStringEntryProto(key=METADATA_KEY, value="x").SerializeToString()[:-3]
        text = metadata.encode("utf-8", "surrogateescape")
        prop += b"\x12" + varint(len(text)) + text
        content += b"\x72" + varint(len(prop)) + prop
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(kind, match=reason):
        OnnxRuntimeRunner.open(path)


# --- what a graph may cost --------------------------------------------------------------------------------------------


def doubling(model: ModelProto, times: int) -> None:
    """Each Concat doubles what the one before made."""
    names = ["images", *(f"twice{i}" for i in range(1, times)), "entry"]
    prepend(
        model,
        *(helper.make_node("Concat", [a, a], [b], axis=0) for a, b in pairwise(names)),
    )


def squaring(model: ModelProto, times: int) -> None:
    """Each step squares the batch: one image stays one, two become 2^(2^times)."""
    nodes, name = [], "images"
    initializer(model, "one_column", [-1, 1])
    initializer(model, "one_row", [1, -1])
    initializer(model, "images_again", [-1, 3, SIZE, SIZE])
    nodes.append(helper.make_node("ReduceMean", ["images", "axes"], ["step0"], keepdims=0))
    initializer(model, "axes", [1, 2, 3])
    for i in range(times):
        nodes += [
            helper.make_node("Reshape", [f"step{i}", "one_column"], [f"column{i}"]),
            helper.make_node("Reshape", [f"step{i}", "one_row"], [f"row{i}"]),
            helper.make_node("Add", [f"column{i}", f"row{i}"], [f"step{i + 1}"]),
        ]
    nodes.append(helper.make_node("ReduceMean", [f"step{times}"], ["mean"], keepdims=0))
    nodes.append(helper.make_node("Add", [name, "mean"], ["entry"]))
    prepend(model, *nodes)


def padding(model: ModelProto, by: int) -> None:
    initializer(model, "kernel", np.ones((3, 3, 1, 1), np.float32))
    prepend(model, helper.make_node("Conv", ["images", "kernel"], ["entry"], pads=[by] * 4))


def unknown_size(model: ModelProto) -> None:
    """A shape that depends on what the image shows."""
    initializer(model, "axes", [0, 1, 2, 3])
    prepend(
        model,
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0),
        helper.make_node("Cast", ["mean"], ["size"], to=TensorProto.INT64),
        helper.make_node("Unsqueeze", ["size", "zero"], ["sizes"]),
        helper.make_node("Reshape", ["images", "sizes"], ["entry"]),
    )
    initializer(model, "zero", [0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: doubling(model, 19), "value 'entry' has more than 67108864 elements per image"),
        (lambda model: doubling(model, 50), "value 'twice19' has more than 67108864 elements per image"),
        (lambda model: doubling(model, 200), "its shapes do not fit together"),
        (lambda model: padding(model, 1 << 20), "value 'entry' has more than 67108864 elements per image"),
        (lambda model: padding(model, (1 << 62) - 1), "value 'entry' has|cannot be determined|do not fit"),
        (unknown_size, "the size of its value 'entry' cannot be determined"),
    ],
)
def test_values_have_a_known_and_bounded_size(tmp_path: Path, change: Change, reason: str) -> None:
    model = classifier()
    change(model)
    with pytest.raises(ArtifactError, match=f"^refused: .*({reason})"):
        OnnxRuntimeRunner.open(written(tmp_path, model))


def test_growth_with_the_batch_is_bounded_before_it_happens(tmp_path: Path) -> None:
    model = classifier()
    squaring(model, 5)
    batch = np.ones((2, 3, SIZE, SIZE), np.float32)
    with OnnxRuntimeRunner.open(written(tmp_path, model)) as runner:
        assert runner.infer(batch[:1]).shape == (1, CLASSES)
        with pytest.raises(ArtifactError, match="has more than 67108864 elements per image"):
            runner.infer(batch)
        assert runner.infer(batch[:1]).shape == (1, CLASSES)


@pytest.mark.parametrize(
    ("bound", "reason"),
    [
        ("MAX_PARTS", "it has more than 1 fields"),
        ("MAX_ATTRIBUTES", "one of its nodes has more than 1 attributes"),
        ("MAX_NODES", "it has more than 1 nodes or weights"),
        ("MAX_TOTAL_ELEMENTS", "its values have more than 1 elements per image in total"),
        ("MAX_MACS", "it needs more than 1 multiplications per image"),
        ("MAX_STRUCTURE_BYTES", "it has more than 1 bytes besides its weights"),
        ("MAX_FILE_BYTES", "is larger than 1 bytes"),
    ],
)
def test_every_bound_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, reason: str) -> None:
    model = classifier()
    prepend(model, helper.make_node("Split", ["images"], ["entry"], axis=0, num_outputs=1))
    path = written(tmp_path, model)
    check_classifier(read_onnx(path), METADATA)
    monkeypatch.setattr(onnxfile, bound, 1)
    with pytest.raises(ArtifactError, match=reason):
        OnnxRuntimeRunner.open(path)


# --- what is no ONNX file ---------------------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>not found</html>",
        b"\x08",
        b"\x3a\xff\xff\xff\xff\x0f",
        b"\x3a" + b"\xff" * 20,
        b"\x3b\x3c",
        b"\x08\x0a",
        bytes(1000),
        b"\x3a\x04\x2a\x7f\x4a\x00",
    ],
    ids=lambda content: content[:6].hex() or "empty",
)
def test_what_is_no_protobuf_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"^not an ONNX file.*x\.onnx · export it again$"):
        read_onnx(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content, path = classifier().SerializeToString(), tmp_path / "x.onnx"
    for keep in range(0, len(content), 37):
        path.write_bytes(content[:keep])
        with pytest.raises((ArtifactError, ConfigError)):
            OnnxRuntimeRunner.open(path)


def test_many_empty_nodes_are_refused_before_they_become_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    nodes = b"\x0a\x00" * (1 << 20)
    path.write_bytes(b"\x3a" + varint(len(nodes)) + nodes)
    with pytest.raises(ArtifactError, match="it has more than 200000 fields"):
        read_onnx(path)


MEASURE = """
import sys
from pathlib import Path
from smlp_deploy.errors import SmlpError
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024

for path in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak()
    try:
        with OnnxRuntimeRunner.open(path):
            told = "loaded"
    except SmlpError as error:
        told = str(error)
    print(path.stat().st_size, peak() - before, told.replace(chr(10), " "))
"""
TIMES, CONSTANT = 5, 1 << 30


def message(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def with_fields_in_a_node(field: bytes, size: int) -> bytes:
    """A file that is sound but for a node with so many bytes of one field."""
    model = classifier()
    node: bytes = model.graph.node.pop().SerializeToString()
    rest: bytes = model.SerializeToString()
    return rest + message(7, message(1, node + field * (size // len(field))))


EMPTY_ATTRIBUTE, EMPTY_INPUT, DIMENSION, EMPTY_FLOATS = b"\x2a\x00", b"\x0a\x00", b"\x08\x01", b"\x22\x00"
NEARLY_ALL = onnxfile.MAX_STRUCTURE_BYTES - (1 << 14)
HOSTILE: dict[str, bytes] = {
    "attributes": message(7, message(1, message(5, b"") * (4 << 20))) * 4,
    "attributes below the bound": with_fields_in_a_node(EMPTY_ATTRIBUTE, NEARLY_ALL),
    "inputs below the bound": with_fields_in_a_node(EMPTY_INPUT, NEARLY_ALL),
    "packed dimensions": message(7, message(5, message(1, b"\x01" * (32 << 20)))),
    "dimensions": message(7, message(5, DIMENSION * (16 << 20))),
    "empty values": message(7, message(5, EMPTY_FLOATS * (16 << 20))),
    "graphs": message(7, b"") * (16 << 20),
    "weights": message(7, message(5, b"") * (16 << 20)),
}


def test_memory_stays_within_a_multiple_of_the_file(tmp_path: Path, digits_export: Export) -> None:
    def model(name: str, change: Change) -> Path:
        (tmp_path / name).mkdir()
        made = classifier()
        change(made)
        return written(tmp_path / name, made)

    for name, content in HOSTILE.items():
        (tmp_path / name).write_bytes(content)
    files = [
        digits_export.path,
        *(tmp_path / name for name in HOSTILE),
        model("doubled", lambda model: doubling(model, 60)),
        model("padded", lambda model: padding(model, 1 << 18)),
        model("claimed", lambda model: weight_of(model).dims.extend([1 << 40])),
    ]
    command = [sys.executable, "-c", MEASURE, *map(str, files)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    told = [line.split(" ", 2) for line in lines]
    assert [what.split(":")[0] for _, _, what in told] == ["loaded", *["refused"] * (len(files) - 1)]
    for size, growth, what in told:
        assert int(growth) <= TIMES * int(size) + CONSTANT, what


def test_fields_that_come_in_pieces_are_merged_as_protobuf_does(tmp_path: Path) -> None:
    model = classifier()
    del model.graph.initializer[1:]
    rest = ModelProto(producer_name="second", graph=onnx.GraphProto(name="again"))
    rest.graph.node.add(op_type="Relu")
    rest.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "more"))
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString() + rest.SerializeToString())
    assert read_onnx(path).structure == ModelProto.FromString(path.read_bytes())


def test_messages_nested_deeper_than_protobuf_parses_are_refused(tmp_path: Path) -> None:
    nested = b""
    for _ in range(49):  # a sequence of sequences, each of two messages
        nested = message(4, message(1, nested))
    path = tmp_path / "x.onnx"
    path.write_bytes(classifier().SerializeToString() + message(7, message(13, message(2, nested))))
    for load in (Graph.read, OnnxRuntimeRunner.open):
        with pytest.raises(ArtifactError):
            load(path)


def test_weights_in_two_pieces_are_refused(tmp_path: Path) -> None:
    model = classifier()
    tensor = weight_of(model)
    twice = tensor.SerializeToString() + b"\x4a" + varint(len(tensor.raw_data)) + tensor.raw_data
    model.graph.initializer.remove(tensor)
    graph = b"\x2a" + varint(len(twice)) + twice
    path = tmp_path / "x.onnx"
    path.write_bytes(model.SerializeToString() + b"\x3a" + varint(len(graph)) + graph)
    assert ModelProto.FromString(path.read_bytes()).graph.initializer[1].name == "weight"
    with pytest.raises(ArtifactError, match="the values of 'weight' are not stored as raw data"):
        check_graph(read_onnx(path))


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    for name, reason in [
        ("pipe.onnx", "is not a regular file"),
        ("folder.onnx", "is a directory"),
        ("absent.onnx", "no such file"),
        ("loop.onnx", "cannot read it: Too many levels of symbolic links"),
    ]:
        for load in (graph_facts, Graph.read, OnnxRuntimeRunner.open):
            with pytest.raises(ArtifactError, match=rf"^{reason}.*{name}"):
                load(tmp_path / name)


def test_onnx_runtimes_own_reason_does_not_repeat_the_path(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node.append(model.graph.node[1])
    path = written(tmp_path, model)
    with pytest.raises(ArtifactError) as caught:
        OnnxRuntimeRunner.open(path)
    assert str(caught.value).count(str(path)) == 1
