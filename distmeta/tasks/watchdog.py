"""A limit to how long one call may take, such as a step of somebody's simulator."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Self, TypeVar

T = TypeVar("T")

TICKS = 10  # of a limit: a process that is stopped for a while, as by Ctrl-Z, has seen but one when it goes on
NEVER = float("inf")


class Hung(Exception):
    """A call has taken longer than it may."""


class Watchdog:
    """Within this context, a `call` that takes longer than ``limit`` seconds is interrupted by `Hung`.

    The alarm is a signal (SIGALRM), which reaches Python code and its sleeping and waiting. It does not reach a library
    that never comes back to Python, nor threads beside the main one, where nothing is limited.

    Args:
        limit: Seconds; None for no limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit if threading.current_thread() is threading.main_thread() else None
        self._left = NEVER

    def __enter__(self) -> Self:
        if self.limit is not None:
            self._began = time.monotonic()
            self._handler = signal.signal(signal.SIGALRM, self._tick)
            self._timer = signal.setitimer(signal.ITIMER_REAL, self.limit / TICKS, self.limit / TICKS)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.limit is None:
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler or signal.SIG_DFL)
        due, interval = self._timer
        if due:  # somebody else's alarm, which goes on
            signal.setitimer(signal.ITIMER_REAL, max(due - (time.monotonic() - self._began), 1e-3), interval)

    def call(self, function: Callable[[], T]) -> T:
        """What ``function`` gives.

        Raises:
            Hung: It has taken too long.
        """
        self._left = TICKS
        try:
            return function()
        finally:
            self._left = NEVER

    def _tick(self, *signal_and_frame: object) -> None:
        self._left -= 1
        if self._left <= 0:  # and again with the next tick, where the call has caught it
            raise Hung
