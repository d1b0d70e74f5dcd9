"""StyleAligned (arXiv 2312.02133) and Visual Style Prompting (2402.12974) in a job: rows in groups of one style."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infer.checks import check_file, check_id, check_number, check_share
from infer.gallery import Picture
from infer.grid import told
from infer.methods.method import BatchRows, Method, size_of
from infer.methods.method import Flags as Base
from infer.pictures import open_picture, write_picture
from infer.rows import Field, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """Groups, whose first row is the reference: drawn as it would be alone, or reconstructed from a picture.

    Attributes:
        group_size: StyleAligned: size of the groups of rows that name none; default: these are drawn alone, or, in
            infer.style_aligned, form one group
        reference: StyleAligned: a picture in whose style all groups are drawn; it becomes the first row of each
        reference_prompt: StyleAligned: what that picture shows
        score_scale: StyleAligned: factor of the scores of the reference's keys (no unit)
        score_shift: StyleAligned: added to them: log 2 = 0.69 doubles their weight (no unit)
        level: StyleAligned: share of the self-attention layers that are not shared, from 0 to 1
        share_group_norm: StyleAligned: pool the statistics of group norms with the reference's; auto: on for SD 1 and
            2, off for SDXL
        full: StyleAligned: all images of a group attend to all of them, without AdaIN
        swap: StyleAligned: take keys and values of the reference alone (Visual Style Prompting)
        offset: StyleAligned: steps by which a picture's inversion runs ahead of the others
        inversion_guidance: StyleAligned: guidance scale of a picture's inversion (no unit)
        style_strength: StyleAligned, StyleID: weight of the style, from 0 (none) to 1 (no unit)
        adain: StyleAligned: which of queries, keys and values take the reference's statistics, some of qkv, or none;
            StyleID: false leaves the mean and standard deviation of the start noise alone (then qk)
    """

    group_size: int | None = None
    reference: str | None = None
    reference_prompt: str = ""
    score_scale: float = 1.0
    score_shift: float = 0.0
    level: float = 0.0
    share_group_norm: Literal["auto", "on", "off"] = "auto"
    full: bool = False
    swap: bool = False
    offset: int = 5
    inversion_guidance: float = 2.0
    style_strength: float = 1.0
    adain: bool | str = "qk"

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and a picture that does not exist."""
        super().__post_init__()
        if self.group_size is not None and self.group_size < 2:
            raise InputError(f"--group-size: found {self.group_size}, expected at least 2, the reference and one more")
        for flag, value in (("--style-strength", self.style_strength), ("--level", self.level)):
            check_share(flag, value)
        if not isinstance(self.adain, bool) and self.adain != "none" and not set(self.adain) <= set("qkv"):
            raise InputError(f"--adain: found {self.adain!r}, expected some of qkv, or none")
        if self.reference is not None:
            check_file("--reference", self.reference)
        if self.offset < 0:
            raise InputError(f"--offset: found {self.offset}, expected 0 or more steps")

    def method(self) -> Method:
        """Return the method under these flags."""
        return StyleAligned(self)


class StyleAligned(Method):
    """Rows in groups."""

    name = "style_aligned"
    switches = ("group",)
    needs_rows = "no rows: expected --prompts FILE with at least two of them, all drawn in the style of the first"

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.adain = "qk" if isinstance(flags.adain, bool) else flags.adain
        self.fields = {
            "group": Field(check_id),
            "reference": Field(check_file),
            "style_strength": Field(check_share, flags.style_strength),
            "score_scale": Field(check_number, flags.score_scale),
            "score_shift": Field(check_number, flags.score_shift),
        }
        self._held: set[Hashable] = set()  # groups that hold to a picture
        self._leads: dict[Hashable, int] = {}  # the number of each group's first row, whatever becomes of it
        self._firsts: dict[Hashable, Row] = {}
        self._inverted: dict[Hashable, Any] = {}

    def on(self, row: Row) -> bool:
        """Return whether a row is in a group: of its own, by --group-size, or of all rows in the method's command."""
        return super().on(row) or self.flags.group_size is not None or self.wanted

    def group(self, row: Row) -> Hashable:
        """Return the group of a row: in a grid, each cell has its own."""
        name = self._name(row)
        return f"{name} ({told(row.cell)})" if row.cell else name

    def _name(self, row: Row) -> Hashable:
        if row["group"] is not None:
            return row["group"]
        return row.origin // self.flags.group_size if self.flags.group_size else 0

    def looks_at(self, row: Row, members: Sequence[Row]) -> Sequence[Row]:
        """Return the reference, or all of the group if they all look at each other."""
        return members if self.flags.full else members[:1]

    def arrange(self, rows: Sequence[Row], alone: Mapping[str, None]) -> list[Row]:
        """Return the rows with the flag's picture as the first row of each group, numbered after all others."""
        self._held = {self.group(row) for row in rows if self.on(row) and row["reference"] is not None}
        self._leads = {}
        for row in reversed(rows) if self.flags.reference is None else ():
            if self.on(row):
                self._leads[self.group(row)] = row.number
        if self.flags.reference is None or not rows:
            return list(rows)
        out: list[Row] = []
        next_number = max(row.number for row in rows) + 1
        named = {"reference": self.flags.reference, "style_strength": 1.0, "score_scale": 1.0, "score_shift": 0.0}
        for row in rows:
            if not self.on(row):
                out.append(row)
                continue
            row = row.change(group=self._name(row))
            if (group := self.group(row)) not in self._leads:
                self._leads[group] = next_number
                first = row.change(**alone, **named)
                out.append(
                    dataclasses.replace(
                        first,
                        number=next_number,
                        where="--reference",
                        prompt=self.flags.reference_prompt,
                        id=None,
                        named=frozenset({"reference", "group"}),
                    )
                )
                next_number += 1
            out.append(row)
        return out

    def defaults(self, row: Row) -> Mapping[str, Any]:
        """Default to DDIM in a group that holds to a picture, which is inverted."""
        return {"sampler": "ddim"} if self.group(row) in self._held or self.flags.reference is not None else {}

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse a reference that cannot be inverted."""
        if row["reference"] is not None:
            assert row.steps is not None
            open_picture(row["reference"], *size_of(row))
            if row.sampler != "ddim":
                raise InputError(f"sampler: found {row.sampler}, expected ddim, to whose inversion a reference is held")
            if self.flags.offset >= row.steps:
                raise InputError(f"--offset: found {self.flags.offset}, expected fewer than the {row.steps} steps")
            if row.image is not None:
                raise InputError("image: found it with a reference, expected none: the row starts from its inversion")
        return row

    def settings(self, row: Row) -> dict[str, Any]:
        """Return the flags that no row can change."""
        names = ("group_size", "level", "share_group_norm", "full", "swap", "offset", "inversion_guidance")
        return {name: getattr(self.flags, name) for name in names} | {"adain": self.adain}

    def check_groups(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Refuse groups of one, groups of several programs, and pictures that do not come first."""
        self._firsts, bad = {}, []
        groups: dict[Hashable, list[Row]] = {}
        for row in rows:
            groups.setdefault(self.group(row), []).append(row)
        for name, members in groups.items():
            reason = ""
            if members[0].number != self._leads[name]:
                reason = f"group {name}: its first row, in whose style this one was to be, cannot be drawn"
            elif len(members) < 2:
                reason = f"group {name}: found one image, expected the reference and at least one more"
            elif len({row.program_key for row in members}) > 1:
                reason = f"group {name}: found different steps, samplers or sizes, expected one of each in a group"
            elif any(row["reference"] for row in members[1:]):
                reason = f"group {name}: found a reference picture in another row, expected it in the first"
            elif self.flags.full and len(members) != len(next(iter(groups.values()))):
                reason = f"group {name}: found {len(members)} images, expected groups of one size with --full"
            bad += [(row, reason) for row in members if reason]
            self._firsts[name] = members[0]
        return bad

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Compile groups with a reference picture as a program of their own."""
        return bool(rows[0]["reference"])

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the method for the groups, with the inversions of their pictures."""
        import jaxmix

        flags = self.flags
        firsts = [batch.rows[start] for start in itertools.accumulate((0, *batch.groups[:-1]))]
        pictured = {i: row for i, row in enumerate(firsts) if row["reference"] is not None}
        pictures = {i: self._picture(row) for i, row in pictured.items()}
        if not batch.draft:
            pictures = self._invert(pipe, batch.weights, pictured)
        adain = "" if self.adain == "none" or flags.swap else self.adain
        return [
            jaxmix.StyleAligned(
                tuple(batch.groups),
                level=flags.level,
                share_group_norm={"auto": None, "on": True, "off": False}[flags.share_group_norm],
                strength=[row["style_strength"] for row in batch.rows],
                scale=[row["score_scale"] for row in batch.rows],
                shift=[row["score_shift"] for row in batch.rows],
                adain=tuple(adain),
                full=flags.full,
                swap=flags.swap,
                pictures=pictures,
                offset=flags.offset,
                inversion_guidance=flags.inversion_guidance,
            )
        ]

    def _picture(self, row: Row) -> np.ndarray:
        return open_picture(row["reference"], *size_of(row))

    def _invert(self, pipe: Any, weights: Hashable, rows: Mapping[int, Row]) -> dict[int, Any]:
        """Return the inversions of pictures, keeping those that the next batch needs again."""
        found: dict[Hashable, Any] = {}
        out = {}
        for i, row in rows.items():
            key = (weights, row["reference"], row.texts[0], row.reading, row.steps, row.height, row.width)
            if key not in found:
                found[key] = self._inverted.get(key) or pipe.invert(
                    self._picture(row)[None],
                    [row.texts[0]],
                    steps=row.steps,
                    guidance_scale=self.flags.inversion_guidance,
                    reading=row.reading,
                )
            out[i] = found[key]
        self._inverted = found
        return out

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the reference picture beside its reconstruction."""
        if row["reference"] is not None:
            write_picture(self._picture(row), out / _reference_name(row))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show the reference: its picture, or what was drawn for it."""
        height, width = size_of(row)
        first = self._firsts[self.group(row)]
        if first["reference"] is not None:
            return [Picture(_reference_name(first), width, height, "reference")]
        return [] if row is first else [Picture(first.file_name, width, height, "reference")]

    def shown(self, row: Row) -> dict[str, str]:
        """Say the group."""
        return {"group": str(self.group(row))}


def _reference_name(row: Row) -> str:
    return row.file_name.replace(".png", "_reference.png")
