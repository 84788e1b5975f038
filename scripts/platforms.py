"""Regenerate docs/platforms.md: what each extra installs on which platform, and what its libraries need.

    python -m scripts.platforms

Asks the package index through pip, and downloads wheels where it offers no metadata apart from them: some gigabytes.
PyTorch is left out, and so are the packages of TensorRT that exist as source alone, in favour of those they require.
Reading libraries takes readelf (binutils).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "platforms.md"
EXTRAS: Mapping[str, Sequence[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
PYTHONS = ("3.11", "3.12", "3.13")
SKIPPED = {"smlp-deploy", "torch"}
"""Other extras are resolved where they are included; PyTorch's wheels with CUDA are large and its own choice."""
SPLIT = re.compile(r"tensorrt-(rtx-)?cu\d\d")
"""Packages that exist as source alone; they require -libs and -bindings of the same version."""
WITH_CUDA = re.compile(r"cuda-bindings|nvidia-c.*|onnxruntime-gpu|tensorrt-.*")
"""Packages whose libraries are read."""
SYSTEM = re.compile(r"(ld-linux.*|lib(c|dl|gcc_s|m|pthread|rt|stdc\+\+|z))\.so\.\d+")
DRIVER = {"libcuda.so.1", "libnvidia-ml.so.1"}


@dataclass(frozen=True)
class Platform:
    """A platform, as pip, wheels and environment markers call it."""

    name: str
    tags: tuple[str, ...]
    markers: Mapping[str, str]


def _linux(machine: str, glibc: int) -> Platform:
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(glibc, 4, -1)]
    markers = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": machine}
    return Platform(
        f"Linux {machine}, glibc 2.{glibc}", (*tags, f"manylinux2014_{machine}", f"linux_{machine}"), markers
    )


PLATFORMS = (
    _linux("x86_64", 28),
    _linux("aarch64", 35),
    Platform(
        "Windows x86-64",
        ("win_amd64",),
        {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
    ),
)

# pip evaluates markers for the machine it runs on, whatever --platform says.
PIP = """
import json, sys
from pip._internal.cli.main import main
from pip._vendor.packaging import markers
facts, own = json.loads(sys.argv.pop(1)), markers.default_environment
markers.default_environment = lambda: {**own(), **facts}
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Resolution:
    """What pip would install.

    Attributes:
        versions: of each distribution, by its normalized name.
        urls: of their wheels.
        absent: requirements without a wheel.
    """

    versions: dict[str, str] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


def requirements_of(extra: str) -> Iterator[str]:
    """What an extra requires, without the other extras that it includes, in terms of packages with wheels."""
    for line in EXTRAS[extra]:
        requirement = Requirement(line)
        if SPLIT.fullmatch(requirement.name):
            yield from (f"{requirement.name}-{piece}{requirement.specifier}" for piece in ("bindings", "libs"))
        elif requirement.name not in SKIPPED:
            yield line


def included(extra: str) -> Iterator[str]:
    """An extra and those that it includes."""
    yield extra
    for line in EXTRAS[extra]:
        requirement = Requirement(line)
        if requirement.name == "smlp-deploy":
            for other in sorted(requirement.extras):
                yield from included(other)


def resolve(lines: Iterable[str], where: Platform, python: str, *, alone: bool = False) -> Resolution:
    """Ask pip; a requirement without a wheel is put aside, and the rest resolved.

    Args:
        lines: requirements.
        where: the platform.
        python: its version, as "3.11".
        alone: without what they require.
    """
    wanted, result = list(dict.fromkeys(lines)), Resolution()
    while wanted:
        with TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            tags = [argument for tag in where.tags for argument in ("--platform", tag)]
            facts = {
                **where.markers,
                "python_version": python,
                "python_full_version": f"{python}.0",
            }
            options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--python-version", python, *tags]
            options += ["--no-deps"] if alone else []
            command = ["install", *options, "--target", folder, "--report", str(report), "--quiet", *wanted]
            done = _run(sys.executable, "-c", PIP, json.dumps(facts), *command)
            if done.returncode == 0:
                for item in json.loads(report.read_text())["install"]:
                    name = canonicalize_name(item["metadata"]["name"])
                    result.versions[name] = item["metadata"]["version"]
                    result.urls[name] = item["download_info"]["url"]
                return result
        lost = re.findall(r"No matching distribution found for (\S+)", done.stderr)
        dropped = [line for line in wanted if lost and _normal(line) == _normal(lost[-1])]
        if not dropped:
            raise SystemExit(f"pip: {where.name}: {done.stderr}")
        result.absent += [_normal(line) for line in dropped]
        wanted = [line for line in wanted if line not in dropped]
    return result


def _run(*command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=check)  # noqa: S603


def _normal(line: str) -> str:
    return canonicalize_name(Requirement(line).name)


def libraries_in(wheel: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and needed libraries of each shared library in a wheel."""
    with ZipFile(wheel) as archive, TemporaryDirectory() as folder:
        for name in archive.namelist():
            if re.search(r"\.so(\.\d+)*$", name):
                library = archive.extract(name, folder)
                text = _run("readelf", "--dynamic", "--wide", library, check=True).stdout
                own = re.findall(r"\(SONAME\).*\[(.+)\]", text)
                yield own[0] if own else Path(name).name, re.findall(r"\(NEEDED\).*\[(.+)\]", text)
                Path(library).unlink()


def not_provided(resolution: Resolution) -> tuple[int, dict[str, list[str]]]:
    """How many libraries the packages have, and which they need beside each other, the system's and the driver's.

    Returns:
        Their number, and for each library that is not provided, the packages that need it.
    """
    provided: set[str] = set(DRIVER)
    needed: dict[str, set[str]] = defaultdict(set)
    count = 0
    for name, url in resolution.urls.items():
        if not WITH_CUDA.fullmatch(name):
            continue
        with TemporaryDirectory() as folder:
            _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, url, check=True)
            for own, others in libraries_in(next(Path(folder).iterdir())):
                provided.add(own)
                count += 1
                for other in others:
                    needed[other].add(name)
    lost = {other: sorted(names) for other, names in sorted(needed.items()) if other not in provided}
    return count, {other: names for other, names in lost.items() if not SYSTEM.fullmatch(other)}


HEADING = """# Platforms and GPUs

What `pip install "smlp-deploy[EXTRA]"` brings on which platform, and which GPUs each backend serves. Written by
`python -m scripts.platforms`, which asks the package index with `pip install --dry-run --report`.
`smlp doctor` compares what is installed with this machine ([doctor](doctor.md)).

"""


@dataclass(frozen=True)
class Family:
    """GPUs of one compute capability, or of several that are served alike, and what each backend does on them.

    Attributes:
        name: of the generation.
        capability: as NVIDIA writes it.
        examples: products.
        onnxruntime: with its CUDA provider.
        tensorrt10: the backend `tensorrt` with TensorRT 10.12 or later.
        tensorrt11: with TensorRT 11.
        rtx: TensorRT-RTX; whether its binding names the architecture is tested.
    """

    name: str
    capability: str
    examples: str
    onnxruntime: str
    tensorrt10: str
    tensorrt11: str
    rtx: str


FAMILIES = (
    Family("Turing", "7.5", "T4, RTX 2080", "yes", "yes", "yes", "yes, in an engine of its own, FP16"),
    Family("Ampere", "8.0", "A100, A30", "yes", "yes", "yes", "yes"),
    Family("Ampere", "8.6", "A10, RTX 3090", "yes", "yes", "yes", "yes"),
    Family("Ada", "8.9", "L4, L40S, RTX 4090", "yes", "yes", "yes", "yes"),
    Family("Hopper", "9.0", "H100, H200", "**ran**", "yes", "yes", "**no**: refuses to load; use `tensorrt`"),
    Family("Blackwell", "10.0", "B200", "yes", "yes", "yes", "no: use `tensorrt`"),
    Family("Blackwell", "12.0", "RTX 5090", "yes", "yes", "yes", "yes"),
    Family("Blackwell", "12.1", "GB10 (DGX Spark)", "unknown", "unknown", "unknown", "unknown: its binding names it"),
    Family("Jetson Orin, JetPack 6", "8.7", "AGX Orin", "not from pip", "no: JetPack has 10.3", "no JetPack", "no"),
    Family("Jetson Thor, JetPack 7", "11.0", "AGX Thor", "unknown", "unknown", "unknown", "unknown"),
    Family("Volta and older", "below 7.5", "V100, P100", "not supported", "not supported", "not supported", "no"),
)

HARDWARE = """
**Bold** was seen on a GPU here: on an H100 80GB, `onnxruntime-gpu` 1.31.1 with its CUDA provider ran the network, as
did PyTorch 2.11 ([Speed on a GPU](gpu-speed.md#beside-measurements)), and TensorRT-RTX 1.7.1 refused: "The engine
cannot run on this GPU, which has compute capability 9.0". Everything else comes from the vendor's documents or from
what the packages name; it was not checked against the libraries, and no engine has run
([TensorRT engines](engines.md#what-was-tested-on-a-gpu)). "Unknown" means that neither says so. bf16 and TF32 need
compute capability 8.0 or later.

- ONNX Runtime's TensorRT provider is linked against TensorRT 10, so `gpu` and `gpu-cu12` stay below 11. `tensorrt`
  installs TensorRT 11 without ONNX Runtime; add `cpu`. TensorRT 11 has no JetPack.
- CUDA 13 needs a driver of the 580 series or later. For older ones there are `gpu-cu12` and `rtx`, for CUDA 12.
- `cuda-bindings` exists once in an environment, so `gpu-cu12` does not go with `gpu`, `tensorrt` or `rtx-cu13`. PyTorch
  2.13 from PyPI requires it for CUDA 13 on Linux: `gpu-cu12` goes with `export` only if PyTorch is its CPU build, and
  `rtx` takes either. On a driver for CUDA 12, use `pip install "smlp-deploy[rtx]" "cuda-bindings<13"`.
- `cpu` excludes `gpu` and `gpu-cu12`: `onnxruntime` and `onnxruntime-gpu` own the same folder.
- TensorRT-RTX on aarch64 exists for CUDA 13 only: `rtx-cu13`.
"""


def main() -> None:
    """Write the page."""
    resolved = {
        (extra, where.name): resolve(
            (line for each in included(extra) for line in requirements_of(each)), where, PYTHONS[0]
        )
        for extra in EXTRAS
        for where in PLATFORMS
        if not print(extra, where.name, flush=True)
    }
    page = [HEADING, *_summary(resolved), "\n", *_versions(resolved), "\n", *_libraries(resolved), "\n", *hardware()]
    TARGET.write_text("".join(page))


def hardware() -> Iterator[str]:
    """The section on GPUs."""
    yield "## GPUs\n\n"
    yield "| GPU | compute capability | `onnxruntime-gpu`, CUDA | TensorRT 10 | TensorRT 11 | TensorRT-RTX |\n"
    yield "|---|---|---|---|---|---|\n"
    for family in FAMILIES:
        served = (family.onnxruntime, family.tensorrt10, family.tensorrt11, family.rtx)
        yield f"| {family.name}: {family.examples} | {family.capability} | {' | '.join(served)} |\n"
    yield HARDWARE


Resolved = Mapping[tuple[str, str], Resolution]


def _summary(resolved: Resolved) -> Iterator[str]:
    names = [where.name for where in PLATFORMS]
    yield f"## Extras\n\n| extra | {' | '.join(names)} |\n|---{'|---' * len(names)}|\n"
    for extra in EXTRAS:
        absent = [resolved[extra, name].absent for name in names]
        cells = [f"no wheel: {', '.join(lost)}" if lost else "complete" for lost in absent]
        yield f"| `{extra}` | {' | '.join(cells)} |\n"
    yield (
        "\nComplete: every package has a wheel. `tensorrt-cu12-libs` and `tensorrt-cu13-libs` are source packages,\n"
        "which fetch TensorRT's libraries from NVIDIA's own index while they are installed; whether it has them for a\n"
        "platform was not checked. PyTorch, in `export`, `train` and `test`, was not asked for.\n"
    )


def _versions(resolved: Resolved) -> Iterator[str]:
    """The versions of what the extras name, and of NVIDIA's packages that these bring; equal rows are one."""
    rows: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for extra in EXTRAS:
        named = {_normal(line) for line in requirements_of(extra)}
        found = [resolved[extra, where.name].versions for where in PLATFORMS]
        brought = {name for versions in found for name in versions if extra != "test" and WITH_CUDA.fullmatch(name)}
        for name in sorted(named | brought):
            rows[(name, *(versions.get(name, "none") for versions in found))].append(f"`{extra}`")
    names = [where.name for where in PLATFORMS]
    yield f"## Versions\n\n| package | extras | {' | '.join(names)} |\n|---|---{'|---' * len(names)}|\n"
    for (name, *versions), extras in sorted(rows.items()):
        yield f"| {name} | {', '.join(extras)} | {' | '.join(versions)} |\n"
    yield f"\nWith Python {PYTHONS[0]}."
    for python in PYTHONS[1:]:
        yield f" {_differences(resolved, python)}"
    yield "\n"


def _differences(resolved: Resolved, python: str) -> str:
    """What another Python version changes for the extras with CUDA, in a sentence."""
    changes = set()
    for (extra, name), usual in resolved.items():
        if not any(WITH_CUDA.fullmatch(_normal(line)) for line in requirements_of(extra)):
            continue
        where = next(where for where in PLATFORMS if where.name == name)
        lines = [line for line in requirements_of(extra) if WITH_CUDA.fullmatch(_normal(line))]
        other = resolve(lines, where, python, alone=True)
        changes |= {f"{line} on {name} (no wheel)" for line in other.absent if line not in usual.absent}
    return f"{python} lacks {', '.join(sorted(changes))}." if changes else f"{python} has the same wheels with CUDA."


def _libraries(resolved: Resolved) -> Iterator[str]:
    where = PLATFORMS[0].name
    yield (
        f"## Libraries\n\nThe shared libraries of the packages with CUDA, on {where}: what they need (ELF `NEEDED`)\n"
        "beside each other, the C and C++ libraries of the system, and the driver's.\n\n"
        "| extra | libraries | needed from elsewhere |\n|---|---|---|\n"
    )
    for extra in EXTRAS:
        if extra == "test" or not any(WITH_CUDA.fullmatch(name) for name in resolved[extra, where].versions):
            continue
        count, lost = not_provided(resolved[extra, where])
        cell = ", ".join(f"{library} ({', '.join(names)})" for library, names in lost.items()) or "nothing"
        yield f"| `{extra}` | {count} | {cell} |\n"
    yield "\n`libnvinfer` and `libnvonnxparser` are in the source packages of TensorRT, which were not read.\n"


if __name__ == "__main__":
    main()
