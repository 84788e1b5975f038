from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto

from smlp_deploy.exporters.pixels import take_pixels
from smlp_deploy.exporters.tensorrt import BuildOptions, TensorRT
from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.images.preprocessing import normalize
from smlp_deploy.metadata import PRECISIONS, BatchProfile, Preprocessing
from smlp_deploy.pipeline.export import Export
from tests.support.fakes import Exported

ADDED = ["Cast", "Mul", "Add", "Transpose"]
PHOTOS = Preprocessing(image_size=32)
"""ImageNet's mean and deviation, with three different channels."""


@pytest.fixture
def model(digits_export: Export) -> ModelProto:
    return onnx.load(digits_export.path)


@pytest.fixture
def pixels() -> ImageArray:
    """Five images with every value from 0 to 255."""
    return np.random.default_rng(0).permutation(np.arange(5 * 32 * 32 * 3) % 256).astype(np.uint8).reshape(5, 32, 32, 3)


def normalized(pixels: ImageArray, preprocessing: Preprocessing) -> FloatArray:
    batch = np.empty((len(pixels), 3, *pixels.shape[1:3]), np.float32)
    normalize(pixels, preprocessing, batch)
    return batch


def run(model: ModelProto, batch: ImageArray, output: str = "logits") -> FloatArray:
    values: FloatArray = onnxruntime.InferenceSession(model.SerializeToString()).run([output], {"images": batch})[0]
    return values


def shape_of(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_rule_1_the_input_keeps_its_name_and_its_batch_size(model: ModelProto, exported: Exported) -> None:
    before = model.SerializeToString()
    for source, batch in ((model, "batch"), (onnx.load(exported(batch=4).path), 4)):
        taken = take_pixels(source, PHOTOS)
        onnx.checker.check_model(taken, full_check=True)
        (images,) = taken.graph.input
        assert (images.name, images.type.tensor_type.elem_type) == ("images", TensorProto.UINT8)
        assert shape_of(images) == [batch, 32, 32, 3]
        assert taken.graph.output == source.graph.output
    assert model.SerializeToString() == before
    assert take_pixels(model, PHOTOS).SerializeToString() == take_pixels(model, PHOTOS).SerializeToString()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rule_2_the_normalization_is_float32_and_the_rest_stays(exported: Exported, precision: str) -> None:
    source = onnx.load(exported(precision).path)
    taken = take_pixels(source, PHOTOS)
    assert [node.op_type for node in taken.graph.node[:4]] == ADDED
    rest = [(node.name, node.op_type, list(node.output)) for node in taken.graph.node[4:]]
    assert rest == [(node.name, node.op_type, list(node.output)) for node in source.graph.node]
    types = {value.name: value.type.tensor_type.elem_type for value in taken.graph.value_info}
    assert {types[node.output[0]] for node in taken.graph.node[:4]} == {TensorProto.FLOAT}
    kept = {tensor.name: tensor for tensor in taken.graph.initializer}
    assert all(
        kept.pop(tensor.name).SerializeToString() == tensor.SerializeToString() for tensor in source.graph.initializer
    )
    assert {(tensor.data_type, *tensor.dims) for tensor in kept.values()} == {(TensorProto.FLOAT, 3)}
    assert len(kept) == 2


def test_rule_2_each_value_is_that_of_the_preprocessing(model: ModelProto, pixels: ImageArray) -> None:
    taken = take_pixels(model, PHOTOS)
    taken.graph.output.append(onnx.helper.make_tensor_value_info("images_normalized", TensorProto.FLOAT, None))
    expected = normalized(pixels, PHOTOS)
    np.testing.assert_allclose(run(taken, pixels, "images_normalized"), expected, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("preprocessing", [PHOTOS, replace(PHOTOS, mean=(-3, 900, 0), std=(0.01, 50, 1000))])
def test_the_logits_are_those_of_the_normalized_images(
    model: ModelProto, pixels: ImageArray, preprocessing: Preprocessing
) -> None:
    expected = run(model, normalized(pixels, preprocessing))
    found = run(take_pixels(model, preprocessing), pixels)
    np.testing.assert_allclose(found, expected, atol=1e-4 * expected.std())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rule_3_tensorrt_needs_not_one_kernel_more(exported: Exported, precision: str) -> None:
    options = BuildOptions(profile=BatchProfile.fixed(8), architectures=("sm89",))
    tensorrt = TensorRT.load("tensorrt-rtx")  # which builds with no GPU
    graph = exported(precision).graph
    before = tensorrt.kernels(graph.content, options)
    after = tensorrt.kernels(take_pixels(graph.model(), PHOTOS).SerializeToString(), options)
    assert len(after) == len(before)
    assert [str(tensor.element) for tensor in after[0].inputs] == ["UInt8"]
    assert {"images/cast", "images/mul", "images/add", "images/transpose"} <= set(after[0].nodes)
