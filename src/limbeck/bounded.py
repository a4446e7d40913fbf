"""A bound on the time that what a stranger wrote may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS, AGAIN = 5.0, 0.1  # for one text; between one alarm and the next


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Within, raise ``TimeoutError`` after ``seconds``; a timer that the caller had set goes on behind it.

    It is raised again and again, since what runs within may swallow it. Only in the main thread and where the
    system has timers: elsewhere nothing is bounded.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    over = False

    def late(*_: object) -> None:
        if not over:
            raise TimeoutError(f"it takes more than {seconds:g} s")

    handler, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    left, again = signal.getitimer(signal.ITIMER_REAL)
    try:
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        yield
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), again)
