"""Small ONNX graphs, and traces that are made once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn


def smallest_classifier() -> onnx.ModelProto:
    """A graph of which `fakes.metadata` may be the metadata: one matrix product."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 8, 8])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])
    nodes = [helper.make_node("Flatten", ["images"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["logits"])]
    weights = numpy_helper.from_array(np.ones((192, 4), np.float32), "w")
    graph = helper.make_graph(nodes, "smallest", [images], [logits], [weights])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)], producer_name="test")


def remembering(trace: Callable[..., onnx.ModelProto]) -> Callable[..., onnx.ModelProto]:
    """`trace`, which is called once for each network, by its class and weights, and set of options."""
    made: dict[tuple[str, ...], bytes] = {}

    def remembered(network: nn.Module, **options: Any) -> onnx.ModelProto:
        weights = hashlib.sha256(type(network).__name__.encode())
        for name, tensor in network.state_dict().items():
            weights.update(name.encode())
            weights.update(tensor.numpy().tobytes())
        key = (weights.hexdigest(), *map(str, sorted(options.items())))
        if key not in made:
            made[key] = trace(network, **options).SerializeToString()
        model: onnx.ModelProto = onnx.ModelProto.FromString(made[key])
        return model

    remembered.__wrapped__ = trace  # type: ignore[attr-defined]
    return remembered
