"""Long work: how it tells how far it is, and how Ctrl-C and SIGTERM end it, with the exit codes 130 and 143."""

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
"""Called with what is being done, how much of it is done, and of how much."""

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Terminated(SystemExit):
    """SIGTERM, as an exception, so that what is half-made is removed on the way out."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StopRequest:
    """A signal that came while it was put off.

    Attributes:
        signal: which, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._waiting = False

    def __bool__(self) -> bool:
        return self.signal is not None

    def obey(self) -> None:
        """Stop now, if that was asked for."""
        if self.signal is not None:
            _stop(self.signal)

    def report(self, images: int, *, partial: Path | None) -> None:
        """Say how far a run came, if it was stopped.

        Args:
            images: that are done.
            partial: the file with what is done, if it can be continued.

        Raises:
            StoppedError: a signal came.
        """
        if self.signal is not None:
            raise StoppedError(
                f"stopped by {SIGNALS[self.signal]} after {images} images",
                signal=self.signal,
                where=partial,
                fix="the same command with --resume continues" if partial else None,
            )

    def before(self, items: Iterable[T]) -> Iterator[T]:
        """Those of `items` that come before a signal, even if it comes while the next one is awaited."""
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
        """Note a signal; wake whoever is waiting in `before`."""
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
        again: a second one stops at once. False where code of others would be torn apart by an exception.
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
