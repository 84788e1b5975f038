"""What a file is, from the file alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from smlp_deploy.artifacts import is_checkpoint
from smlp_deploy.dependencies import require, require_torch
from smlp_deploy.errors import UsageError
from smlp_deploy.files import sha256_of
from smlp_deploy.runners.tensorrt import read_manifest


def inspect_file(path: Path, *, ema: bool = False) -> dict[str, Any]:
    """Facts about a checkpoint, an ONNX file or an engine, ready for JSON.

    Raises:
        UsageError: it is a file of another kind.
        SmlpError: the file cannot be read.
    """
    if path.suffix.lower() == ".onnx":
        return _onnx_facts(path)
    if is_checkpoint(path):
        return _checkpoint_facts(path, ema=ema)
    if path.suffix.lower() == ".engine":
        return _engine_facts(path)
    raise UsageError(
        "neither a checkpoint, an ONNX file nor an engine",
        where=path,
        fix="expected weights as torch.save or safetensors writes them, .onnx or .engine",
    )


def _checkpoint_facts(path: Path, *, ema: bool) -> dict[str, Any]:
    require_torch("to read a checkpoint")
    from smlp_deploy.models.checkpoint import load_checkpoint
    from smlp_deploy.models.variants import mac_count, parameter_count, variant_of

    checkpoint = load_checkpoint(path, ema=ema)
    variant = variant_of(checkpoint.config)
    return {
        "kind": "checkpoint",
        **_file_facts(path),
        "variant": variant.name if variant else None,
        "config": asdict(checkpoint.config),
        "parameters": parameter_count(checkpoint.config),
        "macs": mac_count(checkpoint.config),
        "weights": checkpoint.weights,
        "other_weights": checkpoint.others,
        "tensors_left_out": checkpoint.left_out,
        "not_built": checkpoint.not_built,
        **asdict(checkpoint.metadata),
    }


def _onnx_facts(path: Path) -> dict[str, Any]:
    require("onnx", purpose="to read an ONNX file", extra="cpu")
    from smlp_deploy.graphs.file import graph_facts

    return {"kind": "onnx", **_file_facts(path), **asdict(graph_facts(path))}


def _engine_facts(path: Path) -> dict[str, Any]:
    """From the manifest beside an engine, which must describe this very engine; the engine is never loaded."""
    return {"kind": "engine", **_file_facts(path), **asdict(read_manifest(path))}


def _file_facts(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"file": str(path)}
    return {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
