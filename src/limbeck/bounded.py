"""A bound on the time that what a stranger wrote may take."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SECONDS = 5.0  # for one text


@contextmanager
def bounded(seconds: float = SECONDS) -> Iterator[None]:
    """Within, raise ``TimeoutError`` after ``seconds``; a timer that the caller had set goes on behind it.

    Only in the main thread and where the system has timers: elsewhere nothing is bounded.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> NoReturn:
        raise TimeoutError(f"it takes more than {seconds:g} s")

    handler, began = signal.signal(signal.SIGALRM, late), time.monotonic()
    left, again = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), again)
