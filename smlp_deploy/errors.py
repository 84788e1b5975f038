"""The error tree. Every error a user can cause or act on is an `SmlpError`; anything else is a bug.

SmlpError                     6  this machine cannot do it: a full disk, a folder that cannot be written
├── UsageError                2  an invalid option or argument
├── CheckError                3  a check that failed: parity, a bound, shards that do not make one run
├── ImageError                4  an image that cannot be read; becomes that image's record
├── ConfigError               5  an invalid network or preprocessing configuration
├── CheckpointError           5  a weights file that is unsafe, damaged or not an sMLPNet
├── ArtifactError             5  an ONNX file or engine (or its metadata) that cannot be used
├── RecordsError              5  records or a shard that are damaged, or that smlp predict did not write
├── BuildError                6  an engine that TensorRT did not build, or not as requested
├── GpuError                  6  a GPU that is absent or cannot go on, which ends the run
├── GpuMemoryError            6  a GPU whose memory is full; a smaller batch may fit
├── DownloadError             6  official weights that could not be fetched or verified
├── MissingDependencyError    6  a required package that is missing or wrongly installed
└── StoppedError     130 or 143  Ctrl-C or SIGTERM during a run that can be resumed

The numbers are the exit codes of smlp. Besides them there are 0, and Python's own 1 for a bug.
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

    exit_code = 6

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


class CheckError(SmlpError):
    exit_code = 3


class ImageError(SmlpError):
    exit_code = 4


class ConfigError(SmlpError):
    exit_code = 5


class CheckpointError(SmlpError):
    exit_code = 5


class ArtifactError(SmlpError):
    exit_code = 5


class RecordsError(SmlpError):
    exit_code = 5


class BuildError(SmlpError):
    pass


class GpuError(SmlpError):
    pass


class GpuMemoryError(SmlpError):
    pass


class DownloadError(SmlpError):
    pass


class MissingDependencyError(SmlpError):
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


def printable(text: str) -> str:
    """`text` on one line: control characters and undecodable bytes are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
