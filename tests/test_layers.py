"""Imports point down: the layers of the package, and who may import which framework. No function is long."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import smlp_deploy
from smlp_deploy.files import BUNDLED_MODEL

PACKAGE = Path(smlp_deploy.__file__).parent
LAYERS = (
    ("errors", "interrupts", "strictjson", "metadata", "files", "dependencies", "artifacts"),
    ("images", "graphs"),
    ("models",),
    ("exporters", "runners"),
    ("inference",),
    ("evaluation",),
    ("pipeline", "reports", "doctor", "inspect_file"),
    ("commands",),
    ("cli",),
    ("__main__", "__init__"),
)
"""Packages, and modules that stand at the root, from the ground up; those of the first layer may import each other."""

RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}
FRAMEWORKS = {"torch", "onnx", "onnxruntime", "onnxscript", "openvino", "tensorrt", "tensorrt_rtx"}
MAY_IMPORT_FRAMEWORKS = {"graphs", "models", "exporters", "runners"}
MODULES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def imported(code: str) -> Iterator[str]:
    """The dotted name of everything that code imports, in functions too: `from a import b` counts as `a.b`."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def violations(name: str, code: str) -> list[str]:
    """What a module imports that it may not; `name` is its path below the package."""
    unit = name.partition("/")[0].removesuffix(".py")
    found = []
    for dotted in imported(code):
        root, _, rest = dotted.partition(".")
        other = rest.partition(".")[0]
        if not root:
            found.append(f"{name} imports relatively: {dotted}")
        elif root in FRAMEWORKS and unit not in MAY_IMPORT_FRAMEWORKS:
            found.append(f"{name} imports {root}")
        elif root == PACKAGE.name and other in RANK and other != unit:
            above, beside = RANK[other] > RANK[unit], RANK[other] == RANK[unit] > 0
            if above or beside:
                found.append(f"{name} imports {other}, which is {'above' if above else 'beside'} it")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    assert violations(name, MODULES[name]) == []


@pytest.mark.parametrize(
    ("name", "code", "found"),
    [
        ("files.py", "from smlp_deploy import cli", "imports cli, which is above it"),
        ("files.py", "import smlp_deploy.cli", "imports cli, which is above it"),
        ("files.py", "from smlp_deploy.cli import main", "imports cli, which is above it"),
        (
            "images/find.py",
            "def f():\n    import smlp_deploy.commands.options as o",
            "imports commands, which is above it",
        ),
        ("runners/base.py", "from smlp_deploy.exporters import onnx", "imports exporters, which is beside it"),
        ("exporters/onnx.py", "from smlp_deploy import runners", "imports runners, which is beside it"),
        ("doctor.py", "import smlp_deploy.pipeline.build", "imports pipeline, which is beside it"),
        ("images/find.py", "from . import decode", "imports relatively"),
        ("images/find.py", "from ..commands import options", "imports relatively"),
        ("inference/classify.py", "import onnxruntime as ort", "imports onnxruntime"),
        ("cli.py", "from torch.nn import functional", "imports torch"),
    ],
)
def test_a_planted_violation_is_found(name: str, code: str, found: str) -> None:
    (violation,) = violations(name, f"{MODULES[name]}\n{code}\n")
    assert violation.startswith(f"{name} {found}")


def test_every_module_has_a_layer_and_the_root_is_small() -> None:
    units = {name.partition("/")[0].removesuffix(".py") for name in MODULES}
    assert units == RANK.keys()
    assert len([name for name in MODULES if "/" not in name]) <= 12


def too_long(name: str, code: str) -> list[str]:
    """The functions of a module with more than 60 lines."""
    functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f"{name}: {node.name}" for node in functions if (node.end_lineno or 0) - node.lineno >= 60]


def test_no_function_is_long() -> None:
    assert [found for name, code in MODULES.items() for found in too_long(name, code)] == []


def test_a_long_function_is_found() -> None:
    assert too_long("x.py", "def short():\n" + "    0\n" * 59) == []
    assert too_long("x.py", "class A:\n    def long(self):\n" + "        0\n" * 60) == ["x.py: long"]


def loaded_by(*arguments: str, folder: Path | None = None) -> set[str]:
    """The top-level modules that a run of the command line has loaded when it ends."""
    script = (
        "import sys\n"
        "from smlp_deploy.cli import main\n"
        f"try: main({list(arguments)!r})\n"
        "except SystemExit: pass\n"
        "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
    return set(output.rpartition("LOADED ")[2].split())


def test_help_loads_no_framework() -> None:
    assert not loaded_by("--help") & (FRAMEWORKS | {"numpy", "PIL", "safetensors"})


def test_listing_models_loads_no_framework() -> None:
    assert not loaded_by("models") & FRAMEWORKS


@pytest.mark.parametrize(
    ("framework", "arguments"),
    [
        ("onnx", ("predict", "--model", "broken.onnx", "a.jpg")),  # whose metadata decide what runs it
        ("onnxruntime", ("predict", "--model", "broken.onnx", "--runtime", "onnxruntime", "a.jpg")),
        ("openvino", ("predict", "--model", "broken.onnx", "--runtime", "openvino", "a.jpg")),
        ("onnxruntime", ("eval", str(PACKAGE), "--model", "broken.onnx", "--runtime", "onnxruntime")),
        ("onnxruntime", ("build-engine", "broken.onnx", "--fp16")),
        ("onnxruntime", ("verify", "broken.engine", "--layers")),
    ],
)
def test_artifacts_are_used_without_torch(framework: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("broken.onnx", "broken.engine"):  # what is absent is refused before anything is loaded
        (tmp_path / name).write_bytes(b"broken")
    loaded = loaded_by(*arguments, folder=tmp_path)
    assert framework in loaded
    assert "torch" not in loaded


def test_a_run_on_one_machine_loads_nothing_of_clusters_and_servers(tmp_path: Path) -> None:
    images = sorted((PACKAGE.parent / "images").glob("*.jpg"))
    loaded = loaded_by("predict", *map(str, images), "-o", "x.jsonl", "-m", str(BUNDLED_MODEL), folder=tmp_path)
    assert (tmp_path / "x.jsonl").exists()
    assert not loaded & {"ray", "pandas", "pyarrow", "tritonclient", "grpc", "multiprocessing"}


def test_artifacts_are_timed_without_any_framework_in_the_process_that_asks(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"broken")
    assert not loaded_by("benchmark", "broken.onnx", folder=tmp_path) & FRAMEWORKS
