"""The input pictures of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jaxmix.types import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def picture_size(path: str, factor: int) -> tuple[int, int]:
    """Return the (height, width) at which to draw a picture: its own, rounded down to multiples of `factor`."""
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
        # Masks keep their hard edges.
        image = image.resize((width, height), Image.Resampling.NEAREST if mode == "L" else Image.Resampling.LANCZOS)
    return np.array(image)


def _open(path: str) -> Image.Image:
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError:
        raise InputError(f"{path}: not a readable picture") from None


def open_cropped(path: str, height: int, width: int) -> np.ndarray:
    """Return the centre of a picture as uint8 (height, width, 3): the largest part of that shape, resized."""
    with _open(path) as image:
        try:
            image = image.convert("RGB")
        except OSError as error:
            raise InputError(f"{path}: the picture is damaged: {error}") from None
    return np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def write_picture(image: np.ndarray, out: Path) -> None:
    """Write an input beside the result, for the gallery."""
    Image.fromarray(image).save(out)


def levels_of(path: str, height: int, width: int) -> np.ndarray:
    """Return a mask (height, width) as the bytes of a picture; refuses other sizes."""
    with _open(path) as image:
        if image.size != (width, height):
            raise InputError(
                f"{path}: found a mask of {image.width}x{image.height} pixels, expected the image's {width}x{height}"
            )
    return open_picture(path, height, width, "L")


def mask_of(path: str, height: int, width: int) -> np.ndarray:
    """Return a mask (height, width), true where the picture is lighter than grey; one of another size is refused."""
    mask = levels_of(path, height, width) > 127
    if not mask.any():
        raise InputError(f"{path}: the mask is empty, expected white where the phrase goes")
    return mask


def pictures_in(path: str) -> list[str]:
    """Return the pictures in a folder, sorted by name, or the one file."""
    place = Path(path)
    if place.is_dir():
        found = sorted(str(p) for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"{path}: found no pictures, expected files that end in {', '.join(SUFFIXES)}")
        return found
    if not place.is_file():
        raise InputError(f"{path}: no such file or folder")
    return [path]
