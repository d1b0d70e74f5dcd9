"""A contact sheet of equal images as one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def save_grid(path: str | Path, images: np.ndarray, columns: int, enlarge: int = 1) -> Path:
    """Write images (n, H, W, 3) uint8, row by row, `columns` wide, each pixel `enlarge` times, and return the path."""
    from PIL import Image

    count, height, width, channels = images.shape
    rows = -(-count // columns)
    padded = np.full((rows * columns, height, width, channels), 255, np.uint8)
    padded[:count] = images
    sheet = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, channels)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.repeat(enlarge, 0).repeat(enlarge, 1)).save(path)
    return path
