"""Paint-with-words (eDiff-I, arXiv 2211.01324, section 5) as a method: prompts and masks in, a control out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from jaxmix.controls import paint_with_words as paint
from jaxmix.models.unet import sites
from jaxmix.pipeline import layouts as shared
from jaxmix.pipeline.chunks import PLAIN, Reading
from jaxmix.pipeline.layouts import Placed, Segment
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import Method, Request
from jaxmix.rows import numbers
from jaxmix.samplers.sigmas import training_sigmas
from jaxmix.types import AnyArray, InputError


@dataclasses.dataclass(frozen=True)
class PaintWithWords(Method):
    """Give the words of each segment more attention at its place; see `jaxmix.controls.paint_with_words`.

    ``layouts`` has a list of segments per image, in which masks may have any values from 0 to 1 (0 to 255 in bytes) and
    each segment its own weight; segments without words change nothing. ``weight`` is a number or one per image.
    ``by`` is "max", or "std" for the deviation of the scores in place of their maximum. ``window`` is the share of the
    steps in which the paint acts, and ``sites`` are among attn2. SDXL: a token is a phrase's if it is for either text
    encoder, and the pooled text knows nothing of the layout.

    Raises `InputError`, naming the image and the segment, for a phrase that is not in its prompt, a mask that is empty,
    of values out of range or of another size than the first, and a weight that is not a finite number.
    """

    layouts: Sequence[Sequence[Segment]]
    weight: float | Sequence[float] = 0.4
    by: str = "max"
    window: tuple[float, float] = (0.0, 1.0)
    sites: str = paint.ATTN2

    title: ClassVar[str] = "paint-with-words"
    per_image: ClassVar[tuple[str, ...]] = ("layouts", "weight")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse layouts for other prompts, and whatever else a layout cannot be."""
        if len(self.layouts) != request.n:
            raise InputError(f"layouts: found {len(self.layouts)}, expected one for each of the {request.n} prompts")
        super().check(pipe, request)
        numbers("weight", self.weight, request.n, "prompts")
        for layout in shared.place(pipe, request.prompts, self.layouts, request.reading, request.prompts_2):
            for segment, _, where in layout:
                _levels(segment.mask, where)

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control of the first image that has segments: the masks of many images are large."""
        first = next(i for i, layout in enumerate(self.layouts) if len(layout))
        one = dataclasses.replace(self, layouts=[self.layouts[first]], weight=0.0)
        return request.add(controls=(one._of(pipe, request.take([first])),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control, unless none of the images has a segment."""
        if not any(map(len, self.layouts)):
            return request
        return request.add(controls=(self._of(pipe, request),))

    def _of(self, pipe: Pipeline, request: Request) -> paint.PaintControl:
        return self.control(pipe, request.prompts, request.reading, request.prompts_2, request.tokens(pipe))

    def control(
        self,
        pipe: Pipeline,
        prompts: Sequence[str],
        reading: Reading = PLAIN,
        prompts_2: Sequence[str | None] | None = None,
        tokens: int | None = None,
    ) -> paint.PaintControl:
        """Return the control of the layouts of prompts, whose text has so many ``tokens`` (None: those of a chunk)."""
        placed = shared.place(pipe, prompts, self.layouts, reading, prompts_2)
        height, width = shared.size_of(placed)
        factor = pipe.vae.config.factor
        grids = sorted({site.hw for site in sites(pipe.unet.config, (height // factor, width // factor))})
        drawn = [_painted(layout, tokens or pipe.text_length, grids) for layout in placed]
        return paint.bind(
            {grid: np.stack([image[grid] for image in drawn]) for grid in drawn[0]},
            training_sigmas(pipe.schedule),
            weight=self.weight,
            by=self.by,
            sites=self.sites,
            window=self.window,
        )


def _painted(layout: Sequence[Placed], tokens: int, grids: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
    """Return what one image's segments with words make of each grid."""
    masks, weights, words = [], [], []
    for segment, phrase, where in layout:
        if phrase is not None:
            masks.append(_levels(segment.mask, where))
            weights.append(segment.weight)
            words.append(np.concatenate([phrase.tokens(encoder) for encoder in range(len(phrase.lengths))]))
    return paint.paint(masks, weights, words, tokens, grids)


def _levels(mask: AnyArray, where: str) -> np.ndarray:
    """Return a mask as values from 0 to 1."""
    mask = np.asarray(mask)
    if mask.dtype == np.uint8 and mask.max() > 1:
        return mask / np.float32(255)
    mask = mask.astype(np.float32)
    if not mask.min() >= 0 or not mask.max() <= 1:  # nan is neither
        raise InputError(f"{where}: found a mask of {mask.min():g} to {mask.max():g}, expected values from 0 to 1")
    if not mask.any():
        raise InputError(f"{where}: the mask is empty, expected a value above 0")
    return mask
