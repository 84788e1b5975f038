"""A real `tritonserver` serves what `smlp export --format triton` writes; run by `make test-triton`.

It is the server inside nvidia-pytriton 0.7.0, version 2.51, with its Python backend. Backends for ONNX Runtime and
TensorRT are not on PyPI, so the Python backend runs the exported ONNX file in ONNX Runtime
(`support/triton_network.py`), and of the configuration one line is another. Everything else is as exported.

Its environment has NumPy 1 and no PyTorch, so no fixture of conftest.py is used here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smlp_deploy.evaluation.server import TritonClient, endpoints_of
from smlp_deploy.exporters.triton import PLAN, Interface, write_repository
from smlp_deploy.files import BUNDLED_MODEL
from smlp_deploy.graphs.file import Graph
from smlp_deploy.metadata import BatchProfile
from smlp_deploy.pipeline.repository import export_repository
from tests.support.triton_server import Server, is_installed, run_here, serving

pytestmark = pytest.mark.skipif(
    not is_installed(), reason="nvidia-pytriton and tritonclient need an environment of their own: make test-triton"
)

ROOT = Path(__file__).parents[1]
IMAGES = sorted((ROOT / "images").glob("*.jpg"))
PAGE = ROOT / "docs" / "serving.md"
MODELS = ("smlpnet", "preprocess", "postprocess", "classify")


def smlp(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line, in a process of its own."""
    command = [sys.executable, "-m", "smlp_deploy", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout, done.stderr


def checked(server: Server, *arguments: object, model: Path = BUNDLED_MODEL) -> tuple[int, str, str]:
    return smlp("serve-check", server.http, "--grpc", server.grpc, *arguments, "--model", model)


def ask(server: Server, path: str, *, post: bool = False) -> str:
    """What the server answers to a request without a body; of a refusal, its message."""
    request = urllib.request.Request(f"http://{server.http}/{path}", data=b"{}" if post else None)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return str(error.read().decode())


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files that are no whole images."""
    folder = tmp_path_factory.mktemp("broken")
    contents = {"cut.jpg": IMAGES[0].read_bytes()[:200], "text.jpg": b"not an image", "empty.jpg": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as the command line writes it, which can be served here."""
    repository = tmp_path_factory.mktemp("exported") / "model_repository"
    code, out, err = smlp("export", "--format", "triton", BUNDLED_MODEL, "-o", repository)
    assert (code, out) == (0, f"{repository}\n"), err
    run_here(repository)
    return repository


@pytest.fixture(scope="module")
def server(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of that repository; models are loaded on request, and at the beginning all of them."""
    options = ("--model-control-mode=explicit", "--load-model=*")
    with serving(exported, tmp_path_factory.mktemp("server"), *options) as running:
        yield running


def test_serve_check_finds_full_agreement_and_dynamic_batching(server: Server, broken: list[Path]) -> None:
    load = ("--concurrency", "1,16", "--requests", "200")
    code, out, err = checked(server, *IMAGES, *broken, *load, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["passed"] is True
    assert report["server"].startswith("triton 2.")
    assert [found["endpoint"] for found in report["agreements"]] == [f"http://{server.http}", f"grpc://{server.grpc}"]
    for found in report["agreements"]:
        assert (found["images"], found["same"], found["refused"]) == (15, 15, 3)
        assert found["disagreements"] == []
        assert found["largest"] < 1e-6
    for load in report["loads"]:
        assert load["requests"] == 200
        if load["concurrency"] == 1:
            assert load["runs"] == 200
        else:
            assert load["runs"] < 150, "requests that come together were not run together"


def test_the_table_of_serve_check(server: Server) -> None:
    code, out, err = checked(server, IMAGES[0], "--concurrency", "2", "--requests", "4")
    assert code == 0, err
    assert "same top-1" in out
    assert f"grpc://{server.grpc}" in out


def test_bad_images_are_refused_one_by_one_among_others_of_their_batch(server: Server, broken: list[Path]) -> None:
    files = [IMAGES[0], broken[0], IMAGES[1], broken[1], IMAGES[2], broken[2]] * 8

    def answered(path: Path) -> str:
        with closing(TritonClient(endpoints_of(server.http, grpc=server.grpc)[1])) as client:
            client.check(input_type="FP32")
            found = client.classify(path.read_bytes())
        return found.error or found.scores[0].label

    before = counts(server, "preprocess")
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(answered, files))
    after = counts(server, "preprocess")
    assert after[1] - before[1] < len(files), "no two requests were in one batch"
    for path, found in zip(files, answers, strict=True):
        if path in broken:
            assert any(reason in found for reason in ("damaged image", "not an image", "empty file")), found
        else:
            assert found == path.name.split("-")[1]


def counts(server: Server, model: str) -> tuple[int, int]:
    """Images, and runs of a model for them."""
    (found,) = json.loads(ask(server, f"v2/models/{model}/stats"))["model_stats"]
    return found["inference_count"], found["execution_count"]


def test_the_classification_extension_has_the_labels(server: Server) -> None:
    zeros = [0.0] * (3 * 32 * 32)
    body = {
        "inputs": [{"name": "images", "shape": [1, 3, 32, 32], "datatype": "FP32", "data": zeros}],
        "outputs": [{"name": "logits", "parameters": {"classification": 3}}],
    }
    request = urllib.request.Request(f"http://{server.http}/v2/models/smlpnet/infer", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        (logits,) = json.loads(answer.read())["outputs"]
    labels = Graph.read(BUNDLED_MODEL).metadata.labels
    assert len(logits["data"]) == 3
    for line in logits["data"]:
        _, index, label = line.split(":")
        assert labels[int(index)] == label


def test_metrics_have_what_the_page_names(server: Server) -> None:
    page = PAGE.read_text(encoding="utf-8")
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    named = [word.strip("`") for word in page.split() if word.startswith("`nv_") and "gpu" not in word]
    assert len(named) >= 5
    for name in named:
        assert f"{name}{{" in text, name


def test_the_client_on_the_page(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    code = code.replace("localhost:8000", server.http).replace('"images/', f'"{IMAGES[0].parent}/')
    exec(code, {})
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("0 0.92")
    assert len(others) == 4


def test_a_new_version_is_served_after_a_load(exported: Path, tmp_path: Path) -> None:
    repository = tmp_path / "model_repository"
    shutil.copytree(exported, repository)
    with serving(repository, tmp_path, "--model-control-mode=explicit", "--load-model=*") as running:
        assert export_repository(BUNDLED_MODEL, repository).version == 2
        run_here(repository)
        assert ask(running, "v2/repository/models/smlpnet/load", post=True) == ""
        assert json.loads(ask(running, "v2/models/smlpnet"))["versions"] == ["2"]
        code, _, err = checked(running, *IMAGES, "--concurrency", "0")
        assert code == 0, err


def of_one_batch_size(folder: Path) -> Path:
    graph = Graph.read(BUNDLED_MODEL)
    model = graph.model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    del model.graph.value_info[:]
    fixed = Graph.of(model, replace(graph.metadata, batch=4), path=folder / "batch4.onnx")
    fixed.save()
    return fixed.path


def of_pixels(folder: Path) -> Path:
    from smlp_deploy.exporters.pixels import take_pixels

    graph = Graph.read(BUNDLED_MODEL)
    metadata = replace(graph.metadata, input="uint8")
    pixels = Graph.of(take_pixels(graph.model(), metadata.preprocessing), metadata, path=folder / "pixels.onnx")
    pixels.save()
    return pixels.path


@pytest.mark.parametrize("make", [of_one_batch_size, of_pixels])
def test_other_forms_of_the_network_agree(make: Callable[[Path], Path], broken: list[Path], tmp_path: Path) -> None:
    model = make(tmp_path)
    repository = export_repository(model, tmp_path / "model_repository").path
    run_here(repository)
    with serving(repository, tmp_path) as running:
        code, out, err = checked(running, *IMAGES, *broken, "--requests", "20", "--json", model=model)
        assert code == 0, err
        assert [found["same"] for found in json.loads(out)["agreements"]] == [15, 15]
        code, _, err = checked(running, IMAGES[0], "--concurrency", "0")
        of_other_input = make is of_pixels
        assert code == (6 if of_other_input else 0)
        assert not of_other_input or "its smlpnet takes UINT8, and the model here FP32" in err


def test_another_model_does_not_agree(server: Server, tmp_path: Path) -> None:
    graph = Graph.read(BUNDLED_MODEL)
    labels = tuple(f"class {label}" for label in graph.metadata.labels)
    other = Graph.of(graph.model(), replace(graph.metadata, labels=labels), path=tmp_path / "other.onnx")
    other.save()
    code, out, err = checked(server, *IMAGES, "--concurrency", "0", model=other.path)
    assert code == 3
    assert "the server calls class" in out
    assert "error: the server does not agree" in err
    assert "top-1 is the same on 0 of 12 images" in err


@pytest.mark.parametrize("verb", [("--help",), ("predict", str(IMAGES[0]), "--model", str(BUNDLED_MODEL))])
def test_other_verbs_load_nothing_of_it(verb: tuple[str, ...]) -> None:
    script = (
        "import sys\n"
        "from smlp_deploy.cli import main\n"
        f"try: main({list(verb)!r})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    assert "smlp_deploy" in loaded
    assert not loaded & {"tritonclient", "gevent", "geventhttpclient", "grpc", "pytriton"}


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_no_server_is_one_line(protocol: str) -> None:
    arguments = ("127.0.0.1:9", IMAGES[0], "--protocol", protocol, "--model", BUNDLED_MODEL)
    code, out, err = smlp("serve-check", *arguments)
    assert (code, out) == (6, "")
    assert err.count("\n") == 1
    assert err.startswith("error: no server answers: ")


def test_a_model_that_is_not_loaded_and_one_of_another_tool_are_one_line(exported: Path, tmp_path: Path) -> None:
    repository = tmp_path / "model_repository"
    shutil.copytree(exported, repository)
    for field in ("name", "value"):
        replaced(f'{field}: "index"', f'{field}: "number"', model="classify")(repository)
    with serving(repository, tmp_path, "--model-control-mode=explicit", "--load-model=smlpnet") as running:
        for protocol in ("http", "grpc"):
            code, _, err = checked(running, IMAGES[0], "--protocol", protocol)
            assert code == 6
            assert err.startswith("error: the model classify is not loaded · ")
        assert ask(running, "v2/repository/models/classify/load", post=True) == ""
        for protocol in ("http", "grpc"):
            code, _, err = checked(running, IMAGES[0], "--protocol", protocol)
            assert code == 6
            assert err.startswith(
                "error: its classify takes image and gives label, number, probability: smlp export did"
            )


Edit = Callable[[Path], Any]


def replaced(old: str, new: str, *, model: str = "smlpnet") -> Edit:
    def edit(repository: Path) -> None:
        config = repository / model / "config.pbtxt"
        text = config.read_text()
        assert old in text
        config.write_text(text.replace(old, new, 1))

    return edit


def renamed(name: str) -> Edit:
    return lambda repository: (repository / "smlpnet" / "1").rename(repository / "smlpnet" / name)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(replaced('name: "smlpnet"', 'name: "other"'), "directory name must equal model name", id="rule 1"),
        pytest.param(renamed("01"), "at least one version must be available", id="rule 2, 01"),
        pytest.param(renamed("v1"), "at least one version must be available", id="rule 2, v1"),
        pytest.param(replaced('backend: "python"', 'platform: "onnx"'), "unexpected platform type 'onnx'", id="rule 3"),
        pytest.param(replaced("size: 64", "size: 0"), "preferred size must be <= max batch size", id="rule 4"),
        pytest.param(replaced("32, 64 ]", "32, 128 ]"), "preferred size must be <= max batch size", id="rule 5"),
        pytest.param(replaced("TYPE_FP32", "TYPE_FLOAT"), "failed to read text proto", id="rule 6, no such type"),
        pytest.param(replaced('"labels.txt"', '"absent.txt"'), "failed to open text file", id="rule 7, absent"),
        pytest.param(replaced('"labels.txt"', '"/etc/hostname"'), "failed to open text file", id="rule 7, absolute"),
        pytest.param(
            replaced('key: "logits"', 'key: "logit"', model="classify"),
            "is mapped from non-existing output logit in model smlpnet",
            id="rule 8, name",
        ),
        pytest.param(
            replaced("[ 3, 32, 32 ]", "[ 3, 32, 33 ]", model="preprocess"),
            "inconsistent shape: [-1,3,32,33] is inferred from model preprocess",
            id="rule 8, dims",
        ),
        pytest.param(
            replaced("TYPE_FP32", "TYPE_FP16", model="postprocess"), "inconsistent data type", id="rule 8, type"
        ),
        pytest.param(
            replaced("size: 64", "size: 128", model="classify"),
            "allows maximum batch size 128, but",
            id="rule 8, batch",
        ),
    ],
)
def test_the_server_refuses_what_breaks_a_rule(edit: Edit, message: str, exported: Path, tmp_path: Path) -> None:
    repository = tmp_path / "model_repository"
    shutil.copytree(exported, repository)
    edit(repository)
    with serving(repository, tmp_path, "--model-control-mode=explicit") as running:
        answer = ask(running, "v2/repository/models/classify/load", post=True)
        log = "".join(running.log)
    assert "error" in answer, "it was loaded"
    assert message in answer + log


@pytest.mark.parametrize("platform", ["onnxruntime_onnx", PLAN])
@pytest.mark.parametrize("batch", [None, 4])
def test_configurations_are_messages_of_the_schema(platform: str, batch: int | None, tmp_path: Path) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    interface = Interface.read(export_repository(BUNDLED_MODEL, tmp_path / "of_any_size").path / "smlpnet")
    profile = BatchProfile.fixed(batch) if batch else interface.profile
    interface = replace(interface, platform=platform, batch=batch, profile=profile)
    repository = write_repository(tmp_path / "model_repository", interface, {"model": b""}).path
    for model in MODELS:
        config = text_format.Parse((repository / model / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())
        assert config.name == model
        assert config.max_batch_size == (0 if batch else 64)
        assert not config.instance_group
        assert config.platform == {"smlpnet": platform, "classify": "ensemble"}.get(model, "")
        assert bool(config.model_warmup) == (model == "smlpnet")
