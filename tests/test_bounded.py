"""A bound on time holds, and leaves other timers as they were."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress

import pytest

from limbeck.bounded import bounded


def forever() -> None:
    while True:
        time.sleep(0.01)


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"more than 0\.1 s"), bounded(0.1):
        forever()


def test_what_swallows_the_alarm_meets_the_next_one() -> None:
    def deaf() -> None:
        try:
            forever()
        except Exception:
            forever()

    with pytest.raises(TimeoutError), bounded(0.1):
        deaf()


def test_an_alarm_at_the_very_end_leaves_no_timer() -> None:
    for number in range(300):
        with suppress(TimeoutError), bounded(5e-4 + 1e-5 * (number % 50)):
            for _ in range(30):
                with bounded(1.0):
                    pass
            sum(range(4000))
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_what_ends_in_time_is_left_alone() -> None:
    with bounded(0.1):
        pass
    time.sleep(0.15)


def test_a_timer_of_the_callers_goes_on() -> None:
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(True))
    left, again = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(TimeoutError), bounded(0.1):
            forever()
        assert not rung and 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.25
        time.sleep(0.3)
        assert rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, again)
        signal.signal(signal.SIGALRM, before)


def test_in_another_thread_nothing_is_bounded() -> None:
    ended = []

    def work() -> None:
        with bounded(0.05):
            time.sleep(0.1)
        ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended
