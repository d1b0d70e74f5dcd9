"""Layouts of a row: segments as (phrase, place), where a place is a mask file, a box or a polygon."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from infer.checks import check_file, check_number, check_text
from infer.gallery import CELL
from infer.pictures import levels_of, mask_of, write_picture
from jaxmix.types import InputError

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#46c8d8", "#d82ec8", "#8aa800")


@dataclasses.dataclass(frozen=True)
class Place:
    """A phrase of the prompt and where it goes.

    One of `mask` (a picture of the image's size, white inside), `box` (left, top, right, bottom) and `polygon` (corners
    x, y), both in shares of the image's sides from the upper left. `weight` is paint-with-words'.
    """

    phrase: str
    mask: str | None = None
    box: tuple[float, float, float, float] | None = None
    polygon: tuple[tuple[float, float], ...] | None = None
    weight: float = 1.0

    def draw(self, height: int, width: int) -> np.ndarray:
        """Return the mask (height, width), bool: the pixels whose middles are inside."""
        if self.mask is not None:
            return mask_of(self.mask, height, width)
        if self.box is not None:
            left, top, right, bottom = self.box
            y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
            return ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))[None]
        canvas = Image.new("1", (width, height))
        assert self.polygon is not None
        ImageDraw.Draw(canvas).polygon([(x * width - 0.5, y * height - 0.5) for x, y in self.polygon], fill=1)
        return np.array(canvas)

    def levels(self, height: int, width: int) -> np.ndarray:
        """Return the mask (height, width) with what lies between outside, 0, and inside, 1: the greys of a picture."""
        if self.mask is None:
            return self.draw(height, width).astype(np.float32)
        return levels_of(self.mask, height, width) / np.float32(255)

    def stored(self) -> dict[str, Any]:
        """Return the segment as it is stored in a row."""
        held: dict[str, Any] = {"phrase": self.phrase}
        if self.mask is not None:
            held["mask"] = self.mask
        if self.box is not None:
            held["box"] = list(self.box)
        if self.polygon is not None:
            held["polygon"] = [list(corner) for corner in self.polygon]
        if self.weight != 1:
            held["weight"] = self.weight
        return held


def check_segments(key: str, value: Any) -> tuple[Place, ...]:
    """Read segments: a list of objects, or text "PHRASE @ PLACE; PHRASE @ PLACE".

    A place in text is a file name, or numbers "left,top,right,bottom"; ":WEIGHT" may follow.
    """
    if isinstance(value, str):
        value = [_from_text(key, part) for part in value.split(";") if part.strip()]
    if not isinstance(value, (list, tuple)) or not value:
        example = '{"phrase": "a dog", "box": [0, 0.5, 0.5, 1]}'
        raise InputError(f"{key}: found {value!r}, expected a list of segments such as {example}")
    return tuple(_place(f"{key}[{i}]", item) for i, item in enumerate(value))


def _from_text(key: str, part: str) -> dict[str, Any]:
    phrase, at, place = part.rpartition("@")
    if not at:
        raise InputError(
            f"{key}: found {part.strip()!r}, expected 'PHRASE @ left,top,right,bottom' or 'PHRASE @ mask.png'"
        )
    held: dict[str, Any] = {"phrase": phrase.strip()}
    head, colon, tail = place.rpartition(":")
    weight = _floats(tail) if colon else None
    if weight is not None or (colon and _floats(head) is not None):  # else it is a file with a colon in its name
        place, held["weight"] = head, weight[0] if weight is not None and len(weight) == 1 else tail.strip()
    box = _floats(place)
    return {**held, "mask": place.strip()} if box is None else {**held, "box": box}


def _floats(text: str) -> list[float] | None:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        return None


def _place(where: str, item: Any) -> Place:
    if isinstance(item, Place):
        return item
    known = {"mask", "box", "polygon"}
    named = set(item) - {"phrase", "weight"} if isinstance(item, dict) else set()
    if not isinstance(item, dict) or not named <= known or "phrase" not in item or len(named) != 1:
        raise InputError(
            f"{where}: expected an object with 'phrase' and one of 'mask', 'box' and 'polygon', and maybe 'weight'"
        )
    phrase = check_text(f"{where}: phrase", item["phrase"])
    weight = check_number(f"{where}: weight", item.get("weight", 1.0))
    if "mask" in item:
        return Place(phrase, mask=check_file(f"{where}: mask", item["mask"]), weight=weight)
    if "box" in item:
        left, top, right, bottom = _numbers(f"{where}: box", item["box"], 4)
        if not (left < right and top < bottom):
            raise InputError(f"{where}: box: found {item['box']}, expected left < right and top < bottom")
        return Place(phrase, box=(left, top, right, bottom), weight=weight)
    corners = item["polygon"]
    if not isinstance(corners, (list, tuple)) or len(corners) < 3:
        raise InputError(f"{where}: polygon: expected at least three corners [x, y]")
    x_y = [_numbers(f"{where}: polygon", corner, 2) for corner in corners]
    return Place(phrase, polygon=tuple((x, y) for x, y in x_y), weight=weight)


def _numbers(where: str, value: Any, count: int) -> list[float]:
    good = isinstance(value, (list, tuple)) and len(value) == count
    if not good or any(isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x) for x in value):
        raise InputError(f"{where}: found {value!r}, expected {count} numbers")
    if min(value) < 0 or max(value) > 1:
        raise InputError(f"{where}: found {list(value)}, expected shares of the image from 0 to 1")
    return [float(x) for x in value]


def enlargement(width: int) -> int:
    """Return the factor by which the picture of a layout is enlarged, so that its words are legible."""
    return max(1, round(CELL / width))


def picture(places: Sequence[Place], height: int, width: int) -> Image.Image:
    """Return a picture of the layout for people: each segment in its colour with its phrase, enlarged if small."""
    scale = enlargement(width)
    canvas = np.full((height, width, 3), 255, np.float32)
    for i, place in enumerate(places):
        color = np.asarray([int(COLORS[i % len(COLORS)][j : j + 2], 16) for j in (1, 3, 5)], np.float32)
        share = 0.65 * place.levels(height, width)[..., None]
        canvas = (1 - share) * canvas + share * color
    image = Image.fromarray(canvas.astype(np.uint8)).resize((width * scale, height * scale), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for place in places:
        rows, columns = np.nonzero(place.levels(height, width))
        if not len(rows):
            continue
        text = (place.phrase or "(no words)") + (f" x {place.weight:g}" if place.weight != 1 else "")
        x, y = (columns.mean() + 0.5) * scale, (rows.mean() + 0.5) * scale
        left, _, right, _ = draw.textbbox((x, y), text, font=font, anchor="mm")
        x += max(0, 2 - left) - max(0, right - image.width + 2)
        draw.text((x, y), text, fill="#111", font=font, anchor="mm", stroke_width=2, stroke_fill="white")
    return image


def save(places: Sequence[Place], height: int, width: int, path: Path) -> None:
    """Write the layout's picture."""
    write_picture(np.asarray(picture(places, height, width)), path)
