from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from smlp_deploy.errors import UsageError
from smlp_deploy.evaluation.accuracy import evaluate
from smlp_deploy.images.dataset import LabelledImage, find_labelled_images, imagenet_synsets, read_mapping
from smlp_deploy.models.description import imagenet_labels
from tests.support.fakes import FakeRunner, quadrant_means

ANIMALS = ("cat", "dog", "3")


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


def dataset(folder: Path, *names: str) -> Path:
    for name in names:
        picture(folder / name / "a.png")
    return folder


def found(folder: Path, labels: tuple[str, ...] = ANIMALS, **options: Mapping[str, str] | tuple[str, ...]) -> list[str]:
    samples = find_labelled_images(folder, labels, **options)  # type: ignore[arg-type]
    return [f"{Path(sample.path).parent.name} {sample.label} {sample.named_by}" for sample in samples]


class TestFolders:
    def test_named_by_label(self, tmp_path: Path) -> None:
        assert found(dataset(tmp_path, "dog", "cat", ".cache")) == ["cat 0 label", "dog 1 label"]

    def test_digits_are_labels_rather_than_indices(self, tmp_path: Path) -> None:
        assert found(dataset(tmp_path, "1", "0"), ("1", "0")) == ["0 1 label", "1 0 label"]

    def test_one_folder_that_is_no_label_makes_all_of_them_indices(self, tmp_path: Path) -> None:
        assert found(dataset(tmp_path, "3", "00"), ("cat", "3", "dog", "fox")) == ["00 0 index", "3 3 index"]

    def test_named_by_synset(self, tmp_path: Path) -> None:
        labels = imagenet_labels()
        synsets = imagenet_synsets(labels)
        assert synsets is not None
        assert imagenet_synsets(ANIMALS) is None
        folder = dataset(tmp_path, "n01443537", "n01440764")
        assert found(folder, labels, synsets=synsets) == ["n01440764 0 synset", "n01443537 1 synset"]
        with pytest.raises(UsageError, match="did you mean 'n01443537'"):
            find_labelled_images(dataset(tmp_path, "n0144353"), labels, synsets=synsets)
        with pytest.raises(UsageError, match=r"'1000' is not the index .* · use one of the model's, counted from 0"):
            find_labelled_images(dataset(tmp_path / "indices", "0", "1000"), labels, synsets=synsets)

    def test_a_mapping_renames_what_differs(self, tmp_path: Path) -> None:
        folder = dataset(tmp_path, "Katze", "dog")
        assert found(folder, mapping={"Katze": "cat", "Maus": "mouse"}) == ["Katze 0 label", "dog 1 label"]

    def test_an_unknown_folder_is_named_with_the_closest_label(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"'dgo' is not the label of .* · .*/dgo · did you mean 'dog'\?"):
            find_labelled_images(dataset(tmp_path, "cat", "dgo"), ANIMALS)

    @pytest.mark.parametrize(
        ("folders", "labels", "reason"),
        [
            (("0", "1", "3"), ("cat", "dog", "fox"), "'3' is not the index of .* counted from 0"),
            (("crane", "cat"), ("crane", "cat", "crane"), "'crane' is not the label of exactly one class"),
            ((), ANIMALS, "has no images"),
        ],
    )
    def test_what_names_no_class(
        self, tmp_path: Path, folders: tuple[str, ...], labels: tuple[str, ...], reason: str
    ) -> None:
        with pytest.raises(UsageError, match=reason):
            find_labelled_images(dataset(tmp_path, *folders), labels)

    def test_images_lie_at_any_depth_and_an_empty_class_is_reported(self, tmp_path: Path) -> None:
        picture(tmp_path / "cat" / "deep" / "er" / "x.png")
        (tmp_path / "dog").mkdir()
        samples = find_labelled_images(tmp_path, ANIMALS)
        assert [Path(sample.path).relative_to(tmp_path).as_posix() for sample in samples] == [
            "cat/deep/er/x.png",
            "dog",
        ]
        result = evaluate([FakeRunner(quadrant_means)], samples)
        assert result.records[1].error == "is a directory without images"

    def test_a_folder_called_like_a_list_is_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset(tmp_path / "@data", "cat")
        monkeypatch.chdir(tmp_path)
        assert [str(sample.path) for sample in find_labelled_images(Path("@data"), ANIMALS)] == ["@data/cat/a.png"]

    def test_paths_begin_as_the_dataset_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dataset(tmp_path, "cat")
        monkeypatch.chdir(tmp_path)
        Path("set.csv").write_text("path,label\n./cat//a.png,cat\n")
        written = {"./": "./cat/a.png", ".": "./cat/a.png", "./set.csv": "././cat//a.png", "set.csv": "./cat//a.png"}
        assert {given: find_labelled_images(given, ANIMALS)[0].path for given in written} == written

    def test_a_folder_of_images_without_classes_is_told_the_layout(self, tmp_path: Path) -> None:
        picture(tmp_path / "a.png")
        with pytest.raises(
            UsageError, match=r"has images, but no class folders .* DATASET/cat/1\.jpg, or a CSV file with"
        ):
            find_labelled_images(tmp_path, ANIMALS)


class TestModelsThatOnlyNumberTheirClasses:
    NUMBERS = ("0", "1", "2")

    def test_folders_are_taken_in_sorted_order_after_saying_so(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = dataset(tmp_path, "dog", "Zebra", "cat", ".cache")
        assert found(folder, self.NUMBERS) == ["Zebra 0 order", "cat 1 order", "dog 2 order"]
        assert "sorted order, as ImageFolder numbers them: 0 is Zebra, 2 is dog (--class-order gives" in caplog.text

    def test_numbered_folders_are_still_those_numbers(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert found(dataset(tmp_path, "2", "0"), self.NUMBERS) == ["0 0 label", "2 2 label"]
        assert caplog.text == ""

    @pytest.mark.parametrize("folders", [("cat", "dog"), ("ant", "cat", "dog", "emu")])
    def test_another_number_of_folders_has_no_order(self, tmp_path: Path, folders: tuple[str, ...]) -> None:
        reason = rf"only numbers them: {len(folders)} folders for 3 classes · .* --class-order, or to smlp export with"
        with pytest.raises(UsageError, match=reason):
            find_labelled_images(dataset(tmp_path, *folders), self.NUMBERS)

    def test_a_mapping_to_numbers_is_used(self, tmp_path: Path) -> None:
        folder = dataset(tmp_path, "cat", "dog")
        assert found(folder, self.NUMBERS, mapping={"cat": "2", "dog": "0"}) == ["cat 2 label", "dog 0 label"]

    def test_names_of_classes_in_a_file_of_rows_have_no_order(self, tmp_path: Path) -> None:
        (tmp_path / "set.csv").write_text("path,label\na.png,cat\nb.png,dog\nc.png,emu\n")
        with pytest.raises(UsageError, match=r"'cat' is not the label of exactly one class"):
            find_labelled_images(tmp_path / "set.csv", self.NUMBERS)
        order = ("emu", "dog", "cat")
        samples = find_labelled_images(tmp_path / "set.csv", self.NUMBERS, class_order=order)
        assert [(sample.label, sample.named_by) for sample in samples] == [(2, "order"), (1, "order"), (0, "order")]


class TestAGivenOrder:
    def test_comes_before_everything_else(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = dataset(tmp_path, "cat", "dog")
        assert found(folder, ANIMALS, class_order=("dog", "fox", "cat")) == ["cat 2 order", "dog 0 order"]
        assert found(folder, ("0", "1"), class_order=("dog", "cat")) == ["cat 1 order", "dog 0 order"]
        assert caplog.text == ""

    @pytest.mark.parametrize("order", [("dog", "cat"), ("dog", "cat", "cat"), ("a", "b", "c", "d")])
    def test_names_each_class_once(self, tmp_path: Path, order: tuple[str, ...]) -> None:
        with pytest.raises(UsageError, match=r"different names for 3 classes · --class-order"):
            find_labelled_images(dataset(tmp_path, "cat"), ANIMALS, class_order=order)

    def test_lacks_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"'dgo' is not in the given order of classes · .*did you mean 'dog'\?$"):
            find_labelled_images(dataset(tmp_path, "dgo"), ANIMALS, class_order=("cat", "dog", "fox"))


class TestCsv:
    @pytest.mark.parametrize("head", ["path,label", "\ufeffpath,label", "label,path,note"])
    def test_paths_are_relative_to_the_file(self, tmp_path: Path, head: str) -> None:
        rows = ["cat,in/a.png,x", "3,b.png,y"] if "note" in head else ["in/a.png,cat", "b.png,3"]
        (tmp_path / "set.csv").write_text("\r\n".join([head, *rows]), encoding="utf-8")
        samples = find_labelled_images(tmp_path / "set.csv", ANIMALS)
        assert samples == (LabelledImage(str(tmp_path / "in/a.png"), 0), LabelledImage(str(tmp_path / "b.png"), 2))

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("path,label\na.png,cat\nb.png,dig\n", r"'dig' is not the label .*set.csv, line 3 · did you mean 'dog'"),
            ("a.png,cat\n", "its first row must name the columns path and label"),
            ("path,label\na.png\n", "line 2"),
            ("path,label\n,cat\n", "line 2"),
            ("path,label\na,b.png,cat\n", "too many columns"),
            ('path,label\n"a.png,cat\n', "is not a CSV file: unexpected end of data"),
            ("path,label\n", "has no images"),
        ],
    )
    def test_what_cannot_be_used_names_the_row(self, tmp_path: Path, text: str, reason: str) -> None:
        (tmp_path / "set.csv").write_text(text)
        with pytest.raises(UsageError, match=reason):
            find_labelled_images(tmp_path / "set.csv", ANIMALS)

    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no such file"):
            find_labelled_images(tmp_path / "absent", ANIMALS)


class TestMapping:
    @pytest.mark.parametrize(("name", "text"), [("m.json", '{"Katze": "cat"}'), ("m.csv", "folder,label\nKatze,cat\n")])
    def test_json_and_csv(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        assert read_mapping(tmp_path / name) == {"Katze": "cat"}

    @pytest.mark.parametrize(
        ("name", "text", "reason"),
        [
            ("m.json", '["cat"]', "not a JSON object"),
            ("m.json", '{"a": 1}', "not a JSON object"),
            ("m.json", '{"a": "b", "a": "c"}', "a key occurs twice"),
            ("m.csv", "folder,label\na,b\na,c\n", "maps a folder twice"),
        ],
    )
    def test_what_is_no_mapping(self, tmp_path: Path, name: str, text: str, reason: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=reason):
            read_mapping(tmp_path / name)
