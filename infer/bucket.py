"""Results in a bucket: the lines of manifests as objects, which appear whole and cannot be appended to or locked.

Each process writes its lines in small objects, one every few seconds, `manifest-HOST-PID.NUMBER.jsonl`, and puts them
together into one when it ends. Nobody removes another's. `manifest.jsonl` is what all of them say, written by each
process that ends. A process that was killed loses the lines of its last seconds, and no picture: a PNG has its
settings inside.
"""

from __future__ import annotations

import concurrent.futures
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxmix import paths

EVERY = 10.0
"""Seconds after which lines are written."""
_AT_ONCE = 16
BESIDE = ("file", "status", "width", "height", "latents", "bytes", "seconds", "devices")
"""What the line of an image holds besides its settings, or in their place."""


class ObjectLines:
    """The lines of one process, in objects called after `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: list[Path] = []
        self._all: list[bytes] = []
        self._waiting = 0
        self._last = time.monotonic()

    def append(self, line: bytes) -> None:
        """Keep a line, and write those that have waited long enough."""
        self._all.append(line)
        self._waiting += 1
        if time.monotonic() - self._last >= EVERY:
            self.flush()

    def flush(self) -> None:
        """Write the lines that wait."""
        if self._waiting:
            part = self.path.with_name(f"{self.path.stem}.{len(self._written):05d}.jsonl")
            paths.write(part, b"".join(self._all[-self._waiting :]))
            self._written.append(part)
            self._waiting = 0
        self._last = time.monotonic()

    def close(self) -> None:
        """Put all lines into one object."""
        if self._all:
            paths.write(self.path, b"".join(self._all))
            paths.remove_all(self._written)
            self._all, self._written, self._waiting = [], [], 0


def contents(files: list[Path]) -> Iterator[bytes]:
    """Yield what objects hold, several read at once; those that are gone meanwhile are left out."""
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from (content for content in pool.map(paths.read, files) if content is not None)


def same(record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Return whether the line of an image says that it was drawn with exactly these settings."""
    held, asked = (
        {key: value for key, value in of.items() if key not in BESIDE}
        for of in (record, json.loads(json.dumps(settings)))
    )
    return held == asked
