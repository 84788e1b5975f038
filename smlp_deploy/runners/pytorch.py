"""The trained network in PyTorch on the CPU: the reference that artifacts are compared with."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch

from smlp_deploy.metadata import ModelMetadata
from smlp_deploy.models.checkpoint import Checkpoint
from smlp_deploy.models.smlpnet import SMLPNet
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
        self._network: SMLPNet | None = checkpoint.network()

    def infer(self, batch: FloatArray) -> FloatArray:
        assert self._network is not None, "the runner is closed"
        with torch.inference_mode():
            logits: FloatArray = self._network(torch.from_numpy(batch)).numpy()
        return logits

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._network = None
