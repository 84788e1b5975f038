"""The metadata stored with a model: configuration, labels, preprocessing, precision and provenance.

It loads no framework, so that a machine that only runs models can read it. The JSON form is stored under `METADATA_KEY`
in an ONNX file's `metadata_props` or a safetensors file's metadata, or as the `.json` file beside a checkpoint.

`strictjson.read` enforces the types of the fields in a file; each `__post_init__` checks the values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, TypeVar

from msgspec import Meta

from smlp_deploy import strictjson
from smlp_deploy.errors import ConfigError

METADATA_KEY = "smlp_deploy"
SCHEMA_VERSION = 1
MANIFEST_SCHEMA = 2
"""Of an engine's manifest; in schema 1, `backend` had another name."""
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
INPUTS = ("float32", "uint8")
FORMS = ("cpu", "gpu")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_NUMBER = 1 << 20
"""The largest number in a configuration, far above that of any real network."""
MAX_BLOCKS = 2048
MAX_IMAGE_SIZE = 2048
"""Pixels per side; an input of this size takes 50 MB."""
MAX_BATCH = 65536
MAX_TEXT = 1000
"""Characters of a label or another text in a model's metadata."""
_MAX_NAME_BYTES = 200
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Text = Annotated[str, Meta(max_length=MAX_TEXT)]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SMLPNetConfig:
    """The shape of an sMLPNet (arXiv 2109.05422, section 3 and table 1).

    Attributes:
        dim: channels of the first stage; stage `s` has `dim * 2**s`.
        depths: blocks per stage.
        expansion: hidden width of the channel MLP, as a multiple of its channels.
        patch_size: pixels per side of one patch.
        image_size: pixels per side of the input; the axial matrices fix it.
        num_classes: outputs of the head.

    Raises:
        ConfigError: a value is not positive or is too large, or the image does not divide into the stages' grids.
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
    """A point in the network where the trained and the deployed form compute the same values.

    Attributes:
        name: for display, counted from 1: `stage 1 block 2`.
        kind: "embedding", "tokens" (after a block's token mixing) or "block".
        index: of the stage, or of the block within the whole network; counted from 0.
    """

    name: str
    kind: str
    index: int


def trace_points(config: SMLPNetConfig) -> tuple[TracePoint, ...]:
    """The points of a network, in order of computation."""
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
    crop_pct: int | float = 0.875  # an integer 1 in a file stays one, so that artifacts keep their bytes
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
    """The batch sizes an engine accepts: any from `min` to `max`, fastest at `opt`, which is the one it is used with.

    Raises:
        ConfigError: not 1 <= min <= opt <= max <= 65,536.
    """

    min: int = 1
    opt: int = 64
    max: int = 64

    def __post_init__(self) -> None:
        if not all(type(n) is int for n in (self.min, self.opt, self.max)) or self.max > MAX_BATCH:
            raise ConfigError(f"batch sizes are integers from 1 to {MAX_BATCH}")
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(
                f"batch profile {self.min}, {self.opt}, {self.max} is not in order", fix="give min <= opt <= max"
            )

    @classmethod
    def fixed(cls, batch: int) -> BatchProfile:
        """A profile of exactly one size."""
        return cls(min=batch, opt=batch, max=batch)


@dataclass(frozen=True, kw_only=True)
class CheckpointMetadata:
    """What a checkpoint states besides its weights; None where it states nothing.

    Attributes:
        labels: class names in the order of the logits.
        preprocessing: how its training images were prepared.
        training: figures of the training run, for information only.
    """

    labels: tuple[Text, ...] | None = None
    preprocessing: Preprocessing | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return _dump({"schema": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, *, where: object, image_size: int) -> CheckpointMetadata:
        """Read the JSON form: any of `labels`, `preprocessing` (which may be partial) and `training`.

        Args:
            text: a JSON object; its other fields are ignored, because other tools write such files too.
            where: the file it came from, for errors.
            image_size: of the network, for preprocessing that does not state it.

        Raises:
            ConfigError: the JSON has another form, or a value is out of range.
        """

        def own(document: dict[str, Any]) -> dict[str, Any]:
            names = {"schema", *(field.name for field in fields(cls))}
            chosen = {name: value for name, value in document.items() if name in names}
            if isinstance(chosen.get("preprocessing"), dict):
                chosen["preprocessing"] = {"image_size": image_size, **chosen["preprocessing"]}
            return chosen

        return _read(text, where, cls, prepare=own)


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """Everything needed to use an artifact and to trace its origin.

    Attributes:
        name: the model's name, which is part of file names.
        config: the network's shape.
        labels: class names in the order of the logits.
        preprocessing: how an image becomes the input.
        precision: of the graph's arithmetic.
        batch: the only batch size it accepts, or None for any.
        input: what it takes: "float32", normalized images N, 3, S, S, or "uint8", pixels N, S, S, 3, which the graph
            normalizes itself; S is the image size.
        form: what the lowered network was made for, "cpu" or "gpu"; both compute the same.
        variant: the paper's variant with this configuration, if any.
        checkpoint: file name of the source weights.
        checkpoint_sha256: of that file.
        ema: whether its moving-average weights were used.
        libraries: versions of the software that wrote the artifact, including smlp-deploy.
        quantization: how an int8 graph was made; empty for others.

    Raises:
        ConfigError: the fields contradict each other.
    """

    name: str
    config: SMLPNetConfig
    labels: tuple[Text, ...]
    preprocessing: Preprocessing
    precision: Text = "fp32"
    batch: int | None = None
    input: Text = "float32"
    form: Text = "cpu"
    variant: Text | None = None
    checkpoint: Text = ""
    checkpoint_sha256: Text = ""
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
        if self.input not in INPUTS:
            raise ConfigError(f"input {self.input!r} is unknown", fix=f"one of {', '.join(INPUTS)}")
        if self.form not in FORMS:
            raise ConfigError(f"form {self.form!r} is unknown", fix=f"one of {', '.join(FORMS)}")

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of one image at the input."""
        size = self.config.image_size
        return (3, size, size) if self.input == "float32" else (size, size, 3)

    def to_json(self) -> str:
        """The JSON form; it leaves out the form "cpu", so that files keep the bytes they had when that was the only."""
        facts = asdict(self)
        if self.form == "cpu":
            del facts["form"]
        return _dump({"schema": SCHEMA_VERSION, **facts})

    @classmethod
    def from_json(cls, text: str, *, where: object) -> ModelMetadata:
        """Read the JSON form, which came from the file `where`.

        Raises:
            ConfigError: the JSON has another form or schema, or a value is out of range.
        """
        return _read(text, where, cls)


@dataclass(frozen=True, kw_only=True)
class EngineManifest:
    """The facts about an engine, stored beside it because the engine's own bytes belong to TensorRT.

    Attributes:
        engine_sha256: of the engine it describes.
        metadata: of the graph it was built from.
        onnx_file: file name of the ONNX source.
        onnx_sha256: of that file.
        backend: "tensorrt" or "tensorrt-rtx".
        version: of TensorRT.
        profile: batch sizes it accepts.
        architectures: of the GPUs it was built for, ahead of time or on the building machine.
        ran_here: whether it was run on the machine that built it.
        gpu: name of the GPU it was built on; empty if it was built ahead of time.
        system: operating system and processor it was built on: "Linux x86_64"; empty if it was built ahead of time.
        options: how it was built.
        memory: figures from the build log.
        kernels: a summary of its kernels.
        graph_parity: the 16-bit graph's comparison with the ONNX source, if the engine was built from one.
        engine_parity: the engine's comparison with the ONNX source, if it was run.
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
    gpu: str = ""
    system: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    memory: tuple[str, ...] = ()
    kernels: Mapping[str, Any] = field(default_factory=dict)
    graph_parity: Mapping[str, Any] | None = None
    engine_parity: Mapping[str, Any] | None = None

    @property
    def arithmetic(self) -> str:
        """What its products are computed in: "tf32" for fp32 engines built so, otherwise the graph's precision."""
        precision = self.metadata.precision
        return "tf32" if precision == "fp32" and self.options.get("tf32") else precision

    def to_json(self) -> str:
        return (
            json.dumps({"schema": MANIFEST_SCHEMA, **asdict(self)}, indent=2, ensure_ascii=False, allow_nan=False)
            + "\n"
        )

    @classmethod
    def from_json(cls, text: str, *, where: object) -> EngineManifest:
        """Read the JSON form, which came from the file `where`.

        Raises:
            ConfigError: the JSON has another form or schema, or a value is out of range.
        """
        return _read(text, where, cls, schema=MANIFEST_SCHEMA, again="build the engine again")


def _dump(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _read(
    text: str,
    where: object,
    form: type[T],
    *,
    schema: int = SCHEMA_VERSION,
    again: str = "export again",
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> T:
    try:
        return strictjson.read(text, form, schema=schema, prepare=lambda found: {"schema": schema, **prepare(found)})
    except ConfigError as error:
        raise ConfigError(error.what, where=where, fix=error.fix) from None
    except strictjson.SchemaError as error:
        raise ConfigError(f"metadata {error}", where=where, fix=f"upgrade smlp-deploy, or {again}") from None
    except ValueError as error:
        raise ConfigError(f"metadata is damaged: {error}", where=where) from None


def _check_name(name: object) -> None:
    """A model's name becomes part of file names, so it must not lead to another folder."""
    sound = isinstance(name, str) and name.isprintable() and 0 < len(name.encode()) <= _MAX_NAME_BYTES
    if not sound or set(str(name)) & {"/", "\\"}:
        raise ConfigError(f"model name {name!r:.100} cannot be part of a file name", fix="rename the checkpoint")
