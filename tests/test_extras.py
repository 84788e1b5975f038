"""Each extra is complete by itself: an environment with nothing else, on a host without a CUDA toolkit.

Its packages are links to this environment's. What resolves on other platforms is in docs/platforms.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from smlp_deploy.metadata import EngineManifest
from smlp_deploy.pipeline.export import Export
from tests.support.environments import PROJECT, Environments

EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PAGE = Path(__file__).parents[1] / "docs" / "platforms.md"
LOADS_A_RUNTIME = """
from cuda.bindings import runtime
from smlp_deploy.dependencies import load_cuda_runtime
found = load_cuda_runtime()
print(found.version, found.path)
print(*map(int, runtime.cudaRuntimeGetVersion()))
"""


@pytest.fixture
def rtx(environments: Environments) -> Path:
    """The interpreter of an environment with nothing but the extras `cpu` and `rtx`."""
    return environments("cpu,rtx")


def output_of(python: Path, folder: Path, *arguments: str | Path) -> str:
    """What a command prints on a host without a toolkit."""
    toolkit = ("LD_LIBRARY_PATH", "CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX", "PYTHONPATH")
    variables = {name: value for name, value in os.environ.items() if name not in toolkit}
    done = subprocess.run(
        [python, "-P", *arguments],
        cwd=folder,
        env={**variables, "XDG_CACHE_HOME": str(folder / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestNothingButRtx:
    def test_the_cuda_runtime_of_the_package_loads_without_a_driver(self, rtx: Path, tmp_path: Path) -> None:
        ours, bindings = output_of(rtx, tmp_path, "-c", LOADS_A_RUNTIME).splitlines()
        version, path = ours.split(" ", 1)
        assert Path(path).is_relative_to(rtx.parents[1])
        # 13 where PyTorch from PyPI has brought that too.
        assert version[:2] in {"12", "13"}
        status, of_bindings = bindings.split()
        assert status == "0"
        assert of_bindings.startswith(distribution("cuda-bindings").version.split(".")[0])

    def test_doctor_misses_nothing(self, rtx: Path, tmp_path: Path) -> None:
        document = json.loads(output_of(rtx, tmp_path, "-m", "smlp_deploy", "doctor", "--json"))
        found = {finding["name"]: finding for finding in document["findings"]}
        # Those of the extras `export` and `gpu`; a machine with a GPU is told of the latter.
        assert {name for name, finding in found.items() if finding["status"] != "ok"} <= {
            "torch",
            "onnxscript",
            "tensorrt",
        }
        assert re.match(r"CUDA 1[23]\.\d, ", found["cuda runtime"]["detail"])
        assert found["cuda versions"]["detail"].startswith("tensorrt-rtx-cu12 for CUDA 12, cuda-bindings for CUDA ")

    def test_an_engine_is_built_ahead_of_time_and_inspected(
        self, rtx: Path, tmp_path: Path, digits_export: Export
    ) -> None:
        engine = tmp_path / "digits.engine"
        build = ("build-engine", digits_export.path, "--fp16", "--target", "tensorrt-rtx", "-o", engine)
        output_of(rtx, tmp_path, "-m", "smlp_deploy", *build)
        assert engine.stat().st_size > 100_000
        manifest = EngineManifest.from_json((tmp_path / "digits.engine.json").read_text(), where=engine)
        assert manifest.metadata.precision == "fp16"
        assert "sm89" in output_of(rtx, tmp_path, "-m", "smlp_deploy", "inspect", engine)


def test_every_extra_that_calls_cuda_brings_its_runtime() -> None:
    for extra, lines in EXTRAS.items():
        text = " ".join(lines)
        majors = set(re.findall(r"(?:tensorrt|tensorrt-rtx)-cu(\d\d)", text))
        if majors:
            (major,) = majors
            runtime = "nvidia-cuda-runtime-cu12>=12.9,<13" if major == "12" else "nvidia-cuda-runtime>=13,<14"
            assert runtime in lines, extra
            (bindings,) = (Requirement(line) for line in lines if line.startswith("cuda-bindings"))
            assert bindings.specifier.contains(f"{major}.9"), extra
            assert any(line.startswith("cuda-pathfinder") for line in lines), extra


def test_the_page_of_platforms_has_each_extra_once() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Extras")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE) == list(EXTRAS)
