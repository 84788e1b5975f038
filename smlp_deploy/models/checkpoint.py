"""Reading weights files without trusting them.

No code in a file is ever run, and what a file claims about itself is checked before memory is spent on it
(`docs/security.md`). The configuration is read off the tensors' shapes, and everything must fit it exactly.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from smlp_deploy.artifacts import CHECKPOINT_SUFFIXES
from smlp_deploy.errors import CheckpointError, ConfigError
from smlp_deploy.files import sha256_of
from smlp_deploy.metadata import METADATA_KEY, ModelCard, SMLPNetConfig
from smlp_deploy.models.smlpnet import SMLPNet

logger = logging.getLogger(__name__)

_Shapes = Mapping[str, tuple[int, ...]]
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_PREFIXES = ("module.", "_orig_mod.")
_WEIGHT_KEYS = ("model", "state_dict")
_EMA_KEYS = ("model_ema", "state_dict_ema")
_MAX_PICKLE_BYTES = 64 << 20
_MAX_HEADER_BYTES = 64 << 20
# What torch.save writes for tensors in plain containers, and the Namespace of an official checkpoint's options.
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_SAFE_GLOBALS = {
    "collections OrderedDict",
    "collections Counter",
    "argparse Namespace",
    "torch Size",
    "torch device",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}Storage" for name in _STORAGES),
}
_OTHER_IMPORT_OPCODES = {"STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Trained weights and what their file says of them.

    Attributes:
        path: the file they came from.
        sha256: of that file.
        config: read off the shapes.
        state_dict: float32, every value finite, exactly the keys of `SMLPNet(config)`.
        card: labels, preprocessing and training numbers, as far as the file states them.
        ema: whether these are the moving-average weights.
    """

    path: Path
    sha256: str
    config: SMLPNetConfig
    state_dict: Mapping[str, Tensor]
    card: ModelCard
    ema: bool = False

    def network(self) -> SMLPNet:
        """The trained network with its own copy of the weights, in evaluation mode."""
        network = _empty_network(self.config)
        copies = {key: tensor.clone() for key, tensor in self.state_dict.items()}
        network.load_state_dict(copies, strict=True, assign=True)
        return network.eval()


def load_checkpoint(path: Path, *, ema: bool = False) -> Checkpoint:
    """Read a `.pth` or `.safetensors` file.

    A `.pth` may be an official one (a dict with `model`, perhaps `model_ema`, and training state), or a bare state
    dict; `module.` and `_orig_mod.` prefixes are removed. Labels and preprocessing come from safetensors metadata or
    from a `.json` beside the file.

    Args:
        path: the file.
        ema: take the moving-average weights of a training checkpoint.

    Raises:
        CheckpointError: it is unsafe, damaged, or not an sMLPNet; the message names the key and both shapes.
    """
    _require_file(path)
    if path.suffix.lower() == ".safetensors":
        if ema:
            raise CheckpointError("a safetensors file has no moving-average weights", where=path, fix="omit --ema")
        tensors, card_text = _read_safetensors(path)
    else:
        tensors, card_text = _unwrap(_read_pickle(path), path, ema=ema), None
    tensors = _without_prefixes(tensors)
    _check_tensors(tensors, path)
    try:
        config = infer_config({key: tuple(tensor.shape) for key, tensor in tensors.items()})
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(error.what, where=path, fix=error.fix) from None
    return Checkpoint(
        path=path,
        sha256=sha256_of(path),
        config=config,
        state_dict=_weights(tensors, path),
        card=_card(path, card_text, config),
        ema=ema,
    )


def infer_config(shapes: _Shapes) -> SMLPNetConfig:
    """The configuration of the network whose state dict has these shapes.

    Raises:
        CheckpointError: a key is missing, unknown, or has another shape than the rest implies.
        ConfigError: the numbers are no possible configuration.
    """
    patch = _shape(shapes, "to_patch_embedding.0.0.weight", 4)
    dim, patch_size = patch[0], patch[2]
    stages = _count(shapes, lambda s: f"to_patch_embedding.{s}.0.weight")
    blocks = _count(shapes, lambda i: f"token_mix.{i}.0.conv_merge.Conv.weight")
    config = SMLPNetConfig(
        dim=dim,
        depths=_depths(shapes, dim=dim, stages=stages, blocks=blocks),
        expansion=max(1, _shape(shapes, "channel_mix.0.2.net.0.weight", 2)[0] // dim),
        patch_size=patch_size,
        image_size=_shape(shapes, "token_mix.0.1.proj_h.weight", 4)[0] * patch_size,
        num_classes=_shape(shapes, "mlp_head.0.weight", 2)[0],
    )
    _compare(shapes, {key: tuple(tensor.shape) for key, tensor in _empty_network(config).state_dict().items()})
    return config


def _empty_network(config: SMLPNetConfig) -> SMLPNet:
    with torch.device("meta"):
        return SMLPNet(config)


def _shape(shapes: _Shapes, key: str, rank: int) -> tuple[int, ...]:
    shape = shapes.get(key)
    if shape is None:
        raise CheckpointError(f"not an sMLPNet checkpoint: it has no {key!r}")
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{key!r} has shape {shape}, expected {rank} positive sizes")
    return shape


def _count(shapes: _Shapes, key: Callable[[int], str]) -> int:
    count = 0
    while key(count) in shapes:
        count += 1
    return count


def _depths(shapes: _Shapes, *, dim: int, stages: int, blocks: int) -> tuple[int, ...]:
    depths = [0] * stages
    stage = 0
    for i in range(blocks):
        key = f"token_mix.{i}.0.conv_merge.Conv.weight"
        channels = _shape(shapes, key, 4)[0]
        if channels != dim << stage and stage + 1 < stages and channels == dim << stage + 1:
            stage += 1
        if channels != dim << stage:
            raise CheckpointError(f"{key!r} has shape {shapes[key]}, expected {(dim << stage, 1, 3, 3)}")
        depths[stage] += 1
    if 0 in depths:
        raise CheckpointError(
            f"{stages} patch embeddings but stage {depths.index(0)} has no blocks: "
            f"no {f'token_mix.{blocks}.0.conv_merge.Conv.weight'!r} of {dim << depths.index(0)} channels"
        )
    return tuple(depths)


def _compare(found: _Shapes, expected: _Shapes) -> None:
    for key, shape in expected.items():
        if key in found and found[key] != shape:
            raise CheckpointError(f"{key!r} has shape {found[key]}, expected {shape}")
    missing = [key for key in expected if key not in found and not _is_counter(key)]
    if missing:
        raise CheckpointError(f"{missing[0]!r} of shape {expected[missing[0]]} is missing{_and_others(missing)}")
    unknown = [key for key in found if key not in expected]
    if unknown:
        raise CheckpointError(
            f"{unknown[0]!r} of shape {found[unknown[0]]} is not part of sMLPNet{_and_others(unknown)}"
        )


def _and_others(keys: list[str]) -> str:
    return f", and {len(keys) - 1} more keys" if len(keys) > 1 else ""


def _is_counter(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _require_file(path: Path) -> None:
    if path.suffix.lower() not in CHECKPOINT_SUFFIXES:
        raise CheckpointError(
            "not a checkpoint's file name", where=path, fix=f"expected {', '.join(CHECKPOINT_SUFFIXES)}"
        )
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise CheckpointError(what, where=path, fix="give the path of a weights file")
    if path.stat().st_size == 0:
        raise CheckpointError("empty file", where=path, fix="fetch it again")


def _read_pickle(path: Path) -> Any:
    """Whatever a zip-format `.pth` holds, after its claims about sizes and code were checked."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            "not a zip-format torch file: truncated, something else, or written before torch 1.6",
            where=path,
            fix="fetch it again, or save it anew with torch.save",
        )
    try:
        _check_zip(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # torch's own messages advise loading unsafely, so they are not repeated.
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"damaged torch file ({type(error).__name__})", where=path, fix="fetch it again"
        ) from None


def _check_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        if len(set(names)) != len(names):
            raise CheckpointError("refused: a member of the archive occurs twice", where=path, fix="fetch it again")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError("refused: members are compressed, which torch.save never does", where=path)
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise CheckpointError("refused: members claim more bytes than the file has", where=path)
        if (damaged := archive.testzip()) is not None:
            raise CheckpointError(f"damaged: checksum of {damaged!r} is wrong", where=path, fix="fetch it again")
        pickles = [member for member in members if member.filename.endswith("data.pkl")]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise CheckpointError("not a torch file: no data.pkl of sensible size", where=path)
        _check_pickle(archive.read(pickles[0]), path)


def _check_pickle(content: bytes, path: Path) -> None:
    for opcode, argument, _ in pickletools.genops(content):
        wanted = str(argument) if opcode.name == "GLOBAL" else opcode.name
        if opcode.name in _OTHER_IMPORT_OPCODES or (opcode.name == "GLOBAL" and wanted not in _SAFE_GLOBALS):
            raise CheckpointError(
                f"refused, and nothing was run: the file asks for {wanted.replace(' ', '.')}, which is not weights",
                where=path,
                fix="where you trust it, save its weights alone as safetensors",
            )


def _unwrap(content: Any, path: Path, *, ema: bool) -> dict[str, Tensor]:
    """The state dict inside whatever was saved."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}, not a state dict", where=path)
    wanted = _EMA_KEYS if ema else _WEIGHT_KEYS
    inner = next((content[key] for key in wanted if isinstance(content.get(key), Mapping)), None)
    if inner is None and ema:
        raise CheckpointError(f"has no {' or '.join(map(repr, _EMA_KEYS))}", where=path, fix="omit --ema")
    state_dict = content if inner is None else inner
    if not state_dict or not all(isinstance(key, str) for key in state_dict):
        raise CheckpointError("holds no state dict: a mapping from names to tensors", where=path)
    for key, value in state_dict.items():
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise CheckpointError(f"{key!r} is a {type(value).__name__}, not a tensor", where=path)
    return dict(state_dict)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    _check_unique_keys(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata.get(METADATA_KEY)  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"damaged safetensors file: {error}", where=path, fix="fetch it again") from None


def _check_unique_keys(path: Path) -> None:
    """The one attack on the header that the safetensors library lets through."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise CheckpointError("refused: a key of the header occurs twice", where=path)
        return dict(pairs)

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise CheckpointError("damaged safetensors file: its header claims more bytes than it has", where=path)
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise CheckpointError("damaged safetensors file: its header is not JSON", where=path) from None


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
    return tensors


def _check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Layout, type and claimed size of each tensor, before any of its values is read."""
    for key, tensor in tensors.items():
        allowed = (torch.int64,) if _is_counter(key) else _WEIGHT_DTYPES
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in allowed:
            kind = f"{tensor.layout} {tensor.dtype}".replace("torch.", "").replace("strided", "dense")
            raise CheckpointError(f"{key!r} is {kind}, expected dense {str(allowed[0])[6:]}", where=path)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"refused: {key!r} claims more values than the file holds", where=path)


def _weights(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors in float32 and contiguous, in memory of their own."""
    weights = {}
    for key, tensor in tensors.items():
        if _is_counter(key):
            continue
        weights[key] = tensor.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not torch.isfinite(weights[key]).all():
            raise CheckpointError(f"{key!r} has values that are NaN or beyond float32", where=path, fix="train again")
    for key in [key for key in weights if key.endswith(".running_var")]:
        if (weights[key] < 0).any():
            raise CheckpointError(f"{key!r} has negative variances", where=path)
        weights[f"{key.removesuffix('running_var')}num_batches_tracked"] = torch.tensor(0)
    return weights


def _card(path: Path, text: str | None, config: SMLPNetConfig) -> ModelCard:
    beside = path.with_suffix(".json")
    source: Path = path
    if text is None and beside.is_file():
        source = beside
        try:
            text = beside.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read labels and preprocessing: {error}", where=beside) from None
    if text is None:
        return ModelCard()
    return ModelCard.from_json(text, where=source, image_size=config.image_size)
