"""Small ONNX graphs, and traces that are made once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from filelock import FileLock
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


def remembering(trace: Callable[..., onnx.ModelProto], folder: Path) -> Callable[..., onnx.ModelProto]:
    """`trace`, which is called once for each network, by its class and weights, and set of options.

    Traces are kept in a folder, so that processes share them.
    """

    def remembered(network: nn.Module, **options: Any) -> onnx.ModelProto:
        key = hashlib.sha256(f"{type(network).__name__} {sorted(options.items())}".encode())
        for name, tensor in network.state_dict().items():
            key.update(name.encode())
            key.update(tensor.numpy().tobytes())
        path = folder / f"{key.hexdigest()}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                path.write_bytes(trace(network, **options).SerializeToString())
        return onnx.load(path)

    remembered.__wrapped__ = trace  # type: ignore[attr-defined]
    return remembered
