from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from smlp_deploy.interrupts import StopRequest, Terminated, handle_sigterm, put_off


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background does not have
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def test_sigterm_is_an_exit_with_its_code() -> None:
    handle_sigterm()
    with pytest.raises(Terminated) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_is_put_off_until_it_is_obeyed(number: signal.Signals, error: type[BaseException]) -> None:
    with put_off(again=False) as request:
        request.obey()
        assert not request
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert request.signal == number
        with pytest.raises(error):
            request.obey()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_stops_at_once() -> None:
    with put_off(again=True) as request:
        signal.raise_signal(signal.SIGINT)
        assert request
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_waiting_for_the_next_item_ends_with_the_signal() -> None:
    def endless() -> Iterator[int]:
        yield 1
        signal.raise_signal(signal.SIGTERM)
        yield 2

    with put_off(again=True) as request:
        assert list(request.before(endless())) == [1]
        assert request.signal == signal.SIGTERM
        assert list(request.before([3])) == []


def test_all_items_come_where_there_is_no_signal() -> None:
    assert list(StopRequest().before(iter("abc"))) == ["a", "b", "c"]


def test_other_threads_leave_signals_alone() -> None:
    handler = signal.getsignal(signal.SIGINT)
    seen: list[bool] = []

    def work() -> None:
        handle_sigterm()
        with put_off(again=True) as request:
            seen.append(bool(request) or signal.getsignal(signal.SIGINT) is not handler)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
