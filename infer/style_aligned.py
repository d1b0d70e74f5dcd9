"""Draw sets of images in one style: StyleAligned (arXiv 2312.02133), or Visual Style Prompting with --swap.

Examples: python -m infer.style_aligned --prompts rows.txt --out gallery        (one set, in the style of the first)
          python -m infer.style_aligned --prompts rows.jsonl --steps 50         (sets by "group" of the rows)
          python -m infer.style_aligned --reference picture.png --reference-prompt "a cat" --prompts rows.txt
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infer.gallery import Picture
from infer.generate import Config as Plain
from infer.generate import job
from infer.method import Batch, Method
from infer.pictures import open_picture, write_picture
from infer.rows import Field, Row, check_file, check_id, check_number, check_share
from jaxmix.command import run
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Config(Plain):
    """What to draw in whose style, and where to; the flags of infer.generate, and these.

    The first row of a group is its reference: drawn as it would be alone, or, with a picture, reconstructed.

    Attributes:
        group_size: rows of a group, for rows that name none; default: all of them are one
        reference: a picture in whose style all groups are drawn; it becomes the first row of each
        reference_prompt: what that picture shows
        style_strength: weight of the reference, from 0 (none) to 1 (no unit)
        score_scale: factor of the scores of the reference's keys (no unit)
        score_shift: added to them: log 2 = 0.69 doubles their weight (no unit)
        level: share of the self-attention layers that keep to themselves, from 0 to 1
        adain: which of queries, keys and values take the reference's statistics, some of qkv, or none
        share_group_norm: pool the statistics of group norms with the reference's; auto: on for SD 1 and 2, off for SDXL
        full: all images of a group attend to all of them, without AdaIN
        swap: take keys and values of the reference alone (Visual Style Prompting)
        offset: steps by which a picture's inversion runs ahead of the others
        inversion_guidance: guidance scale of a picture's inversion (no unit)
    """

    group_size: int | None = None
    reference: str | None = None
    reference_prompt: str = ""
    style_strength: float = 1.0
    score_scale: float = 1.0
    score_shift: float = 0.0
    level: float = 0.0
    adain: str = "qk"
    share_group_norm: Literal["auto", "on", "off"] = "auto"
    full: bool = False
    swap: bool = False
    offset: int = 5
    inversion_guidance: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size is not None and self.group_size < 2:
            raise InputError(f"--group-size: expected at least 2, the reference and one more, found {self.group_size}")
        for flag, value in (("--style-strength", self.style_strength), ("--level", self.level)):
            check_share(flag, value)
        if self.adain != "none" and not set(self.adain) <= set("qkv"):
            raise InputError(f"--adain: expected some of qkv, or none, found {self.adain!r}")
        if self.reference is not None:
            check_file("--reference", self.reference)
        if self.offset < 0:
            raise InputError(f"--offset: expected 0 or more steps, found {self.offset}")


class StyleAligned(Method):
    """Rows in groups."""

    needs_rows = "no rows: expected --prompts FILE with at least two of them, the first in whose style all are drawn"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.fields = {
            "group": Field(check_id),
            "reference": Field(check_file),
            "style_strength": Field(check_share, config.style_strength),
            "score_scale": Field(check_number, config.score_scale),
            "score_shift": Field(check_number, config.score_shift),
        }
        self._groups: dict[Row, tuple[Row, ...]] = {}
        self._courses: dict[Any, Any] = {}

    def settings(self) -> dict[str, Any]:
        """Return the flags that no row can change."""
        names = ("group_size", "level", "adain", "share_group_norm", "full", "swap")
        held = {"method": "style_aligned"} | {name: getattr(self.config, name) for name in names}
        return held | {"offset": self.config.offset, "inversion_guidance": self.config.inversion_guidance}

    def arrange(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with the flag's picture as the first of each group, numbered after all others."""
        if self.config.reference is None or not rows:
            return list(rows)
        out: list[Row] = []
        next_number = max(row.number for row in rows) + 1
        extra = {"reference": self.config.reference, "style_strength": 1.0, "score_scale": 1.0, "score_shift": 0.0}
        seen: dict[Hashable, None] = {}
        for row in rows:
            name = self._group_of(row)
            if name not in seen:
                seen[name] = None
                held = {**extra, "group": str(name)}
                out.append(
                    dataclasses.replace(
                        row,
                        number=next_number,
                        where="--reference",
                        prompt=self.config.reference_prompt,
                        id=None,
                        extra=tuple((key, held[key]) for key, _ in row.extra),
                        stored=held,
                    )
                )
                next_number += 1
            fields = {**dict(row.extra), "group": str(name)}
            out.append(dataclasses.replace(row, extra=tuple(fields.items())))
        return out

    def _group_of(self, row: Row) -> Hashable:
        if row["group"] is not None:
            return row["group"]
        return row.number // self.config.group_size if self.config.group_size else 0

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse a reference that cannot be inverted."""
        if row["reference"] is not None:
            assert row.height is not None and row.width is not None and row.steps is not None
            open_picture(row["reference"], row.height, row.width)
            if row.sampler != "ddim":
                raise InputError(
                    f"reference: a picture is held to its DDIM inversion, expected ddim, found {row.sampler}"
                )
            if self.config.offset >= row.steps:
                raise InputError(f"--offset: expected fewer than the {row.steps} steps, found {self.config.offset}")
        if row.image is not None:
            raise InputError("image: expected none, groups start from noise")
        return row

    def check_all(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Refuse groups of one, of several programs, and pictures elsewhere than first."""
        self._groups, bad = {}, []
        by_name: dict[Hashable, list[Row]] = {}
        for row in rows:
            by_name.setdefault(self._group_of(row), []).append(row)
        for name, members in by_name.items():
            reason = ""
            if len(members) < 2:
                reason = f"group {name}: found one image, expected the reference and at least one more"
            elif len({row.program for row in members}) > 1:
                reason = f"group {name}: found different steps, samplers or sizes, expected one of each in a group"
            elif any(row["reference"] for row in members[1:]):
                reason = f"group {name}: found a reference picture in another row, expected it in the first"
            elif self.config.full and len(members) != len(next(iter(by_name.values()))):
                reason = f"group {name}: found {len(members)} images, expected groups of one size with --full"
            bad += [(row, reason) for row in members if reason]
            self._groups |= {row: tuple(members) for row in members}
        return bad

    def program(self, row: Row) -> Hashable:
        """Groups with a picture are a program of their own."""
        return bool(self._groups[row][0]["reference"])

    def undone(self, rows: Sequence[Row], done: Sequence[bool]) -> list[Row]:
        """Draw a group whole: no image of it can be drawn without its reference."""
        missing = {id(self._groups[row][0]) for row, there in zip(rows, done, strict=True) if not there}
        return [row for row in rows if id(self._groups[row][0]) in missing]

    def batches(self, bucket: Sequence[Row], size: int, devices: int) -> list[Batch]:
        """Pack whole groups: each device's share of a batch is filled up with the last row of its last group."""
        groups = [list(members) for members in dict.fromkeys(self._groups[row] for row in bucket)]
        longest = max(len(members) for members in groups)
        share = longest if self.config.full else max(size // devices, longest)
        shares: list[list[Row]] = []
        for members in groups:
            if not shares or len(shares[-1]) + len(members) > share or self.config.full:
                shares.append([])
            shares[-1] += members
        cut = [shares[i : i + devices] for i in range(0, len(shares), devices)]
        out = []
        for parts in cut:
            whole = [[*rows, *[rows[-1]] * (share - len(rows))] for rows in parts]
            whole += [whole[-1]] * (devices - len(parts))
            out.append(Batch(list(itertools.chain(*parts)), list(itertools.chain(*whole))))
        return out

    def draw(self, pipe: Any, rows: Sequence[Row], arguments: dict[str, Any]) -> np.ndarray:
        """Draw groups, the images of each in the style of its first."""
        import jax.numpy as jnp

        import jaxmix

        devices = 1 if arguments["mesh"] is None else arguments["mesh"].size
        share = len(rows) // devices
        sizes: list[int] = []
        firsts: list[tuple[int, Row]] = []
        for start in range(0, len(rows), share):
            for reference, members in itertools.groupby(rows[start : start + share], lambda row: self._groups[row][0]):
                firsts.append((sum(sizes), reference))
                sizes.append(len(list(members)))
        config = self.config
        norms = {"auto": None, "on": True, "off": False}[config.share_group_norm]
        options: dict[str, Any] = {"full": config.full, "swap": config.swap, "level": config.level}
        if not config.swap:
            options["adain"] = () if config.adain == "none" else tuple(config.adain)
        control = jaxmix.style_aligned(
            pipe,
            sizes,
            share_group_norm=norms,
            strength=[row["style_strength"] for row in rows],
            scale=[row["score_scale"] for row in rows],
            shift=[row["score_shift"] for row in rows],
            **options,
        )
        pictured = [(i, row) for i, row in firsts if row["reference"]]
        if pictured:
            courses = jnp.concatenate([self._course(pipe, row) for _, row in pictured])
            arguments["pinned"] = jaxmix.hold(courses, [i for i, _ in pictured], len(rows))
        controls = (*arguments.pop("controls"), control)
        return pipe.generate([row.prompt for row in rows], controls=controls, **arguments)

    def _course(self, pipe: Any, row: Row) -> Any:
        key = (row["reference"], row.prompt, row.steps, row.height, row.width)
        if key not in self._courses:
            picture = open_picture(row["reference"], row.height, row.width)[None]  # type: ignore[arg-type]
            guidance = self.config.inversion_guidance
            found = pipe.invert(picture, [row.prompt], steps=row.steps, guidance_scale=guidance)
            self._courses = {key: found.course(self.config.offset)}
        return self._courses[key]

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the reference picture beside its reconstruction."""
        if row["reference"] is not None:
            assert row.height is not None and row.width is not None
            write_picture(open_picture(row["reference"], row.height, row.width), out / _reference_name(row))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show the reference: its picture, or what was drawn for it."""
        assert row.height is not None and row.width is not None
        first = self._groups[row][0]
        if first["reference"] is not None:
            return [Picture(_reference_name(first), row.width, row.height, "reference")]
        return [] if row is first else [Picture(first.file_name, row.width, row.height, "reference")]

    def shown(self, row: Row) -> dict[str, str]:
        """Say the group."""
        return {"group": str(self._group_of(row))}


def _reference_name(row: Row) -> str:
    return row.file_name.replace(".png", "_reference.png")


def main(config: Config) -> int:
    """Read the rows, load the model, draw the groups."""
    return job(config, StyleAligned(config))


if __name__ == "__main__":
    run(main)
