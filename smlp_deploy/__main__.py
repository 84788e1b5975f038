"""The process of the `smlp` command."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import NoReturn

_COLLECT_AFTER = 100_000
"""New objects between two searches for unreachable ones. At Python's 700 they take a twentieth of a short command, in
vain: nearly all of its objects are those of modules, which stay."""


def run() -> NoReturn:
    """Run the command line, and end the process once all exit handlers have run, without freeing objects one by one.

    See `cli.main` for the exit code.
    """
    gc.set_threshold(_COLLECT_AFTER)
    codes: list[int] = []
    atexit.register(_leave, codes)  # the first, which is the last to run
    from smlp_deploy.cli import main

    try:
        main()
    except SystemExit as stop:
        if isinstance(stop.code, int):
            codes.append(stop.code)
        raise


def _leave(codes: list[int]) -> None:
    """End the process with the only one of `codes`; without one, Python ends it, with what went wrong."""
    if not codes:
        return
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # Python tries again, and reports it
        return
    os._exit(codes[0])


if __name__ == "__main__":
    run()
