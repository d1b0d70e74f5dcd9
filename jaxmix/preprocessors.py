"""Maps for ControlNets from pictures, as the nets that people have were trained on them.

A preprocessor is named, with numbers of its own after a colon where it has any, "canny:100,200". Pictures and maps are
uint8 (h, w, 3). The maths is OpenCV's (the extra "preprocess"), since its Canny is the one that the published nets saw.
Depth, poses and other maps that need a network come from other tools ("none" takes a map as it is).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmix.types import InputError, shown

Map = Callable[[Any, np.ndarray, Sequence[float]], np.ndarray]


def canny(cv2: Any, picture: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
    """Return white edges on black: OpenCV's Canny (aperture 3, L1 norm) between a low and a high threshold."""
    return _three(cv2.Canny(np.ascontiguousarray(picture), *numbers))


def tile(cv2: Any, picture: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
    """Return the picture without its detail: averaged over squares of a power of two, and enlarged by pyramids."""
    rate = int(numbers[0])
    if rate != numbers[0] or rate < 2 or rate & (rate - 1):
        raise InputError(f"tile: found a rate of {numbers[0]:g}, expected 2, 4, 8, 16 or another power of two")
    h, w = picture.shape[:2]
    small = cv2.resize(picture, (max(1, w // rate), max(1, h // rate)), interpolation=cv2.INTER_AREA)
    for _ in range(int(math.log2(rate))):
        small = cv2.pyrUp(small)
    return small if small.shape == picture.shape else cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


def blur(cv2: Any, picture: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
    """Return the picture under a Gaussian of a standard deviation in pixels."""
    if numbers[0] <= 0:
        raise InputError(f"blur: found {numbers[0]:g}, expected a standard deviation above 0, in pixels")
    return cv2.GaussianBlur(picture, (0, 0), numbers[0])


def gray(cv2: Any, picture: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
    """Return the picture without colour: the luma of Rec. 601."""
    return _three(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))


def recolor(cv2: Any, picture: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
    """Return the picture's lightness (L of CIE Lab), to the power of a gamma."""
    if numbers[0] <= 0:
        raise InputError(f"recolor: found {numbers[0]:g}, expected a gamma above 0")
    light = cv2.cvtColor(picture, cv2.COLOR_RGB2LAB)[..., 0].astype(np.float32) / 255
    return _three((light ** numbers[0] * 255).clip(0, 255).astype(np.uint8))


def scribble(cv2: Any, picture: np.ndarray, numbers: Sequence[float]) -> np.ndarray:
    """Return white strokes on black where a wide blur is lighter than a narrow one (XDoG), by more than half of it."""
    narrow, wide = (cv2.GaussianBlur(picture.astype(np.float32), (0, 0), sigma) for sigma in (0.5, 5.0))
    dog = (255 - np.min(wide - narrow, axis=2)).clip(0, 255).astype(np.uint8)
    return _three(np.where(2 * (255 - dog.astype(np.int32)) > numbers[0], 255, 0).astype(np.uint8))


KINDS: dict[str, tuple[Map, tuple[float, ...], str]] = {
    "canny": (canny, (100, 200), "low and high threshold"),
    "tile": (tile, (8,), "pixels averaged, a power of two"),
    "blur": (blur, (9,), "standard deviation in pixels"),
    "gray": (gray, (), ""),
    "recolor": (recolor, (1,), "gamma"),
    "scribble": (scribble, (32,), "threshold"),
}
"""Preprocessors by name: what makes the map, its default numbers, and what these are."""

NAMES = (*KINDS, "none")


def parse(text: str) -> tuple[str, tuple[float, ...]]:
    """Return the name and the numbers of "name" or "name:number,number"; raises `InputError` for anything else."""
    name, colon, rest = str(text).strip().partition(":")
    if name not in NAMES:
        raise InputError(f"found {shown(text)}, expected one of {', '.join(NAMES)}")
    if name == "none":
        default: tuple[float, ...] = ()
        told = ""
    else:
        _, default, told = KINDS[name]
    if not colon:
        return name, default
    try:
        numbers = tuple(float(x) for x in rest.split(","))
    except ValueError:
        numbers = (math.nan,)
    if len(numbers) != len(default) or not all(math.isfinite(x) for x in numbers):
        wanted = f"{name}:{','.join(f'{x:g}' for x in default)} ({told})" if default else f"{name} without numbers"
        raise InputError(f"found {shown(text)}, expected such as {wanted}")
    return name, numbers


def preprocess(picture: np.ndarray, how: str) -> np.ndarray:
    """Return the map of a picture, both uint8 (h, w, 3).

    ``how`` is a name of `NAMES`, with numbers of its own or its defaults (`parse`). Raises `InputError` for an unknown
    one, and if OpenCV is not installed.
    """
    name, numbers = parse(how)
    if name == "none":
        return picture
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise InputError(f"{name}: found {picture.dtype} {picture.shape}, expected a picture uint8 (height, width, 3)")
    return KINDS[name][0](_opencv(name), np.ascontiguousarray(picture), numbers)


def _opencv(name: str) -> Any:
    try:
        import cv2
    except ImportError:
        raise InputError(
            f"{name}: found no OpenCV, expected the extra: pip install 'jaxmix-diffusion[preprocess]' "
            "(opencv-python-headless)"
        ) from None
    return cv2


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)
