"""A folder of captioned pictures, in the formats of Hugging Face's imagefolder and kohya's trainers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, BinaryIO

from etils import epath

from jaxmix.types import InputError
from train.data.rows import PICTURES, BadRow, Entry, PictureSource, make_entry

METADATA = "metadata.jsonl"
CAPTIONS = (".txt", ".caption")
"""Endings of the files with captions, those of kohya's trainers; the first that is there counts."""


class ImageFolder(PictureSource):
    """Pictures with a `metadata.jsonl`, or with their captions beside them in files `NAME.txt` (or .caption).

    A line of the metadata is {"file_name": ..., "text": ...}, with labels as "labels": ["color", "light"] or as one
    column per dimension ("color": true, false, 1 or 0); other columns are ignored. `labels` names the dimensions; None
    does not read labels. `hint_column` is that of a second picture's file. The folder is local or gs://. Ids are the
    file names, followed by ":LINE" for the second and later captions of a picture.

    Raises InputError for a folder without either, and for an unknown label; any other unusable line becomes a row that
    raises BadRow when it is read.
    """

    def __init__(
        self,
        folder: str | epath.PathLike,
        text_column: str = "text",
        image_column: str = "file_name",
        labels: Sequence[str] | None = None,
        hint_column: str = "",
    ) -> None:
        self.hint_column = hint_column
        self.folder = epath.Path(folder).expanduser()
        if not self.folder.is_dir():
            raise InputError(f"{folder}: found no such folder, expected pictures with a {METADATA}")
        self._text_column, self._image_column = text_column, image_column
        metadata = self.folder / METADATA
        self._files: list[str] = []
        self._hints: list[Any] = []
        if hint_column and not metadata.exists():
            raise InputError(f"{folder}: found no {METADATA}, expected one with a column {hint_column!r}")
        entries = self._from_metadata(metadata, labels) if metadata.exists() else self._from_captions()
        super().__init__(str(self.folder), labels, entries)

    def open(self, index: int) -> BinaryIO:
        return self._open(self._files[index])

    def open_hint(self, index: int) -> BinaryIO:
        name = self._hints[index]
        if not isinstance(name, str) or not name:
            raise BadRow(f"found {'nothing' if name is None else repr(name)}, expected a file")
        return self._open(name)

    def _open(self, name: str) -> BinaryIO:
        try:
            return (self.folder / name).open("rb")
        except (FileNotFoundError, IsADirectoryError):
            raise BadRow("no such file") from None

    def _from_metadata(self, metadata: epath.Path, labels: Sequence[str] | None) -> list[Entry]:
        entries: list[Entry] = []
        seen: set[str] = set()
        columns = (self._text_column, labels)
        # Not splitlines: captions may contain Unicode line separators.
        for number, line in enumerate(metadata.read_text(encoding="utf-8-sig").split("\n"), 1):
            if not line.strip():
                continue
            where = f"{metadata}:{number}"
            row = _read_line(line)
            name = row.get(self._image_column) if isinstance(row, dict) else None
            if not isinstance(row, dict) or not isinstance(name, str) or not name:
                fault = row if isinstance(row, str) else f"no {self._image_column!r} in this line"
                self._files.append("")
                self._hints.append(None)
                entries.append(Entry(f"{METADATA}:{number}", fault=fault))
                continue
            self._files.append(name)
            self._hints.append(row.get(self.hint_column) if self.hint_column else None)
            # A picture may have several captions, one line each.
            entries.append(make_entry(f"{name}:{number}" if name in seen else name, row, *columns, where))
            seen.add(name)
        return entries

    def _from_captions(self) -> list[Entry]:
        names = {path.name for path in self.folder.iterdir()}
        entries = []
        for name in sorted(name for name in names if epath.Path(name).suffix.lower() in PICTURES):
            beside = [epath.Path(name).with_suffix(ending).name for ending in CAPTIONS]
            caption = next((file for file in beside if file in names), "")
            self._files.append(name)
            if not caption:
                fault = f"no text: found no {beside[0]} beside it and no {METADATA}"
                entries.append(Entry(name, fault=fault, untold=True))
                continue
            row = {self._text_column: (self.folder / caption).read_text(encoding="utf-8")}
            entries.append(make_entry(name, row, self._text_column, None, str(self.folder / caption)))
        return entries


def _read_line(line: str) -> Any:
    """Return the contents of a line if it is a JSON object, otherwise what is wrong with it."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not readable as JSON: {error}"
    return row if isinstance(row, dict) else f"found {type(row).__name__}, expected a JSON object"
