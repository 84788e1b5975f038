"""The same network without this package's lowering, as baselines for benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from smlp_deploy.artifacts import is_checkpoint
from smlp_deploy.dependencies import require_proof
from smlp_deploy.evaluation.worker import Target
from smlp_deploy.pipeline.verify import find_reference
from smlp_deploy.runners import open_runner
from smlp_deploy.runners.placement import ANYWHERE, AUTO, Placement


def baselines_of(model: Path, *, reference: Path | None = None, placement: Placement = ANYWHERE) -> tuple[Target, ...]:
    """A model's baselines: its checkpoint in PyTorch and in `torch.compile`, and the unlowered graph in its runtime.

    Args:
        model: an artifact or checkpoint.
        reference: the checkpoint it was made from; by default found as `smlp verify` finds it.
        placement: where the model runs. Its baselines run on the same GPU, if it runs on one.

    Raises:
        UsageError: the checkpoint was not found.
        MissingDependencyError: PyTorch is not installed.
        SmlpError: a file cannot be used.
    """
    require_proof("for the baselines")
    from smlp_deploy.exporters.onnx import export_unlowered
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.description import describe

    if is_checkpoint(model):
        path = reference or model
    else:
        with open_runner(model, placement=placement.for_file(model)) as runner:
            path = reference or find_reference(runner.metadata, model)
    checkpoint = load_checkpoint(path)
    metadata = describe(checkpoint)
    graph = export_unlowered(checkpoint.network(), metadata, path=Path(f"{metadata.name}-unlowered.onnx"))
    beside = replace(placement.for_file(graph.path), gpu=placement.for_file(model).gpu_of(model))
    in_pytorch = replace(beside, provider=None, runtime=AUTO)
    eager = () if path == model else (Target(path=path, placement=in_pytorch),)
    compiled = Target(path=path, placement=in_pytorch, compiled=True)
    return (*eager, compiled, Target(path=graph.path, placement=beside, graph=graph))
