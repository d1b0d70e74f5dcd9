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
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from jaxmix import command
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


class Step(int):
    """The number of a step, from 0, that a callback is told of.

    ``images`` are the numbers of the images whose latents come with it, and ``steps`` how many there are in all.
    """

    images: np.ndarray
    steps: int

    @classmethod
    def of(cls, step: int, images: np.ndarray, steps: int) -> Step:
        """Return a step with what is known of it."""
        made = cls(step)
        made.images, made.steps = images, steps
        return made


class Watch(NamedTuple):
    """What a program tells: after every so many steps, and the last, the latents or what it takes for clean ones."""

    every: int
    clean: bool


class Watcher:
    """Hands the steps of a batch to a function, in the order of its rows, whatever device they are from.

    What the function raises is kept and raised by `watched` when the program has ended; until then it is not called.
    """

    def __init__(self, told: StepFn, watch: Watch) -> None:
        self.told, self.watch = told, watch
        self.kept = self.images = np.zeros(0, int)
        self.devices, self.steps, self.last = 1, 0, -1
        self.error: BaseException | None = None
        self._parts: dict[int, dict[int, np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, step: int, device: int, latents: np.ndarray) -> None:
        """Take the rows of one device after a step; the last device's make the step whole."""
        with self._lock:
            if self.error is not None or step <= self.last:  # a solver may call the model twice in a step
                return
            parts = self._parts.setdefault(step, {})
            parts.setdefault(device, latents)
            if len(parts) < self.devices:
                return
            rows = np.concatenate([parts[i] for i in sorted(parts)])
            del self._parts[step]
            self.last = step
            try:
                self.told(Step.of(step, self.images, self.steps), rows[self.kept])
            except BaseException as error:
                self.error = error


def make_watcher(callback: Any, preview: Callable[[np.ndarray], np.ndarray]) -> Watcher | None:
    """Return what tells a callback of steps, None without one; ``preview`` makes pictures of latents.

    Raises `InputError` for what is neither a function nor a `Preview`, and where several processes draw.
    """
    if callback is None:
        return None
    if not callable(callback) and not isinstance(callback, Preview):
        raise InputError(f"callback: found {shown(callback)}, expected a function (step, latents), or Preview")
    if jax.process_count() > 1:
        raise InputError(f"callback: found one in {jax.process_count()} processes, expected one process to be watched")
    if isinstance(callback, Preview):
        show = callback.show
        return Watcher(lambda step, latents: show(step, preview(latents)), Watch(callback.every, True))
    return Watcher(callback, Watch(1, False))


_watchers: dict[int, Watcher] = {}
_numbers = itertools.count(1)


@contextmanager
def watched(watcher: Watcher | None, images: np.ndarray, kept: np.ndarray, steps: int, mesh: Any) -> Iterator[int]:
    """Let the programs that run in this context tell a watcher of their steps, by the number that this yields.

    ``kept`` are the rows that it sees, of the ``images``. Waits for the last step, and raises what the watcher's
    function raised.
    """
    if watcher is None:
        yield 0
        return
    number = next(_numbers) % 2**31
    watcher.images, watcher.kept, watcher.steps, watcher.last = images, np.asarray(kept), steps, -1
    watcher.devices = 1 if mesh is None else mesh.size
    _watchers[number] = watcher
    try:
        yield number
        jax.effects_barrier()
    finally:
        del _watchers[number]
    if watcher.error is not None:
        raise watcher.error


def tell(watch: Watch, number: Array, device: Array | int, step: Array, last: int, latents: Array) -> None:
    """Tell the watcher of a number of latents (n, h, w, c) of a device after a step, from inside a program."""

    def on_host(number: Any, device: Any, step: Any, latents: Any) -> None:
        watcher = _watchers.get(int(number))
        if watcher is not None:
            watcher.take(int(step), int(device), np.asarray(latents))

    def now() -> None:
        io_callback(on_host, None, number, jnp.asarray(device, jnp.int32), step, latents)

    if watch.every == 1:
        now()
    else:
        jax.lax.cond(((step + 1) % watch.every == 0) | (step == last), now, lambda: None)


Told: TypeAlias = Callable[[int, int], None]


@contextmanager
def bar(progress: Any, n: int) -> Iterator[Told]:
    """Yield what is told of images done and in all: a function that was given, or a bar.

    There is a bar for True, and by default (None) in a terminal or a notebook, but not inside a command, which has its
    own. Raises `InputError` for anything else.
    """
    if progress is None:
        progress = _someone_looks()
    if not isinstance(progress, bool):
        if not callable(progress):
            raise InputError(f"progress: found {shown(progress)}, expected true, false or a function of two counts")
        yield progress
    elif not progress:
        yield lambda done, n: None
    else:
        from tqdm.auto import tqdm

        with tqdm(total=n, unit="image", mininterval=0, leave=False, file=sys.stderr) as made:
            yield lambda done, n: made.update(done - made.n) and None


def _someone_looks() -> bool:
    if command.running():
        return False
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())


def as_pil(images: np.ndarray) -> list[Any]:
    """Return images uint8 (n, H, W, 3) as PIL images."""
    from PIL import Image

    return [Image.fromarray(image) for image in images]
