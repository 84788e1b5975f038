"""Speed of the lowered graph on this CPU, beside PyTorch, `torch.compile` and the unlowered baseline.

    python -m benchmarks.speed [VARIANT] [--json FILE]

The variant gets the seeded weights of `tests/support/recipe.py`, is exported in fp32, and is timed by
`smlp benchmark FILE --baseline --reference WEIGHTS`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch

from smlp_deploy.cli import main as smlp
from smlp_deploy.exporters.onnx import export_onnx
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.models.variants import VARIANTS
from tests.support.recipe import recipe_weights

SEED = 1


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the lowered graph, PyTorch, torch.compile, and the baseline.")
    parser.add_argument("variant", nargs="?", default="smlpnet_tiny", choices=VARIANTS)
    parser.add_argument("--json", type=Path, help="Also write the report here.")
    arguments = parser.parse_args()
    report = ["-o", str(arguments.json.absolute())] if arguments.json else []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        weights, artifact = (f"{arguments.variant}{end}" for end in (".pth", "-fp32.onnx"))
        torch.save(recipe_weights(VARIANTS[arguments.variant].config, SEED), weights)
        checkpoint = load_checkpoint(Path(weights))
        export_onnx(checkpoint.network(), describe(checkpoint), path=Path(artifact)).save()
        smlp(["benchmark", artifact, "--baseline", "--reference", weights, *report])


if __name__ == "__main__":
    main()
