"""`examine` in environments made for it: real ones, whose packages are links to this environment's, and fakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import onnx
import pytest

from smlp_deploy import doctor
from smlp_deploy.artifacts import engine_manifest_path
from smlp_deploy.dependencies import GpuDevice
from smlp_deploy.doctor import Finding, examine, to_json
from smlp_deploy.files import sha256_of
from smlp_deploy.graphs.file import Graph
from smlp_deploy.metadata import BatchProfile, EngineManifest
from tests.support.environments import Environments
from tests.support.fakes import metadata
from tests.support.graphs import smallest_classifier

L4 = GpuDevice(name="NVIDIA L4", architecture="sm89", driver=12080)

Findings = dict[str, Finding]


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder for packages that come before the installed ones."""
    folder = tmp_path / "fakes"
    folder.mkdir()
    return folder


def stand_in(folder: Path, name: str, version: str = "1.0", *, code: str | None = None, requires: str = "") -> None:
    """A distribution of this name; with the module of that name if there is code for it."""
    facts = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
    if code is not None:
        (folder / f"{name}.py").write_text(code)


def examined(python: Path, folder: Path, gpu: GpuDevice | None = None, *, prelude: str = "") -> Findings:
    """The findings of an environment on a machine with this GPU, in a working directory."""
    script = (
        "import sys\n"
        "from smlp_deploy import doctor\n"
        "from smlp_deploy.dependencies import GpuDevice\n"
        "from smlp_deploy.runners import tensorrt\n"
        f"doctor.find_gpu = tensorrt.find_gpu = lambda: {gpu!r}\n"
        f"{prelude}\n"
        "print(doctor.to_json(doctor.examine()))\n"
    )
    variables = {
        **os.environ,
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(folder / "fakes"),
    }
    output = subprocess.run(
        [python, "-c", script], cwd=folder, env=variables, stdout=subprocess.PIPE, check=True
    ).stdout
    findings = {values["name"]: Finding(**values) for values in json.loads(output)["findings"]}
    assert all("\n" not in finding.detail for finding in findings.values())
    return findings


def names(findings: Findings, status: str) -> set[str]:
    return {finding.name for finding in findings.values() if finding.status == status}


class TestFourEnvironments:
    def test_nothing_but_the_base(self, environments: Environments, tmp_path: Path) -> None:
        findings = examined(environments(""), tmp_path)
        optional = {"torch", "onnx", "onnxscript", "ml_dtypes", "onnxruntime", "tensorrt_rtx", "cuda.bindings"}
        assert names(findings, "warning") == optional
        assert not names(findings, "error")
        assert findings["onnxruntime"].fix == 'pip install "smlp-deploy[cpu]"'
        assert findings["torch"].detail == "not installed; needed to load checkpoints and export"
        assert findings["tensorrt"].detail.endswith("and there is no GPU")

    def test_cpu(self, environments: Environments, tmp_path: Path) -> None:
        findings = examined(environments("cpu"), tmp_path)
        assert names(findings, "warning") == {"torch", "onnxscript", "tensorrt_rtx", "cuda.bindings"}
        assert not names(findings, "error")
        assert findings["onnxruntime"].detail == f"onnxruntime {distribution('onnxruntime').version}"
        assert [name for name in findings if name.startswith("provider")] == ["provider cpu"]
        how = r"(natively|in fp32)"
        version = re.escape(distribution("openvino").version)
        assert re.fullmatch(rf"{version}, on this CPU bf16 {how} and fp16 {how}", findings["openvino"].detail)

    def test_cpu_and_rtx(self, environments: Environments, tmp_path: Path) -> None:
        # cuda-bindings is for CUDA 12 or 13, whichever goes with the installed PyTorch.
        findings = examined(environments("cpu,rtx"), tmp_path, replace(L4, driver=13020))
        assert names(findings, "warning") == {"torch", "onnxscript", "tensorrt"}
        assert not names(findings, "error")
        assert findings["tensorrt_rtx"].detail == f"tensorrt-rtx-cu12 {distribution('tensorrt-rtx-cu12').version}"
        assert findings["gpu"].detail == "NVIDIA L4, compute capability sm89, driver for CUDA 13.2"

    @pytest.mark.parametrize(("gpu", "keep"), [(None, "onnxruntime"), (L4, "onnxruntime-gpu")])
    def test_both_onnxruntimes(
        self, environments: Environments, tmp_path: Path, stand_ins: Path, gpu: GpuDevice | None, keep: str
    ) -> None:
        stand_in(stand_ins, "onnxruntime-gpu")
        findings = examined(environments("cpu"), tmp_path, gpu)
        assert names(findings, "error") == {"onnxruntime"}
        found = findings["onnxruntime"]
        assert "onnxruntime and onnxruntime-gpu are installed together" in found.detail
        assert found.fix == f"pip uninstall -y onnxruntime onnxruntime-gpu && pip install {keep}"
        assert "provider cpu" not in findings


class TestPackages:
    def test_what_fails_or_crashes_when_imported_is_an_error(
        self, environments: Environments, tmp_path: Path, stand_ins: Path
    ) -> None:
        stand_in(stand_ins, "onnxscript", code="raise OSError('libx.so.1: cannot open shared object file')")
        stand_in(stand_ins, "torch", "2.0", code="import os; os.kill(os.getpid(), 9)")
        stand_in(stand_ins, "cuda-bindings")  # its files are gone
        findings = examined(environments(""), tmp_path)
        assert names(findings, "error") == {"torch", "onnxscript", "cuda.bindings"}
        assert findings["torch"].detail == "torch 2.0: cannot be imported: it crashed with signal 9"
        assert findings["onnxscript"].detail.endswith("OSError: libx.so.1: cannot open shared object file")
        assert findings["cuda.bindings"].fix == "pip install --force-reinstall cuda-bindings"

    def test_a_module_in_the_working_directory_is_not_imported(
        self, environments: Environments, tmp_path: Path, stand_ins: Path
    ) -> None:
        stand_in(stand_ins, "torch", code="class version: cuda = None\nclass cuda: is_available = lambda: False")
        (tmp_path / "torch.py").write_text("raise SystemExit('a module of the current folder')")
        findings = examined(environments(""), tmp_path, prelude="sys.path.remove('')")
        assert findings["torch"].detail == "torch 1.0, built for the CPU"

    def test_an_empty_folder_that_pip_left_is_no_package(
        self, environments: Environments, tmp_path: Path, stand_ins: Path
    ) -> None:
        (stand_ins / "onnxruntime").mkdir()
        finding = examined(environments(""), tmp_path, L4)["onnxruntime"]
        assert (finding.status, finding.fix) == ("warning", 'pip install "smlp-deploy[gpu-cu12]"')

    @pytest.mark.parametrize(("gpu", "status"), [(L4, "error"), (replace(L4, driver=13000), "ok"), (None, "ok")])
    def test_tensorrt_for_a_newer_cuda_than_the_driver(
        self, environments: Environments, tmp_path: Path, stand_ins: Path, gpu: GpuDevice | None, status: str
    ) -> None:
        stand_in(stand_ins, "tensorrt", "11.2", code="", requires="Requires-Dist: tensorrt_cu13==11.2\n")
        finding = examined(environments(""), tmp_path, gpu)["tensorrt"]
        assert finding.status == status
        if status == "error":
            assert finding.detail == "tensorrt 11.2: built for CUDA 13, but the NVIDIA driver is for CUDA 12"
            assert finding.fix == (
                "pip uninstall -y tensorrt && "
                'pip install "smlp-deploy[gpu-cu12]", or update the NVIDIA driver to one for CUDA 13'
            )

    def test_a_torch_that_does_not_see_the_gpu(
        self, environments: Environments, tmp_path: Path, stand_ins: Path
    ) -> None:
        stand_in(stand_ins, "torch", code="class version: cuda = '13.0'\nclass cuda: is_available = lambda: False")
        finding = examined(environments(""), tmp_path, L4)["torch"]
        assert (finding.status, finding.detail) == ("warning", "torch 1.0, built for CUDA 13.0, does not see the GPU")


def runtime(of: str) -> str:
    """Code for a fake cuda-pathfinder, which finds or raises this."""
    return (
        "import sys, types\n"
        "from smlp_deploy import dependencies\n"
        "class Library:\n"
        "    def __init__(self, path): self.path = path\n"
        "    def cudaRuntimeGetVersion(self, number): number._obj.value = int(self.path); return 0\n"
        "def load_nvidia_dynamic_lib(name):\n"
        f"    {of}\n"
        "pathfinder = types.ModuleType('cuda.pathfinder')\n"
        "pathfinder.load_nvidia_dynamic_lib = load_nvidia_dynamic_lib\n"
        "sys.modules['cuda.pathfinder'] = pathfinder\n"
        "dependencies.ctypes.CDLL = Library\n"
    )


def found(version: int) -> str:
    return runtime(f"return types.SimpleNamespace(abs_path='{version}')")


MISSING = runtime("raise RuntimeError('no libcudart.so.12 in 7 folders')")
BLACKWELL = GpuDevice(name="NVIDIA B200", architecture="sm100", driver=13000)
HOPPER = GpuDevice(name="NVIDIA H100 80GB HBM3", architecture="sm90", driver=12080)


class TestWhatDoesNotFitTogether:
    """Packages, the CUDA runtime, the driver and the GPU: each combination names one pip line."""

    @pytest.mark.parametrize(
        ("packages", "gpu", "code", "status", "detail", "fix"),
        [
            ({}, L4, MISSING, "ok", "not needed: no package calls CUDA", None),
            ({"tensorrt-cu13": "10.16"}, BLACKWELL, found(13000), "ok", "CUDA 13.0, 13000", None),
            (
                {"tensorrt-rtx-cu12": "1.7"},
                L4,
                MISSING,
                "error",
                "the CUDA runtime library does not load: no libcudart.so.12 in 7 folders",
                "pip install nvidia-cuda-runtime-cu12",
            ),
            (
                {"tensorrt-cu13": "10.16"},
                None,
                MISSING,
                "warning",
                "the CUDA runtime library does not load: no libcudart.so.12 in 7 folders",
                "pip install nvidia-cuda-runtime",
            ),
            (
                {"tensorrt-cu13": "10.16"},
                BLACKWELL,
                found(12090),
                "error",
                "CUDA 12.9, 12090: but tensorrt-cu13 needs CUDA 13",
                "pip install nvidia-cuda-runtime",
            ),
            (
                {"tensorrt-rtx-cu13": "1.7"},
                L4,
                found(13000),
                "error",
                "CUDA 13.0, 13000: the NVIDIA driver is for CUDA 12",
                "pip uninstall -y tensorrt-rtx-cu13 tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings && "
                'pip install "smlp-deploy[rtx]", or update the NVIDIA driver to one for CUDA 13',
            ),
            (
                {"tensorrt-rtx-cu12": "1.7", "cuda-bindings": "13.0.1"},
                L4,
                found(13000),
                "error",
                "CUDA 13.0, 13000: the NVIDIA driver is for CUDA 12",
                "pip uninstall -y nvidia-cuda-runtime",
            ),
        ],
    )
    def test_the_cuda_runtime(
        self,
        environments: Environments,
        tmp_path: Path,
        stand_ins: Path,
        packages: dict[str, str],
        gpu: GpuDevice | None,
        code: str,
        status: str,
        detail: str,
        fix: str | None,
    ) -> None:
        for name, version in packages.items():
            stand_in(stand_ins, name, version)
        (stand_ins / "fake_runtime.py").write_text(code)
        prelude = "doctor._RUNTIME = 'import fake_runtime' + doctor._RUNTIME"
        finding = examined(environments(""), tmp_path, gpu, prelude=prelude)["cuda runtime"]
        assert (finding.status, finding.detail, finding.fix) == (status, detail, fix)

    @pytest.mark.parametrize(
        ("packages", "gpu", "fix"),
        [
            ({"tensorrt-cu12": "10.16", "cuda-bindings": "12.9.1"}, L4, None),
            ({"tensorrt-rtx-cu12": "1.7", "cuda-bindings": "13.0.1", "onnxruntime-gpu": "1.31"}, BLACKWELL, None),
            ({"tensorrt-rtx-cu12": "1.7", "cuda-bindings": "13.0.1"}, L4, 'pip install "cuda-bindings<13"'),
            (
                {"tensorrt-cu12": "10.16", "onnxruntime-gpu": "1.31"},
                L4,
                'pip uninstall -y onnxruntime-gpu && pip install "smlp-deploy[gpu-cu12]"',
            ),
            (
                {"tensorrt-cu12": "10.16", "onnxruntime-gpu": "1.31"},
                None,
                "pip uninstall -y tensorrt-cu12 tensorrt-cu12-libs tensorrt-cu12-bindings && "
                'pip install "smlp-deploy[gpu]"',
            ),
        ],
    )
    def test_packages_for_different_cuda_versions(
        self,
        environments: Environments,
        tmp_path: Path,
        stand_ins: Path,
        packages: dict[str, str],
        gpu: GpuDevice | None,
        fix: str | None,
    ) -> None:
        for name, version in packages.items():
            of_13 = 'Requires-Dist: nvidia-cudnn-cu13~=9.0; extra == "cudnn"\n' if name == "onnxruntime-gpu" else ""
            stand_in(stand_ins, name, version, requires=of_13)
        finding = examined(environments(""), tmp_path, gpu)["cuda versions"]
        status = "error" if "cuda-bindings" in packages else "warning"
        assert (finding.status, finding.fix) == (status if fix else "ok", fix)

    @pytest.mark.parametrize(
        ("gpu", "with_tensorrt", "fix"),
        [
            (L4, False, None),
            (HOPPER, True, None),
            (HOPPER, False, 'pip install "smlp-deploy[gpu-cu12]"'),
            (BLACKWELL, False, 'pip install "smlp-deploy[gpu]"'),
        ],
    )
    def test_tensorrt_rtx_on_a_gpu_that_it_does_not_build_for(
        self,
        environments: Environments,
        tmp_path: Path,
        stand_ins: Path,
        gpu: GpuDevice,
        with_tensorrt: bool,
        fix: str | None,
    ) -> None:
        code = "class ComputeCapability: NONE, CURRENT, SM75, SM89, SM120 = range(5)"
        stand_in(stand_ins, "tensorrt_rtx", "1.7", code=code)
        if with_tensorrt:
            stand_in(stand_ins, "tensorrt-cu12", "10.16")
        finding = examined(environments(""), tmp_path, gpu)["tensorrt_rtx"]
        assert (finding.status, finding.fix) == ("warning" if fix else "ok", fix)
        assert fix is None or f"has no {gpu.architecture}, so the engines it builds do not run on" in finding.detail

    def test_the_real_tensorrt_rtx_on_a_data_center_gpu(self, environments: Environments, tmp_path: Path) -> None:
        finding = examined(environments("rtx"), tmp_path, HOPPER)["tensorrt_rtx"]
        assert (finding.status, finding.fix) == ("warning", 'pip install "smlp-deploy[gpu-cu12]"')
        assert finding.detail.endswith("do not run on NVIDIA H100 80GB HBM3; TensorRT's do")

    def test_a_driver_that_is_too_old_for_all(
        self, environments: Environments, tmp_path: Path, stand_ins: Path
    ) -> None:
        stand_in(stand_ins, "tensorrt-cu12", "10.16")
        finding = examined(environments(""), tmp_path, replace(L4, driver=11080))["tensorrt"]
        assert (finding.status, finding.fix) == ("error", "update the NVIDIA driver to one for CUDA 12 or later")

    def test_two_tensorrts_are_removed_with_all_that_they_brought(
        self, environments: Environments, tmp_path: Path, stand_ins: Path
    ) -> None:
        for name in ("tensorrt-cu12", "tensorrt-cu13"):
            stand_in(stand_ins, name, "10.16")
        assert examined(environments(""), tmp_path)["tensorrt"].fix == (
            "pip uninstall -y tensorrt-cu12 tensorrt-cu12-libs tensorrt-cu12-bindings "
            "tensorrt-cu13 tensorrt-cu13-libs tensorrt-cu13-bindings && pip install tensorrt-cu12"
        )


@pytest.mark.parametrize(("installed", "detail"), [("10.16", "libraries are not found"), ("11.4", "but 11.4 is")])
def test_the_tensorrt_that_onnxruntime_needs(
    environments: Environments, tmp_path: Path, stand_ins: Path, installed: str, detail: str
) -> None:
    stand_in(stand_ins, "tensorrt-cu13", installed, code="")
    (stand_ins / "tensorrt.py").write_text(f"__version__ = '{installed}'")
    (stand_ins / "sitecustomize.py").write_text(
        "import onnxruntime; onnxruntime.get_available_providers = lambda: ['TensorrtExecutionProvider']"
    )
    finding = examined(environments("cpu"), tmp_path, BLACKWELL)["provider tensorrt"]
    fix = 'pip install "smlp-deploy[gpu]"' if installed == "10.16" else 'pip install "tensorrt-cu13>=10.13.2,<11"'
    assert (finding.status, finding.fix) == ("warning", fix)
    assert detail in finding.detail


@pytest.mark.parametrize(("gpu", "cuda"), [(None, "warning"), (L4, "error")])
def test_providers_that_are_listed_but_not_given(
    environments: Environments, tmp_path: Path, stand_ins: Path, gpu: GpuDevice | None, cuda: str
) -> None:
    listed = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")]
    # Runs in every process of the environment; the sessions stay the real ones of a machine without a GPU.
    (stand_ins / "sitecustomize.py").write_text(
        f"import onnxruntime; onnxruntime.get_available_providers = lambda: {listed}"
    )
    findings = examined(environments("cpu"), tmp_path, gpu)
    assert findings["provider cpu"].status == "ok"
    assert findings["provider cuda"].status == cuda
    assert findings["provider tensorrt"].status == "warning"
    if gpu:
        assert findings["provider tensorrt"].detail.endswith("it needs TensorRT 10, but none is installed")
        assert findings["provider tensorrt"].fix == 'pip install "tensorrt-cu12>=10.12,<11"'
        assert findings["provider cuda"].fix == 'pip install "smlp-deploy[gpu-cu12]"'


class TestFolders:
    def test_a_cache_that_cannot_be_written_and_a_full_disk(self, environments: Environments, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file")
        full = "from collections import namedtuple\ndoctor.shutil.disk_usage = lambda path: Usage(9, 9, 0)"
        findings = examined(
            environments(""), tmp_path, prelude=full.replace("\n", "\nUsage = namedtuple('Usage', 'total used free')\n")
        )
        assert findings["weights cache"].fix == f"make {tmp_path / 'cache'} a folder that you can write to"
        assert findings["kernels cache"].status == "warning"
        assert findings["artifacts"].fix == "make room on that disk"

    def test_sizes_are_of_what_is_there(self, environments: Environments, tmp_path: Path) -> None:
        weights = tmp_path / "cache" / "smlp-deploy" / "weights"
        weights.mkdir(parents=True)
        (weights / "a.pth").write_bytes(bytes(1_500_000))
        findings = examined(environments(""), tmp_path)
        assert f"{weights}: 1.5 MB in 1 files, " in findings["weights cache"].detail
        assert "does not exist yet" in findings["artifacts"].detail


def write_engine(path: Path, **changes: Any) -> None:
    path.write_bytes(b"an engine")
    values: dict[str, Any] = {
        "engine_sha256": sha256_of(path),
        "metadata": metadata(),
        "onnx_file": "x.onnx",
        "onnx_sha256": "0" * 64,
        "backend": "tensorrt-rtx",
        "version": distribution("tensorrt-rtx-cu12").version,
        "profile": BatchProfile(min=1, opt=4, max=8),
        "architectures": ("sm89",),
        "ran_here": False,
    }
    engine_manifest_path(path).write_text(EngineManifest(**values | changes).to_json())


class TestArtifacts:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "artifacts"
        folder.mkdir()
        model = smallest_classifier()
        onnx.save(model, folder / "foreign.onnx")
        Graph.of(model, metadata(), path=folder / "sound.onnx").save()
        (folder / "cut\nshort.onnx").write_bytes((folder / "sound.onnx").read_bytes()[:1000])
        (folder / ".hidden.onnx").write_bytes(b"")
        os.mkfifo(folder / "pipe.onnx")
        write_engine(folder / "fits.engine")
        write_engine(folder / "other.engine", architectures=("sm120",))
        write_engine(folder / "changed.engine", engine_sha256="0" * 64)
        return tmp_path

    def test_each_is_judged(self, environments: Environments, folder: Path) -> None:
        findings = examined(environments("cpu,rtx"), folder, L4)
        found = {name[10:]: finding for name, finding in findings.items() if name.startswith("artifacts/")}
        assert {name: finding.status for name, finding in found.items()} == {
            "sound.onnx": "ok",
            "cut\\nshort.onnx": "error",
            "foreign.onnx": "warning",
            "pipe.onnx": "error",
            "fits.engine": "ok",
            "other.engine": "warning",
            "changed.engine": "error",
        }
        assert found["sound.onnx"].detail == "fake, fp32, batch any"
        assert found["other.engine"].detail.endswith("was built for sm120, this GPU is sm89 (NVIDIA L4)")
        assert found["other.engine"].fix == "build it again for this GPU"

    def test_without_onnx_or_a_gpu_nothing_is_called_broken(self, environments: Environments, folder: Path) -> None:
        findings = examined(environments(""), folder)
        assert names(findings, "error") == {"artifacts/changed.engine"}
        assert findings["artifacts/sound.onnx"].fix == 'pip install "smlp-deploy[cpu]"'
        assert findings["artifacts/fits.engine"].fix == "use the ONNX file"


@pytest.mark.usefixtures("packages_asked_once")
def test_this_environment_has_nothing_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "find_gpu", lambda: None)
    (tmp_path / "artifacts").mkdir()
    write_engine(tmp_path / "artifacts" / "x.engine")
    findings = {finding.name: finding for finding in examine()}
    assert not names(findings, "error")
    assert findings["python"].detail.startswith(sys.version.split()[0])
    assert findings["torch"].detail.startswith(f"torch {distribution('torch').version}, built for ")


def test_json_has_the_worst_status() -> None:
    findings = [Finding(name="a", status="warning", detail="x"), Finding(name="b", status="ok", detail="y", fix="z")]
    document = json.loads(to_json(findings))
    assert document["status"] == "warning"
    assert document["findings"][1] == {"name": "b", "status": "ok", "detail": "y", "fix": "z"}
    assert json.loads(to_json([]))["status"] == "ok"
