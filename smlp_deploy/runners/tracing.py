"""Values inside an ONNX graph, in ONNX Runtime: between its blocks, and of each int8 layer beside its fp32 form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from onnx import GraphProto

from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.errors import ArtifactError
from smlp_deploy.graphs.edit import Int8Layer, add_int8_copy, add_output, add_trace_outputs, int8_layers
from smlp_deploy.graphs.file import Graph
from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.metadata import trace_points
from smlp_deploy.runners.base import Closing, LayerOutput, input_of
from smlp_deploy.runners.onnxruntime import OnnxRuntimeRunner


class _OpenedRunner(OnnxRuntimeRunner):
    """Runs a graph with additional outputs.

    Args:
        graph: what to run.
        extend: adds the outputs, given the graph and its path.
        provider: see `OnnxRuntimeRunner`.
        gpu: see `OnnxRuntimeRunner`.
    """

    def __init__(
        self,
        graph: Graph,
        extend: Callable[[GraphProto, Path], None],
        *,
        provider: str = "cpu",
        gpu: GpuDevice | None = None,
    ) -> None:
        self._extend = extend
        super().__init__(graph, provider=provider, gpu=gpu)

    def added(self, batch: ImageArray) -> list[FloatArray]:
        """The values of the added outputs; a graph with a fixed batch size gets zeros as padding."""
        size = self.metadata.batch or len(batch)
        parts = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            missing = np.zeros((size - len(part), *part.shape[1:]), part.dtype)
            outputs = self._outputs(np.concatenate([part, missing]))[1:]
            parts.append([values[: len(part)] for values in outputs])
        return [np.concatenate(values) for values in zip(*parts, strict=True)]

    def _content(self, graph: Graph) -> bytes:
        model = graph.model()
        self._extend(model.graph, graph.path)
        return bytes(model.SerializeToString())


class TracingOnnxRunner(_OpenedRunner):
    """Runs a graph that `smlp export` made, in any precision, and returns the values inside.

    Raises:
        ArtifactError: as `OnnxRuntimeRunner`, or the nodes lack the names that `smlp export` gives them.
    """

    def __init__(self, graph: Graph, *, provider: str = "cpu", gpu: GpuDevice | None = None) -> None:
        self._config = graph.metadata.config
        super().__init__(graph, self._watch, provider=provider, gpu=gpu)

    def trace(self, batch: ImageArray) -> dict[str, FloatArray]:
        names = [point.name for point in trace_points(self.metadata.config)]
        return dict(zip(names, self.added(batch), strict=True))

    def _watch(self, graph: GraphProto, path: Path) -> None:
        add_trace_outputs(graph, self._config, path)


class QuantizedLayers(Closing):
    """The int8 layers of one graph beside the same layers of an fp32 graph, its source or an equivalent export.

    Layers are matched by the name of their weight, because the number in a node's name depends on the export.

    Args:
        candidate: an int8 graph that `smlp export` made.
        reference: an fp32 graph of a network of the same shape.

    Raises:
        ArtifactError: as `OnnxRuntimeRunner`, or the fp32 graph lacks a layer.
    """

    def __init__(self, candidate: Graph, reference: Graph) -> None:
        self._layers: list[Int8Layer] = []
        self._deployed = _OpenedRunner(candidate, self._watch_deployed)
        self._reference = _OpenedRunner(reference, self._watch_reference)

    def trace_layers(self, batch: ImageArray) -> Iterator[LayerOutput]:
        """See `LayerTracer`; image by image if the graph allows, because all layers are in memory at once."""
        size = self._deployed.metadata.batch or self._reference.metadata.batch or 1
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            preprocessing = self._deployed.metadata.preprocessing
            deployed, both = (
                runner.added(input_of(runner, part, preprocessing)) for runner in (self._deployed, self._reference)
            )
            for i, layer in enumerate(self._layers):
                yield LayerOutput(layer.name, both[2 * i], both[2 * i + 1], deployed[i])

    def close(self) -> None:
        self._deployed.close()
        self._reference.close()

    def _watch_deployed(self, graph: GraphProto, path: Path) -> None:
        self._layers = int8_layers(graph)
        for layer in self._layers:
            add_output(graph, layer.output, f"{layer.weight}_out")

    def _watch_reference(self, graph: GraphProto, path: Path) -> None:
        """Adds two outputs per layer: its own, and that of an int8 copy with the same input."""
        nodes = {name: node for node in graph.node for name in node.input}
        for layer in self._layers:
            if layer.weight not in nodes:
                raise ArtifactError(
                    f"has no layer with the weight {layer.weight}",
                    where=path,
                    fix="give the checkpoint as the reference",
                )
            node = nodes[layer.weight]
            add_output(graph, node.output[0], f"{layer.weight}_out")
            add_output(graph, add_int8_copy(graph, node, layer), f"{layer.weight}_alone")
