"""StyleID (arXiv 2312.09008) in a job: a content picture drawn with the attention of a style picture."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from infer.checks import check_file, check_number, check_share, check_text
from infer.gallery import Picture
from infer.methods.method import BatchRows, Method, size_of
from infer.methods.method import Flags as Base
from infer.pictures import open_cropped, pictures_in, write_picture
from infer.rows import Field, Row
from jaxmix.types import InputError

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """Two pictures for rows that name none, and how strongly one acts on the other.

    Attributes:
        content: style transfer: a picture, or a folder of them: without --prompts every content meets every style
        style: style transfer: a picture, or a folder of them
        transfer: style transfer: the method, style_id (StyleID) or instantstyle_plus, whose rows have captions;
            default: style_id
        gamma: StyleID: share of the content's queries, from 0 (more style) to 1 (more content)
        temperature: StyleID: factor of the attention scores at the edited layers (no unit)
        inject: StyleID: whether attention takes the style's keys and values
        pairing: StyleID: reference follows the authors' code (50 steps, the first of them skipped), diffusers its port
            (20)
        features: StyleID: stored keeps the inversions' queries, keys and values in memory, rows recomputes them beside
            the result, in three rows per image
        style_strength: StyleAligned, StyleID: weight of the style, from 0 (none) to 1 (no unit)
        adain: StyleAligned: which of queries, keys and values take the reference's statistics, some of qkv, or none;
            StyleID: false leaves the mean and standard deviation of the start noise alone (then qk)
    """

    content: str | None = None
    style: str | None = None
    transfer: str | None = None
    gamma: float = 0.75
    temperature: float = 1.5
    inject: bool = True
    pairing: Literal["reference", "diffusers"] = "reference"
    features: Literal["stored", "rows"] = "stored"
    style_strength: float = 1.0
    adain: bool | str = "qk"

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and one picture without the other."""
        super().__post_init__()
        for flag, value in (("--gamma", self.gamma), ("--style-strength", self.style_strength)):
            check_share(flag, value)
        check_number("--temperature", self.temperature)
        if (self.content is None) != (self.style is None) and getattr(self, "prompts", None) is None:
            raise InputError("--content and --style: found one of them, expected both")

    def method(self) -> Method:
        """Return the method under these flags."""
        return StyleID(self)


class StyleID(Method):
    """Rows of a content and a style picture."""

    name = "style_transfer"
    switches = ("content", "style")
    choice = ("transfer", "style_id")
    needs_rows = "no rows: expected --content and --style, or --prompts FILE.jsonl whose rows have both"

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        self.adain = flags.adain is not False
        self.fields = {
            "content": Field(check_file, flags.content, enough=True),
            "style": Field(check_file, flags.style, enough=True),
            "transfer": Field(check_text, flags.transfer),
            "gamma": Field(check_share, flags.gamma),
            "temperature": Field(check_number, flags.temperature),
            "style_strength": Field(check_share, flags.style_strength),
        }
        self._inverted: dict[Hashable, Any] = {}

    def objects(self) -> Iterable[tuple[str, Mapping[str, Any]]] | None:
        """Return every content with every style."""
        if self.flags.content is None or self.flags.style is None:
            return None
        contents, styles = pictures_in(self.flags.content), pictures_in(self.flags.style)
        return [(f"{c} in the style of {s}", {"content": c, "style": s}) for c in contents for s in styles]

    def defaults(self, row: Row) -> Mapping[str, Any]:
        """Default to DDIM, which the method inverts, with the steps of the code that the pairing follows."""
        return {"sampler": "ddim", "steps": 50 if self.flags.pairing == "reference" else 20}

    def missing(self) -> InputError:
        """Ask for the first of the two pictures."""
        return InputError("no field 'content', expected a picture")

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse a row without two pictures, or with a sampler other than DDIM."""
        for key in ("content", "style"):
            if row[key] is None:
                raise InputError(f"no field '{key}', expected a picture")
            open_cropped(row[key], *size_of(row))
        if row.sampler != "ddim":
            raise InputError(f"sampler: found {row.sampler}, expected ddim, which the method inverts")
        if row.image is not None:
            raise InputError("image: found it with 'content' and 'style', expected these alone")
        return row

    def settings(self, row: Row) -> dict[str, Any]:
        """Return the flags that no row can change."""
        names = ("inject", "pairing", "features")
        return {name: getattr(self.flags, name) for name in names} | {"adain": self.adain}

    def note(self, pipe: Any, rows: Sequence[Row], size: int) -> str:
        """Return the memory for the features of a batch, and what the other way would need."""
        stored, beside = self.memory(pipe, rows[0], size, size)
        ours, other = (stored, beside) if self.flags.features == "stored" else (beside, stored)
        names = ("stored", "rows") if self.flags.features == "stored" else ("rows", "stored")
        return f"; features at most {ours / MIB:.0f} MiB ({names[0]}; {names[1]} would take {other / MIB:.0f})"

    def memory(self, pipe: Any, row: Row, contents: int, styles: int) -> tuple[int, int]:
        """Return the bytes that a batch needs beyond its own: of stored features, and of rows beside the result.

        Stored: q of each content, k and v of each style, for every step and site. Rows: the courses, and the q, k and v
        of two more rows per image, one site at a time.
        """
        from jaxmix.methods.style_id import style_id_sites
        from jaxmix.models.unet import sites, subtree

        assert row.steps is not None
        height, width = size_of(row)
        hw = (height // pipe.vae.config.factor, width // pipe.vae.config.factor)
        pattern = style_id_sites(pipe, self.flags.pairing)
        edited = [s for s in sites(pipe.unet.config, hw) if re.search(pattern, s.name)]
        item = np.dtype(pipe.unet.dtype).itemsize
        one = [
            s.hw[0] * s.hw[1] * subtree(pipe.params["unet"], s.name)["to_q"]["kernel"].shape[-1] * item for s in edited
        ]
        stored = sum(one) * row.steps * (contents + 2 * styles)
        courses = 2 * contents * (row.steps + 1) * hw[0] * hw[1] * pipe.latent_shape[2] * 4
        return stored, courses + 2 * contents * 3 * max(one)

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the method with the inversion of the pictures of a batch."""
        import jaxmix

        rows = batch.rows
        if not all(self.on(row) for row in rows):
            raise InputError("content and style: found them in some rows of the group, expected them in all or none")
        contents, styles = ([(row[key], *size_of(row)) for row in rows] for key in ("content", "style"))
        if batch.draft:
            pictures: dict[str, Any] = {
                "content": [open_cropped(*one) for one in contents],
                "style": [open_cropped(*one) for one in styles],
            }
        else:
            names = list(dict.fromkeys([*contents, *styles]))
            pairs = [(names.index(c), names.index(s)) for c, s in zip(contents, styles, strict=True)]
            pictures = {"found": self._invert(pipe, batch.weights, names, rows[0]), "pairs": pairs}
        return [
            jaxmix.StyleID(
                **pictures,
                gamma=[row["gamma"] for row in rows],
                temperature=[row["temperature"] for row in rows],
                strength=[row["style_strength"] * self.flags.inject for row in rows],
                adain=self.adain,
                pairing=self.flags.pairing,
                stored=self.flags.features == "stored",
                guided=bool({"fuse", "compose"} & batch.beside),  # both are built on guided predictions
            )
        ]

    def _invert(self, pipe: Any, weights: Hashable, names: Sequence[Any], row: Row) -> Any:
        """Return the inversion of pictures, reusing those of the last batch."""
        from jaxmix.methods.style_id import style_id_sites, together

        label = "own" if self.flags.pairing == "reference" else "next"
        record = style_id_sites(pipe, self.flags.pairing) if self.flags.features == "stored" else None
        keys = [(weights, row.steps, *name) for name in names]
        self._inverted = {key: one for key, one in self._inverted.items() if key in keys}
        for key, name in zip(keys, names, strict=True):
            # One by one: how many are new changes from batch to batch, and each number would be another program.
            if key not in self._inverted:
                picture = open_cropped(*name)[None]
                self._inverted[key] = pipe.invert(picture, steps=row.steps, label=label, record=record)
        return together([self._inverted[key] for key in keys])

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write both pictures as they were used."""
        for key in ("content", "style"):
            write_picture(open_cropped(row[key], *size_of(row)), out / _input_name(row, key))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show both pictures."""
        height, width = size_of(row)
        return [Picture(_input_name(row, key), width, height, key) for key in ("content", "style")]

    def caption(self, row: Row) -> str:
        """Name both pictures."""
        return f"{Path(row['content']).stem} in the style of {Path(row['style']).stem}"

    def shown(self, row: Row) -> dict[str, str]:
        """Show gamma and the temperature."""
        return {"gamma, T": f"{row['gamma']:g}, {row['temperature']:g}"}


def _input_name(row: Row, key: str) -> str:
    return row.file_name.replace(".png", f"_{key}.png")
