"""Class names in the order of a network's outputs, from the files and folders that training leaves behind."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smlp_deploy import strictjson
from smlp_deploy.errors import UsageError
from smlp_deploy.files import read_text

_WNID = re.compile("n[0-9]{8}")
_FORMS = (
    "give one name per line, a folder of class folders, or JSON: a list of names, {index: name}, {name: index}, "
    "{wnid: name}, or a config.json of timm or Hugging Face"
)


def class_folders(folder: Path) -> tuple[Path, ...]:
    """The class folders in a folder, in the order of torchvision's ImageFolder; those that begin with a dot are none.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        found = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return tuple(sorted(found, key=lambda path: path.name))
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", where=folder) from None


def read_labels(path: Path) -> tuple[str, ...]:
    """The class names in a file, or those of the class folders in a folder, in their order.

    A text file has one per line. A `.json` file has a list of them, an object {index: name}, whose names may be
    [wnid, name] as in Keras, {name: index} as torchvision's `class_to_idx`, {wnid: name}, in the order of the WordNet
    ids, or a model's `config.json` with `label_names` (timm) or `id2label` (Hugging Face).

    Raises:
        UsageError: it cannot be read, or is none of these.
    """
    if path.is_dir():
        labels: Any = [folder.name for folder in class_folders(path)]
    else:
        text = read_text(path, error=UsageError, fix=_FORMS)
        try:
            labels = _from_json(strictjson.loads(text)) if path.suffix.lower() == ".json" else text.splitlines()
        except ValueError as error:
            raise UsageError(f"cannot read the labels: {error}", where=path, fix=_FORMS) from None
    if not isinstance(labels, list) or not labels or not all(isinstance(name, str) and name.strip() for name in labels):
        raise UsageError("does not hold one name per class", where=path, fix=_FORMS)
    return tuple(label.strip() for label in labels)


def _from_json(document: Any) -> Any:
    """The list of names in a JSON document.

    Raises:
        ValueError: an object that has none of the known forms.
    """
    if not isinstance(document, dict):
        return document
    inner = next((document[key] for key in ("label_names", "id2label") if document.get(key)), document)
    if isinstance(inner, list):
        described = document.get("label_descriptions")
        return [described.get(name, name) if isinstance(described, dict) else name for name in map(_text, inner)]
    if isinstance(inner, dict) and inner:
        if all(type(index) is int for index in inner.values()):
            return _in_order({str(index): name for name, index in inner.items()}, of=len(inner))
        if all(_WNID.fullmatch(key) for key in inner):
            return [_text(inner[key]) for key in sorted(inner)]
        if all(key.isascii() and key.isdigit() for key in inner):
            return _in_order({key: _text(name) for key, name in inner.items()}, of=len(inner))
    raise ValueError("its keys are neither indices nor WordNet ids, and its values no indices")


def _text(name: Any) -> Any:
    """The name in [wnid, name], or what is given."""
    return name[1] if isinstance(name, list) and len(name) == 2 else name


def _in_order(names: dict[str, Any], *, of: int) -> list[Any]:
    missing = next((index for index in map(str, range(of)) if index not in names), None)
    if missing is not None:
        raise ValueError(f"it names {of} classes but has no index {missing}, counted from 0")
    return [names[str(index)] for index in range(of)]
