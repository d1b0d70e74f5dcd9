"""Results for people: a static gallery.html beside the images, and one contact sheet PNG.

The page holds everything but the pictures: it opens from a file, a server or a bucket, and asks nobody else for
anything. Its first cards are plain HTML; a script turns pages, filters and enlarges, from the rows as JSON at its end.
"""

from __future__ import annotations

import html
import io
import json
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw

from infer.captions import font, wrapped
from infer.png import write_whole
from infer.thumbnails import SIDE, make_thumbnails, there, thumbnail_of
from jaxmix import paths

CELL = 208  # pixels: the width at which pictures are shown; small ones are enlarged to the nearest whole multiple
SHEET_LIMIT = 120
PAGE = 60  # cards


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

    An item without pictures is shown as a failed row with `error` as its text. `method` is what rows are filtered by,
    `rows` what draws the picture again, a line of JSON for each row of its group, "" if nobody knows.
    """

    caption: str
    pictures: Sequence[Picture] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    method: str = "plain"
    rows: str = ""


def write_gallery(
    folder: Path,
    items: Sequence[Item],
    title: str,
    facts: Mapping[str, str],
    command: str = "",
) -> Path:
    """Write gallery.html into `folder`, and small copies of large pictures; return the page's path.

    The page needs only what lies beside it. `facts` (model, date, speeds) are shown under the title; `command` is what
    draws rows again, with ` --prompts FILE --out FOLDER` after it.
    """
    path = folder / "gallery.html"
    large = [p.file for item in items for p in item.pictures if max(p.width, p.height) > SIDE]
    thumbs = there(folder, large)

    def write() -> None:
        page = _page(items, title, facts, command or "python -m infer.generate", thumbs)
        write_whole(path, page.encode("utf-8", "replace"))

    write()
    if len(thumbs) < len(set(large)):  # thousands take minutes, and whoever ends the job now has a page all the same
        thumbs = make_thumbnails(folder, large)
        write()
    return path


def _page(items: Sequence[Item], title: str, facts: Mapping[str, str], command: str, thumbs: Mapping[str, str]) -> str:
    here = Path(__file__)
    drawn = [item for item in items if item.pictures]
    width = max((shown_width(picture) for item in drawn for picture in item.pictures), default=CELL)
    data = {"page": PAGE, "command": command, "rows": [_packed(item, thumbs) for item in drawn]}
    parts = {
        "TITLE": html.escape(title),
        "COLUMN": str(width),
        "FACTS": "\n".join(_fact(key, value) for key, value in facts.items()),
        "ERRORS": _errors([item for item in items if not item.pictures]),
        "ITEMS": "\n".join(_card(item, thumbs) for item in drawn[:PAGE]),
        "MORE": _more(drawn[PAGE:]),
        # "<" would end the element, or begin a comment in it.
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"),
        "STYLE": here.with_name("gallery.css").read_text(encoding="utf-8").strip(),
        "SCRIPT": here.with_name("gallery.js").read_text(encoding="utf-8").strip(),
    }
    template = here.with_name("gallery.template.html").read_text(encoding="utf-8")
    return re.sub("@(" + "|".join(parts) + ")@", lambda match: parts[match[1]], template)


def write_contact_sheet(folder: Path, items: Sequence[Item], title: str, columns: int | None = None) -> Path | None:
    """Draw all pictures (at most SHEET_LIMIT items) with their captions into contact_sheet.png; return its path.

    Returns None when there is nothing to draw.
    """
    drawn = [item for item in items if item.pictures]
    shown = drawn[:SHEET_LIMIT]
    if not shown:
        return None
    width = max(shown_width(picture) for item in shown for picture in item.pictures)
    height = max(shown_height(picture) for item in shown for picture in item.pictures)
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
                sheet.paste(scaled(folder, picture), (left + place * (width + 4), top))
            for number, line in enumerate(captions[index]):
                small.draw(draw, (left, top + height + 6 + number * line_height), line, "#222")
        top += row_height
    path = folder / "contact_sheet.png"
    content = io.BytesIO()
    sheet.save(content, format="PNG")
    write_whole(path, content.getvalue())
    return path


def shown_width(picture: Picture) -> int:
    """Return the width in pixels at which a picture is shown."""
    if picture.width > CELL:
        return CELL
    return picture.width * round(CELL / picture.width)


def shown_height(picture: Picture) -> int:
    """Return the height in pixels at which a picture is shown."""
    return round(picture.height * shown_width(picture) / picture.width)


def scaled(folder: Path, picture: Picture) -> Image.Image:
    """Return a picture at the size at which it is shown, an empty place for one that cannot be read."""
    enlarge = picture.width <= CELL
    size = (shown_width(picture), shown_height(picture))
    small = folder / thumbnail_of(picture.file)
    names = [small] if max(picture.width, picture.height) > SIDE else []
    for path in (*names, folder / picture.file):
        try:
            with paths.opened(path) as file, Image.open(file) as image:
                how = Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
                return image.convert("RGB").resize(size, how)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # not there, or damaged since it was written
    return Image.new("RGB", size, "#ddd")  # an empty place


def _fact(key: str, value: str) -> str:
    return f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"


def _errors(items: Sequence[Item]) -> str:
    if not items:
        return ""
    lines = "\n".join(_error(item) for item in items)
    many = f" ({len(items):,})" if len(items) > 5 else ""
    return f'<section class="errors"><h2>Rows not drawn{many}</h2><ul>{lines}</ul></section>'


def _error(item: Item) -> str:
    if not item.rows:
        return f"<li>{html.escape(item.error)}</li>"
    copied, button = html.escape(item.rows), '<button type="button">Copy row</button>'
    return f'<li data-copy="{copied}">{html.escape(item.error)}{button}</li>'


def _more(rest: Sequence[Item]) -> str:
    """Return what a browser without scripts shows instead of the other pages."""
    if not rest:
        return ""
    return f'<p class="more">{len(rest):,} more, which need scripts to be shown here; they lie beside this page.</p>'


def _packed(item: Item, thumbs: Mapping[str, str]) -> list[object]:
    """Return what the page's script knows of an item, in the order in which it reads it."""
    pictures = [
        [p.file, shown_width(p), shown_height(p), p.label, thumbs.get(p.file, ""), int(p.width <= CELL)]
        for p in item.pictures
    ]
    return [item.caption, pictures, [*map(list, item.settings.items())], item.method, item.rows]


def _card(item: Item, thumbs: Mapping[str, str]) -> str:
    settings = "".join(_fact(key, value) for key, value in item.settings.items())
    pictures = "".join(_figure(picture, item.caption, thumbs) for picture in item.pictures)
    return (
        f'<article><div class="pictures">{pictures}</div>'
        f'<p class="caption">{html.escape(item.caption)}</p><dl class="settings">{settings}</dl></article>'
    )


def _figure(picture: Picture, caption: str, thumbs: Mapping[str, str]) -> str:
    small = ' class="small"' if picture.width <= CELL else ""
    label = f"<figcaption>{html.escape(picture.label)}</figcaption>" if picture.label else ""
    file, shown = _href(picture.file), _href(thumbs.get(picture.file, picture.file))
    alt = html.escape(picture.label or caption)
    return (
        f'<figure><a href="{file}" aria-label="Enlarge: {alt}"><img src="{shown}"{small} alt="{alt}" loading="lazy" '
        f'width="{shown_width(picture)}" height="{shown_height(picture)}"></a>{label}</figure>'
    )


def _href(file: str) -> str:
    return html.escape(urllib.parse.quote(file))
