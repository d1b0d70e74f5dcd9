"""A contact sheet of equal images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def make_grid(images: np.ndarray, columns: int, enlarge: int = 1, titles: Sequence[str] = ()) -> np.ndarray:
    """Put images (n, H, W, 3) uint8 side by side, row by row, `columns` wide, each pixel enlarged `enlarge` times.

    `titles` are put above the columns. Returns (H', W', 3) uint8.
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    padded = np.full((rows * columns, height, width, channels), 255, np.uint8)
    padded[:count] = images
    sheet = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels).repeat(enlarge, 0).repeat(enlarge, 1)
    if not titles:
        return sheet
    from PIL import Image, ImageDraw, ImageFont

    strip = Image.new("RGB", (sheet.shape[1], 16), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(11)
    for i, title in enumerate(titles):
        draw.text(((i + 0.5) * width * enlarge, 8), title, "black", font, anchor="mm")
    return np.concatenate([np.asarray(strip), sheet])


def fitted(image: np.ndarray, side: Sequence[int]) -> np.ndarray:
    """Return a picture uint8 (H, W, 3) at another height and width."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((side[1], side[0]), Image.Resampling.BICUBIC))


def save_grid(path: str | Path, images: np.ndarray, columns: int, enlarge: int = 1, titles: Sequence[str] = ()) -> Path:
    """Write `make_grid` of the same arguments as a PNG and return the path."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(make_grid(images, columns, enlarge, titles)).save(path)
    return path
