"""What a method adds to a job of `infer.generate`: fields of rows, arguments of the sampler, pictures in the gallery.

`infer.generate` itself is the `Method` that adds nothing; each other command is one subclass and its flags.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from infer.gallery import Picture
from infer.rows import Fields, Row


class Batch(NamedTuple):
    """Rows to draw together, and the same with the repetitions that fill up the batch."""

    rows: list[Row]
    filled: list[Row]


class Method:
    """The plain job. Subclasses override what differs."""

    fields: Fields = MappingProxyType({})
    needs_rows = ""
    """What is missing where the command line names no rows; empty: the built-in prompts are drawn."""

    def objects(self) -> Iterable[tuple[str, Mapping[str, Any]]] | None:
        """Return rows that the flags spell out, as (where, fields), or None."""
        return None

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows as they are to be drawn, with those that the flags add."""
        return list(rows)

    def open(self, pipe: Any) -> None:
        """Prepare for the model of the job, before any row is looked at."""

    def settings(self) -> dict[str, Any]:
        """Return what of the flags goes into each picture's settings."""
        return {}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Return the row with what the model settles; raises InputError for one that this model cannot draw."""
        return row

    def program(self, row: Row) -> Hashable:
        """Return what rows must share beside size, steps and sampler to be drawn together."""
        return None

    def undone(self, rows: Sequence[Row], done: Sequence[bool]) -> list[Row]:
        """Return the rows to draw, where `done` says which of them an earlier run left."""
        return [row for row, there in zip(rows, done, strict=True) if not there]

    def check_all(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Return rows that cannot be drawn because of the others, and why."""
        return []

    def batches(self, bucket: Sequence[Row], size: int, devices: int) -> list[Batch]:
        """Cut rows of one program into batches of one size, which is at least the devices' number."""
        cut = [list(bucket[start : start + size]) for start in range(0, len(bucket), size)]
        # A short last batch is filled up with its last row, so that every program of a bucket is compiled once.
        return [Batch(rows, [*rows, *[rows[-1]] * (size - len(rows))]) for rows in cut]

    def note(self, pipe: Any, bucket: Sequence[Row], size: int) -> str:
        """Return what the plan says of a bucket, such as the memory that it takes."""
        return ""

    def draw(self, pipe: Any, rows: Sequence[Row], arguments: dict[str, Any]) -> np.ndarray:
        """Return the latents of the rows of one batch, from `Pipeline.generate` with these and further arguments."""
        return pipe.generate([row.prompt for row in rows], **arguments)

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the pictures beside the result that show what went in."""

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Return the pictures that the gallery shows before the result."""
        return []

    def caption(self, row: Row) -> str:
        """Return the text under the pictures."""
        return row.prompt

    def shown(self, row: Row) -> dict[str, str]:
        """Return what the gallery says of a row besides its plain settings."""
        return {}
