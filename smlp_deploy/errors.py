"""The error tree. Every error a user can cause or act on is an `SmlpError`; anything else is a bug.

SmlpError                  exit code 1
├── UsageError             an invalid option or argument (exit code 2)
├── ConfigError            an invalid network or preprocessing configuration
├── CheckpointError        a weights file that is unsafe, damaged or not an sMLPNet
├── ArtifactError          an ONNX file (or its metadata) that cannot be used
├── BuildError             an engine that TensorRT did not build, or not as requested
├── GpuError               a GPU that cannot go on, which ends the run
├── ImageError             an image that cannot be read; becomes that image's record
├── StoppedError           Ctrl-C or SIGTERM during a run that can be resumed (exit code 130 or 143)
├── DownloadError          official weights that could not be fetched or verified
└── MissingDependencyError a required package that is missing or wrongly installed
"""

from __future__ import annotations

_LONGEST = 500


class SmlpError(Exception):
    """One line that says what is wrong, where, and what to do next.

    Args:
        what: the problem, with the values that matter.
        where: the file, key or option it is about.
        fix: what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix

    def __str__(self) -> str:
        what = self.what if len(self.what) <= _LONGEST else f"{self.what[:_LONGEST]}…"  # it may quote a file
        return " · ".join(printable(part) for part in (what, self.where, self.fix) if part)


class UsageError(SmlpError):
    exit_code = 2


class ConfigError(SmlpError):
    pass


class CheckpointError(SmlpError):
    pass


class ArtifactError(SmlpError):
    pass


class BuildError(SmlpError):
    pass


class GpuError(SmlpError):
    pass


class ImageError(SmlpError):
    pass


class StoppedError(SmlpError):
    """See `SmlpError`.

    Args:
        what: how far it got.
        signal: the signal's number.
        where: the file with the results so far.
        fix: how to continue.
    """

    def __init__(self, what: str, *, signal: int, where: object = None, fix: str | None = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + signal


class DownloadError(SmlpError):
    pass


class MissingDependencyError(SmlpError):
    pass


def printable(text: str) -> str:
    """`text` on one line: control characters and undecodable bytes are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
