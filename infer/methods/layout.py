"""What the methods share that draw a row by its segments: flags, fields, and the picture of the layout."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from infer import layouts
from infer.checks import check_text
from infer.gallery import Picture
from infer.methods.method import Flags as Base
from infer.methods.method import Method, size_of
from infer.rows import Field, Fields, Row
from jaxmix.types import InputError

FIRST = "dense"


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """Segments for rows without their own, and the method that draws them.

    Attributes:
        segments: layout: "PHRASE @ PLACE; PHRASE @ PLACE ...", each phrase word for word in the prompt and each place
            left,top,right,bottom in shares of the image (0 to 1) or a mask.png of its size, white inside; PLACE:WEIGHT
            weighs the phrase (paint-with-words)
        layout: layout: the method that draws segments, dense (DenseDiffusion) or paint (paint-with-words); default:
            dense
    """

    segments: str | None = None
    layout: str | None = None

    def __post_init__(self) -> None:
        """Refuse segments that cannot be read."""
        super().__post_init__()
        if self.segments is not None:
            layouts.check_segments("--segments", self.segments)


class Layout(Method):
    """Rows with segments, of those that name this method as their `layout`."""

    switches = ("segments",)
    needs_rows = "no rows: expected --prompt with --segments, or --prompts FILE.jsonl whose rows have segments"

    def shared(self, flags: Flags) -> Fields:
        """Return the fields of all layouts."""
        stored = Field(layouts.check_segments, flags.segments, lambda places: [place.stored() for place in places])
        return {"segments": stored, "layout": Field(check_text, flags.layout)}

    def on(self, row: Row) -> bool:
        """Say whether the row has segments that are drawn by this method and not by another."""
        assert self.choice is not None
        return super().on(row) and (row["layout"] or FIRST) == self.choice[1]

    def places(self, row: Row) -> tuple[layouts.Place, ...]:
        """Return the segments of a row, none if another method draws them."""
        return row["segments"] if self.on(row) else ()

    def missing(self) -> InputError:
        """Say what a layout is."""
        return InputError("no field 'segments', expected phrases and their places")

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the picture of the layout."""
        layouts.save(row["segments"], *size_of(row), out / _layout_name(row))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show the layout."""
        height, width = size_of(row)
        scale = layouts.enlargement(width)
        return [Picture(_layout_name(row), width * scale, height * scale, "layout")]


def _layout_name(row: Row) -> str:
    return row.file_name.replace(".png", "_layout.png")
