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
    """The flags of a method, mixed into the commands' `Config`; subclasses check them and return their `method`."""

    def __post_init__(self) -> None:
        """Raise InputError for a flag out of range."""

    def method(self) -> Method:
        """Return the method under these flags."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """Rows for which methods are to be built.

    `groups` are the sizes of the rows' groups, `beside` the names of all their methods, and `weights` identifies the
    weights that these result in. A `draft` is built only to be checked, not drawn: it needs no inversion.
    """

    rows: Sequence[Row]
    groups: Sequence[int] = ()
    beside: frozenset[str] = frozenset()
    weights: Hashable = None
    draft: bool = False


class Method:
    """A method as a job knows it. Subclasses override what differs."""

    #: What settings and messages call it.
    name: ClassVar[str] = ""
    #: Those of `fields` that switch the method on for a row that has any of them.
    switches: ClassVar[tuple[str, ...]] = ()
    #: What messages call the switch of the method; if empty, the names of those fields.
    says: ClassVar[str] = ""
    #: A field by which a row chooses among methods with the same switches, and this method's value of it.
    choice: ClassVar[tuple[str, str] | None] = None
    #: The name of a method in whose place it may be where a command needs that in every row.
    stands_for: ClassVar[str] = ""
    #: Whether it counts as part of the model: pictures are not said to be drawn by it under "method".
    part_of_model: ClassVar[bool] = False
    #: The fields that it adds to rows.
    fields: Fields
    #: The message of a command that needs this method in every row, if it is given no rows.
    needs_rows: ClassVar[str] = ""
    #: Whether the command needs this method in every row.
    wanted: bool = False

    # Rows ----------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Open what the flags name, before the model is loaded."""

    def objects(self) -> Iterable[tuple[str, Mapping[str, Any]]] | None:
        """Return rows that the flags alone define, as (where, fields), or None."""
        return None

    def arrange(self, rows: Sequence[Row], alone: Mapping[str, None]) -> list[Row]:
        """Return the rows to draw, including those that the flags add.

        `alone` maps fields to None; a row changed by it is drawn by no other method, except adapters.
        """
        return list(rows)

    def on(self, row: Row) -> bool:
        """Return whether a row is drawn by the method."""
        return any(row[key] is not None for key in self.switches)

    def adopt(self, row: Row, pipe: Any) -> Row:
        """Return the row with the method's switches if it needs the method for what its prompt says to this model."""
        return row

    def open(self, pipe: Any) -> None:
        """Prepare for the model of the job, before any row is processed."""

    def defaults(self, row: Row) -> Mapping[str, Any]:
        """Return the method's defaults for what neither the row nor a flag sets, in place of the model's."""
        return {}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Return a row of the method completed for the model; raises InputError for one that cannot be drawn."""
        return row

    def further_prompts(self, row: Row) -> Sequence[str]:
        """Return the prompts that a completed row of the method is drawn with beside its own."""
        return ()

    def missing(self) -> InputError:
        """Return the error for a row without any of the method's switches, if the command needs the method."""
        return InputError(f"no field '{self.switches[0]}'")

    def settings(self, row: Row) -> dict[str, Any]:
        """Return further settings of a row's picture, besides its fields: flags that no row can change."""
        return {}

    # Batches ---------------------------------------------------------------------------------------------------------

    def group(self, row: Row) -> Hashable:
        """Return the key that rows share if they must be drawn together, None for a row on its own."""
        return None

    def looks_at(self, row: Row, members: Sequence[Row]) -> Sequence[Row]:
        """Return the rows of a row's group on which its picture depends."""
        return ()

    def check_groups(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Return the rows that cannot be drawn because of others in their group, and why."""
        return []

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Return the key that a row, or the rows of a group, must share with others to be drawn in one batch."""
        return None

    def weights(self, row: Row) -> Hashable:
        """Return a key of the method's change to the model's weights for a row, None for no change."""
        return None

    def note(self, pipe: Any, rows: Sequence[Row], size: int) -> str:
        """Return the plan's remark about a bucket drawn in batches of `size`, such as the memory that it needs."""
        return ""

    def plan(self, row: Row) -> str:
        """Return the plan's description of the method for a bucket that contains `row`."""
        return self.name

    def begin(self, pipe: Any, rows: Sequence[Row]) -> None:
        """Make what rows of the method that are about to be drawn have in common, once for the job."""

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the `jaxmix.Method`s for rows, which must leave alone rows of a group that do not have this method.

        `pipe` has the weights of these rows.
        """
        raise NotImplementedError

    # Pictures --------------------------------------------------------------------------------------------------------

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write pictures of the row's inputs beside the result."""

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Return the pictures that the gallery shows before the result."""
        return []

    def caption(self, row: Row) -> str:
        """Return the text under the pictures of a row without a prompt."""
        return ""

    def shown(self, row: Row) -> dict[str, str]:
        """Return what the gallery shows of a row besides its plain settings."""
        return {}


def size_of(row: Row) -> tuple[int, int]:
    """Return the (height, width) in pixels of a completed row."""
    assert row.height is not None and row.width is not None, "complete() the row first"
    return row.height, row.width
