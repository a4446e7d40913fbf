"""A bound on the time that what a stranger wrote may take."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

SECONDS, AGAIN = 5.0, 0.1  # for one text; between one alarm and the next


class bounded:  # it stands behind ``with``, as what contextlib gives does
    """Within, raise ``TimeoutError`` after ``seconds``; a timer that the caller had set goes on behind it.

    It is raised again and again, since what runs within may swallow it. Only in the main thread and where the
    system has timers: elsewhere nothing is bounded.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        main = threading.current_thread() is threading.main_thread()
        self.works = main and hasattr(signal, "setitimer")

    def __enter__(self) -> None:
        if self.works:
            self.handler, self.began = signal.getsignal(signal.SIGALRM), time.monotonic()
            self.before = signal.getitimer(signal.ITIMER_REAL)
            signal.signal(signal.SIGALRM, self._late)
            signal.setitimer(signal.ITIMER_REAL, self.seconds, AGAIN)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.works:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.handler or signal.SIG_DFL)
            left, again = self.before
            if left:
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - self.began), 1e-3), again)

    def _late(self, _: int, frame: FrameType | None) -> None:
        """An alarm; one that comes while the timer is set or taken back would leave it ringing."""
        if frame is None or frame.f_code not in (bounded.__enter__.__code__, bounded.__exit__.__code__):
            raise TimeoutError(f"it takes more than {self.seconds:g} s")
