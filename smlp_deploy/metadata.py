"""What travels with a model: configuration, labels, preprocessing, precision and provenance.

Standard library only, so that a machine that merely predicts can read it. The JSON form stands in an ONNX file's
`metadata_props`, in a safetensors file's metadata, or in a `.json` file beside a checkpoint, under `METADATA_KEY`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from smlp_deploy import strictjson
from smlp_deploy.errors import ConfigError

METADATA_KEY = "smlp_deploy"
SCHEMA_VERSION = 1
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_NUMBER = 1 << 20
"""Of any number in a configuration; none of them is anywhere near."""
MAX_BLOCKS = 2048
MAX_IMAGE_SIZE = 2048
"""Pixels per side; an input of this size takes 50 MB."""
MAX_BATCH = 65536
MAX_TEXT = 1000
"""Characters of a label."""
_MAX_NAME_BYTES = 200
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SMLPNetConfig:
    """The shape of an sMLPNet (arXiv 2109.05422, section 3 and table 1).

    Attributes:
        dim: channels of the first stage; stage `s` has `dim * 2**s`.
        depths: blocks per stage.
        expansion: hidden width of the channel MLP over its channels.
        patch_size: pixels per side of one patch.
        image_size: pixels per side of the input; the axial matrices fix it.
        num_classes: outputs of the head.

    Raises:
        ConfigError: a value is not positive or absurdly large, or the image does not divide into the stages' grids.
    """

    dim: int
    depths: tuple[int, ...]
    expansion: int = 3
    patch_size: int = 4
    image_size: int = 224
    num_classes: int = 1000

    def __post_init__(self) -> None:
        numbers = (self.dim, *self.depths, self.expansion, self.patch_size, self.image_size, self.num_classes)
        if not self.depths or any(type(n) is not int or n < 1 for n in numbers):
            raise ConfigError("every number of an sMLPNet configuration must be a positive integer")
        if max(numbers) > MAX_NUMBER or sum(self.depths) > MAX_BLOCKS:
            raise ConfigError(
                f"an sMLPNet configuration has no number above {MAX_NUMBER}, and at most {MAX_BLOCKS} blocks"
            )
        if self.image_size > MAX_IMAGE_SIZE:
            raise ConfigError(f"image size {self.image_size} is above {MAX_IMAGE_SIZE}")
        step = self.patch_size * 2 ** (len(self.depths) - 1)
        if self.image_size % step:
            raise ConfigError(
                f"image size {self.image_size} is not a multiple of {step} "
                f"(patch {self.patch_size}, {len(self.depths)} stages)",
                fix=f"use {max(step, self.image_size // step * step)}",
            )

    def channels(self, stage: int) -> int:
        """Channels of `stage`, counted from 0."""
        return self.dim << stage

    def grid(self, stage: int) -> int:
        """Tokens per side of `stage`, counted from 0."""
        return self.image_size // self.patch_size >> stage

    def stages(self) -> tuple[int, ...]:
        """The stage of each block, over the whole network."""
        return tuple(stage for stage, depth in enumerate(self.depths) for _ in range(depth))


@dataclass(frozen=True)
class TracePoint:
    """A place between two parts of the network, where the trained and the deployed one have the same values.

    Attributes:
        name: for people: `stage 1 block 2`, counted from 1.
        kind: "embedding", "tokens" (after a block's token mixing) or "block".
        index: of the stage or, over the whole network, of the block; counted from 0.
    """

    name: str
    kind: str
    index: int


def trace_points(config: SMLPNetConfig) -> tuple[TracePoint, ...]:
    """The points of a network, in the order of the computation."""
    points = []
    for stage, depth in enumerate(config.depths):
        points.append(TracePoint(f"stage {stage + 1} embedding", "embedding", stage))
        first = sum(config.depths[:stage])
        for block in range(depth):
            name = f"stage {stage + 1} block {block + 1}"
            points.append(TracePoint(f"{name} token mixing", "tokens", first + block))
            points.append(TracePoint(name, "block", first + block))
    return tuple(points)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image file becomes the network's input.

    The shorter side is resized to `floor(image_size / crop_pct)` pixels with antialiasing, the centre
    `image_size` x `image_size` is cropped, and each RGB channel becomes `(value / 255 - mean) / std`.

    Raises:
        ConfigError: a value is out of range.
    """

    image_size: int
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or not 1 <= self.image_size <= MAX_IMAGE_SIZE:
            raise ConfigError(f"image size {self.image_size} is not an integer from 1 to {MAX_IMAGE_SIZE}")
        if not 0.05 <= self.crop_pct <= 1:
            raise ConfigError(f"crop-pct {self.crop_pct} is outside 0.05 to 1")
        if type(self.interpolation) is not str or self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"interpolation {self.interpolation!r} is unknown", fix=f"use one of {', '.join(INTERPOLATIONS)}"
            )
        if len(self.mean) != 3 or not all(-1000 <= m <= 1000 for m in self.mean):
            raise ConfigError("mean is not three finite numbers from -1000 to 1000")
        if len(self.std) != 3 or not all(1e-6 <= s <= 1e6 for s in self.std):
            raise ConfigError("std is not three positive numbers from 1e-6 to 1e6")

    @property
    def resize(self) -> int:
        """Pixels of the shorter side before the crop: 256 for 224 at 0.875."""
        return math.floor(self.image_size / self.crop_pct)


@dataclass(frozen=True, kw_only=True)
class BatchProfile:
    """The batch sizes an engine takes: any from `min` to `max`, fastest at `opt`.

    Raises:
        ConfigError: not 1 <= min <= opt <= max <= 65,536.
    """

    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not all(type(n) is int for n in (self.min, self.opt, self.max)) or self.max > MAX_BATCH:
            raise ConfigError(f"batch sizes are integers from 1 to {MAX_BATCH}")
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(
                f"batch profile {self.min}, {self.opt}, {self.max} is not in order", fix="give min <= opt <= max"
            )

    @classmethod
    def fixed(cls, batch: int) -> BatchProfile:
        """Exactly one size."""
        return cls(min=batch, opt=batch, max=batch)


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What a checkpoint says of itself beside its weights; None where it says nothing.

    Attributes:
        labels: class names in the order of the logits.
        preprocessing: how its training images were prepared.
        training: numbers of the training run, for people to read.
    """

    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return _dump({"schema": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, *, where: object, image_size: int) -> CheckpointMetadata:
        """Read the JSON form: any of `labels`, `preprocessing` (in part, too) and `training`.

        Args:
            text: a JSON object.
            where: the file it stood in, for errors.
            image_size: of the network, for a preprocessing that does not state it.

        Raises:
            ConfigError: not that form, or a value out of range.
        """

        def build(document: dict[str, Any]) -> CheckpointMetadata:
            labels, preprocessing = document.get("labels"), document.get("preprocessing")
            return cls(
                labels=None if labels is None else _labels(labels),
                preprocessing=None
                if preprocessing is None
                else _preprocessing({"image_size": image_size, **preprocessing}),
                training=_mapping(document.get("training", {})),
            )

        return _parse(text, where, build)


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """Everything needed to use an artifact, and to know where it came from.

    Attributes:
        name: the model's name, as file names carry it.
        config: the network's shape.
        labels: class names in the order of the logits.
        preprocessing: how an image becomes the input.
        precision: of the graph's arithmetic.
        batch: the one batch size it takes, or None for any.
        variant: the paper's variant with this configuration, if there is one.
        checkpoint: file name of the source weights.
        checkpoint_sha256: of that file.
        ema: whether its moving-average weights were taken.
        libraries: versions of what wrote the artifact, this tool among them.
        quantization: how an int8 graph was made; empty for others.

    Raises:
        ConfigError: the parts contradict each other.
    """

    name: str
    config: SMLPNetConfig
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    precision: str = "fp32"
    batch: int | None = None
    variant: str | None = None
    checkpoint: str = ""
    checkpoint_sha256: str = ""
    ema: bool = False
    libraries: Mapping[str, str] = field(default_factory=dict)
    quantization: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.name)
        if len(self.labels) != self.config.num_classes:
            raise ConfigError(
                f"{len(self.labels)} labels for {self.config.num_classes} classes", fix="give one label per class"
            )
        if self.preprocessing.image_size != self.config.image_size:
            raise ConfigError(
                f"preprocessing makes images of {self.preprocessing.image_size} pixels, "
                f"the network takes {self.config.image_size}"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision {self.precision!r} is unknown", fix=f"one of {', '.join(PRECISIONS)}")
        if self.batch is not None and (type(self.batch) is not int or not 1 <= self.batch <= MAX_BATCH):
            raise ConfigError(f"batch {self.batch} is not a positive integer up to {MAX_BATCH}")

    def to_json(self) -> str:
        return _dump({"schema": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, *, where: object) -> ModelMetadata:
        """Read the JSON form, which stood in the file `where`.

        Raises:
            ConfigError: not that form, a newer schema, or a value out of range.
        """

        def build(document: dict[str, Any]) -> ModelMetadata:
            values = {key: value for key, value in document.items() if key != "schema"}
            config = values["config"]
            _check_types(values)
            return cls(
                **{
                    **values,
                    "config": SMLPNetConfig(**{**config, "depths": tuple(config["depths"])}),
                    "labels": _labels(values["labels"]),
                    "preprocessing": _preprocessing(values["preprocessing"]),
                }
            )

        return _parse(text, where, build)


@dataclass(frozen=True, kw_only=True)
class EngineManifest:
    """What stands beside an engine, whose own bytes are TensorRT's alone.

    Attributes:
        engine_sha256: of the engine it is about.
        metadata: of the graph it was built from.
        onnx_file: file name of the ONNX source.
        onnx_sha256: of that file.
        backend: "tensorrt" or "tensorrt-rtx".
        version: of TensorRT.
        profile: batch sizes it takes.
        architectures: of the GPUs it was built for, ahead of time or where it was built.
        ran_here: whether it was run where it was built.
        engine_parity: if so, its comparison with the ONNX source.
        options: how it was built.
        memory: the build log's figures.
        kernels: what is inside, as a summary.
        graph_parity: the comparison of the 16-bit graph with the ONNX source, if one was made from it.
    """

    engine_sha256: str
    metadata: ModelMetadata
    onnx_file: str
    onnx_sha256: str
    backend: str
    version: str
    profile: BatchProfile
    architectures: tuple[str, ...]
    ran_here: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: tuple[str, ...] = ()
    kernels: Mapping[str, Any] = field(default_factory=dict)
    graph_parity: Mapping[str, Any] | None = None
    engine_parity: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        return (
            json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        )

    @classmethod
    def from_json(cls, text: str, *, where: object) -> EngineManifest:
        """Read the JSON form, which stood in the file `where`.

        Raises:
            ConfigError: not that form, a newer schema, or a value out of range.
        """

        def build(document: dict[str, Any]) -> EngineManifest:
            values = {key: value for key, value in document.items() if key != "schema"}
            return cls(
                **{
                    **values,
                    "metadata": ModelMetadata.from_json(json.dumps(values["metadata"]), where=where),
                    "profile": BatchProfile(**values["profile"]),
                    "architectures": tuple(values["architectures"]),
                    "memory": tuple(values["memory"]),
                }
            )

        return _parse(text, where, build)


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _parse(text: str, where: object, build: Callable[[dict[str, Any]], T]) -> T:
    try:
        document = strictjson.loads(text)
        schema = document.get("schema", SCHEMA_VERSION)
        if schema == SCHEMA_VERSION:
            built = build(document)
            json.dumps(document, ensure_ascii=False).encode()
            return built
    except UnicodeEncodeError:
        raise ConfigError("metadata is damaged: it has half a character", where=where) from None
    except ConfigError as error:
        raise ConfigError(_shortened(error.what), where=where, fix=error.fix) from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        what = _shortened(f"metadata is damaged: {type(error).__name__}: {error}")
        raise ConfigError(what, where=where) from None
    raise ConfigError(
        f"metadata schema {_shortened(repr(schema))} is not {SCHEMA_VERSION}, the one this version reads",
        where=where,
        fix="upgrade smlp-deploy, or export again",
    )


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]}..."


def _check_name(name: object) -> None:
    """A model's name becomes part of file names, so it may not lead elsewhere."""
    sound = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= _MAX_NAME_BYTES
    if not sound or set(str(name)) & {"/", "\\"}:
        raise ConfigError(f"model name {name!r:.100} cannot be part of a file name", fix="rename the checkpoint")


def _check_types(values: Mapping[str, Any]) -> None:
    """Check the fields of `ModelMetadata` that have no other check."""
    for key in ("precision", "checkpoint", "checkpoint_sha256", "variant"):
        value = values.get(key, "")
        if not (isinstance(value, str) and len(value) <= MAX_TEXT) and (key, value) != ("variant", None):
            raise TypeError(f"{key} is not a string")
    if type(values.get("ema", False)) is not bool:
        raise TypeError("ema is neither true nor false")
    libraries = _mapping(values.get("libraries", {}))
    if not all(isinstance(version, str) for version in libraries.values()):
        raise TypeError("a library's version is not a string")
    _mapping(values.get("quantization", {}))


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("a mapping was expected")
    return value


def _labels(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise TypeError("labels are not a list of strings")
    if any(len(label) > MAX_TEXT for label in value):
        raise ValueError(f"a label has more than {MAX_TEXT} characters")
    return tuple(value)


def _preprocessing(value: Mapping[str, Any]) -> Preprocessing:
    triples = {key: tuple(float(number) for number in value[key]) for key in ("mean", "std") if key in value}
    return Preprocessing(**{**value, **triples})
