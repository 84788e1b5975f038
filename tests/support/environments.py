"""Environments with some of the extras: real ones, whose packages are links to this environment's."""

from __future__ import annotations

import tomllib
import venv
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

import smlp_deploy

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


class Environments:
    """Gives the interpreter of an environment with smlp-deploy and some extras: "", "cpu" or "cpu,rtx".

    Args:
        folder: where they are made, each once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def __call__(self, extras: str) -> Path:
        if extras not in self._made:
            folder = self._folder / (extras or "base")
            venv.create(folder, symlinks=True)
            lines = [*PROJECT["dependencies"]]
            for extra in filter(None, extras.split(",")):
                lines += PROJECT["optional-dependencies"][extra]
            site = next(folder.glob("lib/python*/site-packages"))
            (site / "smlp_deploy.pth").write_text(str(Path(smlp_deploy.__file__).parents[1]))
            for name in {name for line in lines for name in distributions_of(Requirement(line))}:
                of = distribution(name)
                for top in {file.parts[0] for file in of.files or ()} - {"..", "__pycache__"}:
                    if not (site / top).is_symlink():
                        (site / top).symlink_to(str(of.locate_file(top)))
            self._made[extras] = folder / "bin" / "python"
        return self._made[extras]


def distributions_of(requirement: Requirement) -> Iterator[str]:
    """The distributions that pip would install for a requirement, some more than once."""
    yield requirement.name
    for line in distribution(requirement.name).requires or []:
        needed = Requirement(line)
        if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in requirement.extras or {""}):
            yield from distributions_of(needed)
