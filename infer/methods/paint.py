"""Paint-with-words (eDiff-I, arXiv 2211.01324) in a job: words get more attention where they are painted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from infer.checks import check_number
from infer.methods import layout
from infer.methods.method import BatchRows, Method, size_of
from infer.rows import Field, Row


@dataclasses.dataclass(frozen=True)
class Flags(layout.Flags):
    """How strongly words are painted, in rows that do not say.

    Attributes:
        paint: paint-with-words: weight of the paint, 0 for none (no unit)
        paint_by: paint-with-words: measure the paint by the largest score of attention or by their deviation
    """

    paint: float = 0.4
    paint_by: Literal["max", "std"] = "max"

    def __post_init__(self) -> None:
        """Refuse a weight that is not a number."""
        super().__post_init__()
        check_number("--paint", self.paint)

    def method(self) -> Method:
        """Return the method under these flags."""
        return Paint(self)


class Paint(layout.Layout):
    """Rows with segments that are to be painted."""

    name = "paint"
    choice = ("layout", "paint")

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.fields = {**self.shared(flags), "paint": Field(check_number, flags.paint)}

    def settings(self, row: Row) -> dict[str, Any]:
        """Return the flag that no row can change."""
        return {"paint_by": self.flags.paint_by}

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the painted words of each row."""
        import jaxmix

        drawn = [
            [jaxmix.Segment(place.phrase, place.levels(*size_of(row)), place.weight) for place in self.places(row)]
            for row in batch.rows
        ]
        weights = [row["paint"] if self.on(row) else 0.0 for row in batch.rows]
        return [jaxmix.PaintWithWords(drawn, weight=weights, by=self.flags.paint_by)]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the weight; those of the phrases are in the picture of the layout."""
        return {"paint": f"{row['paint']:g}"}
