from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from smlp_deploy.errors import UsageError
from smlp_deploy.images.labels import class_folders, read_labels

ANIMALS = ("cat", "big dog", "ant")


def test_a_text_file_has_one_per_line(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\nbig dog \nant\n", encoding="utf-8")
    assert read_labels(tmp_path / "labels.txt") == ANIMALS


@pytest.mark.parametrize(
    "document",
    [
        ["cat", "big dog", "ant "],
        {"0": "cat", "1": "big dog", "2": "ant"},
        {"2": "ant", "0": "cat", "1": "big dog"},
        {"ant": 2, "big dog": 1, "cat": 0},
        {"0": ["n02123045", "cat"], "1": ["n02084071", "big dog"], "2": ["n02219486", "ant"]},
        {"n02219486": "ant", "n01440764": "cat", "n01443537": "big dog"},
        {"architecture": "smlpnet", "label_names": ["cat", "big dog", "ant"], "num_classes": 3},
        {"label_names": ["n1", "n2", "n3"], "label_descriptions": {"n1": "cat", "n2": "big dog", "n3": "ant"}},
        {"id2label": {"0": "cat", "1": "big dog", "2": "ant"}, "label2id": {"cat": 0}},
    ],
    ids=lambda value: json.dumps(value)[:40],
)
def test_json_has_them_in_any_of_the_usual_forms(tmp_path: Path, document: Any) -> None:
    (tmp_path / "labels.json").write_text(json.dumps(document))
    assert read_labels(tmp_path / "labels.json") == ANIMALS


def test_digits_that_are_names_are_not_indices(tmp_path: Path) -> None:
    (tmp_path / "class_to_idx.json").write_text('{"1": 1, "0": 2, "2": 0}')
    assert read_labels(tmp_path / "class_to_idx.json") == ("2", "1", "0")


def test_the_folders_of_a_training_set_in_image_folders_order(tmp_path: Path) -> None:
    for name in ("dog", "Zebra", "cat", "10", "9", ".cache", "ähre"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").touch()
    assert read_labels(tmp_path) == ("10", "9", "Zebra", "cat", "dog", "ähre")
    assert [path.name for path in class_folders(tmp_path)] == list(read_labels(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("labels.txt", "cat\n\ndog\n", "does not hold one name per class"),
        ("labels.txt", "", "does not hold one name per class"),
        ("labels.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("labels.json", "[]", "does not hold one name per class"),
        ("labels.json", "{}", "its keys are neither indices nor WordNet ids"),
        ("labels.json", "[1, 2]", "does not hold one name per class"),
        ("labels.json", '"cat"', "does not hold one name per class"),
        ("labels.json", '{"a": "cat"}', "its keys are neither indices nor WordNet ids"),
        ("labels.json", '{"0": "cat", "2": "dog"}', "it names 2 classes but has no index 1, counted from 0"),
        ("labels.json", '{"1": "cat", "2": "dog"}', "has no index 0"),
        ("labels.json", '{"cat": 0, "dog": 0}', "has no index 1"),
        ("labels.json", '{"cat": 1, "dog": 2}', "has no index 0"),
        ("labels.json", '{"cat": true, "dog": 0}', "neither indices"),
        ("labels.json", '{"0": {"name": "cat"}}', "does not hold one name per class"),
        ("labels.json", '{"label_names": [["a"]]}', "does not hold one name per class"),
        ("labels.json", '{"label_names": ["a"], "label_descriptions": {"a": 3}}', "does not hold one name per class"),
        ("labels.json", '{"0": "a", "0": "b"}', "a key occurs twice"),
    ],
)
def test_anything_else_is_refused_with_the_forms(tmp_path: Path, name: str, content: str | bytes, reason: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=rf"{reason}.* · give one name per line, a folder of class folders, or JSON"):
        read_labels(path)


def test_a_folder_without_class_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not hold one name per class"):
        read_labels(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        read_labels(tmp_path / "absent")
