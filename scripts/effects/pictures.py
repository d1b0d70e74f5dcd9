"""Grids of pictures with names above the columns and prompts above the rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

GAP, HEADER, CAPTION = 6, 24, 20  # pixels; a line of the header


def labelled_grid(
    path: str | Path, columns: Sequence[tuple[str, np.ndarray]], captions: Sequence[str], enlarge: int = 3
) -> Path:
    """Write a PNG of columns (name, uint8 (rows, H, W, 3)), one row per caption, and return its path."""
    from PIL import Image, ImageDraw, ImageFont

    _, height, width, _ = columns[0][1].shape
    cell, step = (height * enlarge, width * enlarge), width * enlarge + GAP
    line, font = CAPTION + cell[0] + GAP, ImageFont.load_default(size=15)
    titles = [_wrapped(name, cell[1], font.getlength) for name, _ in columns]
    header = HEADER * max(len(title) for title in titles)
    sheet = Image.new("RGB", (GAP + step * len(columns), header + line * len(captions)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (_, images) in enumerate(columns):
        left = GAP + k * step
        for row, words in enumerate(titles[k]):
            draw.text((left + cell[1] / 2, HEADER * (row + 0.5)), words, fill="black", font=font, anchor="mm")
        for i in range(len(captions)):
            picture = Image.fromarray(images[i].repeat(enlarge, 0).repeat(enlarge, 1))
            sheet.paste(picture, (left, header + line * i + CAPTION))
    small = ImageFont.load_default(size=12)
    for i, caption in enumerate(captions):
        draw.text((GAP, header + line * i + CAPTION / 2), caption, fill=(90, 90, 90), font=small, anchor="lm")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path


def _wrapped(title: str, width: float, length: Callable[[str], float]) -> list[str]:
    """Return the lines of a title, each as much of it as fits, broken at spaces, long words after dots."""
    lines: list[str] = []
    for word in title.split():
        pieces = re.findall(r"[^.]+\.?|\.", word) if length(word) > width else [word]
        for k, piece in enumerate(pieces):
            joined = f"{lines[-1]}{'' if k else ' '}{piece}" if lines else piece
            if lines and length(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines or [""]
