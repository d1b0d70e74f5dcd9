"""What all sources of captioned pictures share: a table of rows, and pictures read by index."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from jaxmix import pictures
from jaxmix.types import InputError

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
"""Suffixes of picture files."""


class BadRow(Exception):
    """A row that cannot be used. The message says why, without the row's name."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What is known about a row without opening its picture; `fault` says why it cannot be used, if so.

    `untold` rows lack nothing but a caption. `repeats` is how often a pass shows the row, `regular` whether it is a
    regularisation picture.
    """

    id: str
    text: str = ""
    labels: tuple[str, ...] = ()
    fault: str = ""
    untold: bool = False
    repeats: int = 1
    regular: bool = False


class PictureSource(abc.ABC):
    """Rows {"image" uint8 (H, W, 3), "text", "labels", "id"}, read afresh each time, from any number of threads.

    `where` names the source in errors, `known` are the dimensions that labels may name, None if labels are not read.
    `hint_column` names the rows' second picture, "hint" uint8 (H, W, 3), if they have one.
    """

    hint_column = ""

    def __init__(self, where: str, known: Sequence[str] | None, entries: Sequence[Entry]) -> None:
        self.where = where
        self.known = None if known is None else tuple(known)
        self.entries: Sequence[Entry] = entries
        if not entries:
            raise InputError(f"{where}: found no rows, expected pictures with captions")

    @abc.abstractmethod
    def open(self, index: int) -> BinaryIO:
        """Open the file of a row's picture. Raises BadRow if there is none."""

    def open_hint(self, index: int) -> BinaryIO:
        """Open the file of a row's second picture. Raises BadRow if there is none."""
        raise BadRow(f"found no {self.hint_column!r}")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a row. Raises BadRow with the reason if it has no text or its picture cannot be decoded."""
        entry = self.entries[index]
        if entry.fault:
            raise BadRow(entry.fault)
        with self.open(index) as file:
            image = decode(file.read())
        row: dict[str, Any] = {"image": image, "text": entry.text, "labels": entry.labels, "id": entry.id}
        if entry.regular:
            row["regular"] = True
        if not self.hint_column:
            return row
        try:
            with self.open_hint(index) as file:
                return {**row, "hint": decode(file.read())}
        except BadRow as fault:
            raise BadRow(f"{self.hint_column}: {fault}") from None

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) as the picture is shown, from its header. Raises BadRow as reading it would."""
        if fault := self.entries[index].fault:
            raise BadRow(fault)
        with self.open(index) as file:
            return header_size(file)


def decode(content: bytes) -> np.ndarray:
    """Return a picture as uint8 (H, W, 3), as `jaxmix.pictures` reads it. Raises BadRow if it is broken."""
    try:
        return pictures.read(content)
    except pictures.UnreadableError as error:
        raise BadRow(f"cannot be decoded: {error}") from None


def header_size(file: BinaryIO) -> tuple[int, int]:
    """Return (height, width) of the upright picture in an open file; no pixels are decoded."""
    try:
        return pictures.shown_size(file)
    except pictures.UnreadableError as error:
        raise BadRow(f"cannot be decoded: {error}") from None


def read_text(row: Mapping[str, Any], column: str) -> str:
    """Return a row's caption. Raises BadRow if it has none."""
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        found = "nothing" if text is None else "an empty text" if isinstance(text, str) else repr(text)
        raise BadRow(f"no text: found {found} in {column!r}")
    return text.strip()


def read_labels(row: Mapping[str, Any], known: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Return a row's positive labels in the order of `known`, from "labels": [...] or from one column per dimension.

    If `known` is None labels are not read. Raises InputError starting with `where` for an unknown label, and for
    invalid values.
    """
    if known is None:
        return ()
    listed = row.get("labels")
    if listed is None:
        listed = []
    if not isinstance(listed, list) or not all(isinstance(label, str) for label in listed):
        raise InputError(f'{where}: labels: found {listed!r}, expected a list of names such as ["{known[0]}"]')
    for label in listed:
        if label not in known:
            raise InputError(f"{where}: unknown label {label!r}, expected some of {', '.join(known)}")
    found = set(listed)
    for name in known:
        value = row.get(name)
        if value is None:
            continue
        if value not in (0, 1):  # True and False are equal to 1 and 0
            raise InputError(f"{where}: {name}: found {value!r}, expected true, false, 1 or 0")
        if value:
            found.add(name)
    return tuple(name for name in known if name in found)


def make_entry(name: str, row: Mapping[str, Any], column: str, known: Sequence[str] | None, where: str) -> Entry:
    """Return the entry of a row of metadata; one without text is kept as a fault, to be reported and replaced."""
    labels = read_labels(row, known, where)
    try:
        return Entry(name, read_text(row, column), labels)
    except BadRow as fault:
        return Entry(name, labels=labels, fault=str(fault), untold=True)
