"""Pictures that a row starts from."""

from __future__ import annotations

import numpy as np
from PIL import Image

from jaxmix.types import InputError


def picture_size(path: str, factor: int) -> tuple[int, int]:
    """Return the (height, width) to draw a picture at: its own, cut down to multiples of `factor`."""
    with _open(path) as image:
        width, height = image.size
    return max(height // factor, 1) * factor, max(width // factor, 1) * factor


def open_picture(path: str, height: int, width: int, mode: str = "RGB") -> np.ndarray:
    """Return a picture as uint8 (height, width, 3), or (height, width) in mode "L", resized if it has another size."""
    with _open(path) as image:
        try:
            image = image.convert(mode)
        except OSError as error:
            raise InputError(f"{path}: the picture is damaged: {error}") from None
    if image.size != (width, height):
        # A mask keeps its hard edges.
        image = image.resize((width, height), Image.Resampling.NEAREST if mode == "L" else Image.Resampling.LANCZOS)
    return np.array(image)


def _open(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError:
        raise InputError(f"{path}: not a picture that can be opened") from None
