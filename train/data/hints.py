"""What a ControlNet is shown beside a picture: a second picture of the row, or a map made of the picture itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmix.preprocessors import parse, preprocess
from jaxmix.types import InputError
from train.data.buckets import Size, crop_to_bucket
from train.data.rows import BadRow

Hint = Callable[[dict[str, Any], np.ndarray, Size, tuple[float, float], bool], np.ndarray]
"""(row of a source, its picture as cropped, the bucket, where it was cropped, mirrored?) -> hint uint8 (H, W, 3)."""

_ROUNDING = 2  # pixels by which the shapes of two pictures of a pair may differ


def make_hint(column: str, how: str) -> Hint | None:
    """Return what makes hints, None if there are to be none.

    With a ``column`` the hint is the row's second picture, cropped and mirrored like the first; ``how`` is a
    preprocessor (`jaxmix.preprocessors`) of it, or of the cropped picture if there is no column. Raises `InputError`
    for an unknown preprocessor, and if what it needs is not installed.
    """
    try:
        parse(how or "none")
        preprocess(np.zeros((32, 32, 3), np.uint8), how or "none")
    except InputError as error:
        raise InputError(f"preprocess: {error}") from None
    if not column and how in ("", "none"):
        return None

    def hint(row: dict[str, Any], image: np.ndarray, bucket: Size, at: tuple[float, float], flip: bool) -> np.ndarray:
        if not column:
            return preprocess(image, how)
        second, (height, width) = row["hint"], row["image"].shape[:2]
        if abs(second.shape[0] * width - second.shape[1] * height) > _ROUNDING * max(height, width):
            raise BadRow(
                f"{column}: found {second.shape[0]} x {second.shape[1]}, expected the shape of its picture, "
                f"{height} x {width}"
            )
        return preprocess(crop_to_bucket(second, bucket, at, flip)[0], how or "none")

    return hint


def hint_name(column: str, how: str) -> str:
    """Return what tells hints from others, such as "canny:100,200 of photo"; "" without hints."""
    name, numbers = parse(how or "none")
    told = "" if name == "none" else f"{name}:{','.join(f'{x:g}' for x in numbers)}" if numbers else name
    return " of ".join(x for x in (told, column) if x)
