"""The sprite atlas: loads the committed tiles, styles them and scales them to the size that a scene needs."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter

FOLDER = Path(__file__).parent

# Derived styles are computed from a drawn one; the others are in the atlas.
DERIVED = {"pixel": "flat", "sketch": "3d", "oil": "cartoon"}

# Margin around a tile, so that outline and shadow are not cut off; in tile pixels.
PAD = 8


class Sprite(NamedTuple):
    """One object in one style at one size.

    `rgb` (n, n, 3) float32 in [0, 1], premultiplied by `alpha` (n, n, 1); `mask` (n, n) bool is the object alone,
    without its shadow; `box` is (top, left, bottom, right) of the mask.
    """

    rgb: np.ndarray
    alpha: np.ndarray
    mask: np.ndarray
    box: tuple[int, int, int, int]


class Atlas:
    """Tiles of every object in every style, with a cache of the scaled ones."""

    def __init__(self, folder: Path = FOLDER):
        self.folder = folder
        self.index = json.loads((folder / "atlas.json").read_text())
        self.objects: tuple[str, ...] = tuple(self.index["objects"])
        self.drawn: tuple[str, ...] = tuple(style["name"] for style in self.index["styles"])
        self.styles: tuple[str, ...] = self.drawn + tuple(DERIVED)
        self._styled: dict[tuple[str, int], tuple[Image.Image, Image.Image]] = {}
        self._sprites: dict[tuple[str, int, int], Sprite] = {}

    def __getstate__(self):
        # A worker process loads the picture itself; sending the caches would cost more.
        return {"folder": self.folder}

    def __setstate__(self, state):
        type(self).__init__(self, state["folder"])

    @cached_property
    def sheet(self) -> Image.Image:
        return Image.open(self.folder / self.index["image"]).convert("RGBA")

    def tile(self, style: str, obj: int) -> Image.Image:
        """Return the tile of a drawn style from the atlas, RGBA."""
        side, columns, rows = self.index["tile"], self.index["columns"], self.index["rows_per_style"]
        row, column = divmod(obj, columns)
        top, left = (self.drawn.index(style) * rows + row) * side, column * side
        return self.sheet.crop((left, top, left + side, top + side))

    def styled(self, style: str, obj: int) -> tuple[Image.Image, Image.Image]:
        """Return the finished tile (RGBA, padded) and the silhouette (L) of the object without its shadow."""
        key = (style, obj)
        if key not in self._styled:
            tile = self.tile(DERIVED.get(style, style), obj)
            canvas = Image.new("RGBA", (tile.width + 2 * PAD, tile.height + 2 * PAD))
            canvas.paste(_derive(style, tile), (PAD, PAD))
            self._styled[key] = _finish(style, canvas)
        return self._styled[key]

    def sprite(self, style: str, obj: int, size: int) -> Sprite:
        """Return the object scaled so that the longer side of its drawing takes `size` pixels."""
        key = (style, obj, size)
        if key not in self._sprites:
            picture, silhouette = self.styled(style, obj)
            side = round(size * picture.width / self.index["tile"])
            how = Image.Resampling.BOX if style == "pixel" else Image.Resampling.LANCZOS
            small = np.asarray(picture.resize((side, side), how), np.float32) / 255
            mask = np.asarray(silhouette.resize((side, side), Image.Resampling.BOX)) > 110
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
            alpha = small[..., 3:]
            self._sprites[key] = Sprite(small[..., :3] * alpha, alpha, mask, box)
        return self._sprites[key]


def _derive(style: str, tile: Image.Image) -> Image.Image:
    """Turn the tile of a drawn style into that of a derived one; a drawn style passes unchanged."""
    alpha = tile.getchannel("A")
    if style == "pixel":
        # Twelve cells per side remain visible as squares when the object takes half of a 64 px picture.
        cells = tile.resize((12, 12), Image.Resampling.BOX)
        colours = cells.convert("RGB").point(lambda v: min(255, round(v / 85) * 85))
        colours.putalpha(cells.getchannel("A").point(lambda a: 255 if a > 110 else 0))
        return colours.resize(tile.size, Image.Resampling.NEAREST)
    if style == "sketch":
        paper = Image.new("RGBA", tile.size, (255, 255, 255, 255))
        paper.alpha_composite(tile)
        grey = np.asarray(paper.convert("L"), np.float32)
        smooth = np.asarray(paper.convert("L").filter(ImageFilter.GaussianBlur(4)), np.float32)
        # Dodging by the smoothed picture leaves lines where the picture changes.
        lines = np.clip(255 * (grey + 8) / (smooth + 8), 0, 255)
        shade = np.clip(0.25 * grey + 0.75 * (255 - 3.0 * (255 - lines)), 0, 255).astype(np.uint8)
        sketch = Image.merge("RGB", [Image.fromarray(shade)] * 3)
        sketch.putalpha(alpha)
        return sketch
    if style == "oil":
        backed = Image.new("RGBA", tile.size, (128, 128, 128, 255))
        backed.alpha_composite(tile)
        strokes = backed.convert("RGB").point(lambda v: min(255, round(v / 32) * 32)).filter(ImageFilter.ModeFilter(9))
        strokes.putalpha(alpha)
        return strokes
    return tile


def _finish(style: str, canvas: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Add what sets a style apart at small sizes: an outline to cartoons, a soft shadow to 3d renders."""
    alpha = canvas.getchannel("A")
    if style == "cartoon":
        outline = alpha.filter(ImageFilter.MaxFilter(9)).filter(ImageFilter.GaussianBlur(1))
        result = Image.new("RGBA", canvas.size, (52, 28, 20, 0))
        result.putalpha(outline)
        result.alpha_composite(canvas)
        return result, outline
    if style == "3d":
        shadow = ImageChops.offset(alpha, 0, 6).filter(ImageFilter.GaussianBlur(4)).point(lambda a: a * 2 // 5)
        result = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
        result.putalpha(shadow)
        result.alpha_composite(canvas)
        return result, alpha
    return canvas, alpha
