"""The command line: the app, one registration per verb, and the error boundary, which chooses the exit code."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from smlp_deploy import __version__
from smlp_deploy.commands import output
from smlp_deploy.errors import SmlpError, printable
from smlp_deploy.interrupts import Terminated, handle_sigterm

VERBS = {
    "models": ("commands.models", "models", "Get", None),
    "download": ("commands.download", "download", "Get", "smlp download smlpnet_small"),
    "inspect": ("commands.inspect", "inspect", "Get", "smlp inspect my.pth"),
    "export": ("commands.export", "export", "Export", "smlp export my.pth --labels names.txt --fp16"),
    "build-engine": (
        "commands.build_engine",
        "build_engine",
        "Build",
        "smlp build-engine artifacts/my-fp32.onnx --fp16",
    ),
    "profile": ("commands.profile", "profile", "Build", "smlp profile artifacts/my-fp16.onnx --gpu-arch sm89"),
    "predict": ("commands.predict", "predict", "Run", "smlp predict photos/ -o predictions.jsonl"),
    "merge": ("commands.merge", "merge", "Run", "smlp merge out/ -o all.parquet"),
    "verify": ("commands.verify", "verify", "Prove", "smlp verify artifacts/my-int8.onnx --reference my.pth --layers"),
    "eval": (
        "commands.eval",
        "evaluate",
        "Prove",
        "smlp eval val/ -m artifacts/my-fp32.onnx -m artifacts/my-int8.onnx",
    ),
    "benchmark": (
        "commands.benchmark",
        "benchmark",
        "Prove",
        "smlp benchmark artifacts/my-fp32.onnx --baseline --reference my.pth",
    ),
    "serve-check": (
        "commands.serve_check",
        "serve_check",
        "Prove",
        "smlp serve-check localhost:8000 photos/ -m artifacts/my-fp32.onnx",
    ),
    "doctor": ("commands.doctor", "doctor", "Prove", None),
}
"""Module, function, group in the help, and an example of each verb."""


def command_line(*verbs: str) -> typer.Typer:
    """The app with the given verbs; with all of them by default.

    A run needs only its own verb, and then imports no other's module.
    """
    app = typer.Typer(
        name="smlp",
        cls=_Verbs,
        help="Take a trained sMLPNet from its checkpoint to production, with proof at each step.",
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        no_args_is_help=True,
        callback=smlp,
    )
    for name in verbs or VERBS:
        module, function, panel, example = VERBS[name]
        verb = getattr(import_module(f"smlp_deploy.{module}"), function)
        app.command(name, cls=_Verb, rich_help_panel=panel, epilog=example and f"Example: {example}")(verb)
    return app


_INTERRUPTED = 130  # what typer makes of Ctrl-C
_CLOSED_PIPE = 141  # what a shell makes of SIGPIPE


_WORDS = {"int": "N", "float": "N", "path": "FILE", "str": "NAME", "text": "NAME"}
"""What help shows in place of a type, where an option names nothing else."""


def _without_types(parameters: Iterable[Any]) -> None:
    """Make help show what to write: nothing beside an argument's name, a word for an option's value."""
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parameter.type.get_metavar = lambda param, ctx: ""
        elif not parameter.is_flag and parameter.metavar is None:
            kind = parameter.type.name
            parameter.metavar = next((word for begin, word in _WORDS.items() if kind.startswith(begin)), None)


class _Verb(TyperCommand):
    def get_params(self, ctx: Any) -> Any:
        parameters = super().get_params(ctx)
        _without_types(parameters)
        return parameters


class _Verbs(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        parameters = super().get_params(ctx)
        _without_types(parameters)
        return parameters


class _Settings:
    debug = False


def _debug(wanted: bool) -> None:
    if wanted:
        _Settings.debug = True
        logging.basicConfig(level=logging.DEBUG, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"smlp-deploy {__version__}")
        raise typer.Exit


def smlp(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks and the logs of libraries on stderr.", callback=_debug),
    ] = False,
) -> None:
    """Take a trained sMLPNet from its checkpoint to production, with proof at each step."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line.

    The exit code is 0, that of the error (`errors.py`), 130 after Ctrl-C, 143 after SIGTERM, or 141 if the reader of
    standard output is gone. A bug ends with a traceback, and Python's own 1.
    """
    _Settings.debug = False
    notes = _LazyNotes(logging.WARNING)
    logging.getLogger("smlp_deploy").addHandler(notes)
    handle_sigterm()
    try:
        _run(arguments)
    finally:
        logging.getLogger("smlp_deploy").removeHandler(notes)


def _run(arguments: list[str] | None) -> NoReturn:
    given = sys.argv[1:] if arguments is None else arguments
    output.remember(given)
    first = next((word for word in given if word != "--debug"), None)
    try:
        app = command_line(*([first] if first in VERBS else ()))
        code = app(args=arguments, prog_name="smlp", standalone_mode=False)
    except SmlpError as error:
        _fail(str(error), error.exit_code, error)
    except typer.TyperException as error:
        _fail(_usage_message(error), error.exit_code, error)
    except Terminated:
        _fail("stopped by SIGTERM; no partial files left", 128 + signal.SIGTERM)
    except SystemExit as stop:
        # Typer's or rich's, when the reader of standard output is gone.
        sys.exit(_CLOSED_PIPE if isinstance(stop.__context__, BrokenPipeError) else stop.code)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        # Python's buffered standard output would fail again on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"cannot write: {error.strerror} · standard output", SmlpError.exit_code)
    if code == _INTERRUPTED:
        _fail("stopped by Ctrl-C; no partial files left", _INTERRUPTED)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_message(error: typer.TyperException) -> str:
    """Typer's message in the form of our own errors."""
    context = getattr(error, "ctx", None)
    fix = f"{context.command_path if context else 'smlp'} --help"
    # With no verb, typer has shown the help and the message is empty.
    message = printable(error.format_message()) or "no verb given"
    if similar := getattr(error, "possibilities", None):
        option = error.option_name  # type: ignore[attr-defined]
        message = f"No such option: {printable(option)}"
        from difflib import get_close_matches

        fix = f"did you mean {get_close_matches(option, similar, n=1, cutoff=0)[0]}? · {fix}"
    return f"{message} · {fix}"


class _LazyNotes(logging.Handler):
    """Shows the library's warnings on stderr, each once; imports rich only for the first one."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message in self._said or _Settings.debug:  # where it is in the log
            return
        self._said.add(message)
        from smlp_deploy.commands.terminal import note

        note(message)


def _fail(message: str, code: int, error: BaseException | None = None) -> NoReturn:
    from smlp_deploy.commands.terminal import show_error

    if _Settings.debug and error is not None:
        cause: BaseException | None = error
        while cause is not None:  # also what was left out of the message
            cause.__suppress_context__ = False
            cause = cause.__context__
        traceback.print_exception(error)
    show_error(message)
    sys.exit(code)
