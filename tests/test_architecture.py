"""What docs/architecture.md says of the code is so: the steps on the way down, and the layers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import smlp_deploy
from smlp_deploy.exporters.tensorrt import BuildOptions
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.models import checkpoint as checkpoints
from smlp_deploy.models import description
from smlp_deploy.pipeline import build, export
from tests.test_layers import LAYERS

PACKAGE = Path(smlp_deploy.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def record_calls(monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The steps in the order in which they will be called, from wherever in the package that is."""
    called: list[tuple[str, str]] = []
    loaded = [module for name, module in sys.modules.items() if name.startswith("smlp_deploy.")]

    def recorded(step: tuple[str, str], function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            called.append(step)
            return function(*arguments, **keywords)

        return call

    for module, name in steps:
        home = import_module(f"smlp_deploy.{module.removesuffix('.py').replace('/', '.')}")
        function: Callable[..., Any] = getattr(home, name)
        for user in loaded:
            if vars(user).get(name) is function:
                monkeypatch.setattr(user, name, recorded((module, name), function))
    return called


def test_the_way_down_is_the_one_that_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(module.strip("`"), function.strip("`")) for _, function, module, *_ in rows("The way down")]
    called = record_calls(monkeypatch, steps)
    checkpoint = checkpoints.load_checkpoint(BUNDLED_CHECKPOINT)
    metadata = replace(description.describe(checkpoint, precision="int8"), input="uint8")
    graph = export.export_checkpoint(checkpoint, metadata, tmp_path / "x.onnx").graph
    prepared = build.prepare_graph(graph, None)
    options = BuildOptions(architectures=("sm89",))
    build.build_prepared(prepared, tmp_path / "x.engine", options, backend="tensorrt-rtx")
    # The proof itself lowers the network again: it runs it in true fp16 arithmetic, and records its activations.
    proof = ("evaluation/parity.py", "prove")
    way = [step for i, step in enumerate(called) if step[1] != "lower" or i < called.index(proof)]
    assert way == steps
    modules = [module for module, _ in steps]
    assert [m for i, m in enumerate(modules) if m in modules[:i] and m != modules[i - 1]] == []


def test_the_layers_are_those_of_the_import_rule() -> None:
    drawn: dict[int, set[str]] = {}
    for layer, names, _ in rows("The rooms"):
        drawn.setdefault(int(layer), set()).update(re.findall("`(.*?)`", names))
    assert drawn == {rank: set(units) for rank, units in enumerate(LAYERS, start=1)}


def test_every_module_in_the_picture_exists() -> None:
    picture = PAGE.partition("```text\n")[2].partition("```")[0]
    for package, module in re.findall(r"(exporters)/(\w+)", picture):
        assert (PACKAGE / package / f"{module}.py").is_file()
    for value in ("Checkpoint", "SMLPNet", "LoweredSMLPNet", "Quantization", "ParityReport", "Engine"):
        assert value in picture
        assert any(f"class {value}" in path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
