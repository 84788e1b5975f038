"""One runner for several threads at a time."""

from __future__ import annotations

from collections import deque
from threading import Lock
from types import TracebackType
from typing import Self

from smlp_deploy.errors import GpuError
from smlp_deploy.images.batches import FloatArray, ImageArray
from smlp_deploy.runners.base import Runner, StreamingRunner


class SharedRunner:
    """Gives each of several users a runner of its own, all of which compute on the one below, one batch at a time.

    Args:
        runner: the one below.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lock = Lock()
        self._under_way: deque[_StreamingUser] = deque()  # whose batch each is, oldest first

    def user(self) -> Runner:
        """A runner for one thread, which has streams if the one below has them; closing it does nothing."""
        if isinstance(self._runner, StreamingRunner):
            return _StreamingUser(self._runner, self._lock, self._under_way)
        return _User(self._runner, self._lock)


class _User:
    def __init__(self, runner: Runner, lock: Lock) -> None:
        self._runner, self._lock = runner, lock
        self.name, self.metadata = runner.name, runner.metadata

    def infer(self, batch: ImageArray) -> FloatArray:
        with self._lock:
            return self._runner.infer(batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Does nothing: the runner below is not this one's."""


class _StreamingUser(_User):
    """All users' batches are in one queue, and whoever collects another's logits keeps them for it."""

    def __init__(self, runner: StreamingRunner, lock: Lock, under_way: deque[_StreamingUser]) -> None:
        super().__init__(runner, lock)
        self._stream, self._under_way = runner, under_way
        self._kept: deque[FloatArray | GpuError] = deque()  # collected for this user by others
        self.slots, self.largest = runner.slots, runner.largest

    def infer(self, batch: ImageArray) -> FloatArray:
        with self._lock:
            self._collect(leave=0)  # the runner below would take the oldest batch's logits for this one's
            return self._stream.infer(batch)

    def allocate(self, images: int) -> ImageArray:
        with self._lock:
            return self._stream.allocate(images)

    def release(self, memory: ImageArray) -> None:
        with self._lock:
            self._stream.release(memory)

    def submit(self, batch: ImageArray) -> None:
        with self._lock:
            self._collect(leave=self.slots - 1)
            self._stream.submit(batch)
            self._under_way.append(self)

    def collect(self) -> FloatArray:
        with self._lock:
            while not self._kept:
                self._collect(leave=len(self._under_way) - 1)
            logits = self._kept.popleft()
        if isinstance(logits, GpuError):
            raise logits
        return logits

    def _collect(self, *, leave: int) -> None:
        """Wait for the oldest batches of all users."""
        while len(self._under_way) > leave:
            owner = self._under_way.popleft()
            try:
                owner._kept.append(self._stream.collect().copy())
            except GpuError as error:  # each of them fails then, and its owner is to know
                owner._kept.append(error)
