from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from smlp_deploy import dependencies
from smlp_deploy.errors import UsageError
from smlp_deploy.runners import placement as module
from smlp_deploy.runners.placement import Placement
from tests.support.fakes import metadata
from tests.support.gpu import L4

SECOND = replace(L4, index=1)
ONNX, ENGINE, CHECKPOINT = Path("x.onnx"), Path("x.engine"), Path("x.pth")


@pytest.fixture(autouse=True)
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "list_gpus", lambda: (L4, SECOND))


def test_by_default_only_engines_run_on_a_gpu() -> None:
    placement = Placement.of()
    assert [placement.gpu_of(path) for path in (ONNX, ENGINE, CHECKPOINT)] == [None, L4, None]
    assert placement.onnx_provider == "cpu"


def test_all_run_on_the_gpu_that_is_chosen() -> None:
    placement = Placement.of(device="cuda:1")
    assert [placement.gpu_of(path) for path in (ONNX, ENGINE, CHECKPOINT)] == [SECOND] * 3
    assert placement.onnx_provider == "cuda"
    assert Placement.of(device="1", provider="tensorrt").onnx_provider == "tensorrt"
    assert pickle.loads(pickle.dumps(placement)) == placement


def test_a_provider_runs_on_the_first_gpu() -> None:
    placement = Placement.of(provider="cuda")
    assert [placement.gpu_of(path) for path in (ONNX, CHECKPOINT)] == [L4, None]


@pytest.mark.parametrize(
    ("device", "provider"), [("cpu", "cuda"), ("CPU", "tensorrt"), ("cuda", "cpu"), ("1", "cpu"), ("7", "cpu")]
)
def test_contradictions_are_one_clear_line(device: str, provider: str) -> None:
    with pytest.raises(UsageError, match=rf"^--provider {provider} contradicts --device {device} · "):
        Placement.of(device=device, provider=provider)


def test_the_cpu_agrees_with_the_cpu() -> None:
    placement = Placement.of(device="cpu", provider="cpu")
    assert [placement.gpu_of(path) for path in (ONNX, ENGINE, CHECKPOINT)] == [None] * 3


def test_what_cannot_run_there_is_refused() -> None:
    with pytest.raises(UsageError, match=r"an engine runs only on a GPU · x\.engine · leave out --device cpu"):
        Placement.of(device="cpu").check(ENGINE)
    for path in (ENGINE, CHECKPOINT):
        with pytest.raises(UsageError, match=rf"only ONNX files take a provider · {path} · use --device"):
            Placement.of(provider="cuda").check(path)
        Placement.of(provider="cuda").for_file(path).check(path)
    Placement.of(provider="cuda").for_file(ONNX).check(ONNX)
    assert Placement.of(provider="cuda").for_file(ONNX).provider == "cuda"


@pytest.mark.parametrize(
    ("device", "provider", "kinds"),
    [
        (None, None, ("cpu", "cpu", "cpu")),
        ("cpu", None, ("cpu", "cpu", "cpu")),
        (None, "tensorrt", ("tensorrt", "cpu", "cpu")),
        ("cuda", None, ("cuda", "cpu", "cuda")),
    ],
)
def test_results_depend_on_it(device: str | None, provider: str | None, kinds: tuple[str, ...]) -> None:
    placement = Placement.of(device=device, provider=provider)
    assert tuple(placement.kind_of(path, metadata()) for path in (ONNX, ENGINE, CHECKPOINT)) == kinds


def test_openvino_contradicts_what_is_not_its_own() -> None:
    with pytest.raises(UsageError, match=r"^--runtime openvino contradicts --provider cpu · leave out one"):
        Placement.of(provider="cpu", runtime="openvino")
    with pytest.raises(UsageError, match=r"^--runtime openvino contradicts --device cuda:1 · .* runs on the CPU$"):
        Placement.of(device="cuda:1", runtime="openvino")
    for path in (ENGINE, CHECKPOINT):
        with pytest.raises(UsageError, match=rf"only ONNX files take a runtime · {path} · leave out --runtime"):
            Placement.of(runtime="openvino").check(path)
        assert Placement.of(runtime="openvino").for_file(path).runtime == "auto"
    Placement.of(device="cpu", runtime="openvino").check(ONNX)


def test_the_runtime_is_the_one_chosen_or_the_default_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "default_runtime", lambda metadata: "openvino")
    of = metadata()
    assert Placement.of().runtime_for(of) == Placement.of().kind_of(ONNX, of) == "openvino"
    assert Placement.of(runtime="onnxruntime").runtime_for(of) == "onnxruntime"
    for placement in (Placement.of(provider="cpu"), Placement.of(provider="cuda"), Placement.of(device="cuda")):
        assert placement.runtime_for(of) == "onnxruntime"
    assert Placement.of().kind_of(CHECKPOINT, of) == "cpu"
    monkeypatch.undo()
    assert Placement.of(runtime="openvino").kind_of(ONNX, of) == "openvino"
    assert Placement.of().kind_of(ONNX, of) == "cpu"


def test_names() -> None:
    assert [module.on_gpu("pytorch", gpu) for gpu in (None, L4, SECOND)] == [
        "pytorch (CPU)",
        "pytorch (CUDA)",
        "pytorch (CUDA:1)",
    ]
