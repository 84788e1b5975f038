"""The network in PyTorch on the CPU: as trained, the reference for all artifacts; and lowered, for a closer look."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.lowering import LoweredBlock, lower
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.runners.base import Closing, FloatArray


class PyTorchRunner(Closing):
    """Runs a checkpoint's network as trained.

    Args:
        checkpoint: the weights.
        metadata: labels and preprocessing to go with them.
    """

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        self.name = f"pytorch (CPU) {checkpoint.path.name}"
        self.metadata = metadata
        self._network: nn.Module | None = self._prepared(checkpoint.network())

    def infer(self, batch: FloatArray) -> FloatArray:
        assert self._network is not None, "the runner is closed"
        with torch.inference_mode():
            logits: FloatArray = self._network(self._input(batch)).float().numpy()
        return logits

    def _prepared(self, network: SMLPNet) -> nn.Module:
        """What is run of the trained network."""
        return network

    def _input(self, batch: FloatArray) -> Tensor:
        return torch.from_numpy(batch)

    def close(self) -> None:
        self._network = None


class HalfRunner(PyTorchRunner):
    """Runs a checkpoint's lowered network in true fp16 arithmetic, float32 only where an fp16 graph has it. Slow."""

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        super().__init__(checkpoint, metadata)
        self.name = f"pytorch (CPU, lowered, fp16) {checkpoint.path.name}"

    def _prepared(self, network: SMLPNet) -> nn.Module:
        return lower(network).narrow(torch.float16)

    def _input(self, batch: FloatArray) -> Tensor:
        return torch.from_numpy(batch).half()


class RecordingRunner(PyTorchRunner):
    """Runs a checkpoint's lowered network in float32 and remembers its largest activation.

    What is watched is what an fp16 graph keeps in fp16: inputs and outputs of every convolution, among them the axial
    products, and the output of every block.
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
        """The layer with the largest absolute activation so far, and that activation."""
        return max(self._largest.items(), key=lambda item: item[1])
