"""Reading weights files without trusting them.

Code in a file is never run, and what a file claims about itself is checked before memory is spent on it
(`docs/security.md`). The configuration is inferred from the tensors' shapes, and every tensor must match it exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from smlp_deploy import strictjson
from smlp_deploy.artifacts import checkpoint_format, checkpoint_stem
from smlp_deploy.errors import CheckpointError, ConfigError
from smlp_deploy.files import check_regular, read_text, sha256_of
from smlp_deploy.metadata import METADATA_KEY, CheckpointMetadata, SMLPNetConfig
from smlp_deploy.models.smlpnet import SMLPNet
from smlp_deploy.models.torchfile import Placeholder, StoredTensor, open_torch_file
from smlp_deploy.models.weightsets import NO_AVERAGES, Choice, choose_weights

logger = logging.getLogger(__name__)

_Shapes = Mapping[str, tuple[int, ...]]
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_WEIGHT_KEYS = ("model", "state_dict")
_EMA_KEYS = ("model_ema", "state_dict_ema")
_SAVE_STATE_DICT = "save the state dict: torch.save(network.state_dict(), FILE)"
_MAX_HEADER_BYTES = 8 << 20
_MAX_KEYS = 1 << 16
_MAX_KEY_LENGTH = 200
# Tied weights are stored once in a file and appear twice in its state dict.
_MOST_COPIES = 2
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A tensor in a file, its values not read yet; `dtype` is a name if it is a type that weights never have."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str
    read: Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Trained weights and what their file says about them.

    Attributes:
        path: the file they came from.
        sha256: of that file.
        config: inferred from the shapes.
        state_dict: float32, every value finite, exactly the keys of `SMLPNet(config)`.
        metadata: labels, preprocessing and training figures, as far as the file states them.
        ema: whether these are the moving-average weights.
        weights: where in the file they stand: "state_dict (keys model.*)".
        others: other weights in the file, each with how to take it.
        left_out: how many tensors beside the weights were not read.
        not_built: the names of what the file would have Python import, at most 32 of them.
    """

    path: Path
    sha256: str
    config: SMLPNetConfig
    state_dict: Mapping[str, Tensor]
    metadata: CheckpointMetadata
    ema: bool = False
    weights: str = ""
    others: tuple[str, ...] = ()
    left_out: int = 0
    not_built: tuple[str, ...] = ()

    def network(self, *, shared: bool = False) -> SMLPNet:
        """The trained network, in evaluation mode.

        Args:
            shared: the weights are the checkpoint's own, not to be changed, in place of a copy.
        """
        network = _empty_network(self.config)
        weights = self.state_dict if shared else {key: tensor.clone() for key, tensor in self.state_dict.items()}
        network.load_state_dict(weights, strict=True, assign=True)
        return network.eval()


def load_checkpoint(path: Path, *, ema: bool = False) -> Checkpoint:
    """Read a file of torch.save or safetensors, whatever its name.

    The weights are found wherever a training tool has put them: in nested mappings, under any prefix of their keys
    (`choose_weights`). Labels and preprocessing come from safetensors metadata or from a `.json` beside the file.

    Args:
        path: the file.
        ema: take the moving-average weights of a training checkpoint.

    Raises:
        CheckpointError: it is unsafe, damaged, or not an sMLPNet; the message names the key and both shapes. Or it has
            several networks and does not say which is meant.
    """
    _require_file(path)
    with _opened(path, ema=ema) as found:
        entries, choice = found.entries, found.choice
        _check_entries(entries, path)
        try:
            config = infer_config({key: entry.shape for key, entry in entries.items()})
        except (CheckpointError, ConfigError) as error:
            raise CheckpointError(error.what, where=path, fix=error.fix) from None
        weights = _weights(entries, path)
    return Checkpoint(
        path=path,
        sha256=sha256_of(path),
        config=config,
        state_dict=weights,
        metadata=_metadata(path, found.text, config),
        ema=ema,
        weights=choice.taken.name if choice else "",
        others=choice.others if choice else (),
        left_out=choice.left_out if choice else 0,
        not_built=found.not_built,
    )


def infer_config(shapes: _Shapes) -> SMLPNetConfig:
    """The configuration of the network whose state dict has these shapes.

    Raises:
        CheckpointError: a key is missing, unknown, or has a shape that contradicts the rest.
        ConfigError: the shapes give an invalid configuration.
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
    if path.suffix.lower() in (".onnx", ".engine"):
        raise CheckpointError("is an artifact by its name, not a checkpoint", where=path, fix="give a weights file")
    if not check_regular(path, error=CheckpointError, fix="give the path of a weights file"):
        raise CheckpointError("empty file", where=path, fix="fetch it again")


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What a file holds, to be read while it is open.

    Attributes:
        entries: the network's key -> tensor.
        choice: which of the file's tensors these are; None if they are no sMLPNet's.
        text: the metadata of safetensors, if any.
        not_built: see `Checkpoint`.
    """

    entries: dict[str, _Entry]
    choice: Choice | None
    text: str | None = None
    not_built: tuple[str, ...] = ()


@contextmanager
def _opened(path: Path, *, ema: bool) -> Iterator[_Found]:
    """A file, open, and the tensors to read from it."""
    kind = checkpoint_format(path) or ("safetensors" if path.suffix.lower() == ".safetensors" else "torch")
    with _open_safetensors(path, ema=ema) if kind == "safetensors" else _open_torch(path, ema=ema) as found:
        yield found


@contextmanager
def _open_torch(path: Path, *, ema: bool) -> Iterator[_Found]:
    with open_torch_file(path) as file:
        choice = _choose(file.content, path, ema=ema, kind=StoredTensor)
        state_dict = choice.values if choice else _unwrap(file.content, path, ema=ema)
        tensors = _tensors(state_dict, path, known=choice is not None)
        for key, tensor in tensors.items():
            file.check(tensor, key)
        claimed = sum(tensor.nbytes for tensor in tensors.values())
        if claimed > _MOST_COPIES * path.stat().st_size:
            raise CheckpointError("refused: its tensors share values and claim far more than it holds", where=path)
        entries = {key: _described(tensor, file.read) for key, tensor in tensors.items()}
        yield _Found(entries=entries, choice=choice, not_built=file.not_built)


def _described(tensor: StoredTensor, read: Callable[[StoredTensor], Tensor]) -> _Entry:
    return _Entry(shape=tensor.shape, dtype=tensor.dtype, read=lambda: read(tensor))


def _choose(content: Any, path: Path, *, ema: bool, kind: type) -> Choice | None:
    """The weights in a saved object; None if it has none of an sMLPNet."""
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {_kind(content)}, not a state dict", where=path, fix=_SAVE_STATE_DICT)
    try:
        return choose_weights(content, ema=ema, is_tensor=lambda value: isinstance(value, kind))
    except CheckpointError as error:
        raise CheckpointError(error.what, where=path, fix=error.fix) from None


def _unwrap(content: dict[Any, Any], path: Path, *, ema: bool) -> dict[Any, Any]:
    """The state dict in a saved object that has none of an sMLPNet, to say what is wrong with it."""
    wanted = _EMA_KEYS if ema else _WEIGHT_KEYS
    inner = next((content[key] for key in wanted if isinstance(content.get(key), (dict, Placeholder))), None)
    if inner is None and ema:
        raise CheckpointError(NO_AVERAGES, where=path, fix="omit --ema")
    if isinstance(inner, Placeholder):
        raise CheckpointError(f"its weights are a {inner.name}, which is not built", where=path, fix=_SAVE_STATE_DICT)
    return content if inner is None else inner


def _tensors(state_dict: dict[Any, Any], path: Path, *, known: bool) -> dict[str, StoredTensor]:
    """The state dict, after checking that it is one; `known` says that it has keys of an sMLPNet."""
    if not state_dict or not all(isinstance(key, str) for key in state_dict):
        raise CheckpointError("holds no state dict: a mapping from names to tensors", where=path)
    _check_keys(state_dict, path)
    for key, value in state_dict.items():
        if not isinstance(value, StoredTensor):
            what = f"{key!r} is a {_kind(value)}, not a tensor of numbers"
            raise CheckpointError(what if known else f"holds no weights of an sMLPNet: {what}", where=path)
    return state_dict


def _kind(value: Any) -> str:
    return value.name if isinstance(value, Placeholder) else type(value).__name__


def _check_keys(keys: Collection[str], path: Path) -> None:
    """Bound what is built from the keys, and the messages that quote them."""
    if len(keys) > _MAX_KEYS:
        raise CheckpointError(f"refused: it has more than {_MAX_KEYS} tensors", where=path)
    if any(len(key) > _MAX_KEY_LENGTH for key in keys):
        raise CheckpointError(f"refused: it has a name of more than {_MAX_KEY_LENGTH} characters", where=path)


@contextmanager
def _open_safetensors(path: Path, *, ema: bool) -> Iterator[_Found]:
    _check_keys(_header_keys(path), path)
    with ExitStack() as stack:
        with _damaged_safetensors(path):
            file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
            names = file.keys()
            entries = {name: _safetensors_entry(file, name, path) for name in names}
            text = (file.metadata() or {}).get(METADATA_KEY)
        choice = _choose(entries, path, ema=ema, kind=_Entry)
        if choice is None and ema:
            raise CheckpointError(NO_AVERAGES, where=path, fix="omit --ema")
        yield _Found(entries=choice.values if choice else entries, choice=choice, text=text)


def _safetensors_entry(file: Any, name: str, path: Path) -> _Entry:
    described = file.get_slice(name)
    dtype = described.get_dtype()

    def read() -> Tensor:
        with _damaged_safetensors(path):
            tensor: Tensor = file.get_tensor(name)
            return tensor

    return _Entry(shape=tuple(described.get_shape()), dtype=_SAFETENSORS_DTYPES.get(dtype, dtype), read=read)


@contextmanager
def _damaged_safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"damaged safetensors file: {reason}", where=path, fix="fetch it again") from None


def _header_keys(path: Path) -> list[str]:
    """The names in a safetensors file. Duplicates are refused: the one attack that the safetensors library misses."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, path.stat().st_size):
            raise CheckpointError("damaged safetensors file: its header claims more bytes than it has", where=path)
        header = file.read(length)
    try:
        document = strictjson.loads(header)
    except ValueError as error:
        raise CheckpointError(f"damaged safetensors file: its header is not valid JSON: {error}", where=path) from None
    if not isinstance(document, dict):
        raise CheckpointError("damaged safetensors file: its header is not a JSON object", where=path)
    return [key for key in document if key != "__metadata__"]


def _check_entries(entries: Mapping[str, _Entry], path: Path) -> None:
    for key, entry in entries.items():
        allowed = (torch.int64,) if _is_counter(key) else _WEIGHT_DTYPES
        if entry.dtype not in allowed:
            found, expected = (str(dtype).removeprefix("torch.") for dtype in (entry.dtype, allowed[0]))
            raise CheckpointError(f"{key!r} is {found}, expected {expected}", where=path)


def _weights(entries: Mapping[str, _Entry], path: Path) -> dict[str, Tensor]:
    """The tensors in float32 and contiguous, in their own memory."""
    weights = {}
    for key, entry in entries.items():
        if _is_counter(key):
            continue
        weights[key] = entry.read().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        if not torch.isfinite(weights[key]).all():
            raise CheckpointError(f"{key!r} has values that are NaN or beyond float32", where=path, fix="train again")
    for key in [key for key in weights if key.endswith(".running_var")]:
        if (weights[key] < 0).any():
            raise CheckpointError(f"{key!r} has negative variances", where=path)
        weights[f"{key.removesuffix('running_var')}num_batches_tracked"] = torch.tensor(0)
    return weights


def _metadata(path: Path, text: str | None, config: SMLPNetConfig) -> CheckpointMetadata:
    beside = path.with_name(f"{checkpoint_stem(path)}.json")
    source: Path = path
    if text is None and beside.is_file():
        source = beside
        text = read_text(
            beside, error=CheckpointError, fix="labels and preprocessing are read from it; remove or correct it"
        )
    if text is None:
        return CheckpointMetadata()
    return CheckpointMetadata.from_json(text, where=source, image_size=config.image_size)
