"""What a network would be without this package, to time artifacts beside."""

from __future__ import annotations

from pathlib import Path

from smlp_deploy.artifacts import CHECKPOINT_SUFFIXES
from smlp_deploy.dependencies import require_proof
from smlp_deploy.evaluation.worker import Target
from smlp_deploy.runners import open_runner


def baselines_of(
    model: Path, folder: Path, *, reference: Path | None = None, provider: str | None = None
) -> tuple[Target, ...]:
    """What a model would be without this package: PyTorch, `torch.compile`, and the unlowered baseline in ONNX Runtime.

    Args:
        model: an artifact or checkpoint.
        folder: for the unlowered baseline.
        reference: the checkpoint it was made from; by default found as `smlp verify` finds it.
        provider: what ONNX Runtime runs the unlowered baseline on.

    Raises:
        UsageError: the checkpoint is not known.
        MissingDependencyError: PyTorch is not installed.
        SmlpError: a file cannot be used.
    """
    require_proof("for the baselines")
    from smlp_deploy.pipeline.export import (  # needs PyTorch, which timing artifacts does not
        find_reference,
        unlowered_baseline,
    )

    if model.suffix.lower() in CHECKPOINT_SUFFIXES:
        checkpoint = reference or model
    else:
        with open_runner(model) as runner:
            checkpoint = reference or find_reference(runner.metadata, model)
    unlowered = unlowered_baseline(checkpoint, folder)
    eager = () if checkpoint == model else (Target(path=checkpoint),)
    return (*eager, Target(path=checkpoint, compiled=True), Target(path=unlowered, provider=provider))
