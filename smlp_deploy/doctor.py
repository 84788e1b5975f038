"""What works on this machine, and how to fix the rest. Nothing is changed or printed.

Each package is imported in its own process, because one that crashes on import must not take this process down.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from smlp_deploy.artifacts import ARTIFACTS_FOLDER
from smlp_deploy.dependencies import (
    CUDA_RUNTIMES,
    TENSORRT_DISTRIBUTIONS,
    GpuDevice,
    cuda_major,
    find_gpu,
    installed_version,
    provider_tensorrt,
)
from smlp_deploy.errors import SmlpError, printable
from smlp_deploy.files import cache_folder
from smlp_deploy.runners.tensorrt import check_machine, read_manifest

Status = Literal["ok", "warning", "error"]

_STATUSES: tuple[Status, ...] = ("ok", "warning", "error")
_TIMEOUT_SECONDS = 120
_LEAST_FREE = 1 << 30
"""The smlpnet_base weights and one fp32 export take half of it."""
_LONGEST = 300
_DEVICES = "print(it.version.cuda or '-', it.cuda.is_available())"
"""What PyTorch is built for, and whether it sees a GPU."""
_TARGETS = "print(*(name.lower() for name in dir(getattr(it, 'ComputeCapability', None)) if name.startswith('SM')))"
"""The architectures that TensorRT-RTX builds for, if it says so."""
_RUNTIME = """
import json
from smlp_deploy.dependencies import load_cuda_runtime
from smlp_deploy.errors import MissingDependencyError
try:
    runtime = load_cuda_runtime()
    print(json.dumps([runtime.version, runtime.path]))
except MissingDependencyError as error:
    print(json.dumps([0, error.what]))
"""
_EXTRAS = {"gpu": {12: "gpu-cu12", 13: "gpu"}, "rtx": {12: "rtx", 13: "rtx-cu13"}}
"""The extra with the packages for a major version of CUDA, of those that exist for several."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check.

    Attributes:
        name: what was checked.
        status: "ok"; "warning" if something is missing or incompatible; "error" if it is broken.
        detail: what was found, in one line.
        fix: the command or step that helps, or None.
    """

    name: str
    status: Status
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class _Package:
    """An optional package; at most one of its `rivals`, which own the same folder, may be installed."""

    module: str
    extra: str
    purpose: str
    rivals: tuple[str, ...] = ()

    def installed(self) -> dict[str, str]:
        """The version of each installed distribution of it."""
        found = {name: installed_version(name) for name in (re.sub("[_.]", "-", self.module), *self.rivals)}
        return {name: version for name, version in found.items() if version}

    def is_here(self) -> bool:
        if self.installed():
            return True
        try:
            spec = find_spec(self.module)
        except ModuleNotFoundError:  # its package
            return False
        return spec is not None and spec.origin is not None  # no origin: pip left an empty folder behind


_QUESTIONS = {"torch": _DEVICES, "tensorrt_rtx": _TARGETS}

_ORT_NAMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_TENSORRT_NAMES, _RTX_NAMES = (TENSORRT_DISTRIBUTIONS[backend] for backend in ("tensorrt", "tensorrt-rtx"))
_PYTORCH = _Package("torch", "export", "to load checkpoints and export")
_ONNX = _Package("onnx", "cpu", "to read and run ONNX files")
_ONNXRUNTIME = _Package("onnxruntime", "cpu", "to run ONNX files", _ORT_NAMES)
_TENSORRT = _Package("tensorrt", "gpu", "to build and run engines on their GPU", _TENSORRT_NAMES[1:])
_RTX = _Package("tensorrt_rtx", "rtx", "to build engines ahead of time, and to run them on RTX GPUs", _RTX_NAMES)
_PACKAGES = (
    _PYTORCH,
    _ONNX,
    _Package("onnxscript", "export", "to export"),
    _Package("ml_dtypes", "export", "to export fp16, bf16 and int8"),
    _ONNXRUNTIME,
    _TENSORRT,
    _RTX,
    _Package("cuda.bindings", "rtx", "to run engines"),
)


def examine() -> tuple[Finding, ...]:
    """Check Python, packages, the GPU, folders and the artifacts in `artifacts/`."""
    gpu = find_gpu()
    # Each of them waits for its own process.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        providers, runtime = pool.submit(_providers, gpu), pool.submit(_cuda_runtime, gpu)
        openvino = pool.submit(_openvino)
        packages = list(pool.map(lambda package: _package(package, gpu), _PACKAGES))
    reads_onnx = next(finding for finding in packages if finding.name == "onnx")
    folders = (
        _cache("weights cache", "weights"),
        _cache("kernels cache", "runtime"),
        _cache("openvino cache", "openvino"),
        _folder("artifacts", ARTIFACTS_FOLDER.absolute()),
    )
    cuda = (_cuda_versions(gpu), runtime.result())
    return (*_machine(gpu), *packages, *cuda, *providers.result(), openvino.result(), *folders, *_artifacts(reads_onnx))


def to_json(findings: Sequence[Finding]) -> str:
    """A JSON object: the worst status, and the findings."""
    worst = max((finding.status for finding in findings), key=_STATUSES.index, default="ok")
    return json.dumps({"status": worst, "findings": [asdict(finding) for finding in findings]}, indent=2)


def _finding(name: str, status: Status, detail: str, fix: str | None = None) -> Finding:
    """A finding safe to print: file names and library messages may contain anything."""
    shown = detail if len(detail) <= _LONGEST else f"{detail[:_LONGEST]}…"
    return Finding(name=printable(name), status=status, detail=printable(shown), fix=fix and printable(fix))


def _machine(gpu: GpuDevice | None) -> Iterator[Finding]:
    yield _finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    found = "no NVIDIA GPU, or no driver: ONNX files run on the CPU"
    if gpu:
        cuda = f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"
        found = f"{gpu.name}, compute capability {gpu.architecture}, driver for CUDA {cuda}"
    yield _finding("gpu", "ok", found)


def _package(package: _Package, gpu: GpuDevice | None) -> Finding:
    installed = package.installed()
    rivals = [name for name in package.rivals if name in installed]
    if len(rivals) > 1:
        return _rivalry(package, rivals, gpu)
    if not package.is_here():
        return _absence(package, gpu)
    text = ", ".join(f"{name} {version}" for name, version in installed.items()) or f"{package.module}, no metadata"
    again = f"pip install --force-reinstall {' '.join(installed) or package.module}"
    cuda = cuda_major(installed)
    if gpu and package is not _PYTORCH and cuda > gpu.driver // 1000:
        what = f"{text}: built for CUDA {cuda}, but the NVIDIA driver is for CUDA {gpu.driver // 1000}"
        return _finding(package.module, "error", what, _for_driver(installed, cuda, gpu))
    output, failure = _run(f"import {package.module} as it; {_QUESTIONS.get(package.module, '')}")
    if failure:
        return _finding(package.module, "error", f"{text}: cannot be imported: {failure}", again)
    if package is _PYTORCH:
        return _torch(text, output, gpu)
    if package is _RTX and gpu:
        return _rtx(text, output.split(), gpu)
    return _finding(package.module, "ok", text)


def _rtx(text: str, architectures: Sequence[str], gpu: GpuDevice) -> Finding:
    """Whether TensorRT-RTX builds for this GPU: not for those of data centers, from Hopper on."""
    if not architectures or gpu.architecture in architectures or _TENSORRT.is_here():
        return _finding("tensorrt_rtx", "ok", text)
    what = f"{text}: has no {gpu.architecture}, so the engines it builds do not run on {gpu.name}; TensorRT's do"
    return _finding("tensorrt_rtx", "warning", what, _install("gpu", gpu))


def _torch(text: str, output: str, gpu: GpuDevice | None) -> Finding:
    cuda, _, available = output.partition(" ")
    if cuda == "-":
        return _finding("torch", "ok", f"{text}, built for the CPU")
    if gpu and available != "True":
        fix = "update the NVIDIA driver, or install PyTorch for its CUDA version"
        return _finding("torch", "warning", f"{text}, built for CUDA {cuda}, does not see the GPU", fix)
    return _finding("torch", "ok", f"{text}, built for CUDA {cuda}")


def _rivalry(package: _Package, rivals: Sequence[str], gpu: GpuDevice | None) -> Finding:
    keep = "onnxruntime-gpu" if gpu and "onnxruntime-gpu" in rivals else rivals[0]
    return _finding(
        package.module,
        "error",
        f"{' and '.join(rivals)} are installed together and own the same folder, so none can be trusted; "
        f"keep one of them, here {keep}",
        f"{_uninstall(rivals)} && pip install {keep}",
    )


def _absence(package: _Package, gpu: GpuDevice | None) -> Finding:
    detail = f"not installed; needed {package.purpose}"
    if package is _TENSORRT and gpu is None:
        return _finding(package.module, "ok", f"{detail}, and there is no GPU")
    extra = "gpu" if gpu and package is _ONNXRUNTIME else package.extra
    return _finding(package.module, "warning", detail, _install(extra, gpu))


def _install(extra: str, gpu: GpuDevice | None) -> str:
    """The pip line that installs an extra, in its form for the CUDA of the packages that are here, or of the driver."""
    if extra == "gpu":
        majors = [gpu.driver // 1000] if gpu else [max(CUDA_RUNTIMES)]
        major = min(majors + list(_linked_majors().values()))
    else:
        major = 13 if platform.machine() == "aarch64" else 12  # TensorRT-RTX for CUDA 12 runs on newer drivers too
    return f'pip install "smlp-deploy[{_in_form(extra, major)}]"'


def _in_form(extra: str, major: int) -> str:
    """The extra for a major version of CUDA, or for the nearest that there is."""
    forms = _EXTRAS.get(extra, {major: extra})
    return forms[min(max(major, min(forms)), max(forms))]


def _uninstall(names: Iterable[str]) -> str:
    """The pip line that removes distributions, each of TensorRT with the two that it brings."""
    ends = {name: ("", "-libs", "-bindings") if re.fullmatch(r"tensorrt-.*cu\d\d", name) else ("",) for name in names}
    return f"pip uninstall -y {' '.join(name + end for name in ends for end in ends[name])}"


def _for_driver(names: Iterable[str], cuda: int, gpu: GpuDevice) -> str:
    """How to replace packages for a newer CUDA than the driver's."""
    driver, oldest = gpu.driver // 1000, min(CUDA_RUNTIMES)
    if driver < oldest:
        return f"update the NVIDIA driver to one for CUDA {oldest} or later"
    extra = "rtx" if any(name in _RTX_NAMES for name in names) else "gpu"
    line = f'{_uninstall(names)} && pip install "smlp-deploy[{_in_form(extra, driver)}]"'
    return f"{line}, or update the NVIDIA driver to one for CUDA {cuda}"


def _linked_majors() -> dict[str, int]:
    """The CUDA major version of TensorRT and ONNX Runtime, where it is known: its provider loads both at once."""
    majors = {name: cuda_major([name]) for package in (_TENSORRT, _ONNXRUNTIME) for name in package.installed()}
    return {name: major for name, major in majors.items() if major}


def _cuda_majors() -> dict[str, int]:
    """The CUDA major version of each installed distribution that calls CUDA, where it is known."""
    bindings = installed_version("cuda-bindings")
    return {
        **_linked_majors(),
        **{name: cuda_major([name]) for name in _RTX.installed()},
        **({"cuda-bindings": int(bindings.split(".")[0])} if bindings else {}),
    }


def _cuda_versions(gpu: GpuDevice | None) -> Finding:
    """Whether the packages that call CUDA agree on its major version where they must, and fit the driver."""
    name, majors, linked = "cuda versions", _cuda_majors(), _linked_majors()
    text = ", ".join(f"{package} for CUDA {major}" for package, major in majors.items()) or "no package calls CUDA"
    if len(set(linked.values())) > 1:
        fit = [major for major in linked.values() if gpu is None or major <= gpu.driver // 1000]
        keep = max(fit, default=min(linked.values()))
        wrong = [package for package, major in linked.items() if major != keep]
        fix = f'{_uninstall(wrong)} && pip install "smlp-deploy[{_in_form("gpu", keep)}]"'
        return _finding(name, "warning", f"{text}: TensorRT does not work in ONNX Runtime with another CUDA", fix)
    if gpu and majors.get("cuda-bindings", 0) > gpu.driver // 1000:
        what = f"{text}: the NVIDIA driver is for CUDA {gpu.driver // 1000}"
        return _finding(name, "error", what, f'pip install "cuda-bindings<{gpu.driver // 1000 + 1}"')
    return _finding(name, "ok", text)


def _cuda_runtime(gpu: GpuDevice | None) -> Finding:
    """Whether the CUDA runtime library is found and loads, and fits the packages that need it and the driver."""
    name, majors = "cuda runtime", _cuda_majors()
    if not majors:
        return _finding(name, "ok", "not needed: no package calls CUDA")
    output, failure = _run(_RUNTIME)
    version, text = (0, failure) if failure else json.loads(output)
    needing = {package: major for package, major in majors.items() if package != "cuda-bindings"} or majors
    wanted = max(needing.values())
    fix = f"pip install {CUDA_RUNTIMES[min(max(wanted, min(CUDA_RUNTIMES)), max(CUDA_RUNTIMES))]}"
    status: Status = "error" if gpu else "warning"
    if not version:
        return _finding(name, status, text, fix)
    found = f"CUDA {version // 1000}.{version % 1000 // 10}, {text}"
    if version // 1000 not in majors.values():
        what = f"{found}: but {', '.join(needing)} need{'s' * (len(needing) == 1)} CUDA {wanted}"
        return _finding(name, status, what, fix)
    if gpu and version // 1000 > gpu.driver // 1000:
        what = f"{found}: the NVIDIA driver is for CUDA {gpu.driver // 1000}"
        return _finding(name, "error", what, _older_runtime(needing, version // 1000, gpu))
    return _finding(name, "ok", found)


def _older_runtime(needing: dict[str, int], found: int, gpu: GpuDevice) -> str:
    """How to get a CUDA runtime for the driver: with other packages, or without one that none of them needs."""
    newer = [package for package, major in needing.items() if major > gpu.driver // 1000]
    if newer:
        return _for_driver(newer, found, gpu)
    return f"pip uninstall -y {CUDA_RUNTIMES.get(found, CUDA_RUNTIMES[max(CUDA_RUNTIMES)])}"


def _run(code: str) -> tuple[str, str | None]:
    """The last line that code prints in a process with this one's packages, and why it failed, if it did."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-c", code]
    try:
        done = subprocess.run(  # noqa: S603
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"it did not finish within {_TIMEOUT_SECONDS} s"
    output, errors = (text.decode(errors="replace").strip().splitlines() for text in (done.stdout, done.stderr))
    if done.returncode < 0:
        return "", f"it crashed with signal {-done.returncode}"
    if done.returncode:
        return "", errors[-1] if errors else f"it exited with {done.returncode}"
    return output[-1] if output else "", None


def _providers(gpu: GpuDevice | None) -> list[Finding]:
    """Whether each provider that ONNX Runtime lists really works."""
    if not (_ONNXRUNTIME.is_here() and _ONNX.is_here()) or len(_ONNXRUNTIME.installed()) > 1:
        return []
    code = "import json; from smlp_deploy.runners.onnxruntime import working_providers as w; print(json.dumps(w()))"
    output, failure = _run(code)
    if failure:
        fix = f"pip install --force-reinstall onnx {' '.join(_ONNXRUNTIME.installed())}"
        return [_finding("providers", "error", f"ONNX Runtime cannot create a session: {failure}", fix)]
    return [_provider(name, works, gpu) for name, works in json.loads(output).items()]


def _provider(provider: str, works: bool, gpu: GpuDevice | None) -> Finding:
    name = f"provider {provider}"
    if works:
        return _finding(name, "ok", "works in a session")
    lost = "listed, but does not work in a session"
    if provider == "cpu":
        return _finding(name, "error", lost, f"pip install --force-reinstall {' '.join(_ONNXRUNTIME.installed())}")
    if gpu is None:
        return _finding(name, "warning", f"{lost}: there is no NVIDIA GPU or driver", "use --provider cpu")
    if provider == "cuda":
        what = f"{lost}: CUDA or cuDNN libraries are missing or incompatible"
        return _finding(name, "error", what, _install("gpu", gpu))
    if (missing := provider_tensorrt(gpu)) is not None:
        what, line = missing
        return _finding(name, "warning", f"{lost}: {what}", line)
    return _finding(name, "warning", f"{lost}: TensorRT's libraries are not found", _install("gpu", gpu))


def _openvino() -> Finding:
    """Whether OpenVINO starts, and which of the precisions that only some CPUs have run natively."""
    version = installed_version("openvino")
    if version is None:
        return _finding("openvino", "ok", "not installed; needed only for --runtime openvino")
    if not _ONNX.is_here():
        return _finding("openvino", "ok", version)
    output, failure = _run(
        "import json; from smlp_deploy.runners.openvino import cpu_facts; print(json.dumps(cpu_facts().native))"
    )
    if failure:
        return _finding("openvino", "error", f"{version}: {failure}", "pip install --force-reinstall openvino")
    native = json.loads(output)
    texts = [f"{precision} {'natively' if precision in native else 'in fp32'}" for precision in ("bf16", "fp16")]
    return _finding("openvino", "ok", f"{version}, on this CPU {' and '.join(texts)}")


def _cache(name: str, folder: str) -> Finding:
    try:
        return _folder(name, cache_folder(folder))
    except SmlpError as error:
        return _finding(name, "warning", error.what, error.fix)


def _folder(name: str, path: Path) -> Finding:
    there = next(folder for folder in (path, *path.parents) if os.access(folder, os.F_OK))
    sizes = list(_sizes(path))
    free = shutil.disk_usage(there).free
    holds = f"{sum(sizes) / 1e6:.1f} MB in {len(sizes)} files" if there == path else "does not exist yet"
    detail = f"{path}: {holds}, {free / 1e9:.1f} GB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        fix = f"make {there} a folder that you can write to"
        return _finding(name, "warning", f"{detail}, not writable", fix)
    if free < _LEAST_FREE:
        return _finding(name, "warning", detail, "make room on that disk")
    return _finding(name, "ok", detail)


def _sizes(folder: Path) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it has just vanished
                yield (Path(parent) / name).lstat().st_size


def _artifacts(reads_onnx: Finding) -> Iterator[Finding]:
    """Whether each ONNX file and engine in the artifacts folder is valid, and each engine fits this machine."""
    for path in sorted(ARTIFACTS_FOLDER.glob("*")):
        if path.name.startswith(".") or path.suffix.lower() not in (".onnx", ".engine"):
            continue
        try:
            yield _engine(path) if path.suffix.lower() == ".engine" else _onnx(path, reads_onnx)
        except SmlpError as error:
            yield _finding(str(path), "error", error.what, error.fix or "create it again, or remove it")
        except OSError as error:
            yield _finding(str(path), "error", f"cannot be read: {error.strerror}", "make it readable, or remove it")


def _onnx(path: Path, reads_onnx: Finding) -> Finding:
    if reads_onnx.status == "error" or reads_onnx.detail.startswith("not installed"):
        return _finding(str(path), "warning", "cannot be checked without onnx", reads_onnx.fix)
    from smlp_deploy.graphs.check import check_classifier, check_graph, read_onnx

    file = read_onnx(path)
    check_graph(file)
    metadata = file.metadata()
    if metadata is None:
        fix = "export the checkpoint with smlp export"
        return _finding(str(path), "warning", "an ONNX file that smlp-deploy did not write", fix)
    check_classifier(file, metadata)
    return _finding(str(path), "ok", f"{metadata.name}, {metadata.precision}, batch {metadata.batch or 'any'}")


def _engine(path: Path) -> Finding:
    manifest = read_manifest(path)
    batches = f"batch {manifest.profile.min} to {manifest.profile.max}"
    text = f"{manifest.backend} {manifest.version}, {manifest.metadata.precision}, {batches}"
    try:
        check_machine(path, manifest)
    except SmlpError as error:
        return _finding(str(path), "warning", f"{text}; does not run here: {error.what}", error.fix)
    return _finding(str(path), "ok", f"{text}; fits this machine")
