"""Long-running work: how it reports progress, and how Ctrl-C and SIGTERM end it, with exit codes 130 and 143."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

from smlp_deploy.errors import StoppedError

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with the name of the task, how much of it is done, and the total, 0 if it cannot be known."""


def no_progress(what: str, done: int, total: int) -> None:
    """A `Progress` that is not shown."""


SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Terminated(SystemExit):
    """SIGTERM as an exception, so that partial files are removed on the way out."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StopRequest:
    """A signal that arrived while signals were put off.

    Attributes:
        signal: the signal, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = False

    def __bool__(self) -> bool:
        return self.signal is not None

    def obey(self) -> None:
        """Stop now, if a signal arrived."""
        if self.signal is not None:
            _stop(self.signal)

    def report(self, images: int, *, partial: Path | None) -> None:
        """Report how far a run got, if it was stopped.

        Args:
            images: number done.
            partial: the file with the results so far, if the run can be resumed.

        Raises:
            StoppedError: a signal arrived.
        """
        if self.signal is not None:
            raise StoppedError(
                f"stopped by {SIGNALS[self.signal]} after {images} images",
                signal=self.signal,
                where=partial,
                fix="the same command with --resume continues" if partial else None,
            )

    def before(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items` until a signal arrives, even one that arrives while waiting for the next item."""
        iterator = iter(items)
        while not self:
            try:
                self._waiting = True
                item = next(iterator)
            except (StopIteration, _Woken):
                return
            finally:
                self._waiting = False
            yield item

    def receive(self, number: int) -> None:
        """Note a signal, and wake `before` if it is waiting."""
        self.signal = signal.Signals(number)
        if self._waiting:
            raise _Woken


class _Woken(BaseException):
    pass


def handle_sigterm() -> None:
    """Turn SIGTERM into `Terminated` from now on."""
    if _in_main_thread():
        signal.signal(signal.SIGTERM, lambda *_: _stop(signal.SIGTERM))


@contextmanager
def put_off(*, again: bool) -> Iterator[StopRequest]:
    """Note the first Ctrl-C or SIGTERM instead of stopping.

    Args:
        again: a second one stops at once. False where an exception would break third-party code.
    """
    request = StopRequest()

    def receive(number: int, frame: FrameType | None) -> None:
        if again:
            request.obey()
        request.receive(number)

    if not _in_main_thread():
        yield request
        return
    previous = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(number: signal.Signals) -> NoReturn:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
