from __future__ import annotations

import os
import tempfile
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smlp_deploy.errors import UsageError
from smlp_deploy.images.find import SIGNATURE_BYTES, InlineImage, count_images, find_images, images_below, is_image


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", "sub/c.webp", "sub/.hidden.jpg", "empty/readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(*arguments: str, stdin: tuple[str, ...] = ()) -> list[str]:
    return list(find_images(arguments, stdin))


def test_a_folder_gives_its_images_sorted_and_recursively(tree: Path) -> None:
    expected = ["a.PNG", "b.jpg", "sub/.hidden.jpg", "sub/c.webp"]
    assert listed(str(tree)) == [f"{tree}/{name}" for name in expected]


def test_paths_are_what_was_given_byte_for_byte(tree: Path) -> None:
    given = ["./b.jpg", "sub//c.webp", "sub/../b.jpg", "./absent.jpg"]
    assert listed(*given) == given
    assert listed("-", stdin=tuple(f"{path}\n" for path in given)) == given
    below = [".hidden.jpg", "c.webp"]
    for folder in ("sub/", "./sub/", "sub/../sub/"):
        assert listed(folder) == [folder + name for name in below]
    assert listed("./sub") == ["./sub/" + name for name in below]
    assert listed(".") == ["./a.PNG", "./b.jpg", "./sub/.hidden.jpg", "./sub/c.webp"]


def test_files_that_macos_leaves_beside_others_are_skipped(tree: Path) -> None:
    for name in ("._b.jpg", ".DS_Store"):
        (tree / "sub" / name).touch()
    assert listed("sub") == ["sub/.hidden.jpg", "sub/c.webp"]
    assert listed("sub/._b.jpg") == ["sub/._b.jpg"]


def test_a_pattern_that_the_shell_did_not_expand_is_expanded(tree: Path) -> None:
    assert listed("./*.jpg", "sub/*.w?bp") == ["./b.jpg", "sub/c.webp"]
    assert listed("**/*.webp") == ["sub/c.webp"]
    assert listed("s*") == ["sub/.hidden.jpg", "sub/c.webp"]
    (tree / "[1].jpg").touch()
    assert listed("[1].jpg") == ["[1].jpg"]
    with pytest.raises(UsageError, match=r"no file matches this pattern · \*\.gif"):
        find_images(["b.jpg", "*.gif"], ())


@pytest.mark.parametrize("url", ["https://example.org/a b.jpg", "file:///tmp/a.jpg", "ftp://bucket/a.jpg"])
def test_a_url_is_refused_with_the_way_to_do_it(tree: Path, url: str) -> None:
    with pytest.raises(UsageError, match=r"is a URL, and images are read from files · .* · download it first"):
        find_images(["b.jpg", url], ())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "AVIF", "JPEG2000", "ICO", "BMP", "PPM"])
def test_an_image_on_standard_input_is_one_image(tree: Path, kind: str) -> None:
    content = BytesIO()
    Image.new("RGB", (8, 8)).save(content, kind)
    assert is_image(content.getvalue()[:SIGNATURE_BYTES])
    (found,) = find_images(["-"], content.getvalue())
    assert isinstance(found, InlineImage)
    assert (found, found.content) == ("-", content.getvalue())


@pytest.mark.parametrize(
    "head", ["BM.jpg\nPC.jpg\n", "P1.jpg\nP2.jpg\n", "a.jpg", "GIF8.gif\n", "II*.tif\n", "", "RIFF.webp\n"]
)
def test_a_list_on_standard_input_is_no_image(head: str) -> None:
    assert not is_image(head.encode()[:SIGNATURE_BYTES])


def test_a_file_is_taken_whatever_its_name_and_though_it_is_absent(tree: Path) -> None:
    assert listed("notes.txt", "absent.jpg", "b.jpg", "b.jpg") == ["notes.txt", "absent.jpg", "b.jpg", "b.jpg"]


def test_a_folder_without_images_is_an_error_and_in_a_list_it_is_not_lost(tree: Path) -> None:
    with pytest.raises(UsageError, match="no images in this folder · empty · name image files"):
        find_images(["b.jpg", "empty"], ())
    assert listed("-", stdin=("empty\n",)) == ["empty"]


def test_lists_give_paths_and_folders(tree: Path) -> None:
    (tree / "list.txt").write_text("b.jpg\r\n\nsub\n")
    expected = ["b.jpg", "sub/.hidden.jpg", "sub/c.webp"]
    assert listed("@list.txt") == expected
    assert listed("-", stdin=("b.jpg\n", "sub")) == expected


def test_images_are_counted_where_they_can_be_named_twice(tree: Path) -> None:
    (tree / "list.txt").write_text("b.jpg\nsub\n")
    assert count_images(["b.jpg", "sub", "@list.txt", "*.jpg"]) == 1 + 2 + 3 + 1
    assert count_images(["b.jpg", "-"]) is None
    os.mkfifo(tree / "pipe")
    assert count_images(["@pipe"]) is None
    assert count_images(["@absent"]) is None


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
    assert next(images) == "b.jpg"
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
        images = [
            parts for parts in files if parts[-1].lower().endswith((".jpg", ".png", ".webp")) and parts[-1][:2] != "._"
        ]
        expected = [os.path.join(root, *parts) for parts in sorted(images)] or [root]  # noqa: PTH118
        assert list(images_below(root)) == expected
