"""WebDataset tars of captioned pictures, with random access: an index of the members, then one read per picture."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, cast

from etils import epath

from jaxmix.types import InputError
from train.data.rows import PICTURES, BadRow, Entry, PictureSource, make_entry

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_WILD = re.compile(r"[*?\[]")
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_THREADS = 8  # tars indexed at a time; from a bucket each waits for the network most of the time


class Window(io.RawIOBase):
    """Part of an open file as a file of its own; closing it closes the file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        found = self._file.read(count)
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a picture is: bytes `start` to `start + size` of a tar; None for a key without a picture."""

    tar: int
    start: int
    size: int


class WebDataset(PictureSource):
    """Pictures in uncompressed tars: members KEY.jpg, .jpeg, .png or .webp, with KEY.json or KEY.txt.

    KEY.json is like a line of `ImageFolder`'s metadata; the caption is its text column, or else KEY.txt. As in
    WebDataset a key ends at the first dot of the member's file name. `pattern` is a tar, a folder of tars, a glob, or
    names with braces (`data/{000..003}.tar`, `{a,b}.tar`), local or gs://. A second picture is KEY.COLUMN.png (or
    another ending of pictures), COLUMN being `hint_column`. Ids are "TAR/KEY".

    Raises InputError for tars that are missing, compressed or truncated, two pictures of one key, and unknown labels.
    """

    def __init__(
        self,
        pattern: str | epath.PathLike,
        text_column: str = "text",
        labels: Sequence[str] | None = None,
        hint_column: str = "",
    ) -> None:
        self.hint_column = hint_column
        self.tars = find_tars(str(pattern))
        with ThreadPoolExecutor(_THREADS) as pool:
            tables = list(pool.map(lambda path: _index(path, text_column, labels, hint_column), self.tars))

        def places(parts: Iterable[tuple[int, Part | None]]) -> list[_Place | None]:
            return [None if part is None else _Place(tar, *part) for tar, part in parts]

        self._places = places((tar, part) for tar, rows in enumerate(tables) for _, part, _ in rows)
        self._hints = places((tar, part) for tar, rows in enumerate(tables) for _, _, part in rows)
        super().__init__(str(pattern), labels, [entry for rows in tables for entry, _, _ in rows])

    def open(self, index: int) -> BinaryIO:
        return self._open(self._places[index], "")

    def open_hint(self, index: int) -> BinaryIO:
        return self._open(self._hints[index], f".{self.hint_column}")

    def _open(self, place: _Place | None, middle: str) -> BinaryIO:
        if place is None:
            raise BadRow(f"no picture of this key, expected one of {', '.join(middle + end for end in PICTURES)}")
        window = Window(self.tars[place.tar].open("rb"), place.start, place.size)
        return cast(BinaryIO, io.BufferedReader(window, 1 << 16))


def find_tars(pattern: str) -> list[epath.Path]:
    """Return the tars that a pattern names, in order. Raises InputError for one that does not exist."""
    found: list[epath.Path] = []
    for name in expand_braces(pattern):
        path = epath.Path(name).expanduser()
        if _WILD.search(name):
            head = next(parent for parent in path.parents if not _WILD.search(str(parent)))
            tars = sorted(head.glob(str(path.relative_to(head))))
        elif path.is_dir():
            tars = sorted(path.glob("*.tar"))
        else:
            tars = [path] if path.exists() else []
        if not tars:
            raise InputError(f"{name}: no such tar" + (f" (from {pattern})" if name != pattern else ""))
        found += tars
    return found


def expand_braces(pattern: str) -> list[str]:
    """Return the names that `{000..003}` and `{a,b}` stand for, as a shell does."""
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    if span := _RANGE.fullmatch(match[1]):
        first, last = (int(end) for end in span.groups())
        choices = [f"{i:0{len(span[1])}d}" for i in range(first, last + 1)]
        if not choices:
            raise InputError(f"{pattern}: found the range {match[1]}, expected an ascending one")
    else:
        choices = match[1].split(",")
    return [
        name for choice in choices for name in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


Part = tuple[int, int]
"""Where a member starts and how long it is."""


def _index(
    path: epath.Path, text_column: str, labels: Sequence[str] | None, hint_column: str
) -> list[tuple[Entry, Part | None, Part | None]]:
    """Return each key's entry, its picture and its second picture."""
    places: dict[str, Part] = {}
    hints: dict[str, Part] = {}
    texts: dict[str, dict[str, bytes]] = {}
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not member.isfile() or not stem or not dot:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if f".{extension.lower()}" in PICTURES:
                    if key in places:
                        raise InputError(f"{path}: found two pictures for {key}, expected one per key")
                    places[key] = (member.offset_data, member.size)
                elif hint_column and extension.lower().removeprefix(hint_column.lower()) in PICTURES:
                    hints[key] = (member.offset_data, member.size)
                elif extension in ("json", "txt"):
                    content = tar.extractfile(member)
                    assert content is not None, "a member that is a file has content"
                    texts.setdefault(key, {})[extension] = content.read()
    except tarfile.TarError as error:
        with path.open("rb") as file:
            packed = file.read(4).startswith(_COMPRESSED)
        why = "it is compressed, which allows no random access: unpack it" if packed else error
        raise InputError(f"{path}: not readable as a tar: {why}") from None
    return [
        (_entry(path, key, texts.get(key, {}), text_column, labels), places.get(key), hints.get(key))
        for key in dict.fromkeys((*places, *texts))
    ]


def _entry(
    path: epath.Path, key: str, texts: dict[str, bytes], text_column: str, labels: Sequence[str] | None
) -> Entry:
    name = f"{path.name}/{key}"
    row: Any = {}
    try:
        if "json" in texts:
            row = json.loads(texts["json"])
            if not isinstance(row, dict):
                return Entry(name, fault=f"{key}.json: found {type(row).__name__}, expected a JSON object")
        if row.get(text_column) is None and "txt" in texts:
            row = {**row, text_column: texts["txt"].decode()}
    except ValueError as error:
        return Entry(name, fault=f"{key}: not readable: {error}")
    return make_entry(name, row, text_column, labels, f"{path}/{key}.json")
