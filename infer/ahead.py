"""The host at work beside the device: pictures are written by threads, and a clock says how long the device waited.

JAX returns from a call before the device has done it. So while a batch is drawn the host opens the pictures and reads
the prompts of the next one and hands it over; PNGs of the last one are made meanwhile by threads.
"""

from __future__ import annotations

import collections
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax

from jaxmix.pipeline.drawing import GIVEN

WRITERS = 4
"""Threads that write: PNGs are compressed outside of Python's lock."""


class Writers:
    """Threads that write pictures. What one raises is raised by `check`, and no other picture is lost by it.

    At most ``most`` pictures are held that are not yet written, so that a slow disk slows the job, and not its memory
    fills.
    """

    def __init__(self, most: int = 64) -> None:
        self._most = most
        self._pool = ThreadPoolExecutor(WRITERS, "write")
        self._left: collections.deque[Future[None]] = collections.deque()
        self._error: BaseException | None = None

    def hand(self, write: Callable[[], None]) -> None:
        """Let a thread write something; waits while too much is left."""
        while self._left and (len(self._left) >= self._most or self._left[0].done()):
            self._error = self._left.popleft().exception() or self._error
        self._left.append(self._pool.submit(write))

    def check(self) -> None:
        """Raise an error that there has been."""
        while self._left and self._left[0].done():
            self._error = self._left.popleft().exception() or self._error
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait until all that was handed over has been tried; raise an error that there has been."""
        for future in [*self._left]:
            future.exception()
        self.check()

    def close(self) -> None:
        """End the threads, after all that they were given has been tried."""
        self._pool.shutdown()


class DeviceClock:
    """Measures how long the device had nothing to do between the batches that it was given.

    ``waited`` are the seconds from the end of a batch to the moment at which it was given the next one, ``busy`` those
    of the batches, both less those of compiling, which ``compiled()`` adds up. A thread waits for the end of each
    batch; that each is given is an event, after which its program is compiled.
    """

    def __init__(self, compiled: Callable[[], float]) -> None:
        self.busy = self.waited = 0.0
        self._compiled = compiled
        self._batches: queue.SimpleQueue[tuple[float, float, float, Any] | None] = queue.SimpleQueue()
        self._ended = 0.0
        self._before = compiled()
        self._given = 0.0, self._before  # when, and the seconds of compiling by then
        self._thread = threading.Thread(target=self._watch, name="device clock", daemon=True)

    def started(self, result: Any) -> None:
        """Say that the batch that the device was given last will give ``result``, which may be unfinished."""
        compiled, (given, by_then) = self._compiled(), self._given
        self._batches.put((given or time.monotonic(), by_then - self._before, compiled - by_then, result))
        self._before = compiled

    @property
    def share(self) -> float:
        """The share of its time that the device waited."""
        return self.waited / max(self.waited + self.busy, 1e-9)

    def _watch(self) -> None:
        while (batch := self._batches.get()) is not None:
            given, before, after, result = batch
            try:
                result.block_until_ready()
            except Exception:  # told where the pictures are asked for
                self._ended = 0.0
                continue
            now = time.monotonic()
            if self._ended:
                self.waited += max(0.0, given - self._ended - before)
            self.busy += max(0.0, now - max(given + after, self._ended))
            self._ended = now

    def _event(self, event: str, **_: Any) -> None:
        if event == GIVEN:
            self._given = time.monotonic(), self._compiled()

    def __enter__(self) -> DeviceClock:
        jax.monitoring.register_event_listener(self._event)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_listener(self._event)
        self._batches.put(None)
        self._thread.join()


@contextmanager
def ticking(tell: Callable[[], None], every: float = 1.0) -> Iterator[None]:
    """Call ``tell`` every few seconds in a thread of its own, whatever this one waits for."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(every):
            tell()

    thread = threading.Thread(target=run, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
