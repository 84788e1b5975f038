"""smlp as it runs in a container: what the wheel installs, without PyTorch, and little else.

    python -m scripts.container

The root is read-only, the user has no home and no entry in /etc/passwd, there is no network and no room in /tmp, shared
memory has 64 MB, and one folder can be written to. Linux namespaces and mounts give all that without a container
engine; they need root. Each check runs one command and looks at its exit code, its output and the files it left.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
IMAGES = sorted((ROOT / "images").glob("*.jpg"))
USER = "10001"

_ENTER = """
set -e
volume=$1; shift
mount --make-rprivate /
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount --bind "$volume" "$volume"
cut -d ' ' -f 5 /proc/self/mountinfo | sort -u | while read -r point; do
    case "$point" in /dev/shm | "$volume" | /proc* | /sys*) ;; *) mount -o remount,bind,ro "$point" ;; esac
done
cd "$volume"
exec setpriv --reuid "$0" --regid "$0" --clear-groups env -i "$@"
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A command, and what it must do.

    Attributes:
        command: the arguments of smlp.
        code: its exit code.
        says: what it must print, on stdout or stderr.
        variables: of its environment.
    """

    command: Sequence[str]
    code: int = 0
    says: str = ""
    variables: Sequence[str] = ()


def checks(photos: Path, volume: Path) -> list[Check]:
    """All checks; `photos` has a folder for each class, and `volume` can be written to."""
    images = tuple(str(path) for path in sorted(photos.glob("*/*.jpg")))
    no_home = "no home directory for the cache"
    return [
        Check(command=("--help",), says="predict"),
        Check(command=("predict", *images), says="3 90.3%"),
        Check(command=("predict", *images, "-o", "records.jsonl"), says="12 images, 0 failed"),
        Check(command=("predict", *images, "--html", "page.html"), code=6, says='pip install "smlp-deploy[report]"'),
        Check(
            command=("predict", images[0], "-o", "/records.jsonl"), code=6, says="cannot write: Read-only file system"
        ),
        Check(command=("predict", images[0], "--runtime", "openvino"), says="1 image, 0 failed"),
        Check(command=("eval", str(photos)), says="top-1"),
        Check(
            command=("eval", str(photos), "-o", "/records.jsonl"), code=6, says="cannot write: Read-only file system"
        ),
        Check(command=("doctor",), says=no_home),
        Check(command=("inspect", "absent.onnx"), code=5, says="no such file"),
        Check(command=("export",), code=6, says='pip install "smlp-deploy[export]"'),
        Check(command=("build-engine",), code=6, says="pip install"),
        Check(command=("download", "smlpnet_small"), code=6, says=no_home),
        Check(command=("download", "smlpnet_small"), code=6, says="could not fetch", variables=(f"HOME={volume}",)),
        Check(command=("predict", images[0]), says="1 image, 0 failed", variables=("HOME=/",)),
    ]


def install(folder: Path) -> Path:
    """An environment with the wheel and its extra `cpu`; returns the folder of its programs."""

    def pip(*arguments: str | Path) -> None:
        command = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)
        # In this folder, or with it on PYTHONPATH, smlp-deploy would count as installed.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(command, check=True, cwd=folder, env=environment)  # noqa: S603

    installed = folder / "environment"
    subprocess.run((interpreter(), "-m", "venv", "--without-pip", installed), check=True)  # noqa: S603
    pip("wheel", "--no-deps", "--wheel-dir", folder / "wheels", ROOT)
    (wheel,) = (folder / "wheels").glob("*.whl")
    constraints = ROOT / "constraints.txt"
    pip("--python", installed / "bin" / "python", "install", "--constraint", constraints, f"{wheel}[cpu]")
    readable = ("chmod", "--recursive", "a+rX", installed)
    subprocess.run(readable, check=True)  # noqa: S603 - whatever the umask
    return installed / "bin"


def interpreter() -> Path:
    """A Python that every user can start: the one that runs this may be in a folder of root's."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for folder in (Path(sys.base_prefix) / "bin", Path("/usr/local/bin"), Path("/usr/bin")):
        program = (folder / name).resolve()
        if program.exists() and all(parent.stat().st_mode & stat.S_IXOTH for parent in program.parents):
            return program
    sys.exit(f"no {name} that every user can start")


def run(check: Check, programs: Path, volume: Path) -> str:
    """What is wrong with a command's result; empty if nothing is."""
    enter = ("unshare", "--mount", "--net", "--", "sh", "-c", _ENTER, USER, str(volume))
    command = (*enter, f"PATH={programs}:/usr/bin:/bin", *check.variables, "smlp", *check.command)
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    output = done.stdout + done.stderr
    if done.returncode != check.code:
        return f"exit code {done.returncode} in place of {check.code}\n{output}"
    if "Traceback" in output or check.says not in output:
        return f"did not print {check.says!r}\n{output}"
    locks = [path.name for path in volume.iterdir() if path.suffix in (".lock", ".tmp", ".partial")]
    return f"left {', '.join(locks)}" if locks else ""


def main() -> None:
    with TemporaryDirectory(prefix="smlp-container-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        programs = install(folder)
        volume, photos = folder / "volume", folder / "photos"
        volume.mkdir()
        shutil.chown(volume, int(USER), int(USER))
        for path in IMAGES:
            named = photos / path.name.split("-")[1]
            named.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, named)
        for path in (photos, *photos.rglob("*")):
            path.chmod(0o755)  # whatever the umask
        wrong = 0
        for check in checks(photos, volume):
            problem = run(check, programs, volume)
            wrong += bool(problem)
            print("wrong" if problem else "right", *check.variables, "smlp", *check.command[:2], *check.command[-2:])
            if problem:
                print(problem)
        sys.exit(f"{wrong} wrong" if wrong else None)


if __name__ == "__main__":
    main()
