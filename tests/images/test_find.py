from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smlp_deploy.errors import UsageError
from smlp_deploy.images.find import find_images


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


@pytest.mark.parametrize("name", ["absent.txt", "sub", "", "nul\0", "\ud800"])
def test_an_unreadable_list_fails_at_once(tree: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot read the list of images"):
        find_images(["b.jpg", f"@{name}"], ())


def test_a_list_that_goes_away_is_an_error_too(tree: Path) -> None:
    (tree / "list.txt").touch()
    images = find_images(["b.jpg", "@list.txt"], ())
    assert next(images) == Path("b.jpg")
    (tree / "list.txt").unlink()
    with pytest.raises(UsageError, match="cannot read the list of images"):
        next(images)


def test_every_line_of_a_list_is_a_path_however_odd(tree: Path) -> None:
    lines = ["nul\0.jpg", "carriage\rreturn.jpg", " spaces .jpg ", "@not a list.txt", "-", "x" * 5000, "é.jpg"]
    (tree / "list.txt").write_bytes("\n".join(lines).encode())
    assert listed("@list.txt") == lines


def test_links_to_folders_are_not_followed(tree: Path) -> None:
    (tree / "sub" / "loop").symlink_to(tree)
    assert listed("sub") == ["sub/.hidden.jpg", "sub/c.webp"]


def test_folders_nest_deeper_than_pythons_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [Path("/".join("d" * depth)) for depth in range(1, 1300)]
    for folder in folders:
        folder.mkdir()
    deepest = folders[-1] / "a.jpg"
    deepest.touch()
    found = listed("d")
    deepest.unlink()
    for folder in reversed(folders):  # because pytest's own tidying recurses
        folder.rmdir()
    assert found == [str(deepest)]


NAMES = (
    st.builds(
        bytes.__add__,
        st.binary(min_size=1, max_size=5).filter(lambda name: not set(name) & set(b"/\0")),
        st.sampled_from([b".jpg", b".PNG", b".webp", b".txt", b"jpg", b"", b".jpg\n", b"\n.jpg"]),
    )
    .filter(lambda name: name not in (b".", b".."))
    .map(os.fsdecode)
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=3), max_size=12))
def test_any_tree_gives_each_image_once_and_sorted(tree: list[list[str]]) -> None:
    files = set()
    with tempfile.TemporaryDirectory() as root:
        for parts in tree:
            path = Path(root, *parts)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch(exist_ok=False)
            except OSError:  # two of them want one name
                continue
            files.add(tuple(parts))
        images = [parts for parts in files if parts[-1].lower().endswith((".jpg", ".png", ".webp"))]
        expected = [Path(root, *parts) for parts in sorted(images)] or [Path(root)]
        assert list(find_images([root], ())) == expected
