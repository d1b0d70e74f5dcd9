"""Results for people: a static gallery.html beside the images, and one contact sheet PNG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from infer.captions import font, wrapped
from infer.png import write_whole
from jaxmix import paths

CELL = 208  # pixels: the width at which pictures are shown; small ones are enlarged to the nearest whole multiple
SHEET_LIMIT = 120


@dataclass(frozen=True)
class Picture:
    """One image of an item: its file relative to the gallery, its size in pixels, and a label if needed."""

    file: str
    width: int
    height: int
    label: str = ""


@dataclass(frozen=True)
class Item:
    """One row of the job: its pictures side by side (inputs first, the result last), caption and settings.

    An item without pictures is shown as a failed row with `error` as its text.
    """

    caption: str
    pictures: Sequence[Picture] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


def write_gallery(folder: Path, items: Sequence[Item], title: str, facts: Mapping[str, str]) -> Path:
    """Write gallery.html into `folder` and return its path.

    The page needs only the pictures beside it; `facts` (model, date, speeds) are shown under the title.
    """
    template = Path(__file__).with_name("gallery.template.html").read_text(encoding="utf-8")
    drawn = [item for item in items if item.pictures]
    width = max((_shown_width(picture) for item in drawn for picture in item.pictures), default=CELL)
    most = max((len(item.pictures) for item in drawn), default=1)
    parts = {
        "TITLE": html.escape(title),
        "COLUMN": str(width * most + 12 * (most - 1)),
        "FACTS": "\n".join(_fact(key, value) for key, value in facts.items()),
        "ERRORS": _errors([item for item in items if not item.pictures]),
        "ITEMS": "\n".join(_card(item) for item in drawn),
    }
    page = re.sub("@(" + "|".join(parts) + ")@", lambda match: parts[match[1]], template)
    path = folder / "gallery.html"
    write_whole(path, page.encode("utf-8", "replace"))
    return path


def write_contact_sheet(folder: Path, items: Sequence[Item], title: str, columns: int | None = None) -> Path | None:
    """Draw all pictures (at most SHEET_LIMIT items) with their captions into contact_sheet.png; return its path.

    Returns None when there is nothing to draw.
    """
    drawn = [item for item in items if item.pictures]
    shown = drawn[:SHEET_LIMIT]
    if not shown:
        return None
    width = max(_shown_width(picture) for item in shown for picture in item.pictures)
    height = max(_shown_height(picture) for item in shown for picture in item.pictures)
    most = max(len(item.pictures) for item in shown)
    columns = columns or max(1, min(len(shown), 6 // most))
    small, heading = font(13), font(18)
    gap, line_height = 14, 17
    cell = most * width + (most - 1) * 4
    captions = [wrapped(item.caption, small, cell, lines=3) for item in shown]
    rows = [range(start, min(start + columns, len(shown))) for start in range(0, len(shown), columns)]
    heights = [height + 6 + line_height * max(len(captions[index]) for index in row) + gap for row in rows]
    sheet = Image.new("RGB", (gap + columns * (cell + gap), 2 * gap + 24 + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    hidden = f" (first {len(shown)} of {len(drawn)})" if len(drawn) > len(shown) else ""
    heading_line = wrapped(title + hidden, heading, sheet.width - 2 * gap, lines=1)[0]
    heading.draw(draw, (gap, gap), heading_line, "#111")
    top = 2 * gap + 24
    for row, row_height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            left = gap + column * (cell + gap)
            for place, picture in enumerate(shown[index].pictures):
                sheet.paste(_scaled(folder / picture.file, picture), (left + place * (width + 4), top))
            for number, line in enumerate(captions[index]):
                small.draw(draw, (left, top + height + 6 + number * line_height), line, "#222")
        top += row_height
    path = folder / "contact_sheet.png"
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_whole(path, content.getvalue())
    return path


def _shown_width(picture: Picture) -> int:
    if picture.width > CELL:
        return CELL
    return picture.width * round(CELL / picture.width)


def _shown_height(picture: Picture) -> int:
    return round(picture.height * _shown_width(picture) / picture.width)


def _scaled(path: Path, picture: Picture) -> Image.Image:
    enlarge = picture.width <= CELL
    size = (_shown_width(picture), _shown_height(picture))
    try:
        with Image.open(io.BytesIO(paths.read(path) or b"") if paths.remote(path) else path) as image:
            return image.convert("RGB").resize(size, Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS)
    except (OSError, SyntaxError, ValueError):  # damaged since it was written: an empty place
        return Image.new("RGB", size, "#ddd")


def _fact(key: str, value: str) -> str:
    return f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"


def _errors(items: Sequence[Item]) -> str:
    if not items:
        return ""
    lines = "\n".join(f"<li>{html.escape(item.error)}</li>" for item in items)
    return f'<section class="errors"><h2>Rows not drawn</h2><ul>{lines}</ul></section>'


def _card(item: Item) -> str:
    settings = "".join(_fact(key, value) for key, value in item.settings.items())
    pictures = "".join(_figure(picture, item.caption) for picture in item.pictures)
    return (
        f'<article><div class="pictures">{pictures}</div>'
        f'<p class="caption">{html.escape(item.caption)}</p><dl class="settings">{settings}</dl></article>'
    )


def _figure(picture: Picture, caption: str) -> str:
    small = ' class="small"' if picture.width <= CELL else ""
    label = f"<figcaption>{html.escape(picture.label)}</figcaption>" if picture.label else ""
    file, alt = html.escape(picture.file), html.escape(picture.label or caption)
    return (
        f'<figure><a href="{file}" aria-label="Enlarge: {alt}"><img src="{file}"{small} alt="{alt}" loading="lazy" '
        f'width="{_shown_width(picture)}" height="{_shown_height(picture)}"></a>{label}</figure>'
    )
