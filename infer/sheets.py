"""Sheets of grids (XY plots): for each two keys a picture, one key from left to right, the other from top to bottom."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, PngImagePlugin

from infer.captions import Font, font, wrapped
from infer.gallery import Picture, scaled, shown_height, shown_width
from infer.grid import Axis, told
from infer.png import read_settings, write_whole
from infer.rows import Row

PICTURES = 400
"""Most pictures of a sheet: rows are left out, never cells."""
_CHUNK = "jaxmix_sheet"
_GAP, _LINE = 10, 17
_WIDE = 12_000  # pixels
_LEAST = 48  # pixels that a picture is made smaller to


@dataclass(frozen=True)
class Block:
    """One row of the job at all values of two keys: `cells` maps (across, down) to its pictures."""

    rows: list[Row]
    cells: dict[tuple[str, str], Picture]

    def caption(self, keys: Collection[str]) -> str:
        """Return what the cells have in common; `keys` are those in which they differ."""
        first = self.rows[0]
        beside = told((key, label) for key, label in first.cell if key not in keys)
        same = {row.prompt for row in self.rows} == {first.prompt}
        text = first.prompt if same and first.prompt else first.where.removesuffix(f" ({told(first.cell)})")
        seed = "" if "seed" in keys else f"seed {first.seed}"
        more = "; ".join(filter(None, (seed, beside)))
        return f"{text} ({more})" if more else text


def write_sheets(
    out: Path, axes: Sequence[Axis], rows: Iterable[Row], picture_of: Callable[[Row], Picture | None]
) -> list[str]:
    """Write a sheet for each pair of keys, or for a single key; return the names of their files.

    `picture_of` returns a row's picture, None for one that is not drawn: its place stays grey.
    """
    rows = [row for row in rows if row.cell and row.where != "--reference"]
    pairs: list[tuple[Axis, Axis | None]] = [*itertools.combinations(axes, 2)] or [(axis, None) for axis in axes]
    written = []
    for across, down in pairs:
        blocks = _blocks(rows, across, down, picture_of)
        if not any(block.cells for block in blocks):
            continue
        keys = [axis.key for axis in (across, down) if axis is not None]
        name = f"sheet_{'_'.join(re.sub(r'[^A-Za-z0-9]+', '-', key) for key in keys)}.png"
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(_CHUNK, json.dumps({"keys": keys}))
        content = io.BytesIO()
        _draw(out, blocks, across, down).save(content, format="PNG", pnginfo=chunks)
        write_whole(out / name, content.getvalue())
        written.append(name)
    return written


def sheets_in(folder: Path, names: Collection[str]) -> list[str]:
    """Return which of the names of files in a folder are sheets that a job wrote there."""
    return [name for name in names if name.startswith("sheet_") and read_settings(folder / name, _CHUNK)]


def _blocks(
    rows: Sequence[Row], across: Axis, down: Axis | None, picture_of: Callable[[Row], Picture | None]
) -> list[Block]:
    """Return the rows of a job, each with the cells of two keys; other keys make further blocks."""
    found: dict[tuple[int, tuple[tuple[str, str], ...]], Block] = {}
    most = max(1, PICTURES // (len(across.values) * (len(down.values) if down else 1)))
    for row in rows:
        here = dict(row.cell)
        place = here.pop(across.key), here.pop(down.key) if down else ""
        key = row.origin, tuple(here.items())
        if key not in found:
            if len(found) == most:
                continue
            found[key] = Block([], {})
        found[key].rows.append(row)
        if (picture := picture_of(row)) is not None:
            found[key].cells[place] = picture
    return list(found.values())


def _draw(out: Path, blocks: Sequence[Block], across: Axis, down: Axis | None) -> Image.Image:
    small, heading = font(13), font(15)
    pictures = [picture for block in blocks for picture in block.cells.values()]
    columns, lines = across.labels, down.labels if down else ("",)
    shrink = min(1.0, max(_LEAST, _WIDE // len(columns) - _GAP) / max(map(shown_width, pictures)))
    width = round(max(map(shown_width, pictures)) * shrink)
    height = round(max(map(shown_height, pictures)) * shrink)
    left = _GAP
    if down is not None:
        left += _GAP + min(180, round(max(small.getlength(text) for text in (*lines, down.key)) + 1))
    heads = [wrapped(label, small, width, lines=3) for label in columns]
    head = _LINE * max(map(len, heads)) + 4
    over = max(left + len(columns) * (width + _GAP), 320)
    keys = [axis.key for axis in (across, down) if axis is not None]
    captions = [wrapped(block.caption(keys), heading, over - 2 * _GAP, lines=2) for block in blocks]
    block_height = [20 * len(text) + head + len(lines) * (height + _GAP) + _GAP for text in captions]
    title = f"{across.key} from left to right" + (f", {down.key} from top to bottom" if down else "")
    titles = wrapped(title, heading, over - 2 * _GAP, lines=3)
    sheet = Image.new("RGB", (over, _GAP + 20 * len(titles) + sum(block_height)), "white")
    draw = ImageDraw.Draw(sheet)
    top = _text(draw, heading, titles, _GAP, _GAP // 2, 20)
    for block, caption, tall in zip(blocks, captions, block_height, strict=True):
        end = top + tall
        top = _text(draw, heading, caption, _GAP, top, 20)
        for i, text in enumerate(heads):
            _text(draw, small, text, left + i * (width + _GAP), top, _LINE)
        top += head
        for line in lines:
            if down is not None:
                _text(draw, small, wrapped(line, small, left - 2 * _GAP, lines=4), _GAP, top + 2, _LINE)
            for i, column in enumerate(columns):
                at = (left + i * (width + _GAP), top)
                picture = block.cells.get((column, line))
                if picture is None:
                    draw.rectangle((*at, at[0] + width - 1, at[1] + height - 1), fill="#ddd")
                    continue
                image = scaled(out, picture)
                if shrink < 1:
                    image = image.resize((max(1, round(image.width * shrink)), max(1, round(image.height * shrink))))
                sheet.paste(image, at)
            top += height + _GAP
        top = end
    return sheet


def _text(draw: ImageDraw.ImageDraw, letters: Font, lines: Sequence[str], left: int, top: int, height: int) -> int:
    """Draw lines of text; return where the next one would begin."""
    for line in lines:
        letters.draw(draw, (left, top), line, "#111")
        top += height
    return top
