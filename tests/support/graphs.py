"""Small ONNX graphs, and traces, exports and engines that are made once for all processes."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx
from filelock import FileLock
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from smlp_deploy.exporters.tensorrt import BuildOptions, Engine, TensorRT

T = TypeVar("T")


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


def kept(folder: Path, key: str, make: Callable[[], T]) -> T:
    """What `make` returns, which is called once for each key by all processes that share a folder."""
    path = folder / hashlib.sha256(key.encode()).hexdigest()
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
    made: T = pickle.loads(path.read_bytes())
    return made


def building_once(build: Callable[..., Engine], folder: Path) -> Callable[..., Engine]:
    """`TensorRT.build`, which builds once from each graph with each set of options."""

    def remembered(tensorrt: TensorRT, graph: bytes, options: BuildOptions, **keywords: Any) -> Engine:
        key = f"{tensorrt.version} {hashlib.sha256(graph).hexdigest()} {options}"
        return kept(folder, key, lambda: build(tensorrt, graph, options, **keywords))

    return remembered
