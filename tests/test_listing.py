from __future__ import annotations

import os
from pathlib import Path

import pytest

from smlp_deploy.errors import UsageError
from smlp_deploy.listing import find_images


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", "sub/c.webp", "sub/.hidden.jpg", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(*arguments: str, stdin: tuple[str, ...] = ()) -> list[str]:
    return [str(path) for path in find_images(arguments, stdin)]


def test_a_folder_gives_its_images_sorted_and_recursively(tree: Path) -> None:
    assert listed(".") == ["a.PNG", "b.jpg", "sub/.hidden.jpg", "sub/c.webp"]


def test_a_file_is_taken_whatever_its_name_and_though_it_is_absent(tree: Path) -> None:
    assert listed("notes.txt", "absent.jpg", "b.jpg", "b.jpg") == ["notes.txt", "absent.jpg", "b.jpg", "b.jpg"]


def test_a_folder_without_images_is_not_lost(tree: Path) -> None:
    assert listed("empty") == ["empty"]


def test_lists_give_paths_and_folders(tree: Path) -> None:
    (tree / "list.txt").write_text("b.jpg\r\n\nsub\n")
    expected = ["b.jpg", "sub/.hidden.jpg", "sub/c.webp"]
    assert listed("@list.txt") == expected
    assert listed("-", stdin=("b.jpg\n", "sub")) == expected


def test_undecodable_names_survive_a_list(tree: Path) -> None:
    (tree / "list.txt").write_bytes(b"\xff.jpg\n")
    assert [os.fsencode(path) for path in find_images(["@list.txt"], ())] == [b"\xff.jpg"]


def test_an_unreadable_list_fails_at_once(tree: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the list of images"):
        find_images(["b.jpg", "@absent.txt"], ())


def test_links_to_folders_are_not_followed(tree: Path) -> None:
    (tree / "sub" / "loop").symlink_to(tree)
    assert listed("sub") == ["sub/.hidden.jpg", "sub/c.webp"]
