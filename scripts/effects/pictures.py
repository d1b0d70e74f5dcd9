"""Grids of pictures with names above the columns and prompts above the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

GAP, HEADER, CAPTION = 6, 24, 20  # pixels


def labelled_grid(
    path: str | Path, columns: Sequence[tuple[str, np.ndarray]], captions: Sequence[str], enlarge: int = 3
) -> Path:
    """Write a PNG of columns (name, uint8 (rows, H, W, 3)), one row per caption, and return its path."""
    from PIL import Image, ImageDraw, ImageFont

    _, height, width, _ = columns[0][1].shape
    cell, step = (height * enlarge, width * enlarge), width * enlarge + GAP
    line = CAPTION + cell[0] + GAP
    sheet = Image.new("RGB", (GAP + step * len(columns), HEADER + line * len(captions)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for k, (name, images) in enumerate(columns):
        left = GAP + k * step
        draw.text((left + cell[1] / 2, HEADER / 2), name, fill="black", font=font, anchor="mm")
        for i in range(len(captions)):
            picture = Image.fromarray(images[i].repeat(enlarge, 0).repeat(enlarge, 1))
            sheet.paste(picture, (left, HEADER + line * i + CAPTION))
    small = ImageFont.load_default(size=12)
    for i, caption in enumerate(captions):
        draw.text((GAP, HEADER + line * i + CAPTION / 2), caption, fill=(90, 90, 90), font=small, anchor="lm")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
    return path
