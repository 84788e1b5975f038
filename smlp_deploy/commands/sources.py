"""The defaults of a verb's input: finds the file, or exports it, and says which one it uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smlp_deploy.errors import CheckError, SmlpError

if TYPE_CHECKING:
    from smlp_deploy.dependencies import GpuDevice
    from smlp_deploy.graphs.file import Graph
    from smlp_deploy.metadata import ModelMetadata
    from smlp_deploy.models.checkpoint import Checkpoint
    from smlp_deploy.pipeline.export import Export
    from smlp_deploy.runners.placement import Placement


def load_source(source: str | None, *, ema: bool) -> Checkpoint:
    """The checkpoint that an argument names; without one the bundled model, with a note."""
    from smlp_deploy.commands.terminal import downloading, note
    from smlp_deploy.files import BUNDLED_CHECKPOINT
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.pretrained import find_checkpoint

    if source is None:
        note("no checkpoint given; using the bundled digits model")
        return load_checkpoint(BUNDLED_CHECKPOINT, ema=ema)
    with downloading() as progress:
        path = find_checkpoint(source, progress=progress)
    checkpoint = load_checkpoint(path, ema=ema)
    if checkpoint.others or checkpoint.weights not in ("the whole file", "model", "state_dict"):
        left_out = f"; tensors beside them that are left out: {checkpoint.left_out}" if checkpoint.left_out else ""
        note(f"{path.name}: the weights taken are {checkpoint.weights}{left_out}")
    for other in checkpoint.others:
        note(f"{path.name} also has {other}")
    return checkpoint


def source_graph(source: str | None, *, form: str) -> Graph:
    """The graph to build from: the given file, the newest one, or a new export in the form "cpu" or "gpu"."""
    from dataclasses import replace

    from smlp_deploy.artifacts import default_path, newest_artifact
    from smlp_deploy.commands.terminal import note
    from smlp_deploy.dependencies import require_torch
    from smlp_deploy.graphs.file import Graph

    # A file that takes uint8 cannot be converted.
    newest = newest_artifact("*-fp32*.onnx", without="*-fp32-uint8*.onnx") if source is None else None
    if newest is not None:
        note(f"no source given; using {newest}, the newest fp32 file in artifacts/")
    found = newest or (Path(source) if source is not None and source.endswith(".onnx") else None)
    if found is not None:
        graph = Graph.read(found)
        if graph.metadata.form != form:
            note(f"{found} has the form for CPUs; an engine of one exported with --for gpu has fewer kernels")
        return graph
    require_torch("to export")
    from smlp_deploy.models.description import describe

    checkpoint = load_source(source, ema=False)
    metadata = replace(describe(checkpoint), form=form)
    note(f"exporting {default_path(metadata)} first")
    return export_and_show(checkpoint, metadata, None).graph


def export_and_show(checkpoint: Checkpoint, metadata: ModelMetadata, target: Path | None, **options: Any) -> Export:
    """Export a checkpoint and show the parity report.

    Args:
        checkpoint: the weights.
        metadata: to write into the file.
        target: the file; by default in artifacts/.
        options: passed to `export_checkpoint`.

    Raises:
        CheckError: the export failed parity.
    """
    from smlp_deploy.artifacts import default_path
    from smlp_deploy.commands.tables import show_parity, show_sensitivity
    from smlp_deploy.commands.terminal import building
    from smlp_deploy.pipeline.export import export_checkpoint

    target = target or default_path(metadata)
    with building(f"exporting {metadata.name} and comparing it with the trained network") as progress:
        export = export_checkpoint(checkpoint, metadata, target, progress=progress, **options)
    if export.sensitivity is not None:
        show_sensitivity(export.sensitivity)
    show_parity(export.report, on_stderr=True)
    if not export.report.passed:
        raise CheckError(
            f"parity failed: {', '.join(gate.name for gate in export.report.failures)}",
            where=export.path,
            fix=f"see the report {export.report_path}",
        )
    return export


def default_model(given: Path | None, placement: Placement) -> Path:
    """The model to predict with; notes which one if none is given. An engine is one of them if it can run there."""
    from smlp_deploy.artifacts import artifacts_by_age, newest_artifact
    from smlp_deploy.commands.terminal import note
    from smlp_deploy.dependencies import is_installed
    from smlp_deploy.files import BUNDLED_CHECKPOINT, BUNDLED_MODEL

    if given is not None:
        return given
    engine = newest_artifact("*.engine")
    on_gpu = placement.provider is None and not placement.only_cpu and placement.runtime == "auto"
    if engine is not None and on_gpu and _fits(engine, placement.gpu):
        note(f"no model given; using {engine}, the newest engine in artifacts/")
        return engine
    files = artifacts_by_age()
    if files:
        return _fastest(files, placement)
    note("no model given and none in artifacts/; using the bundled digits model")
    return BUNDLED_MODEL if is_installed("onnxruntime") else BUNDLED_CHECKPOINT


def _fastest(files: Sequence[Path], placement: Placement) -> Path:
    """Of ONNX files, the newest first, the fastest here that holds the same network as the newest; notes which."""
    from smlp_deploy.commands.terminal import building, note

    if len(files) == 1:
        note(f"no model given; using {files[0]}, the only one in artifacts/")
        return files[0]
    from smlp_deploy.evaluation.fastest import compare_speed

    with building("comparing speed") as progress:
        speeds = compare_speed(files, placement, progress=progress)
    best, *others = speeds
    if others:
        slower = ", ".join(f"{one.path.name} {1e3 * one.seconds:.3g}" for one in others)
        note(
            f"no model given; using {best.path}, the fastest here of the {len(speeds)} files of the newest model in "
            f"artifacts/: {1e3 * best.seconds:.3g} ms an image (in place of {slower})"
        )
    else:
        note(f"no model given; using {best.path}, the newest in artifacts/")
    return best.path


def _fits(engine: Path, gpu: GpuDevice | None) -> bool:
    """Whether an engine can run here, on the GPU that was chosen; notes why not."""
    from smlp_deploy.commands.terminal import note
    from smlp_deploy.runners.tensorrt import check_machine, read_manifest

    try:
        check_machine(engine, read_manifest(engine), gpu)
    except SmlpError as error:
        note(f"engine skipped: {error}")
        return False
    return True
