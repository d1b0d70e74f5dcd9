"""Draw prompts to a layout: DenseDiffusion (arXiv 2308.12964). Each phrase of a prompt gets a place in the image.

Examples: python -m infer.dense --prompt "a 3d render of a cat left of a car" --out gallery
            --segments "a cat @ 0,0.2,0.5,1; a car @ 0.5,0.2,1,1"
          python -m infer.dense --prompts rows.jsonl --out gallery      (rows with "segments", see infer/README.md)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infer import layouts
from infer.gallery import Picture
from infer.generate import Config as Plain
from infer.generate import job
from infer.method import Method
from infer.rows import Field, Row, check_number, check_share
from jaxmix.command import run
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(Plain):
    """What to draw, where in the image, and where to; the flags of infer.generate, and these.

    Attributes:
        segments: "PHRASE @ PLACE; PHRASE @ PLACE ...", each phrase word for word in the prompt and each place
            left,top,right,bottom in shares of the image (0 to 1) or a mask.png of its size, white inside; for rows that
            have no segments of their own
        cross: weight of the modulation of cross-attention, 0 for none (no unit)
        self_attention: weight of the modulation of self-attention, 0 for none (no unit)
        area: how much less a large segment gets, from 0 (the same) to 1 (no unit)
        part: share of the steps, from the first, in which attention is modulated
        splice: whether each phrase is encoded alone, besides
        strict: draw nothing if any row is bad
        strict_layout: leave alone what the authors' code modulates oddly, overlaps and places without words
    """

    segments: str | None = None
    cross: float = 1.0
    self_attention: float = 0.3
    area: float = 1.0
    part: float = 0.3
    splice: Literal["on", "off"] = "on"
    strict_layout: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, value in (("--cross", self.cross), ("--self-attention", self.self_attention)):
            check_number(flag, value)
        for flag, value in (("--area", self.area), ("--part", self.part)):
            check_share(flag, value)
        if self.part == 0:
            raise InputError("--part: found 0, expected a share of the steps above 0")
        if self.segments is not None:
            layouts.check_segments("--segments", self.segments)


class Dense(Method):
    """Rows with segments."""

    needs_rows = "no rows: expected --prompt with --segments, or --prompts FILE.jsonl whose rows have segments"

    def __init__(self, config: Config) -> None:
        self.config = config
        numbers = {"cross": check_number, "self_attention": check_number, "area": check_share}
        segments = Field(layouts.check_segments, config.segments, lambda places: [place.stored() for place in places])
        self.fields = {"segments": segments} | {
            name: Field(check, getattr(config, name)) for name, check in numbers.items()
        }

    def settings(self) -> dict[str, Any]:
        """Return the flags that no row can change."""
        held = {"method": "dense", "part": self.config.part, "splice": self.config.splice}
        return held | ({"strict_layout": True} if self.config.strict_layout else {})

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse a row without segments, or whose segments do not fit its prompt and size."""
        if row["segments"] is None:
            raise InputError("no field 'segments', expected phrases and their places")
        self._layout(pipe, [row])
        return row

    def draw(self, pipe: Any, rows: Sequence[Row], arguments: dict[str, Any]) -> np.ndarray:
        """Draw rows, each by its own layout."""
        made = self._layout(pipe, rows)
        controls = (*arguments.pop("controls"), made.control)
        return pipe.generate([row.prompt for row in rows], controls=controls, context=made.context, **arguments)

    def _layout(self, pipe: Any, rows: Sequence[Row]) -> Any:
        from jaxmix import Segment, dense_diffusion

        drawn = [[Segment(p.phrase, p.draw(row.height, row.width)) for p in row["segments"]] for row in rows]  # type: ignore[arg-type]
        return dense_diffusion(
            pipe,
            [row.prompt for row in rows],
            drawn,
            cross=[row["cross"] for row in rows],
            self_=[row["self_attention"] for row in rows],
            area=[row["area"] for row in rows],
            window=(0.0, self.config.part),
            splice=self.config.splice == "on",
            strict=self.config.strict_layout,
        )

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the picture of the layout."""
        assert row.height is not None and row.width is not None
        layouts.save(row["segments"], row.height, row.width, out / _layout_name(row))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show the layout."""
        assert row.height is not None and row.width is not None
        scale = layouts.enlargement(row.width)
        return [Picture(_layout_name(row), row.width * scale, row.height * scale, "layout")]

    def shown(self, row: Row) -> dict[str, str]:
        """Say the weights."""
        return {"cross, self": f"{row['cross']:g}, {row['self_attention']:g}"}


def _layout_name(row: Row) -> str:
    return row.file_name.replace(".png", "_layout.png")


def main(config: Config) -> int:
    """Read the rows, load the model, draw each row by its layout."""
    return job(config, Dense(config))


if __name__ == "__main__":
    run(main)
