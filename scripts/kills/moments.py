"""Moments at which a process that writes pictures is killed (SIGKILL): by itself, in the middle of what it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

KINDS = ("clock", "picture", "between", "line", "merge")


@dataclasses.dataclass(frozen=True)
class Kill:
    """When a process kills itself: at the `number`-th event of a kind.

    "clock": somebody else kills it, `seconds` after so many pictures, or, `early`, after its start.
    """

    kind: str
    number: int = 1
    seconds: float = 0.0
    early: bool = False


def watch_writes(log: Path, kill: Kill | None) -> None:
    """Note the name of every picture that this process writes, and end it where `kill` says."""
    from infer import drawing, manifest
    from infer.leftovers import temporary_name

    kill = kill or Kill("none")
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    whole, append, add = drawing.write_whole, manifest.Manifest._append, manifest.Manifest.add_image
    merged = manifest.write_whole

    def now(kind: str) -> bool:
        with lock:  # pictures are written by threads
            counts[kind] += 1
            return kind == kill.kind and counts[kind] == kill.number

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(path: Path, content: bytes) -> None:
        path.with_name(temporary_name(path.name)).write_bytes(content[: len(content) // 2])
        die()

    def write_picture(path: Path, content: bytes) -> None:
        if now("picture"):
            torn(path, content)
        whole(path, content)
        with log.open("a") as lines:
            lines.write(f"{path.name}\n")

    def add_image(self: Any, *arguments: Any) -> None:
        if now("between"):
            die()
        add(self, *arguments)

    def add_line(self: Any, record: Any) -> None:
        if now("line"):
            self._file = self._file or self._opened()
            self._file.write(json.dumps(record).encode()[:40])
            die()
        append(self, record)

    def merge(path: Path, content: bytes) -> None:
        if now("merge"):
            torn(path, content)
        merged(path, content)
        if now("merge"):  # merged, and the files of the others are still there
            die()

    drawing.write_whole, manifest.write_whole = write_picture, merge
    manifest.Manifest.add_image, manifest.Manifest._append = add_image, add_line  # type: ignore[method-assign]
