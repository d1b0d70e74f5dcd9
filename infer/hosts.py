"""The processes that share a job: on many hosts under `jax.distributed`, or workers that know nothing of each other.

Under `jax.distributed` all processes begin together. They compare their rows, take the folder that the first has made
and what it finds there, and then leave JAX's service, which would end them all with the first that dies. From then on
each draws its own batches on its own devices, and they see in the folder who is still at work.

Workers (`--worker 0 --workers 4`) may begin and end whenever they like: the rows alone say which batches are whose.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from infer.leftovers import temporary_name
from jaxmix import paths
from jaxmix.types import InputError

T = TypeVar("T")
DEAD_AFTER = 60.0
"""Seconds without a sign of life after which a process counts as dead."""


@dataclass(frozen=True)
class Hosts:
    """Which of `count` processes this is. Those that are `together` begin at once and hear of each other."""

    index: int = 0
    count: int = 1
    together: bool = False

    @property
    def first(self) -> bool:
        """Whether this process says what concerns them all."""
        return self.index == 0

    def agreed(self, make: Callable[[], T], told: Callable[[T], Mapping[str, str]]) -> T:
        """Return what `make` returns, once all processes have made theirs and say the same about it.

        Raises InputError in every process if it fails in any, or if what is `told` about it differs.
        """
        if not self.together:
            return make()
        try:
            made = make()
        except BaseException:
            _gather({})
            raise
        mine = dict(told(made))
        answers = _gather(mine)
        failed = [number for number, answer in enumerate(answers) if not answer]
        if failed:
            raise InputError(f"process {failed[0]} of {self.count} cannot draw, and says why: nothing is drawn")
        for number, answer in enumerate(answers):
            for key, value in answers[0].items():
                if answer.get(key) != value:
                    raise InputError(
                        f"{key}: process {number} of {self.count} found {answer.get(key)}, expected what process 0 "
                        f"found: {value}"
                    )
        return made

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return what `make`, run by the first process, returns: what JSON can hold. It fails for all or for none."""
        if not self.together:
            return make()
        from jax.experimental import multihost_utils

        made: Any = None
        if self.first:
            try:
                made = make()
            except BaseException:
                multihost_utils.broadcast_one_to_all(np.int32(-1))
                raise
        data = np.frombuffer(json.dumps(made).encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        if size < 0:
            raise InputError(f"process 0 of {self.count} cannot draw, and says why: nothing is drawn")
        data = data if self.first else np.zeros(size, np.uint8)
        return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(data)).tobytes())

    def still_left(self, rows: Sequence[int], dead: Sequence[int], again: str) -> str:
        """Return what to say of rows that other processes have not drawn."""
        count = f"{len(rows)} image{'s' * (len(rows) > 1)}"
        if not self.together:
            return f"{count} left to the other workers"
        who = f"process {', '.join(map(str, dead))} of {self.count} has died" if dead else "others have ended early"
        return f"{who}: {count} left (rows {_ranges(rows)}); go on with: {again}"

    def leave(self) -> None:
        """Leave JAX's service, after all processes have come so far: from here on none depends on another."""
        if self.together:
            import jax

            jax.distributed.shutdown()


ALONE = Hosts()


def join(config: Any) -> Hosts:
    """Return the processes that the flags speak of; with --distributed, join them."""
    if not config.distributed:
        return Hosts(config.worker, config.workers)
    import jax

    from jaxmix.command import join_processes

    join_processes()
    return Hosts(jax.process_index(), jax.process_count(), together=jax.process_count() > 1)


def _gather(told: Mapping[str, str]) -> list[dict[str, str]]:
    """Return what all processes tell, in order; nothing is said by one that fails."""
    from jax.experimental import multihost_utils

    data = json.dumps(told).encode()[:_TOLD].ljust(_TOLD)
    gathered = np.asarray(multihost_utils.process_allgather(np.frombuffer(data, np.uint8)))
    return [json.loads(row.tobytes()) for row in gathered.reshape(-1, _TOLD)]


_TOLD = 1024  # bytes


def _ranges(numbers: Sequence[int], most: int = 12) -> str:
    """Return numbers in order as in "3, 5-9, 12"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(shown[:most]) + ", ..." * (len(shown) > most)


class Presence:
    """Signs of life of processes that are `together`, in the folder that all of them see.

    Each rewrites a small file of its own, every few seconds. It stays until all have ended, and is a temporary file:
    what is left of one that was killed is removed by the next run.
    """

    def __init__(self, folder: Path, hosts: Hosts, run: str) -> None:
        self.folder, self.hosts, self.run = folder, hosts, run
        self.path = folder / temporary_name(self._stem(hosts.index))
        self._ended = threading.Event()
        self._over = threading.Event()
        self._beats = 0
        self._seen: dict[int, str] = {}
        self._beat()
        self._thread = threading.Thread(target=self._go_on, name="signs of life", daemon=True)
        self._thread.start()

    def _stem(self, index: int) -> str:
        return f"process-{self.run}-{index}"

    def _go_on(self) -> None:
        while not (self._over.wait(DEAD_AFTER / 12) or self._ended.is_set()):
            self._beat()

    def _beat(self) -> None:
        """Write the file anew, whole: who reads it takes half a file for a change, and none for an end."""
        self._beats += 1
        text = json.dumps({"beat": self._beats, "ended": self._ended.is_set()})
        with contextlib.suppress(OSError, InputError):  # a disk that is full, a bucket that is away: said elsewhere
            if paths.remote(self.path):
                paths.write(self.path, text.encode())
            else:
                self.path.write_text(text)

    def end(self) -> None:
        """Tell the others that this process draws no more."""
        if not self._ended.is_set():
            self._seen = self._found()  # before anybody can have removed a file because all have ended
        self._ended.set()
        self._beat()

    def wait(self, enough: Callable[[], bool] = lambda: False) -> list[int]:
        """Return the processes that have died, once all others have ended, or `enough` says so."""
        others = [number for number in range(self.hosts.count) if number != self.hosts.index]
        seen = {number: (self._seen.get(number, ""), time.monotonic()) for number in others}
        dead: list[int] = []
        while others and not enough():
            found = self._found()
            now = time.monotonic()
            for number in list(others):
                text, since = seen[number]
                if (number not in found and text) or '"ended": true' in found.get(number, ""):  # it has ended and gone
                    others.remove(number)
                elif found.get(number, "") != text:
                    seen[number] = (found[number], now)
                elif now - since > DEAD_AFTER:
                    others.remove(number)
                    dead.append(number)
            if others:
                time.sleep(min(0.5, DEAD_AFTER / 12))
        return dead

    def _found(self) -> dict[int, str]:
        """Return the signs of life of all processes."""
        found = {}
        for number, path in self._files():
            with contextlib.suppress(OSError, InputError):
                text = (paths.read(path) or b"").decode() if paths.remote(path) else path.read_text()
                found[number] = text or "being written"
        return found

    def _files(self) -> list[tuple[int, Path]]:
        """Return the files of all processes of this run."""
        pattern = re.compile(rf"\.{self._stem(0).removesuffix('0')}(\d+)\..*\.tmp")
        with contextlib.suppress(OSError, InputError):
            found = {name: pattern.fullmatch(name) for name in paths.names(self.folder)}
            return [(int(match[1]), self.folder / name) for name, match in found.items() if match is not None]
        return []

    def __enter__(self) -> Presence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def clear(self) -> None:
        """Remove the files of all processes that have ended."""
        found = self._found()
        for number, path in self._files():
            if '"ended": true' in found.get(number, "") or number == self.hosts.index:
                with contextlib.suppress(OSError, InputError):
                    paths.remove(path) if paths.remote(path) else path.unlink()

    def close(self) -> None:
        """Give no more signs of life."""
        if not self._ended.is_set():
            self.end()
        self._over.set()
        self._thread.join()
