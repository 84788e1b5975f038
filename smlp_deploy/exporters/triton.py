"""A network as a model repository of NVIDIA's Triton Inference Server: four models, written whole.

    smlpnet/       the ONNX file or engine in ONNX Runtime or TensorRT: prepared images to logits
    preprocess/    Python: encoded images to prepared images, by `images.preprocessing`
    postprocess/   Python: logits to the best classes; no backend of Triton has softmax, labels and top-k
    classify/      an ensemble of the three: encoded images to the best classes

What Triton requires of a configuration, and refuses to load without:

1. A model's name is that of its folder.
2. A version's folder is a number without leading zeros; others are ignored.
3. The platform is `onnxruntime_onnx` or `tensorrt_plan`.
4. `max_batch_size` above 0 needs a graph of any batch size, and adds a first dimension to all `dims`. A network that
   takes only one batch size has 0 and that size in its `dims`.
5. Preferred batch sizes are at most `max_batch_size`.
6. Names, types and dims are those of the graph.
7. The label file is named relative to the model's folder, and is there.
8. An ensemble maps every input and output of its steps, with their types and dims, and its batches fit all of them.

The version folders of one model share its configuration. So a new export becomes the next version only if its
`Interface` is that of the versions before, and is refused otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from smlp_deploy import strictjson
from smlp_deploy.errors import ArtifactError, ConfigError, UsageError
from smlp_deploy.files import alone, folder_beside, read_text
from smlp_deploy.metadata import BatchProfile, Preprocessing, Text

ONNX, PLAN = "onnxruntime_onnx", "tensorrt_plan"
NETWORK, PREPROCESS, POSTPROCESS, ENSEMBLE = "smlpnet", "preprocess", "postprocess", "classify"
IMAGE, INDEX, LABEL, PROBABILITY = "image", "index", "label", "probability"
"""The names of the ensemble's input and outputs."""

INTERFACE_FILE = "smlp.json"
LABEL_FILE = "labels.txt"
MODEL_FILES = {ONNX: "model.onnx", PLAN: "model.plan"}

_SCHEMA = 1
_QUEUE_DELAY = 1000  # microseconds that a request waits for others, once a model is idle
_VERSION = re.compile("0|[1-9][0-9]*")
_MODEL = '''"""{purpose}.

Triton's Python needs the package: pip install smlp-deploy.
"""

from smlp_deploy.inference.triton import {name} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_EMPTY = "An ensemble has no file of its own, and object stores keep no empty folders.\n"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output of the network.

    Attributes:
        name: in the graph.
        data_type: as Triton calls it: "FP32" or "UINT8".
        dims: of one image.
    """

    name: Text
    data_type: Text
    dims: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What all versions of a served network have in common; kept as `smlp.json` in each model's folder.

    Attributes:
        platform: `ONNX` or `PLAN`.
        batch: the only batch size that the network takes, or None.
        profile: the batch sizes that it takes, from 1 on if `batch` is None.
        input: prepared images.
        output: logits.
        labels: class names in the order of the logits.
        preprocessing: from image to input.
        topk: classes in an answer.

    Raises:
        ConfigError: the fields contradict each other.
    """

    platform: Text
    batch: int | None
    profile: BatchProfile
    input: Tensor
    output: Tensor
    labels: tuple[Text, ...]
    preprocessing: Preprocessing
    topk: int

    def __post_init__(self) -> None:
        if self.output.dims != (len(self.labels),):
            classes = "x".join(map(str, self.output.dims))
            raise ConfigError(f"{len(self.labels)} labels for {classes} outputs", fix="give one label per class")
        if self.platform not in MODEL_FILES or not 1 <= self.topk <= len(self.labels):
            raise ConfigError(f"platform {self.platform!r} with the best {self.topk} classes cannot be served")
        if (self.batch or 1) != self.profile.min or (self.batch or self.profile.max) != self.profile.max:
            raise ConfigError(
                f"an engine for batches of {self.profile.min} to {self.profile.max} cannot be served: Triton makes "
                "batches of any size up to the largest",
                fix="build it with --min-batch 1, or with --batch for one size",
            )
        if any("\n" in label for label in self.labels):
            raise ConfigError("a label has several lines, and Triton's label file has one for each")

    @property
    def max_batch_size(self) -> int:
        """As in a configuration; 0 for a network of one batch size (rule 4)."""
        return 0 if self.batch else self.profile.max

    @property
    def preferred(self) -> tuple[int, ...]:
        """Batch sizes to run without waiting for more: that with which the network is fastest, and two below it."""
        best = self.profile.opt
        return () if self.batch else tuple(sorted({best // 4, best // 2, best} - {0, 1}))

    def to_json(self) -> str:
        return json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The interface in a model's folder.

        Raises:
            ArtifactError: there is none.
            ConfigError: it has another form or schema, or a value is out of range.
        """
        path = folder / INTERFACE_FILE
        text = read_text(path, error=ArtifactError, fix="smlp export --format triton writes it")
        try:
            return strictjson.read(text, cls, schema=_SCHEMA)
        except ConfigError as error:
            raise ConfigError(error.what, where=path, fix=error.fix) from None
        except ValueError as error:
            raise ConfigError(f"cannot be read: {error}", where=path, fix="export into another folder") from None


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A written repository.

    Attributes:
        path: its folder.
        version: of the network that was added.
        interface: of all its versions.
    """

    path: Path
    version: int
    interface: Interface


def write_repository(repository: Path, interface: Interface, network: Mapping[str, bytes]) -> Repository:
    """Add a network to a repository: as version 1, or as the next if its versions there have the same interface.

    Each model's folder, or the version's, is written beside the repository and moved into it, so that a server that
    polls it sees whole ones. Configurations that are there stay as they are, because users tune them.

    Args:
        repository: the folder; made if it is not there.
        interface: of the network.
        network: the files of the version, by name.

    Raises:
        UsageError: it is a file, or has folders of other models with these names.
        SmlpError: it cannot be written.
    """
    place = repository.resolve()
    if not place.name or (place.exists() and not place.is_dir()):
        raise UsageError("cannot be a model repository", where=repository, fix="name a folder with -o")
    with folder_beside(place) as new, alone(place):
        models = _models(interface)
        there = {name for name in models if (place / name).exists()}
        for name in there:
            _check_same(place / name, interface)
        version = _next_version(place / NETWORK)
        for name in models.keys() - there:
            _write(new / name, models[name])
        _write(new / NETWORK / str(version), network)
        if place.exists():
            for name in models:
                inner = f"{NETWORK}/{version}" if name == NETWORK in there else name
                if name not in there or name == NETWORK:
                    (new / inner).rename(place / inner)
        else:
            new.rename(place)
    return Repository(path=repository, version=version, interface=interface)


def _models(interface: Interface) -> dict[str, dict[str, bytes]]:
    """The files of each model, but for the network's own; an ensemble comes after its steps."""
    about = interface.to_json().encode()
    steps = {
        PREPROCESS: ("Preprocess", f"Encoded images to the input of {NETWORK}, by smlp-deploy's own preprocessing"),
        POSTPROCESS: ("Postprocess", "Logits to the best classes with their labels and probabilities"),
    }
    models = {
        name: {"config.pbtxt": as_pbtxt(config).encode(), INTERFACE_FILE: about}
        for name, config in configurations(interface).items()
    }
    models[NETWORK][LABEL_FILE] = "".join(f"{label}\n" for label in interface.labels).encode()
    for name, (kind, purpose) in steps.items():
        models[name]["1/model.py"] = _MODEL.format(name=kind, purpose=purpose).encode()
    models[ENSEMBLE]["1/empty.txt"] = _EMPTY.encode()
    return models


def _check_same(folder: Path, interface: Interface) -> None:
    """Check that a model that is there is of the same interface.

    Raises:
        UsageError: it is not, or another tool wrote it.
    """
    elsewhere = "export into another folder, or remove this repository's folders "
    elsewhere += ", ".join(f"{name}/" for name in (NETWORK, PREPROCESS, POSTPROCESS, ENSEMBLE))
    if not (folder / INTERFACE_FILE).is_file():
        raise UsageError("is a model that smlp export did not write", where=folder, fix="export into another folder")
    found = Interface.read(folder)
    differ = [field.name for field in fields(found) if getattr(found, field.name) != getattr(interface, field.name)]
    if differ:
        raise UsageError(
            f"the versions there have another {', '.join(differ)}, and all versions share one configuration",
            where=folder,
            fix=elsewhere,
        )


def _next_version(folder: Path) -> int:
    found = [int(path.name) for path in folder.glob("*") if _VERSION.fullmatch(path.name)]
    return max(found, default=0) + 1


def _write(folder: Path, content: Mapping[str, bytes]) -> None:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def configurations(interface: Interface) -> dict[str, Message]:
    """The configuration of each model, by its name (rule 1)."""
    images, logits = _tensor(interface, interface.input), _tensor(interface, interface.output)
    dims = (interface.batch,) if interface.batch else ()
    encoded = {"name": IMAGE, "data_type": Word("TYPE_STRING"), "dims": [*dims] or [1]}
    answer = [
        {"name": name, "data_type": Word(f"TYPE_{kind}"), "dims": [*dims, interface.topk]}
        for name, kind in ((INDEX, "INT32"), (LABEL, "STRING"), (PROBABILITY, "FP32"))
    ]
    step = {"backend": "python", "max_batch_size": interface.max_batch_size}
    batching: Message = {} if interface.batch else {"dynamic_batching": {}}
    return {
        NETWORK: _network(interface, images, logits),
        PREPROCESS: {"name": PREPROCESS, **step, "input": [encoded], "output": [images], **batching},
        POSTPROCESS: {"name": POSTPROCESS, **step, "input": [logits], "output": answer, **batching},
        ENSEMBLE: {
            "name": ENSEMBLE,
            "platform": "ensemble",
            "max_batch_size": interface.max_batch_size,
            "input": [encoded],
            "output": answer,
            "ensemble_scheduling": {"step": _steps(interface)},
        },
    }


def _network(interface: Interface, images: Message, logits: Message) -> Message:
    labels = {} if (interface.batch or 1) > 1 else {"label_filename": LABEL_FILE}  # of one image only: by its index
    config: dict[str, Value] = {
        "name": NETWORK,
        "platform": interface.platform,
        "max_batch_size": interface.max_batch_size,
        "input": [images],
        "output": [{**logits, **labels}],
        "version_policy": {"latest": {"num_versions": 1}},
    }
    if not interface.batch:
        preferred = {"preferred_batch_size": [*interface.preferred]} if interface.preferred else {}
        config["dynamic_batching"] = {**preferred, "max_queue_delay_microseconds": _QUEUE_DELAY}
    value = {"data_type": images["data_type"], "dims": images["dims"], "zero_data": Word("true")}
    config["model_warmup"] = [
        {"name": f"batch of {size}", "batch_size": size, "inputs": {"key": images["name"], "value": value}}
        for size in sorted({1, 1 if interface.batch else interface.profile.opt})
    ]
    return config


def _tensor(interface: Interface, tensor: Tensor) -> Message:
    dims = [interface.batch, *tensor.dims] if interface.batch else [*tensor.dims]
    return {"name": tensor.name, "data_type": Word(f"TYPE_{tensor.data_type}"), "dims": dims}


def _steps(interface: Interface) -> list[Message]:
    images, logits = (f"{NETWORK}_{tensor.name}" for tensor in (interface.input, interface.output))
    through: list[tuple[str, dict[str, str], dict[str, str]]] = [
        (PREPROCESS, {IMAGE: IMAGE}, {interface.input.name: images}),
        (NETWORK, {interface.input.name: images}, {interface.output.name: logits}),
        (POSTPROCESS, {interface.output.name: logits}, {name: name for name in (INDEX, LABEL, PROBABILITY)}),
    ]
    return [
        {
            "model_name": name,
            "model_version": -1,
            "input_map": [{"key": key, "value": value} for key, value in taken.items()],
            "output_map": [{"key": key, "value": value} for key, value in given.items()],
        }
        for name, taken, given in through
    ]


class Word(str):
    """A value that is written without quotes: an enum's, or a truth value."""


Value = str | int | Mapping[str, Any] | Sequence[Any]
Message = Mapping[str, Any]
"""A message of Protocol Buffers: its fields by name; a list is a repeated field."""


def as_pbtxt(message: Message, indent: str = "") -> str:
    """A message in the text format of Protocol Buffers."""
    return "".join(_field(name, value, indent) for name, value in message.items())


def _field(name: str, value: Value, indent: str) -> str:
    if isinstance(value, Mapping):
        inner = as_pbtxt(value, indent + "  ")
        return f"{indent}{name} {{\n{inner}{indent}}}\n" if inner else f"{indent}{name} {{ }}\n"
    if isinstance(value, str):
        return f"{indent}{name}: {value if isinstance(value, Word) else json.dumps(value)}\n"
    if isinstance(value, int):
        return f"{indent}{name}: {value}\n"
    if all(isinstance(item, int) for item in value):
        return f"{indent}{name}: [ {', '.join(map(str, value))} ]\n"
    return "".join(_field(name, item, indent) for item in value)
