"""Labelled images, from folders named after classes or from a CSV file, and the model's class for each name."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from smlp_deploy import strictjson
from smlp_deploy.errors import UsageError
from smlp_deploy.files import DATA_FOLDER, check_regular, read_file, read_text
from smlp_deploy.images.find import images_below
from smlp_deploy.images.labels import class_folders

logger = logging.getLogger(__name__)

_LAYOUT = "give a folder with one folder per class, as in DATASET/cat/1.jpg, or a CSV file with columns path and label"
_MAX_CSV_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """A labelled image; `named_by` says how the dataset named its class: by "label", "synset", "index" or "order"."""

    path: str | Path
    label: int
    named_by: str = "label"


def find_labelled_images(
    dataset: str | Path,
    labels: Sequence[str],
    *,
    synsets: Sequence[str] | None = None,
    mapping: Mapping[str, str] | None = None,
    class_order: Sequence[str] | None = None,
) -> tuple[LabelledImage, ...]:
    """The images of a dataset: a folder with one folder per class, or a CSV file with the columns path and label.

    Classes are named by label, by synset id or by index from 0: the first of these that matches all the names, so that
    folders 0 to 9 are labels where the labels are digits. Where the model only numbers its classes and the folders have
    names, as many as it has classes, they are taken in sorted order, as torchvision's ImageFolder numbers them, and a
    warning says so. Folders that begin with a dot are skipped. A class folder without images is returned itself, as an
    unreadable image.

    Args:
        dataset: the folder or the file; the paths in a file are relative to it. Paths begin as it is written.
        labels: the model's.
        synsets: the WordNet id of each label.
        mapping: the dataset's class names -> labels; a name that is not in it stays as it is.
        class_order: the dataset's class names in the order of the labels; nothing else is then asked.

    Raises:
        UsageError: it cannot be read, has no images, or names a class that the model does not have.
    """
    check_dataset(dataset)
    given, dataset = os.fspath(dataset), Path(dataset)
    groups = list(_folders(given) if dataset.is_dir() else _listed(given))
    if not groups:
        raise UsageError("has no images", where=dataset, fix=_LAYOUT)
    names = {name: (mapping or {}).get(name, name) for _, name, _ in groups}
    if class_order is None and dataset.is_dir() and _only_numbers(names.values(), labels, synsets):
        class_order = _sorted_order(sorted(names), labels, dataset)
    if class_order is not None:
        kind, indices = "order", _ordered(class_order, labels)
    else:
        kind, indices = _named_by(set(names.values()), labels, synsets)
    for where, name, _ in groups:
        if names[name] not in indices:
            known = {"label": labels, "synset": synsets, "order": class_order}.get(kind)
            raise _unknown(names[name], where, kind, known or ())
    return tuple(LabelledImage(path, indices[names[name]], kind) for _, name, paths in groups for path in paths)


def check_dataset(dataset: str | Path) -> None:
    """Check, before models are loaded, that a dataset has the layout of one.

    Raises:
        UsageError: it is neither a folder of class folders nor a file.
    """
    path = Path(dataset)
    if not path.is_dir():
        check_regular(path, error=UsageError, fix=_LAYOUT)
    elif not class_folders(path):
        given = os.fspath(dataset)
        has_images = next(images_below(given)) != given
        what = "has images, but no class folders that say what is on them" if has_images else "has no images"
        raise UsageError(what, where=dataset, fix=_LAYOUT)


def imagenet_synsets(labels: Sequence[str]) -> tuple[str, ...] | None:
    """The WordNet ids of the 1,000 ILSVRC 2012 classes where `labels` are those classes' names, else None."""
    lines = (DATA_FOLDER / "imagenet_classes.tsv").read_text(encoding="utf-8").splitlines()
    ids, names = zip(*(line.split("\t")[:2] for line in lines), strict=True)
    return ids if tuple(labels) == names else None


def read_mapping(path: Path) -> dict[str, str]:
    """A dataset's class names -> labels, from a JSON object or a CSV file with the columns folder and label.

    Raises:
        UsageError: it cannot be read, is neither, or maps one name twice.
    """
    if path.suffix.lower() != ".json":
        rows = [(name, label) for _, name, label in _rows(path, ("folder", "label"))]
        if len(dict(rows)) != len(rows):
            raise UsageError("maps a folder twice", where=path)
        return dict(rows)
    try:
        mapping = strictjson.loads(read_text(path, error=UsageError, fix="--mapping names a JSON or CSV file"))
    except ValueError as error:
        raise UsageError(f"cannot read the mapping: {error}", where=path) from None
    if not isinstance(mapping, dict) or not all(isinstance(label, str) for label in mapping.values()):
        raise UsageError("is not a JSON object of folder: label", where=path)
    return mapping


def _folders(dataset: str) -> Iterator[tuple[str, str, list[str]]]:
    """Each class folder, its name and the images below it, sorted."""
    for folder in class_folders(Path(dataset)):
        path = os.path.join(dataset, folder.name)  # noqa: PTH118 - pathlib would normalize it
        yield path, folder.name, list(images_below(path))


def _listed(dataset: str) -> Iterator[tuple[str, str, list[str]]]:
    """Each row of a CSV file, its label and its image."""
    for where, path, label in _rows(Path(dataset), ("path", "label")):
        yield where, label, [os.path.join(os.path.dirname(dataset), path)]  # noqa: PTH118, PTH120 - the same


def _rows(path: Path, columns: tuple[str, str]) -> Iterator[tuple[str, str, str]]:
    """The location of each row of a CSV file, and its text in two columns, which the first row names."""
    content = read_file(path, limit=_MAX_CSV_BYTES, error=UsageError, fix="give a folder or a CSV file")
    text = io.StringIO(content.decode("utf-8-sig", "surrogateescape"), newline="")
    rows = csv.DictReader(text, strict=True)
    header = f"its first row must name the columns {' and '.join(columns)}"
    try:
        if not set(columns) <= set(rows.fieldnames or ()):
            raise UsageError("is not a CSV file with these columns", where=path, fix=header)
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            first, second = (row[column] for column in columns)
            if not first or not second or None in row:
                raise UsageError("a row has too many columns, or an empty one", where=where, fix=header)
            yield where, first, second
    except csv.Error as error:
        raise UsageError(f"is not a CSV file: {error}", where=f"{path}, line {rows.line_num}", fix=header) from None


def _named_by(names: Set[str], labels: Sequence[str], synsets: Sequence[str] | None) -> tuple[str, dict[str, int]]:
    """How the names refer to classes, and the class of each; if no kind matches all names, the one matching most."""
    occurrences = Counter(labels)
    tables = {
        "label": {label: i for i, label in enumerate(labels) if occurrences[label] == 1},
        "synset": dict(zip(synsets, range(len(labels)), strict=True)) if synsets is not None else {},
        "index": {name: int(name) for name in names if re.fullmatch("[0-9]{1,9}", name) and int(name) < len(labels)},
    }
    kind = max(tables, key=lambda kind: len(names & tables[kind].keys()))  # the first of equals
    return kind, tables[kind]


def _only_numbers(names: Iterable[str], labels: Sequence[str], synsets: Sequence[str] | None) -> bool:
    """Whether the model's labels are the numbers of its classes, and the dataset has names and no number."""
    numbered = tuple(labels) == tuple(map(str, range(len(labels))))
    return numbered and synsets is None and not any(re.fullmatch("[0-9]+", name) for name in names)


def _sorted_order(names: Sequence[str], labels: Sequence[str], dataset: Path) -> Sequence[str]:
    """The sorted names as the order of the classes, with a warning."""
    if len(names) != len(labels):
        raise UsageError(
            f"names its classes, and the model only numbers them: {len(names)} folders for {len(labels)} classes",
            where=dataset,
            fix="give the names in the order of training with --class-order, or to smlp export with --labels",
        )
    logger.warning(
        "the model only numbers its classes; the folders are taken in sorted order, as ImageFolder numbers them: "
        "0 is %s, %d is %s (--class-order gives another)",
        names[0],
        len(names) - 1,
        names[-1],
    )
    return names


def _ordered(names: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    """The class of each name in a list of them.

    Raises:
        UsageError: it is not one name for each class.
    """
    indices = {name: index for index, name in enumerate(names)}
    if not len(indices) == len(names) == len(labels):
        what = f"{len(indices)} different names for {len(labels)} classes"
        raise UsageError(what, where="--class-order", fix="give one name for each class of the model")
    return indices


def _unknown(name: str, where: str, kind: str, known: Sequence[str]) -> UsageError:
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? Rename it," if close else "use one of the model's, counted from 0 if an index,"
    if kind == "order":
        fix = f"did you mean {close[0]!r}?" if close else "give the name of every class with --class-order"
        return UsageError(f"{name!r} is not in the given order of classes", where=where, fix=fix)
    return UsageError(
        f"{name!r} is not the {kind} of exactly one class",
        where=where,
        fix=f"{hint} or map it to a label with --mapping",
    )
