"""Trains a tiny sMLPNet for two steps with PyTorch Lightning, and leaves what its ModelCheckpoint writes.

    python -m tests.support.lightning_run FOLDER

Run in a process of its own: importing Lightning takes seconds, warns, and changes logging.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from smlp_deploy.models.smlpnet import SMLPNet
from tests.support.recipe import CASES, config_of, recipe_weights

CONFIG = config_of(CASES["micro"])


class Schedule(Enum):
    cosine = "cosine"


@dataclass
class Options:
    rate: float = 1e-3
    schedule: Schedule = Schedule.cosine


class Lit(lightning.LightningModule):
    """What a training script's module looks like: the network, a loss with a buffer, and all kinds of settings."""

    def __init__(self, options: Options, root: Path, scale: Any, weights: Any, activation: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = SMLPNet(CONFIG)
        self.model.load_state_dict(recipe_weights(CONFIG, 1))
        self.criterion = nn.CrossEntropyLoss(weight=torch.ones(CONFIG.num_classes))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.criterion(self.model(images), labels)
        self.log("val_loss", loss)
        return loss

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        images = torch.zeros(2, 3, CONFIG.image_size, CONFIG.image_size)
        return DataLoader(TensorDataset(images, torch.tensor([0, 1])), batch_size=2)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["metrics"] = {"top1": np.float64(0.5), "history": np.arange(3.0), "took": timedelta(seconds=3)}


def main(folder: Path) -> None:
    module = Lit(Options(), Path("/data/images"), np.float32(0.5), np.ones(3), nn.functional.relu)
    plain = lightning.callbacks.ModelCheckpoint(dirpath=folder, save_last=True, filename="{epoch}-{val_loss:.2f}")
    averaging = lightning.callbacks.EMAWeightAveraging(decay=0.5)
    averaged = lightning.callbacks.ModelCheckpoint(dirpath=folder, filename="averaged")
    runs: tuple[list[lightning.Callback], ...] = ([plain], [averaging, averaged])
    for callbacks in runs:
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=callbacks,
        )
        trainer.fit(module)
        trainer.save_checkpoint(folder / f"whole-{len(callbacks)}.ckpt", weights_only=len(callbacks) == 1)
    state = OrderedDict((key, tensor.clone()) for key, tensor in module.model.state_dict().items())
    torch.save(state, folder / "expected.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
