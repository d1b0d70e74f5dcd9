"""manifest.jsonl: one line per image or bad row, appended as they come, so that an interrupted run can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infer.png import read_settings


class Manifest:
    """The manifest of one output folder.

    A line holds `status` ("ok" or "error") and, for an image, `file` and its settings; the last line about a file wins.
    With `resume` the old lines are kept and read; without it the manifest is replaced when the first line is added.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.path = folder / "manifest.jsonl"
        self._images: dict[str, dict[str, Any]] = {}
        self._errors: set[tuple[int, str]] = set()
        self._fresh = not resume
        if resume and self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            for line in text.split("\n"):
                self._remember(line)
            if text and not text.endswith("\n"):  # truncated when an earlier run ended: keep it off the next line
                with self.path.open("a", encoding="utf-8") as file:
                    file.write("\n")

    def holds(self, file: str, settings: Mapping[str, Any]) -> bool:
        """Return whether `file` is recorded with exactly these settings and the PNG is whole and says the same."""
        record, path = self._images.get(file), self.path.parent / file
        if record is None or any(record.get(key) != value for key, value in settings.items()):
            return False
        return path.exists() and path.stat().st_size == record.get("bytes") and read_settings(path) == dict(settings)

    def record(self, file: str) -> dict[str, Any]:
        """Return the line about `file`."""
        return self._images[file]

    def add_image(self, file: str, settings: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Append the line of an image whose PNG has been written."""
        self._append({"file": file, "status": "ok", **settings, **extra})

    def add_error(self, row: int, where: str, reason: str) -> None:
        """Append the line of a row that cannot be drawn, unless an earlier run has done so."""
        if (row, reason) not in self._errors:
            self._append({"row": row, "status": "error", "where": where, "error": reason})

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False)
        with self.path.open("w" if self._fresh else "a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._fresh = False
        self._remember(line)

    def _remember(self, line: str) -> None:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(record, dict):
            return
        if record.get("status") == "ok":
            self._images[record["file"]] = record
        elif record.get("status") == "error":
            self._errors.add((record["row"], record["error"]))
