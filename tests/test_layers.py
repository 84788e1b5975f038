"""Imports point down: the layers of the package, and who may import which framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import smlp_deploy

PACKAGE = Path(smlp_deploy.__file__).parent
LAYERS = [
    {"errors", "files", "interrupts", "metadata", "strictjson", "dependencies", "artifacts"},
    {"dataset", "decoding", "preprocessing", "listing", "models"},
    {"exporters", "runners"},
    {"classify", "divergence", "parity", "sensitivity"},
    {"quantization"},
    {"doctor", "evaluate", "export", "inspection", "records"},
    {"benchmark", "engine", "profiling", "recordfile", "timing"},
    {"reports", "terminal"},
    {"options"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FRAMEWORKS = {"torch", "onnx", "onnxruntime", "onnxscript", "openvino", "tensorrt", "tensorrt_rtx"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield node.module or ""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    unit = unit_of(path)
    for name in imported(path):
        root, _, rest = name.partition(".")
        if root == "smlp_deploy" and rest:
            other = rest.split(".")[0]
            assert RANK[other] <= RANK[unit], f"{unit} imports {other}, which is above it"
            assert other == unit or {unit, other} != {"exporters", "runners"}
        if root in FRAMEWORKS:
            assert unit in {"models", "exporters", "runners"}, f"{unit} imports {root}"


def test_every_module_has_a_layer() -> None:
    assert {unit_of(path) for path in MODULES} <= RANK.keys()


def loaded_by(*arguments: str) -> set[str]:
    """The top-level modules that a run of the command line has loaded when it ends."""
    script = (
        "import sys\n"
        "from smlp_deploy.cli import main\n"
        f"try: main({list(arguments)!r})\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return set(output.rpartition("LOADED ")[2].split())


def test_help_loads_no_framework() -> None:
    assert not loaded_by("--help") & (FRAMEWORKS | {"numpy", "PIL", "safetensors"})


def test_listing_models_loads_no_framework() -> None:
    assert not loaded_by("models") & FRAMEWORKS


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "--model", "absent.onnx", "a.jpg"),
        ("eval", str(PACKAGE), "--model", "absent.onnx"),
        ("build-engine", "absent.onnx", "--fp16"),
        ("verify", "absent.engine", "--layers"),
    ],
)
def test_artifacts_are_used_without_torch(arguments: tuple[str, ...]) -> None:
    loaded = loaded_by(*arguments)
    assert "onnxruntime" in loaded
    assert "torch" not in loaded


def test_artifacts_are_timed_without_any_framework_in_the_process_that_asks() -> None:
    assert not loaded_by("benchmark", "absent.onnx") & FRAMEWORKS
