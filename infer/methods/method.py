"""What a method adds to a job: flags, fields of rows, a `jaxmix.Method` for rows of a batch, pictures to show."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from infer.gallery import Picture
from infer.rows import Fields, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of a method, to be mixed into the `Config` of the commands; subclasses check them and say `method`."""

    def __post_init__(self) -> None:
        """Raise InputError for a flag out of range."""

    def method(self) -> Method:
        """Return the method under these flags."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows for which methods are to be built.

    `groups` are the sizes of the groups in which the rows stand, `beside` the names of all methods that these rows
    have, and `weights` what these make of the model's weights. A `draft` is built to be checked and not to be drawn:
    it needs no inversion.
    """

    rows: Sequence[Row]
    groups: Sequence[int] = ()
    beside: frozenset[str] = frozenset()
    weights: Hashable = None
    draft: bool = False


class Method:
    """A method as one job knows it. Subclasses override what differs."""

    #: As settings and messages call it.
    name: ClassVar[str] = ""
    #: Of `fields`, those that switch the method on for a row that has any of them.
    switches: ClassVar[tuple[str, ...]] = ()
    #: What messages call that which switches the method on, the names of those fields if empty.
    says: ClassVar[str] = ""
    #: A field in which a row chooses among methods that share their switches, and this one's name in it.
    choice: ClassVar[tuple[str, str] | None] = None
    #: Whether it is a part of the model, so to speak: pictures do not say under "method" that they were made by it.
    adapter: ClassVar[bool] = False
    #: The fields of rows.
    fields: Fields
    #: What the command says that wants this method in every row, where it is given none.
    needs_rows: ClassVar[str] = ""
    #: Whether the command wants this method in every row.
    wanted: bool = False

    # Rows ----------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Open what the flags name, before the model is loaded."""

    def objects(self) -> Iterable[tuple[str, Mapping[str, Any]]] | None:
        """Return rows that the flags spell out, as (where, fields), or None."""
        return None

    def arrange(self, rows: Sequence[Row], alone: Mapping[str, None]) -> list[Row]:
        """Return the rows as they are to be drawn, with those that the flags add.

        `alone` are the fields, as None, without which a row is drawn by no other method but adapters.
        """
        return list(rows)

    def on(self, row: Row) -> bool:
        """Say whether a row is drawn by the method."""
        return any(row[key] is not None for key in self.switches)

    def open(self, pipe: Any) -> None:
        """Prepare for the model of the job, before any row is looked at."""

    def defaults(self, row: Row) -> Mapping[str, Any]:
        """Return what a row of the method draws with where neither it nor a flag says, in place of the model's own."""
        return {}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Return a row of the method with what the model settles; raises InputError for one that cannot be drawn."""
        return row

    def missing(self) -> InputError:
        """Return what is said of a row that the command wants the method for, and which has none of its switches."""
        return InputError(f"no field '{self.switches[0]}'")

    def settings(self, row: Row) -> dict[str, Any]:
        """Return what goes into the settings of a row's picture beside the fields: flags that no row can change."""
        return {}

    # Batches ---------------------------------------------------------------------------------------------------------

    def group(self, row: Row) -> Hashable:
        """Return what rows share that must be drawn together, None for a row on its own."""
        return None

    def check_groups(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Return rows that cannot be drawn because of the others of their group, and why."""
        return []

    def program(self, rows: Sequence[Row]) -> Hashable:
        """Return what a row, or the rows of a group, must share with others to be drawn in one batch."""
        return None

    def weights(self, row: Row) -> Hashable:
        """Return what the method makes of the model's weights for a row, None for nothing."""
        return None

    def note(self, pipe: Any, rows: Sequence[Row], size: int) -> str:
        """Return what the plan says of a bucket drawn in batches of `size`, such as the memory that it takes."""
        return ""

    def plan(self, row: Row) -> str:
        """Return how the plan calls the method at work in the rows of a bucket, of which `row` is one."""
        return self.name

    def build(self, pipe: Any, batch: Batch) -> Sequence[Any]:
        """Return the `jaxmix.Method`s for rows; those of a group that have not this method must be left as they are.

        `pipe` has the weights of these rows.
        """
        raise NotImplementedError

    # Pictures --------------------------------------------------------------------------------------------------------

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the pictures beside the result that show what went in."""

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Return the pictures that the gallery shows before the result."""
        return []

    def caption(self, row: Row) -> str:
        """Return the text under the pictures of a row without a prompt."""
        return ""

    def shown(self, row: Row) -> dict[str, str]:
        """Return what the gallery says of a row besides its plain settings."""
        return {}


def size_of(row: Row) -> tuple[int, int]:
    """Return the (height, width) in pixels of a completed row."""
    assert row.height is not None and row.width is not None, "complete() the row first"
    return row.height, row.width
