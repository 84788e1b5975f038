"""Small ONNX graphs."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def smallest_classifier() -> onnx.ModelProto:
    """A graph of which `fakes.metadata` may be the metadata: one matrix product."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    weights = numpy_helper.from_array(np.ones((192, 4), np.float32), "w")
    graph = helper.make_graph(nodes, "smallest", [images], [logits], [weights])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="test")
