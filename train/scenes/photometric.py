"""Aesthetic labels as pixel operations whose effect can be measured by formula."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageFilter

DIMENSIONS: tuple[str, ...] = ("color", "light", "focus", "composition")

SATURATION = {1: 1.7, -1: 0.3}
GAMMA = {1: 0.6, -1: 1.9}
BLUR = 0.025  # standard deviation, as a share of the width
SHARPEN = 0.8  # weight of what the blur removes

LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def blur(image: np.ndarray) -> np.ndarray:
    """Blur uint8 (h, w, 3) by a Gaussian of 2.5 % of the width."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(BLUR * image.shape[1])))


def apply_labels(image: np.ndarray, labels: Mapping[str, int]) -> np.ndarray:
    """Apply color, light and focus labels (+1, 0, -1) to float32 (h, w, 3) in [0, 1]; returns uint8.

    Composition is up to the scene, which decides where the objects are.
    """
    if labels["color"]:
        grey = (image @ LUMA)[..., None]
        image = np.clip(grey + np.float32(SATURATION[labels["color"]]) * (image - grey), 0, 1)
    if labels["light"]:
        image = np.clip(image, 0, 1) ** np.float32(GAMMA[labels["light"]])
    pixels = (np.clip(image, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
    if labels["focus"] < 0:
        return blur(pixels)
    if labels["focus"] > 0:
        detail = pixels.astype(np.float32) - blur(pixels)
        return np.clip(pixels + np.float32(SHARPEN) * detail + np.float32(0.5), 0, 255).astype(np.uint8)
    return pixels


def measure(image: np.ndarray) -> dict[str, float]:
    """Return the number that each label affects, from uint8 (h, w, 3); a +1 label increases its number.

    color: mean of max - min over the channels; light: mean luma; focus: mean absolute Laplacian of the luma, all in
    [0, 1]. Composition needs the masks: see `off_centre`.
    """
    x = image.astype(np.float32) / 255
    luma = x @ LUMA
    laplacian = 4 * luma[1:-1, 1:-1] - luma[:-2, 1:-1] - luma[2:, 1:-1] - luma[1:-1, :-2] - luma[1:-1, 2:]
    return {
        "color": float((x.max(-1) - x.min(-1)).mean()),
        "light": float(luma.mean()),
        "focus": float(np.abs(laplacian).mean()),
    }


def off_centre(mask: np.ndarray) -> float:
    """Return how far the centre of a mask's bounding box is from the picture's, as a share of the width."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    height, width = mask.shape
    down = (rows[0] + rows[-1] + 1) / 2 - height / 2
    right = (columns[0] + columns[-1] + 1) / 2 - width / 2
    return float(np.hypot(down, right) / width)
