"""StyleAdapter (arXiv 2309.01770) in a job: rows in the style of any number of pictures, beside their words."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infer.checks import check_number
from infer.gallery import Picture
from infer.methods.image_prompt import check_pictures, check_there, shown_size
from infer.methods.lora import check_loras as check_files
from infer.methods.method import BatchRows, Method
from infer.methods.method import Flags as Base
from infer.pictures import open_picture, picture_size, write_picture
from infer.rows import Field, Row
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class Flags(Base):
    """A StyleAdapter, and pictures of a style for rows that name none.

    Attributes:
        style_adapter: StyleAdapter: mini-style (embedded), or a file by train.style_adapter, PATH[:SCALE]; its CLIP is
            --image-encoder
        style_images: StyleAdapter: pictures of one style; the flag may be repeated, or given a JSON list
        style_scale: StyleAdapter: how strongly, 0 for not at all (no unit); multiplied by the scale of the adapter
    """

    style_adapter: str | None = None
    style_images: list[str] | str | None = None
    style_scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse scales that are not numbers, and files that are not there."""
        super().__post_init__()
        check_files("--style-adapter", self.style_adapter or [])
        check_number("--style-scale", self.style_scale)
        if self.style_images is not None:
            check_pictures("--style-images", self.style_images)

    def method(self) -> Method:
        """Return the method under these flags."""
        return StyleAdapter(self)


class StyleAdapter(Method):
    """Rows in the style of pictures."""

    name = "style_adapter"
    switches = ("style_images",)

    def __init__(self, flags: Any) -> None:
        self.flags = flags
        self.file = next(iter(check_files("--style-adapter", flags.style_adapter or [])), None)
        pictures = None if flags.style_images is None else check_pictures("--style-images", flags.style_images)
        self.fields = {
            "style_images": Field(check_pictures, pictures, list),
            "style_scale": Field(check_number, flags.style_scale),
        }
        self._adapter: Any = None

    def prepare(self) -> None:
        """Look for the adapter: a mistake there is one of the whole job."""
        if self.file is not None:
            check_there("--style-adapter", self.file[0], "a StyleAdapter")

    def open(self, pipe: Any) -> None:
        """Read the adapter for the model, and its encoder."""
        import jaxmix

        if self.file is not None:
            self._adapter = jaxmix.StyleAdapter.load(self.file[0], pipe, self.flags.image_encoder)

    def complete(self, row: Row, pipe: Any) -> Row:
        """Refuse pictures without an adapter, and what cannot be read."""
        if self._adapter is None:
            raise InputError(f"style_images: found {_names(row)} without a --style-adapter, expected one to read them")
        self._adapter.needs_encoder()
        for path in row["style_images"]:
            picture_size(path, 1)
        return row

    def settings(self, row: Row) -> dict[str, Any]:
        """Return what no row can change."""
        assert self.file is not None
        return {"style_adapter": f"{self.file[0]}:{self.file[1]:g}", "encoder": self.flags.image_encoder}

    def program_key(self, rows: Sequence[Row]) -> Hashable:
        """Rows with any number of pictures share their program."""
        return True

    def plan(self, row: Row) -> str:
        """Name the adapter."""
        assert self.file is not None
        return f"style-adapter {Path(self.file[0]).name}:{self.file[1]:g}"

    def build(self, pipe: Any, batch: BatchRows) -> Sequence[Any]:
        """Return the adapter with the pictures of the rows; rows of a group without any do not see the others'."""
        assert self.file is not None
        first = next(row for row in batch.rows if self.on(row))
        rows = [row if self.on(row) else first for row in batch.rows]
        scales = np.asarray([row["style_scale"] if self.on(row) else 0.0 for row in batch.rows], np.float32)
        return [self._adapter.on([list(row["style_images"]) for row in rows], list(self.file[1] * scales))]

    def write_inputs(self, row: Row, out: Path) -> None:
        """Write the pictures, small, beside the result."""
        for i, path in enumerate(row["style_images"]):
            write_picture(open_picture(path, *shown_size(path)), out / _input_name(row, i))

    def inputs(self, row: Row, out: Path) -> list[Picture]:
        """Show the pictures."""
        sizes = [shown_size(path) for path in row["style_images"]]
        return [Picture(_input_name(row, i), width, height, "style") for i, (height, width) in enumerate(sizes)]

    def shown(self, row: Row) -> dict[str, str]:
        """Show the pictures and their scale."""
        return {"style of": f"{_names(row)} x {row['style_scale']:g}"}


def _names(row: Row) -> str:
    return " + ".join(Path(path).name for path in row["style_images"])


def _input_name(row: Row, i: int) -> str:
    return row.file_name.replace(".png", f"_style{i}.png")
