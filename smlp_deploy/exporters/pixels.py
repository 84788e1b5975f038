"""A graph of normalized images to one of pixels, which it normalizes itself; the last pass over a graph.

Rules:

1. The input keeps its name and batch size; N, 3, S, S float32 becomes N, S, S, 3 uint8, as images are decoded.
2. The graph computes (value / 255 - mean) / std in float32, whatever its precision, as a product and a sum with
   constants of three values. Everything after that stays as it is.
3. The transpose comes last: TensorRT does not transpose uint8, and with the sum as the last operation TensorRT-RTX
   needs one more kernel for int8. In this order it computes all of it in the kernel that reads the input anyway, which
   pads the channels or narrows them, so that the number of kernels stays the same in every precision.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import ModelProto

from smlp_deploy.metadata import Preprocessing

_CHANNELS_FIRST = (0, 3, 1, 2)


def take_pixels(model: ModelProto, preprocessing: Preprocessing) -> ModelProto:
    """The graph with uint8 pixels N, S, S, 3 as its input; `model` itself is unchanged.

    Args:
        model: of one input, images N, 3, S, S float32; in any precision.
        preprocessing: has the mean and the standard deviation of the channels.
    """
    graph = ir.from_proto(model)
    PixelsPass(preprocessing)(graph)
    converted = ir.to_proto(graph)
    converted.graph.ClearField("value_info")  # shape inference rewrites it, in its own order
    return onnx.shape_inference.infer_shapes(converted, strict_mode=True, data_prop=True)


class PixelsPass(ir.passes.InPlacePass):
    """Puts the normalization into a graph, by the rules of this module."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
        self.scale = (1 / (255 * std)).astype(np.float32)
        self.shift = (-mean / std).astype(np.float32)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        images = graph.inputs[0]
        assert images.shape is not None, "an input without a shape"
        batch, channels, height, width = images.shape
        pixels = ir.val(images.name, ir.DataType.UINT8, ir.Shape([batch, height, width, channels]))  # rule 1
        images.name = f"{images.name}_normalized"
        scale, shift = (
            _constant(graph, f"{pixels.name}_{name}", values)
            for name, values in (("scale", self.scale), ("shift", self.shift))
        )
        cast = _node("Cast", [pixels], f"{pixels.name}_fp32", pixels.shape, to=int(ir.DataType.FLOAT))
        scaled = _node("Mul", [*cast.outputs, scale], f"{pixels.name}_scaled", pixels.shape)  # rule 2
        shifted = _node("Add", [*scaled.outputs, shift], f"{pixels.name}_shifted", pixels.shape)
        graph.inputs[0] = pixels
        order = {"perm": _CHANNELS_FIRST}
        transpose = ir.node("Transpose", shifted.outputs, order, outputs=[images], name="images/transpose")  # rule 3
        graph[0].prepend([cast, scaled, shifted, transpose])
        return ir.passes.PassResult(model, modified=True)


def _constant(graph: ir.Graph, name: str, values: NDArray[np.float32]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(values, name=name))
    graph.register_initializer(value)
    return value


def _node(operator: str, inputs: list[ir.Value], output: str, shape: ir.Shape | None, **attributes: int) -> ir.Node:
    """A node of the normalization; its output is float32."""
    value = ir.val(output, ir.DataType.FLOAT, shape)
    return ir.node(operator, inputs, attributes, outputs=[value], name=f"images/{operator.lower()}")
