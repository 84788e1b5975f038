from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from smlp_deploy.errors import SmlpError
from smlp_deploy.evaluation import parity
from smlp_deploy.exporters import onnx as exporter
from smlp_deploy.exporters.capture import capture
from smlp_deploy.exporters.onnx import OPSETS, export_onnx
from smlp_deploy.images.defaults import bundled_images
from smlp_deploy.metadata import METADATA_KEY, ModelMetadata
from smlp_deploy.models import lowering
from smlp_deploy.models.checkpoint import Checkpoint, load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.lowering import aligned_columns
from smlp_deploy.pipeline.export import Export, export_checkpoint
from tests.support.fakes import Exported
from tests.support.recipe import CASES, config_of, recipe_weights


@pytest.fixture
def model(digits_export: Export) -> onnx.ModelProto:
    return onnx.load(digits_export.path)


def test_the_batch_axis_is_dynamic_for_real(digits: Checkpoint, digits_export: Export) -> None:
    session = onnxruntime.InferenceSession(digits_export.path)
    network = digits.network()
    for size in (1, 2, 7, 64):
        images = np.random.default_rng(size).standard_normal((size, 3, 32, 32), dtype=np.float32)
        logits = session.run(["logits"], {"images": images})[0]
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
        assert logits.shape == (size, 10)
        assert np.abs(logits - expected).max() < 1e-4 * expected.std()


def test_input_and_output_are_as_documented(model: onnx.ModelProto) -> None:
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    for value, sizes in ((images, [3, 32, 32]), (logits, [10])):
        tensor = value.type.tensor_type
        assert tensor.elem_type == onnx.TensorProto.FLOAT
        assert tensor.shape.dim[0].dim_param == "batch"
        assert [dim.dim_value for dim in tensor.shape.dim[1:]] == sizes


def test_axial_mlps_are_products_with_the_constant_on_the_left(model: onnx.ModelProto, digits: Checkpoint) -> None:
    blocks = sum(digits.config.depths)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert len(products) == 2 * blocks
    for node in products:
        (constant,) = (name for name in node.input if name in weights)
        rows, columns = weights[constant].dims
        assert rows == columns
    counts = Counter(node.op_type for node in model.graph.node)
    # An embedding per stage; depth-wise, three of fuse and two MLP convolutions per block: none for an axial MLP.
    assert counts["Conv"] == len(digits.config.depths) + 6 * blocks
    assert counts["Transpose"] == counts["Concat"] == counts["Reshape"] == 0
    assert counts["BatchNormalization"] == counts["LayerNormalization"] == 0


def test_the_form_for_gpus_has_products_without_a_concatenation(exported: Exported, digits: Checkpoint) -> None:
    graph = onnx.load(exported(form="gpu").path).graph
    blocks = sum(digits.config.depths)
    counts = Counter(node.op_type for node in graph.node)
    assert counts["MatMul"] == counts["Transpose"] == 2 * blocks
    assert counts["Conv"] == len(digits.config.depths) + 3 * blocks
    assert counts["Concat"] == 0
    weights = {tensor.name: tensor for tensor in graph.initializer}
    tokens = [node for node in graph.node if "mixing.tokens" in node.name]
    assert len(tokens) == blocks
    for node, stage in zip(tokens, digits.config.stages(), strict=True):
        grid = digits.config.grid(stage)
        assert list(weights[node.input[0]].dims) == [3 * grid * grid, grid * aligned_columns(grid)]
    # No transpose of a constant is left to compute.
    assert not [node for node in graph.node if node.op_type == "Transpose" and node.input[0] in weights]


def test_a_grid_too_large_for_one_product_has_a_pair(
    digits: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "LARGEST_DENSE_GRID", digits.config.grid(1))
    metadata = replace(describe(digits), form="gpu")
    result = export_checkpoint(digits, metadata, tmp_path / "x.onnx")
    assert result.report.passed
    scopes = [node.name.split("/")[0] for node in result.graph.model().graph.node if node.op_type == "MatMul"]
    paired = ["width", "fuse_width", "height", "fuse_height"]
    for stage, block in zip(digits.config.stages(), range(len(digits.config.stages())), strict=True):
        products = {scope.split(".")[-1] for scope in scopes if scope.startswith(f"blocks.{block}.")}
        assert products == set(paired if stage == 0 else ["tokens", "fuse"])


def test_everything_needed_is_inside(model: onnx.ModelProto, digits: Checkpoint, digits_export: Export) -> None:
    (prop,) = model.metadata_props
    assert prop.key == METADATA_KEY
    metadata = ModelMetadata.from_json(prop.value, where="test")
    assert metadata.labels == tuple("0123456789")
    assert metadata.preprocessing == digits.metadata.preprocessing
    assert metadata.config == digits.config
    assert metadata.checkpoint_sha256 == digits.sha256
    assert metadata.libraries.keys() == {"smlp-deploy", "torch", "onnx"}


def test_nothing_of_this_machine_is_inside(digits_export: Export) -> None:
    content = digits_export.path.read_bytes()
    for word in (str(Path(exporter.__file__).parent.parent), str(Path.home()), "site-packages", "stack_trace"):
        assert word.encode() not in content


def test_nodes_are_named_after_their_block(model: onnx.ModelProto) -> None:
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {name.split("/")[0] for name in names if "/" in name} >= {
        "embeddings.0",
        "blocks.0",
        "blocks.5.mixing.fuse",
        "head",
    }


def test_the_same_checkpoint_gives_the_same_bytes(digits: Checkpoint, digits_export: Export, tmp_path: Path) -> None:
    export_onnx(digits.network(), describe(digits), path=tmp_path / "again.onnx").save()
    assert (tmp_path / "again.onnx").read_bytes() == digits_export.path.read_bytes()


@pytest.mark.parametrize("opset", [min(OPSETS), max(OPSETS)])
def test_other_opsets_and_a_fixed_batch(micro_pth: Path, tmp_path: Path, opset: int) -> None:
    checkpoint = load_checkpoint(micro_pth)
    result = export_checkpoint(checkpoint, describe(checkpoint, batch=3), tmp_path / "x.onnx", opset=opset)
    assert result.report.passed
    model = onnx.load(result.path)
    assert next(entry.version for entry in model.opset_import if entry.domain == "") == opset
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3


def test_an_invalid_graph_is_one_clear_error(
    digits: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*args: Any, **options: Any) -> onnx.ModelProto:
        model = capture(*args, **options)
        model.graph.node[0].input[0] = "nowhere"
        return model

    monkeypatch.setattr(exporter, "capture", damaged)
    with pytest.raises(SmlpError, match="export at opset 20 failed"):
        export_onnx(digits.network(), describe(digits), path=tmp_path / "x.onnx").save()


# Any batch size for one of them; a fixed one is cheaper to trace and to compare.
@pytest.mark.parametrize(
    ("name", "batch", "form"),
    [
        ("smlpnet_tiny", None, "cpu"),
        ("smlpnet_tiny", 2, "gpu"),
        ("smlpnet_small", 2, "cpu"),
        ("smlpnet_base", 1, "cpu"),
    ],
)
def test_full_size_networks_export_and_pass_parity(
    name: str, batch: int | None, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # How many inputs there are is of no account for random weights; small networks are compared on all of them.
    monkeypatch.setattr(parity, "LARGEST_BATCH", 6)
    monkeypatch.setattr(parity, "batch_size_of", lambda runner: 6)
    images = bundled_images()[:2]
    path = tmp_path / f"{name}.pth"
    torch.save({"model": recipe_weights(config_of(CASES[name]), CASES[name]["seed"])}, path)
    checkpoint = load_checkpoint(path)
    metadata = replace(describe(checkpoint, batch=batch), form=form)
    result = export_checkpoint(checkpoint, metadata, tmp_path / f"{name}.onnx", images=images)
    assert result.report.passed, result.report.failures
    assert (result.report.images, result.report.noise) == (2, 4)
    assert describe(checkpoint).variant == name
