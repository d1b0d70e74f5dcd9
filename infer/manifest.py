"""Manifests: one line per image or bad row, appended as they come, so that an interrupted run can be resumed.

Each process writes a file of its own, `manifest-HOST-PID.jsonl`. When it ends, and when another run begins, the files
of processes that have ended are merged into `manifest.jsonl`. No picture depends on a manifest alone: a PNG has its
settings inside, so one without a line is found again. In a bucket, files are those of `infer.bucket`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from infer.bucket import ObjectLines, contents, same
from infer.leftovers import host_name
from infer.png import read_settings, size_of_png, write_whole
from jaxmix import paths

try:
    import fcntl
except ImportError:  # Windows: files of other processes are read, and stay
    fcntl = None  # type: ignore[assignment]

MERGED = "manifest.jsonl"
MERGES = 5
"""How often what several processes have written into a bucket is put together, if others end meanwhile."""
_LARGEST = 1 << 20  # pixels of a side


class Manifest:
    """The manifests of one output folder, read; lines are added to this process's own.

    A line holds `status` ("ok" or "error") and, for an image, `file` and its settings; the last line about a file wins.
    Use it in a `with`, which merges at the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / f"manifest-{host_name()}-{os.getpid()}-{secrets.token_hex(3)}.jsonl"
        self._file: Any = None
        self._lines = ObjectLines(self.path) if paths.remote(folder) else None
        self._there = paths.sizes(folder) if paths.remote(folder) else {}
        self._images: dict[str, dict[str, Any]] = {}
        self._errors: dict[tuple[int, str], str] = {}
        merge(folder)
        for record in read_records(folder):
            self._remember(record)

    def holds(self, file: str, settings: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> bool:
        """Return whether the PNG `file` is there, whole, with exactly these settings.

        It may lack its line, which is then written; `extra` is what the line says that the PNG does not.
        """
        path = self.folder / file
        record = self._images.get(file)
        if self._lines is not None:
            size = self._there.get(file)
            if size is None and record is not None:  # a listing may be late
                size = paths.size(path)
            if size is None or (record is not None and size != record.get("bytes")):
                return False
            if record is not None:  # to read the pictures of a large job takes as long as to draw some
                return same(record, settings)
        elif not path.is_file() or (record is not None and path.stat().st_size != record.get("bytes")):
            return False
        if read_settings(path) != json.loads(json.dumps(settings)):
            return False
        if record is None:
            width, height = size_of_png(path)
            size = path.stat().st_size if self._lines is None else self._there[file]
            self.add_image(file, settings, {"width": width, "height": height, "bytes": size, **(extra or {})})
        return True

    def record(self, file: str) -> dict[str, Any] | None:
        """Return the line about `file`, None if there is none."""
        return self._images.get(file)

    def images(self) -> Iterator[dict[str, Any]]:
        """Yield the lines about images."""
        yield from self._images.values()

    def add_image(self, file: str, settings: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Append the line of an image whose PNG has been written."""
        self._append({"file": file, "status": "ok", **settings, **extra})

    def add_error(self, row: int, where: str, reason: str) -> None:
        """Append the line of a row that cannot be drawn, unless an earlier run has done so."""
        if (row, reason) not in self._errors:
            self._append({"row": row, "status": "error", "where": where, "error": reason})

    def refresh(self) -> list[tuple[int, str, str]]:
        """Read what other processes have written meanwhile; return the (row, where, reason) of new errors."""
        before = {*self._errors}
        for record in read_records(self.folder):
            self._remember(record)
        return [(row, where, reason) for (row, reason), where in self._errors.items() if (row, reason) not in before]

    def close(self) -> None:
        """Merge this process's lines with those of others that have ended."""
        if self._lines is not None:
            self._lines.close()
        if self._file is not None:
            self._file.close()
            self._file = None
        merge(self.folder, self.path)

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if self._lines is not None:
            self._lines.append(line)
            self._remember(record)
            return
        if self._file is None:
            self._file = self._opened()
        before = self._file.tell()
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # a disk that is full takes what it can
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(before)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._remember(record)

    def _opened(self) -> Any:
        """Open this process's file and lock it, which says that it is at work."""
        while True:
            file = self.path.open("ab", buffering=0)
            _lock(file, wait=True)
            # Another process may have taken it for that of one that has ended, in between, and removed it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(file.fileno())):
                    return file
            file.close()

    def _remember(self, record: dict[str, Any]) -> None:
        if record["status"] == "ok":
            self._images[record["file"]] = record
        else:
            self._errors[record["row"], record["error"]] = record["where"]


def manifest_files(folder: Path) -> Iterator[Path]:
    """Yield the manifests of a folder, the merged one first."""
    if paths.remote(folder):
        names = paths.names(folder)
        yield from (folder / name for name in sorted(names) if name == MERGED)
        yield from (folder / name for name in sorted(names) if re.fullmatch(r"manifest-.*\.jsonl", name))
        return
    if (folder / MERGED).is_file():
        yield folder / MERGED
    yield from sorted(folder.glob("manifest-*.jsonl"))


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of all manifests of a folder that can be read."""
    if paths.remote(folder):
        for content in contents([*manifest_files(folder)]):
            yield from _records(content)
        return
    for path in manifest_files(folder):
        with contextlib.suppress(FileNotFoundError):  # merged by another process meanwhile
            yield from _records(path.read_bytes())


def merge(folder: Path, own: Path | None = None) -> None:
    """Write the lines of processes that have ended into `manifest.jsonl`, the last about each file, by row.

    `own` is the file of this process, which has ended in any case. Where nothing can be locked, the files stay as they
    are: together they say the same. In a bucket they always stay.
    """
    if paths.remote(folder):
        for _ in range(MERGES if own is not None else 0):
            files = [*manifest_files(folder)]
            if held := [record for content in contents(files) for record in _records(content)]:
                paths.write(folder / MERGED, _merged(held))
            if {*manifest_files(folder)} <= {*files, folder / MERGED}:  # else another process has ended meanwhile
                break
        return
    with _locked(folder) as alone, contextlib.ExitStack() as opened:
        ended = []
        for path in sorted(folder.glob("manifest-*.jsonl")) if alone else ():
            if path.is_file():
                file = opened.enter_context(path.open("rb"))
                if path == own or _lock(file):
                    ended.append((path, file.read()))
        if ended:
            lines = [*(_records((folder / MERGED).read_bytes()) if (folder / MERGED).is_file() else ())]
            for _, content in ended:
                lines += _records(content)
            write_whole(folder / MERGED, _merged(lines))
        for path, _ in ended:
            path.unlink(missing_ok=True)


def _merged(lines: Iterable[dict[str, Any]]) -> bytes:
    """Return a manifest with the last of the lines about each file, and about each error that is one still, by row."""
    images: dict[str, dict[str, Any]] = {}
    errors: dict[int, dict[str, dict[str, Any]]] = {}
    for record in lines:
        if record["status"] == "error":
            errors.setdefault(record["row"], {})[record["error"]] = record
        else:
            images[record["file"]] = record
            errors.pop(record.get("row", -1), None)  # drawn since
    whole = sorted(
        [*images.values(), *(record for of_row in errors.values() for record in of_row.values())],
        key=lambda record: record.get("row", 0),
    )
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in whole)
    return content.encode("utf-8", "replace")


def _records(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the lines that are what this module writes; damaged ones are lost, and no others."""
    for line in content.decode("utf-8", "replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _good(record):
            yield record


def _good(record: dict[str, Any]) -> bool:
    def counts(key: str, most: int) -> bool:
        return type(record.get(key)) is int and 0 <= record[key] <= most

    if record.get("status") == "error":
        return counts("row", 1 << 62) and all(isinstance(record.get(key), str) for key in ("where", "error"))
    file = record.get("file")
    if record.get("status") != "ok" or not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.png", file):
        return False
    sides = all(counts(key, _LARGEST) and record[key] for key in ("width", "height"))
    return sides and counts("bytes", 1 << 62) and ("row" not in record or counts("row", 1 << 62))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock: one process at a time merges. Yields False where folders cannot be locked."""
    if fcntl is None or not folder.is_dir():
        yield False
        return
    # NFS locks nothing that is not open for writing, which a folder cannot be.
    for path, how in ((folder, os.O_RDONLY), (folder / ".manifest.lock", os.O_RDWR | os.O_CREAT)):
        with contextlib.ExitStack() as stack:
            try:
                handle = os.open(path, how)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError:
                continue
            yield True
            return
    yield False


def _lock(file: Any, wait: bool = False) -> bool:
    """Lock a manifest, as a process does while it is at work; return whether nobody else has."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
