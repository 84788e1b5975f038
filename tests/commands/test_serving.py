"""smlp export --format triton and smlp serve-check: what they say, and what they refuse before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from smlp_deploy.cli import main
from smlp_deploy.evaluation import serving
from smlp_deploy.evaluation.serving import ServerReport
from smlp_deploy.files import BUNDLED_MODEL
from tests.evaluation.test_serving import FakeServer

Result = tuple[int | str | None, str, str]


@pytest.fixture
def smlp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs the command line in an empty folder; the exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
        return (stop.value.code, *capsys.readouterr())

    return run


def test_a_repository_is_made_of_the_bundled_model_if_there_is_no_other(
    smlp: Callable[..., Result], tmp_path: Path
) -> None:
    code, out, err = smlp("export", "--format", "triton")
    assert (code, out) == (0, "model_repository\n")
    assert "note: no ONNX file given and none in artifacts/; using the bundled digits model" in err
    assert "version 1 for onnxruntime_onnx, batches of up to 64" in err
    assert (tmp_path / "model_repository" / "smlpnet" / "1" / "model.onnx").is_file()


def test_the_newest_file_becomes_the_next_version(smlp: Callable[..., Result], tmp_path: Path) -> None:
    assert smlp("export", "--format", "triton", BUNDLED_MODEL, "-o", "served")[0] == 0
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "my-fp32.onnx").write_bytes(BUNDLED_MODEL.read_bytes())
    code, out, err = smlp("export", "--format", "triton", "-o", "served", "--json")
    assert code == 0
    assert "no ONNX file given; using artifacts/my-fp32.onnx, the newest in artifacts/" in err
    expected = {"path": "served", "version": 2, "platform": "onnxruntime_onnx", "batch": None, "max_batch_size": 64}
    assert json.loads(out) == expected


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("absent.onnx",), 5, "no such file · absent.onnx"),
        (("my.pth",), 5, "no such file · my.pth"),
        ((BUNDLED_MODEL, "--fp16"), 2, "says how to make an ONNX file, and a repository is made of one that is there"),
        ((BUNDLED_MODEL, "--mean", "0,0,0"), 2, "· --mean · export it first"),
        ((BUNDLED_MODEL, "--for", "gpu"), 2, "· --for · export it first"),
    ],
)
def test_wrong_usage_of_the_export_is_one_line(
    arguments: tuple[object, ...], code: int, message: str, smlp: Callable[..., Result], tmp_path: Path
) -> None:
    found, _, err = smlp("export", "--format", "triton", *arguments)
    assert found == code
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "model_repository").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("ftp://a", "a.jpg"), 2, "'ftp://a' is not the address of a server · URL"),
        (("a", "a.jpg", "--grpc", "b"), 2, "'b' has no port · --grpc"),
        (("a", "a.jpg", "--protocol", "tcp"), 2, "'tcp' is neither http nor grpc · --protocol"),
        (("a", "a.jpg", "--concurrency", "many"), 2, "'many' is not a list of numbers · --concurrency"),
        (("a", "a.jpg", "--concurrency", "0,1"), 2, "at least 1 · --concurrency"),
        (("a", "a.jpg", "--min-top1", "97"), 2, "97 is a percentage · --min-top1 · write 0.97"),
    ],
)
def test_wrong_usage_of_the_check_is_one_line(
    arguments: tuple[object, ...], code: int, message: str, smlp: Callable[..., Result]
) -> None:
    found, _, err = smlp("serve-check", *arguments)
    assert found == code
    assert message in err


def test_the_package_is_asked_for_before_any_work(smlp: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smlp_deploy.dependencies.is_installed", lambda module: module != "tritonclient")
    code, _, err = smlp("serve-check", "localhost:8000", "absent.jpg")
    assert code == 6
    assert (
        err == 'error: tritonclient not installed, needed to ask a Triton server · pip install "smlp-deploy[serve]"\n'
    )


@pytest.fixture
def fake_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of the artifact that is given."""
    check = serving.check_server

    def with_fake(endpoints, classifier, images, **settings) -> ServerReport:  # type: ignore[no-untyped-def]
        return check(endpoints, classifier, images, connect=FakeServer(classifier).connect, **settings)

    monkeypatch.setattr("smlp_deploy.evaluation.server.require_client", lambda: None)
    monkeypatch.setattr(serving, "check_server", with_fake)


@pytest.mark.usefixtures("fake_server")
def test_a_check_that_passes(smlp: Callable[..., Result], digit_images: list[Path]) -> None:
    load = ("--concurrency", "1,2", "--requests", "4")
    code, out, _ = smlp("serve-check", "localhost:8000", *digit_images, "-m", BUNDLED_MODEL, *load)
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("fake 1.0 against onnxruntime (CPU) smlpnet_digits.onnx")
    assert any(line.split()[:4] == ["http://localhost:8000", "12", "0", "100.00%"] for line in lines)
    assert sum(line.startswith("grpc://localhost:8001") for line in lines) == 3


@pytest.mark.usefixtures("fake_server")
def test_a_check_as_json_over_one_protocol(smlp: Callable[..., Result], digit_images: list[Path]) -> None:
    given = ("-m", BUNDLED_MODEL, "--concurrency", "0", "--protocol", "grpc", "--json")
    code, out, _ = smlp("serve-check", "localhost:8000", *digit_images, *given)
    document = json.loads(out)
    assert code == 0
    assert document["passed"] is True
    assert document["loads"] == []
    assert [found["endpoint"] for found in document["agreements"]] == ["grpc://localhost:8001"]


@pytest.mark.usefixtures("fake_server")
def test_a_check_that_fails_has_its_table_and_one_line(smlp: Callable[..., Result], digit_images: list[Path]) -> None:
    given = ("-m", BUNDLED_MODEL, "--concurrency", "0", "--max-difference", "0")
    code, out, err = smlp("serve-check", "localhost:8000", *digit_images, *given)
    assert code == 3
    assert "largest difference" in out
    assert err.startswith("error: the server does not agree: http://localhost:8000: top-1 is the same on 12 of 12")
