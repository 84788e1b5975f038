"""Images in an object store: a real S3 server on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from pyarrow.fs import S3FileSystem

from smlp_deploy.errors import ImageError, MissingDependencyError, UsageError
from smlp_deploy.images import decode, remote
from smlp_deploy.images.find import find_images
from smlp_deploy.images.preprocessing import load_image
from smlp_deploy.inference.classify import Classifier
from smlp_deploy.metadata import Preprocessing
from smlp_deploy.pipeline.export import Export

ROOT = "s3://photos"
UNUSUAL = "week 1/100% é?&#.jpg"


@pytest.fixture(scope="module")
def store(digit_images: list[Path]) -> Iterator[S3FileSystem]:
    """A bucket with photographs in folders, two of them broken, and files that are no images."""
    from moto.server import ThreadedMotoServer  # takes a second to import

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        files = S3FileSystem(endpoint_override=f"http://{host}:{port}", allow_bucket_creation=True)
        files.create_dir("photos")
        photo = digit_images[0].read_bytes()
        contents = {
            "b/2.jpg": photo,
            "b/10.PNG": b"no image",
            "a/deep/x.jpeg": photo,
            UNUSUAL: photo,
            "b/empty.jpg": b"",
        }
        for name, content in {**contents, "b/notes.txt": b"", "b/._2.jpg": b""}.items():
            with files.open_output_stream(f"photos/{name}") as stream:
                stream.write(content)
        remote._filesystem.cache_clear()
        yield files
        remote._filesystem.cache_clear()
    server.stop()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://photos/a.jpg", True),
        ("gs://photos", True),
        ("abfs://photos/", True),
        ("s3:/photos/a.jpg", False),
        ("http://example.org/a.jpg", False),
        ("./s3://photos/a.jpg", False),
        ("a.jpg", False),
        ("s3://", False),
    ],
)
def test_is_remote(name: str, expected: bool) -> None:
    assert remote.is_remote(name) is expected


class TestListing:
    def test_a_folder_gives_its_images_in_the_order_of_a_local_one(self, store: S3FileSystem) -> None:
        expected = [f"{ROOT}/{name}" for name in ("a/deep/x.jpeg", "b/10.PNG", "b/2.jpg", "b/empty.jpg", UNUSUAL)]
        assert list(find_images([ROOT], ())) == expected
        assert list(find_images([f"{ROOT}/"], ())) == expected
        assert list(find_images([f"{ROOT}/a", f"{ROOT}/b/2.jpg"], ())) == [expected[0], expected[2]]

    def test_lines_of_a_listing_are_objects_unless_they_end_in_a_slash(self, store: S3FileSystem) -> None:
        lines = [f"{ROOT}/gone.jpg\n", f"{ROOT}/b\n", f"{ROOT}/a/\n"]
        assert list(find_images(["-"], lines)) == [f"{ROOT}/gone.jpg", f"{ROOT}/b", f"{ROOT}/a/deep/x.jpeg"]

    def test_a_folder_without_images(self, store: S3FileSystem) -> None:
        with store.open_output_stream("photos/c/notes.txt") as stream:
            stream.write(b"text")
        with pytest.raises(UsageError, match="no images in this folder · s3://photos/c"):
            find_images([f"{ROOT}/c"], ())
        store.delete_file("photos/c/notes.txt")

    def test_what_is_not_there_becomes_a_record(self, store: S3FileSystem) -> None:
        assert list(find_images(["s3://other/x.jpg"], ())) == ["s3://other/x.jpg"]

    def test_a_store_that_does_not_answer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(root: str) -> NoReturn:
            raise OSError("When resolving region for bucket 'photos':\nCould not resolve host")

        monkeypatch.setattr(remote, "_filesystem", fail)
        with pytest.raises(UsageError) as error:
            find_images([ROOT], ())
        assert str(error.value) == (
            "When resolving region for bucket 'photos': Could not resolve host · s3://photos · "
            "check the name, the credentials and the network"
        )

    def test_without_pyarrow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("smlp_deploy.dependencies.is_installed", lambda module: module != "pyarrow")
        for arguments, lines in ((["s3://photos"], []), (["-"], ["s3://photos/a.jpg"])):
            with pytest.raises(
                MissingDependencyError, match=r'pyarrow not installed.*pip install "smlp-deploy\[parquet\]"'
            ):
                list(find_images(arguments, lines))


class TestReading:
    def test_an_image_is_what_its_file_is(self, store: S3FileSystem, digit_images: list[Path]) -> None:
        preprocessing = Preprocessing(image_size=28)
        expected = load_image(digit_images[0], preprocessing)
        for name in ("b/2.jpg", UNUSUAL):
            assert (load_image(f"{ROOT}/{name}", preprocessing) == expected).all()

    def test_what_cannot_be_read(self, store: S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
        preprocessing = Preprocessing(image_size=28)
        for name, reason in (("gone.jpg", "no such object"), ("b", "no such object"), ("b/empty.jpg", "empty file")):
            with pytest.raises(ImageError, match=reason):
                load_image(f"{ROOT}/{name}", preprocessing)
        monkeypatch.setattr(remote, "MAX_FILE_SIZE", 100)
        with pytest.raises(ImageError, match="larger than 100 bytes"):
            load_image(f"{ROOT}/b/2.jpg", preprocessing)
        assert decode.MAX_FILE_SIZE > 100

    def test_records_of_a_folder(self, store: S3FileSystem, digits_export: Export, digit_images: list[Path]) -> None:
        with Classifier.open(digits_export.path) as classifier:
            (local,) = classifier.classify(digit_images[0])
            found = list(classifier.classify(find_images([ROOT], ())))
        assert [(one.path, one.error.partition(" (")[0]) for one in found if one.error] == [
            (f"{ROOT}/b/10.PNG", "not an image in a supported format"),
            (f"{ROOT}/b/empty.jpg", "empty file"),
        ]
        assert {one.scores[0].label for one in found if not one.error} == {local.scores[0].label}
