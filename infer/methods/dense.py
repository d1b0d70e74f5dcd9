"""DenseDiffusion (arXiv 2308.12964) in a job: each phrase of a prompt gets a place in the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from infer import layouts
from infer.gallery import Picture
from infer.methods.method import Batch, Method, size_of
from infer.methods.method import Flags as Base
from infer.rows import Field, Row, check_number, check_share, check_text
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """Segments for rows without their own, and how strongly they act.

    Attributes:
        segments: layout: "PHRASE @ PLACE; PHRASE @ PLACE ...", each phrase word for word in the prompt and each place
            left,top,right,bottom in shares of the image (0 to 1) or a mask.png of its size, white inside
        layout: layout: the method that draws segments; default: dense (DenseDiffusion), the only one so far
        cross: DenseDiffusion: weight of the modulation of cross-attention, 0 for none (no unit)
        self_attention: DenseDiffusion: weight of the modulation of self-attention, 0 for none (no unit)
        area: DenseDiffusion: how much less a large segment gets, from 0 (the same) to 1 (no unit)
        part: DenseDiffusion: share of the steps, from the first, in which attention is modulated
        splice: DenseDiffusion: whether to replace each phrase's states by those of the phrase encoded alone
        strict_layout: DenseDiffusion: leave alone what the authors' code modulates oddly, overlaps and places without
            words
    """

    segments: str | None = None
    layout: str | None = None
    cross: float = 1.0
    self_attention: float = 0.3
    area: float = 1.0
    part: float = 0.3
    splice: Literal["on", "off"] = "on"
    strict_layout: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and segments that cannot be read."""
        super().__post_init__()
        for flag, value in (("--cross", self.cross), ("--self-attention", self.self_attention)):
            check_number(flag, value)
        for flag, value in (("--area", self.area), ("--part", self.part)):
            check_share(flag, value)
        if self.part == 0:
            raise InputError("--part: found 0, expected a share of the steps above 0")
        if self.segments is not None:
            layouts.check_segments("--segments", self.segments)

    def method(self) -> Method:
        """Return the method under these flags."""
        return Dense(self)


class Dense(Method):
    """Rows with segments."""

    name = "dense"
    switches = ("segments",)
    choice = ("layout", "dense")
    needs_rows = "no rows: expected --prompt with --segments, or --prompts FILE.jsonl whose rows have segments"

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        numbers = {"cross": check_number, "self_attention": check_number, "area": check_share}
        segments = Field(layouts.check_segments, flags.segments, lambda places: [place.stored() for place in places])
        self.fields = {
            "segments": segments,
            "layout": Field(check_text, flags.layout),
            **{name: Field(check, getattr(flags, name)) for name, check in numbers.items()},
        }

    def missing(self) -> InputError:
        """Say what a layout is."""
        return InputError("no field 'segments', expected phrases and their places")

    def settings(self, row: Row) -> dict[str, Any]:
        """Return the flags that no row can change."""
        held = {"part": self.flags.part, "splice": self.flags.splice}
        return held | ({"strict_layout": True} if self.flags.strict_layout else {})

    def build(self, pipe: Any, batch: Batch) -> Sequence[Any]:
        """Return the layout of each row."""
        import jaxmix

        def weights(key: str) -> list[float]:
            return [row[key] if self.on(row) else 0.0 for row in batch.rows]

        drawn = [
            [jaxmix.Segment(place.phrase, place.draw(*size_of(row))) for place in row["segments"] or ()]
            for row in batch.rows
        ]
        return [
            jaxmix.DenseDiffusion(
                drawn,
                cross=weights("cross"),
                self_=weights("self_attention"),
                area=weights("area"),
                window=(0.0, self.flags.part),
                splice=self.flags.splice == "on",
                strict=self.flags.strict_layout,
            )
        ]

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the picture of the layout."""
        layouts.save(row["segments"], *size_of(row), out / _layout_name(row))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show the layout."""
        height, width = size_of(row)
        scale = layouts.enlargement(width)
        return [Picture(_layout_name(row), width * scale, height * scale, "layout")]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the weights."""
        return {"cross, self": f"{row['cross']:g}, {row['self_attention']:g}"}


def _layout_name(row: Row) -> str:
    return row.file_name.replace(".png", "_layout.png")
