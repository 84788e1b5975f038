"""What docs/architecture.md says of the code is so: the steps on the way down, and the layers."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import smlp_deploy
from smlp_deploy.exporters.tensorrt import BuildOptions
from smlp_deploy.files import BUNDLED_CHECKPOINT
from smlp_deploy.models.checkpoint import load_checkpoint
from smlp_deploy.models.description import describe
from smlp_deploy.pipeline.build import build_engine, prepare_graph
from smlp_deploy.pipeline.export import export_checkpoint
from tests.test_layers import LAYERS

PACKAGE = Path(smlp_deploy.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@contextmanager
def calls_recorded() -> Iterator[list[tuple[str, str]]]:
    """Module and function of every call of this package's functions, in order."""
    found: list[tuple[str, str]] = []

    def see(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            found.append((str(Path(code.co_filename).relative_to(PACKAGE)), code.co_name))

    sys.setprofile(see)
    try:
        yield found
    finally:
        sys.setprofile(None)


def test_the_way_down_is_the_one_that_is_drawn(tmp_path: Path) -> None:
    steps = [(module.strip("`"), function.strip("`")) for _, function, module, *_ in rows("The way down")]
    with calls_recorded() as calls:
        checkpoint = load_checkpoint(BUNDLED_CHECKPOINT)
        export = export_checkpoint(checkpoint, describe(checkpoint, precision="int8"), tmp_path / "x.onnx")
        prepared = prepare_graph(export.graph, None)
        options = BuildOptions(architectures=("sm89",))
        build_engine(prepared, tmp_path / "x.engine", options, backend="tensorrt-rtx")
    # The proof of a 16-bit graph lowers the network once more, to run it in true fp16 arithmetic and to record it.
    down = calls[: calls.index(("evaluation/parity.py", "prove")) + 1]
    after = calls[len(down) :]
    taken = [call for call in down if call in steps] + [call for call in after if call in steps[9:]]
    assert taken == steps
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
