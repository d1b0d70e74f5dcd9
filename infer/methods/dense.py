"""DenseDiffusion (arXiv 2308.12964) in a job: each phrase of a prompt gets a place in the picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from infer.checks import check_number, check_share
from infer.methods import layout
from infer.methods.method import BatchRows, Method, size_of
from infer.rows import Field, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(layout.Flags):
    """How strongly segments act in rows that do not say.

    Attributes:
        cross: DenseDiffusion: weight of the modulation of cross-attention, 0 for none (no unit)
        self_attention: DenseDiffusion: weight of the modulation of self-attention, 0 for none (no unit)
        area: DenseDiffusion: how much less a large segment gets, from 0 (the same) to 1 (no unit)
        part: DenseDiffusion: share of the steps, from the first, in which attention is modulated
        splice: DenseDiffusion: whether to replace each phrase's states by those of the phrase encoded alone
        strict_layout: DenseDiffusion: leave alone what the authors' code modulates oddly, overlaps and places without
            words
    """

    cross: float = 1.0
    self_attention: float = 0.3
    area: float = 1.0
    part: float = 0.3
    splice: Literal["on", "off"] = "on"
    strict_layout: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        for flag, value in (("--cross", self.cross), ("--self-attention", self.self_attention)):
            check_number(flag, value)
        for flag, value in (("--area", self.area), ("--part", self.part)):
            check_share(flag, value)
        if self.part == 0:
            raise InputError("--part: found 0, expected a share of the steps above 0")

    def method(self) -> Method:
        """Return the method under these flags."""
        return Dense(self)


class Dense(layout.Layout):
    """Rows with segments, unless they name another method for them."""

    name = "dense"
    choice = ("layout", layout.FIRST)

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        numbers = {"cross": check_number, "self_attention": check_number, "area": check_share}
        own = {name: Field(check, getattr(flags, name)) for name, check in numbers.items()}
        self.fields = {**self.shared(flags), **own}

    def settings(self, row: Row) -> dict[str, Any]:
        """Return the flags that no row can change."""
        held = {"part": self.flags.part, "splice": self.flags.splice}
        return held | ({"strict_layout": True} if self.flags.strict_layout else {})

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the layout of each row."""
        import jaxmix

        def weights(key: str) -> list[float]:
            return [row[key] if self.on(row) else 0.0 for row in batch.rows]

        drawn = [
            [jaxmix.Segment(place.phrase, place.draw(*size_of(row)), place.weight) for place in self.places(row)]
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

    def shown(self, row: Row) -> dict[str, str]:
        """Show the weights."""
        return {"cross, self": f"{row['cross']:g}, {row['self_attention']:g}"}
