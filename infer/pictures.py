"""The input pictures of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from infer.png import write_png
from jaxmix import pictures
from jaxmix.paths import fetch_all, listing, url_of
from jaxmix.types import InputError
from jaxmix.weights.files import user_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def picture_size(path: str, factor: int) -> tuple[int, int]:
    """Return the (height, width) at which to draw a picture: as it is shown, rounded down to multiples of `factor`."""
    width, height = _checked(path).size
    return max(height // factor, 1) * factor, max(width // factor, 1) * factor


def open_picture(path: str, height: int, width: int, *, mask: bool = False) -> np.ndarray:
    """Return a picture as uint8 (height, width, 3), or a mask (height, width); resized if it has another size."""
    image = _checked(path, mask)
    if image.size != (width, height):
        # Masks keep their hard edges.
        image = image.resize((width, height), Image.Resampling.NEAREST if mask else Image.Resampling.LANCZOS)
    return np.array(image)


def read_picture(path: str) -> np.ndarray:
    """Return a picture as it is shown, uint8 (height, width, 3)."""
    return np.array(_checked(path))


def open_cropped(path: str, height: int, width: int) -> np.ndarray:
    """Return the centre of a picture as uint8 (height, width, 3): the largest part of that shape, resized."""
    return np.array(ImageOps.fit(_checked(path), (width, height), Image.Resampling.LANCZOS))


def _checked(path: str, mask: bool = False) -> Image.Image:
    """Read a file. Raises `InputError` that names it."""
    here = user_path(path)
    if not here.is_file():
        raise InputError(f"{path}: {'found a folder, expected a picture' if here.is_dir() else 'no such file'}")
    try:
        return pictures.load(here, mask=mask)
    except pictures.UnreadableError as error:
        raise InputError(f"{path}: not a readable picture: {error}") from None


def write_picture(image: np.ndarray, out: Path) -> None:
    """Write an input beside the result, for the gallery: whole, or not at all."""
    write_png(out, image, {})


def levels_of(path: str, height: int, width: int) -> np.ndarray:
    """Return a mask (height, width) as the bytes of a picture; refuses other sizes."""
    image = _checked(path, mask=True)
    if image.size != (width, height):
        raise InputError(
            f"{path}: found a mask of {image.width}x{image.height} pixels, expected the image's {width}x{height}"
        )
    return np.array(image)


def mask_of(path: str, height: int, width: int) -> np.ndarray:
    """Return a mask (height, width), true where the picture is lighter than grey; one of another size is refused."""
    mask = levels_of(path, height, width) > 127
    if not mask.any():
        raise InputError(f"{path}: the mask is empty, expected white where the phrase goes")
    return mask


def pictures_in(path: str) -> list[str]:
    """Return the pictures in a folder, sorted by name, or the one file; of one in a bucket their addresses."""
    if url_of(path) is not None:
        there = listing(path)
        found = [path] if there is None else [one for one in there if Path(one).suffix.lower() in SUFFIXES]
        if not found:
            raise InputError(f"{path}: found no pictures, expected files that end in {', '.join(SUFFIXES)}")
        fetch_all(found)
        return found
    place = Path(path)
    if place.is_dir():
        found = sorted(str(p) for p in place.iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise InputError(f"{path}: found no pictures, expected files that end in {', '.join(SUFFIXES)}")
        return found
    if not place.is_file():
        raise InputError(f"{path}: no such file or folder")
    return [path]
