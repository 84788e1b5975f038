"""The network in PyTorch on the CPU: as trained, the reference of all artifacts; and lowered, for inspection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from smlp_deploy.images.batches import FloatArray
from smlp_deploy.metadata import ModelMetadata, trace_points
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.lowering import LoweredBlock, lower
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.runners.base import Closing


class PyTorchRunner(Closing):
    """Runs a checkpoint's network as trained.

    Args:
        checkpoint: the weights.
        metadata: labels and preprocessing to go with them; may be that of an artifact, but the input is float32.
    """

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        self.name = f"pytorch (CPU) {checkpoint.path.name}"
        self.metadata = replace(metadata, input="float32")
        self._network: nn.Module | None = self._prepared(checkpoint.network())

    def infer(self, batch: FloatArray) -> FloatArray:
        assert self._network is not None, "the runner is closed"
        with torch.inference_mode():
            logits: FloatArray = self._network(self._input(batch)).float().numpy()
        return logits

    def _prepared(self, network: SMLPNet) -> nn.Module:
        """The module to run, made from the trained network."""
        return network

    def _input(self, batch: FloatArray) -> Tensor:
        return torch.from_numpy(batch)

    def close(self) -> None:
        self._network = None


class CompiledRunner(PyTorchRunner):
    """Runs a checkpoint's network as trained through `torch.compile`, which compiles it again for each batch size."""

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        super().__init__(checkpoint, metadata)
        self.name = f"torch.compile (CPU) {checkpoint.path.name}"

    def _prepared(self, network: SMLPNet) -> nn.Module:
        return cast(nn.Module, torch.compile(network, dynamic=False))


class HalfRunner(PyTorchRunner):
    """Runs a checkpoint's lowered network in true fp16 arithmetic, in float32 only where an fp16 graph is. Slow."""

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        super().__init__(checkpoint, metadata)
        self.name = f"pytorch (CPU, lowered, fp16) {checkpoint.path.name}"

    def _prepared(self, network: SMLPNet) -> nn.Module:
        return lower(network).narrow(torch.float16)

    def _input(self, batch: FloatArray) -> Tensor:
        return torch.from_numpy(batch).half()


class RecordingRunner(PyTorchRunner):
    """Runs a checkpoint's lowered network in float32 and records its largest activation.

    It watches the values that are fp16 in an fp16 graph: the inputs and outputs of every convolution, including the
    axial products, and the output of every block.
    """

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        self._largest: dict[str, float] = {}
        super().__init__(checkpoint, metadata)
        self.name = f"pytorch (CPU, lowered) {checkpoint.path.name}"

    def _prepared(self, network: SMLPNet) -> nn.Module:
        lowered = lower(network)
        for name, module in lowered.named_modules():
            if isinstance(module, nn.Conv2d | LoweredBlock):
                module.register_forward_hook(self._recorder(name))
        return lowered

    def _recorder(self, name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found = max(float(tensor.abs().max()) for tensor in (*inputs, output))
            self._largest[name] = max(found, self._largest.get(name, 0.0))

        return record

    def largest(self) -> tuple[str, float]:
        """The layer with the largest absolute activation so far, and its value."""
        return max(self._largest.items(), key=lambda item: item[1])


class TracingPyTorchRunner(PyTorchRunner):
    """Runs a checkpoint's network, as trained or lowered, and returns the values inside.

    Args:
        checkpoint: the weights.
        metadata: labels and preprocessing to go with them.
        lowered: run the lowered network, as deployed.
    """

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata, *, lowered: bool = False) -> None:
        self._lowered = lowered
        self._seen: dict[tuple[str, int], Tensor] = {}
        super().__init__(checkpoint, metadata)
        if lowered:
            self.name = f"pytorch (CPU, lowered) {checkpoint.path.name}"

    def trace(self, batch: FloatArray) -> dict[str, FloatArray]:
        self._seen.clear()
        self.infer(batch)
        return {
            point.name: self._seen[point.kind, point.index].contiguous().numpy()
            for point in trace_points(self.metadata.config)
        }

    def _prepared(self, network: SMLPNet) -> nn.Module:
        if not self._lowered:
            self._watch(network.to_patch_embedding, "embedding", lambda _, output: output)
            self._watch(network.channel_mix, "tokens", lambda x, _: x.permute(0, 3, 1, 2))
            self._watch(network.channel_mix, "block", lambda x, output: (x + output).permute(0, 3, 1, 2))
            return network
        deployed = lower(network)
        self._watch(deployed.embeddings, "embedding", lambda _, output: output)
        self._watch(deployed.blocks, "block", lambda _, output: output)
        for index, block in enumerate(deployed.blocks):
            self._watch_token_mixing(block, index)
        return deployed

    def _watch(self, modules: nn.ModuleList, kind: str, look: Callable[[Tensor, Tensor], Tensor]) -> None:
        for index, module in enumerate(modules):

            def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, index: int = index) -> None:
                self._seen[kind, index] = look(inputs[0], output)

            module.register_forward_hook(see)

    def _watch_token_mixing(self, block: nn.Module, index: int) -> None:
        """A lowered block adds the output of its `fuse` to its input."""

        def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._seen["tokens", index] = inputs[0]

        def leave(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen["tokens", index] = self._seen["tokens", index] + output

        block.register_forward_pre_hook(enter)
        cast(nn.Module, block.fuse).register_forward_hook(leave)
