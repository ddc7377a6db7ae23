"""Ctrl-C and SIGTERM as a request to stop when it is safe."""

from __future__ import annotations

import logging
import signal
import threading
from typing import Any

log = logging.getLogger("distmeta")


class StopSignal:
    """SIGINT and SIGTERM ask for a stop after the step at hand; a second one, or ``at_once``, interrupts."""

    requested = False
    at_once = False
    notice = "stopping after this step; a second signal ends at once"

    def __enter__(self) -> StopSignal:
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._stop)
        return self

    def _stop(self, number: int, frame: object) -> None:
        if self.requested or self.at_once:
            raise KeyboardInterrupt
        self.requested = True
        log.warning(self.notice)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
