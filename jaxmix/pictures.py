"""Pictures as a viewer shows them: one reader for everything that people bring, to draw from or to train on.

Upright (EXIF), the first frame of several, deep greys scaled to 8 bits, transparency laid on white. A mask is its
luminance where it is opaque and black where it is not, so that one painted on a transparent layer is what was painted.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_ORIENTATION = 0x0112


class UnreadableError(Exception):
    """A picture cannot be read. The message says why, without its name."""


def read(source: bytes | BinaryIO | str | Path) -> np.ndarray:
    """Return a picture as uint8 (h, w, 3): a file's content, an open file or a path.

    Raises `UnreadableError` for whatever is wrong with it.
    """
    return np.asarray(load(source))


def load(source: bytes | BinaryIO | str | Path, *, mask: bool = False) -> Image.Image:
    """Return a picture of PIL in mode RGB, or a mask in mode L. Raises `UnreadableError`."""
    from PIL import Image, ImageChops, ImageOps

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            image = _eight_bits(ImageOps.exif_transpose(file))
            if not image.has_transparency_data:
                return image.convert("L" if mask else "RGB")
            image = image.convert("RGBA")
            if mask:
                return ImageChops.multiply(image.convert("RGB").convert("L"), image.getchannel("A"))
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, EOFError, struct.error and others
        raise UnreadableError(_reason(error)) from None


# The mean and standard deviation of the pictures that CLIP was trained on.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(image: np.ndarray, size: int = 224, squash: bool = False) -> np.ndarray:
    """Return a picture uint8 (h, w, 3) as CLIP reads it, float32 (size, size, 3), normalised.

    The short side is resized to `size` with PIL's bicubic filter, which rounds to 8 bits between its passes as no
    other library does, and the middle is cut out: what a long side has beyond is not seen. With ``squash`` both sides
    are resized, and all of it is seen, out of shape.
    """
    from PIL import Image

    h, w = image.shape[:2]
    short, long = (w, h) if w <= h else (h, w)
    other = int(size * long / short)
    shape = (size, size) if squash else (size, other) if w <= h else (other, size)  # width, height
    resized = np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    cut = resized[top : top + size, left : left + size].astype(np.float32) / 255
    return ((cut - np.asarray(CLIP_MEAN, np.float32)) / np.asarray(CLIP_STD, np.float32)).astype(np.float32)


def shown_size(source: BinaryIO | str | Path) -> tuple[int, int]:
    """Return (height, width) of a picture as `read` has it, from its header, for many. Raises `UnreadableError`.

    No pixels are decoded, so a PNG whose EXIF comes after them is taken to be upright.
    """
    from PIL import Image

    try:
        with Image.open(source) as image:
            width, height = image.size
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(_ORIENTATION) in _ROTATED
    except Exception as error:
        raise UnreadableError(_reason(error)) from None
    return (width, height) if turned else (height, width)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale greys of more than 8 bits, which `convert` would clip at 255.

    Integers are taken to have 16 bits, or 31 if one needs more. Floats reach to 1, with highlights to 8 that are
    clipped, or to 255 or 65535 if one of them is above that.
    """
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("found pixels that are not finite numbers")
    largest = values.max(initial=0.0)
    if image.mode.startswith("I"):
        values = np.floor(values / (2.0**8 if largest < 2**16 else 2.0**23))
    elif largest <= 65535:
        whole = 1.0 if largest <= 8 else 255.0 if largest <= 255 else 65535.0
        values = np.round(values * (255 / whole))
    else:
        raise ValueError(f"found a pixel of {largest:g}, expected numbers to 1, to 255 or to 65535")
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _reason(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return "not a picture that Pillow knows" if words.startswith("cannot identify image file") else words[:200]
