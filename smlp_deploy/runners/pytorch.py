"""The network in PyTorch on the CPU: as trained, the reference for all artifacts; and lowered, for a closer look."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.lowering import LoweredBlock, lower
from smlp_deploy.runners.base import FloatArray


class PyTorchRunner:
    """Runs a checkpoint's network as trained.

    Args:
        checkpoint: the weights.
        metadata: labels and preprocessing to go with them.
    """

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        self.name = f"pytorch (CPU) {checkpoint.path.name}"
        self.metadata = metadata
        self._network: nn.Module | None = checkpoint.network()

    def infer(self, batch: FloatArray) -> FloatArray:
        assert self._network is not None, "the runner is closed"
        with torch.inference_mode():
            logits: FloatArray = self._network(self._input(batch)).float().numpy()
        return logits

    def _input(self, batch: FloatArray) -> Tensor:
        return torch.from_numpy(batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._network = None


class HalfRunner(PyTorchRunner):
    """Runs a checkpoint's lowered network in true fp16 arithmetic, float32 only where an fp16 graph has it. Slow."""

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        super().__init__(checkpoint, metadata)
        self.name = f"pytorch (CPU, lowered, fp16) {checkpoint.path.name}"
        self._network = lower(checkpoint.network()).narrow(torch.float16)

    def _input(self, batch: FloatArray) -> Tensor:
        return torch.from_numpy(batch).half()


class RecordingRunner(PyTorchRunner):
    """Runs a checkpoint's lowered network in float32 and remembers its largest activation.

    What is watched is what an fp16 graph keeps in fp16: inputs and outputs of every convolution, among them the axial
    products, and the output of every block.
    """

    def __init__(self, checkpoint: Checkpoint, metadata: ModelMetadata) -> None:
        super().__init__(checkpoint, metadata)
        self.name = f"pytorch (CPU, lowered) {checkpoint.path.name}"
        network = lower(checkpoint.network())
        self._largest: dict[str, float] = {}
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d | LoweredBlock):
                module.register_forward_hook(self._recorder(name))
        self._network = network

    def _recorder(self, name: str) -> Any:
        def record(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found = max(float(tensor.abs().max()) for tensor in (*inputs, output))
            self._largest[name] = max(found, self._largest.get(name, 0.0))

        return record

    def largest(self) -> tuple[str, float]:
        """The layer with the largest absolute activation so far, and that activation."""
        return max(self._largest.items(), key=lambda item: item[1])
