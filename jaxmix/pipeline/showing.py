"""What is shown while images are drawn: the latents of each step, cheap previews, and a bar.

Steps are told from inside the compiled loop, by a host call that exists in the program only if somebody looks. Such a
program is not kept in a persistent compile cache.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxmix.types import Array, InputError, shown, whole

StepFn: TypeAlias = Callable[[int, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Preview:
    """A callback for `Pipeline.draw` that shows pictures: ``show(step, images)`` after every ``every`` steps.

    ``images`` (k, h, w, 3) uint8 have one pixel a latent cell. They are a linear map of what the model takes for the
    clean latents (`Pipeline.preview`), so they show something from the first step on, and cost no decoding.
    """

    show: StepFn
    every: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be called, and counts below 1."""
        whole("Preview: every", self.every, 1)
        if not callable(self.show):
            raise InputError(f"Preview: show: found {shown(self.show)}, expected a function of a step and its images")


class Watcher:
    """Hands the steps of a batch to a function, in the order of its rows, whatever device they are from.

    What the function raises is kept and raised by `watched` when the program has ended; until then it is not called.
    """

    def __init__(self, tell: StepFn, every: int, clean: bool) -> None:
        self.tell, self.every, self.clean = tell, every, clean
        self.kept: np.ndarray = np.zeros(0, int)
        self.devices = 1
        self.error: BaseException | None = None
        self._parts: dict[int, dict[int, np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, step: int, device: int, latents: np.ndarray) -> None:
        """Take the rows of one device after a step; the last device's make the step whole."""
        with self._lock:
            parts = self._parts.setdefault(step, {})
            parts[device] = latents
            if len(parts) < self.devices or self.error is not None:
                return
            rows = np.concatenate([parts[i] for i in sorted(parts)])
            del self._parts[step]
            try:
                self.tell(step, rows[self.kept])
            except BaseException as error:
                self.error = error


_watchers: dict[int, Watcher] = {}
_numbers = itertools.count()


@contextmanager
def watched(watcher: Watcher | None, kept: np.ndarray, devices: int) -> Iterator[int]:
    """Let the programs that run in this context tell a watcher of their steps by the number that this yields.

    ``kept`` are the rows that it sees, and ``devices`` those of this process. Waits for the last step, and raises what
    the watcher's function raised.
    """
    number = next(_numbers)
    if watcher is None:
        yield number
        return
    watcher.kept, watcher.devices = np.asarray(kept), devices
    _watchers[number] = watcher
    try:
        yield number
        jax.effects_barrier()
    finally:
        del _watchers[number]
    if watcher.error is not None:
        raise watcher.error


def tell(number: Array, device: Array | int, step: Array, latents: Array) -> None:
    """Tell the watcher of a number, from inside a program, of the latents (n, h, w, c) of a device after a step."""

    def on_host(number: Any, device: Any, step: Any, latents: Any) -> None:
        watcher = _watchers.get(int(number))
        if watcher is not None:
            watcher.take(int(step), int(device), np.asarray(latents))

    io_callback(on_host, None, number, jnp.asarray(device, jnp.int32), step, latents)


class Bar:
    """A tqdm bar over images or steps."""

    def __init__(self, total: int, unit: str) -> None:
        from tqdm.auto import tqdm

        self._bar = tqdm(total=total, unit=unit, leave=False)

    def to(self, done: int) -> None:
        """Move to so many."""
        self._bar.update(done - self._bar.n)
        if done >= self._bar.total:
            self._bar.close()


def someone_looks() -> bool:
    """Return whether there is a terminal or a notebook in which a bar would be seen."""
    if "ipykernel" in sys.modules:
        return True
    return bool(getattr(sys.stderr, "isatty", lambda: False)())
