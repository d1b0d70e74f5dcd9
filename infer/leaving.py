"""A job that is asked to end: it finishes the batch in hand, or drops it when the time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jaxmix.signals import heard

GRACE = 8.0
"""Seconds for the batch in hand after SIGTERM or Ctrl-C: a machine that is taken away leaves 15 to 30 in all."""
CLOSING = 1.5
"""Seconds more for the manifest and the gallery."""


class Leaving:
    """Whether a job was `told` to end, by SIGTERM as a scheduler sends it. Ctrl-C is a KeyboardInterrupt, as always.

    Neither interrupts a compilation or a long batch. So a thread ends the process when its time is over, whatever the
    main thread is doing, after it has called `last` with the signal and the seconds, which says what is left and makes
    sure that nothing half-written is.
    """

    def __init__(self, last: Callable[[str, float], None]) -> None:
        self.told = ""
        self.drawing = True
        self._last = last
        self._timers: list[threading.Timer] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[Leaving]:
        """Hear what is told within a `with`. Outside the main thread nothing can be heard."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            with heard(self._start, (signal.SIGTERM, signal.SIGINT)):
                yield self
        finally:
            signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
            for timer in self._timers:
                timer.cancel()

    def _note(self, number: int, frame: Any) -> None:
        self.told = "SIGTERM"

    def _start(self, number: int) -> None:
        if not self._timers:
            self._after(GRACE, signal.Signals(number).name)

    def _after(self, seconds: float, name: str) -> None:
        timer = threading.Timer(seconds, self._over, (name,))
        timer.daemon = True
        self._timers.append(timer)
        timer.start()

    def _over(self, name: str) -> None:
        if not self.drawing and len(self._timers) == 1:
            self._after(CLOSING, name)
            return
        try:
            self._last(name, GRACE)
        finally:
            os._exit(130)
