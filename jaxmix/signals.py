"""Signals that ask a command to end, heard at once, whatever the main thread is doing."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence


@contextlib.contextmanager
def heard(act: Callable[[int], None], numbers: Sequence[int] = (signal.SIGTERM,)) -> Iterator[None]:
    """Call ``act(number)`` in a thread of its own as soon as one of the signals ``numbers`` arrives.

    A handler by `signal.signal` runs in the main thread between two steps of Python, so it waits for a compilation or
    a long batch to end. For every signal that has one, Python writes the number into the wakeup descriptor at once,
    which a thread reads here. The caller sets the handlers. Outside the main thread nothing can be heard.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)

    def listen() -> None:
        while True:
            for number in ear.recv(64) or b"\0":
                if not number:
                    return
                if number in numbers:
                    act(number)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        mouth.send(b"\0")
        thread.join()
        ear.close()
        mouth.close()
