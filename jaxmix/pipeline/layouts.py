"""Layouts: phrases of a prompt and where each goes, for every method that draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmix.pipeline.chunks import PLAIN, Reading
from jaxmix.pipeline.parts import Parts
from jaxmix.pipeline.phrases import Phrase, find_phrase
from jaxmix.types import AnyArray, InputError


class Segment(NamedTuple):
    """A part of a prompt, word for word, and where it goes: a mask (H, W) of the image's size.

    For DenseDiffusion a pixel is inside where the mask is true, or at half of the whole or above: 0.5, or 128 in bytes;
    paint-with-words takes what lies between as it is. ``weight`` is paint-with-words' alone, 0.2 to 2 in its paper.

    An empty phrase is a place without words, such as a background.
    """

    phrase: str
    mask: AnyArray
    weight: float = 1.0


class Placed(NamedTuple):
    """A segment with the tokens of its phrase, None without words, and what messages call it."""

    segment: Segment
    phrase: Phrase | None
    where: str


def place(
    parts: Parts,
    prompts: Sequence[str],
    layouts: Sequence[Sequence[Segment]],
    reading: Reading = PLAIN,
    prompts_2: Sequence[str | None] | None = None,
) -> list[list[Placed]]:
    """Return the segments of each prompt with the places of their phrases; one may be a pair (phrase, mask), too.

    Raises `InputError`, naming the image and the segment, for a phrase that is not in its prompt, a mask of another
    size than the first or of sides that the autoencoder does not divide, and a weight that is not a finite number.
    """
    if len(prompts) != len(layouts):
        raise InputError(f"layouts: found {len(layouts)}, expected one for each of the {len(prompts)} prompts")
    if not any(len(layout) for layout in layouts):
        raise InputError("layouts: found no segment, expected at least one")
    factor, size = parts.vae.config.factor, None
    held: list[list[Placed]] = []
    for i, layout in enumerate(layouts):
        held.append([])
        for j, given in enumerate(layout):
            segment = _segment(given, i, j)
            where = f"image {i}, segment {j} ({segment.phrase!r})"
            shape = np.shape(segment.mask)
            size = shape if size is None else size
            if len(shape) != 2 or shape != size:
                raise InputError(f"{where}: found a mask of shape {shape}, expected {size}, that of the first")
            if any(side % factor for side in shape):
                raise InputError(
                    f"{where}: found a mask of {shape[0]} x {shape[1]} pixels, expected multiples of {factor}"
                )
            found = None
            if segment.phrase.strip():
                second = None if prompts_2 is None else prompts_2[i]
                found = find_phrase(parts, prompts[i], segment.phrase, where, reading, second)
            held[i].append(Placed(segment, found, where))
    return held


def size_of(placed: Sequence[Sequence[Placed]]) -> tuple[int, int]:
    """Return the height and width that the masks have."""
    height, width = np.shape(next(one.segment.mask for layout in placed for one in layout))
    return height, width


def _segment(segment: Any, i: int, j: int) -> Segment:
    where = f"image {i}, segment {j}"
    if not isinstance(segment, (tuple, list)) or len(segment) not in (2, 3) or not isinstance(segment[0], str):
        raise InputError(f"{where}: found {type(segment).__name__}, expected a Segment(phrase, mask)")
    made = Segment(*segment)
    number = isinstance(made.weight, (int, float, np.number)) and not isinstance(made.weight, bool)
    if not number or not math.isfinite(made.weight):
        raise InputError(f"{where} ({made.phrase!r}): weight: found {made.weight!r}, expected a number")
    return made
