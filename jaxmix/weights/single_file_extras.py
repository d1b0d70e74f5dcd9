"""The tensors of a single-file checkpoint outside the model's parts, and where a diffusers folder keeps them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmix.types import InputError
from jaxmix.weights.safetensors import FileEntry, SafetensorsFile, encode_header, read_tensor
from jaxmix.weights.single_file_names import TEXTS
from jaxmix.weights.store import _replacing as replacing

EXTRAS_FILE = "single_file_extras.safetensors"
"""The file's name in a diffusers folder; diffusers skips files that it does not know."""


@dataclasses.dataclass(frozen=True)
class Extras:
    """The tensors of a single file that belong to no part: buffers, an EMA copy, unused layers.

    They stay in the file at `path` and are read only to be written elsewhere. `layout` records where the file's layout
    is unusual, so that one written later is the same: "prefixes" of text encoders by part, "shapes" by key.
    """

    path: Path
    family: str
    entries: Mapping[str, FileEntry]
    layout: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def read(self, key: str) -> np.ndarray:
        """Return one tensor as the file has it."""
        return read_entry(str(self.path), self.entries[key])

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Extras | None:
        """Return what a single file left in a diffusers folder (or the extras file itself), None if nothing.

        Raises InputError if it is damaged.
        """
        path = Path(path)
        path = path / EXTRAS_FILE if path.is_dir() else path
        if not path.is_file():
            return None
        file = SafetensorsFile(path)
        family = file.metadata.get("family")
        try:
            layout = json.loads(file.metadata.get("layout", "{}"))
        except ValueError:
            layout = None
        if family not in TEXTS or not isinstance(layout, dict):
            raise InputError(f"{path}: its metadata has family={family!r}, expected {', '.join(TEXTS)}, and a layout")
        return cls(path, family, file.entries, layout)

    def reopen(self) -> dict[str, FileEntry]:
        """Return where the tensors are now: the file may have been rewritten since it was opened."""
        if not self.entries:
            return {}
        now = SafetensorsFile(self.path).entries
        if lost := set(self.entries) - set(now):
            raise InputError(f"{self.path}: {min(lost)} is no longer in this file, expected what it had when opened")
        return {key: now[key] for key in self.entries}


def save_extras(extras: Extras | None, folder: str | os.PathLike[str]) -> None:
    """Write what belongs to no part into a diffusers folder, for `Extras.open`, replacing what was there."""
    path = Path(folder) / EXTRAS_FILE
    if extras is None or not (extras.entries or extras.layout):
        path.unlink(missing_ok=True)
        return
    if path.exists() and path.samefile(extras.path):
        return
    entries = extras.reopen()
    order = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))
    metadata = {"format": "pt", "family": extras.family, "layout": json.dumps(dict(extras.layout))}
    with replacing(path) as file:
        file.write(encode_header({key: (entries[key].dtype, entries[key].shape) for key in order}, metadata))
        for key in order:
            file.write(read_entry(str(extras.path), entries[key]).reshape(-1).view(np.uint8).data)


def read_entry(path: str, entry: FileEntry) -> np.ndarray:
    """Return one tensor of a file, in memory of its own; raises InputError if the file is gone or truncated."""
    try:
        with open(path, "rb") as file:
            return read_tensor(file, entry)
    except OSError as error:
        raise InputError(f"{path}: cannot be read any more: {error.strerror}") from None
