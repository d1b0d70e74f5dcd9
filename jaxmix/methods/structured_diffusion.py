"""Structured Diffusion (arXiv 2212.05032) as a method: prompts and their phrases in, a control out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxmix.controls import structured_diffusion as structured
from jaxmix.pipeline.phrases import Phrase, encoded_alone, find_phrase
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import Method, Request
from jaxmix.rows import numbers
from jaxmix.types import InputError


@dataclasses.dataclass(frozen=True)
class StructuredDiffusion(Method):
    """Keep the attributes of each phrase with it; see `jaxmix.controls.structured_diffusion`.

    ``phrases`` has a list of an image's phrases, word for word in its prompt, such as "a red car" and "a white dog":
    the authors take all noun phrases that a parser finds, also those within others. If a phrase occurs more than
    once, its first occurrence counts. An image without phrases is drawn as usual. ``strength`` (1 in the paper, 0
    for nothing) is a number or one per image; ``window`` is the share of the steps in which the values are mixed, and
    ``sites`` are among attn2. SDXL: the states of each text encoder are spliced at its own tokens.

    Raises `InputError`, naming the image and the phrase, for one that is not in its prompt.
    """

    phrases: Sequence[Sequence[str]]
    strength: float | Sequence[float] = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    sites: str = structured.ATTN2

    per_image: ClassVar[tuple[str, ...]] = ("phrases", "strength")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse phrases for other prompts, or that are not in them."""
        if isinstance(self.phrases, str) or len(self.phrases) != request.n:
            raise InputError(f"phrases: found {len(self.phrases)}, expected a list for each of the {request.n} prompts")
        super().check(pipe, request)
        numbers("strength", self.strength, request.n, "prompts")
        self._find(pipe, request)

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add a control that changes nothing."""
        return request.add(controls=(self._bind(np.zeros((request.n, 1, 1), np.float32)),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control, unless none of the images has a phrase."""
        found = self._find(pipe, request)
        if not any(found):
            return request
        text = request.states(pipe)
        context = np.asarray(text.context[:, 1].astype(jnp.float32))
        change = np.zeros_like(context)
        phrases = [(i, phrase) for i, some in enumerate(found) for phrase in some]
        for image, tokens, channels, states in encoded_alone(pipe, phrases, request.reading):
            # c_i and c_0 differ in this place alone.
            change[image, tokens, channels] += (states - context[image, tokens, channels]) / (1 + len(found[image]))
        return dataclasses.replace(request, text=text).add(controls=(self._bind(change),))

    def _bind(self, change: np.ndarray) -> structured.StructuredControl:
        return structured.bind(change, strength=self.strength, sites=self.sites, window=self.window)

    def _find(self, pipe: Pipeline, request: Request) -> list[list[Phrase]]:
        held = []
        for i, (prompt, phrases) in enumerate(zip(request.prompts, self.phrases, strict=True)):
            if isinstance(phrases, str) or not all(isinstance(phrase, str) for phrase in phrases):
                raise InputError(f"image {i}: phrases: found {phrases!r}, expected a list of parts of its prompt")
            how = request.reading, None if request.prompts_2 is None else request.prompts_2[i]
            named = [(p, f"image {i}, phrase {j} ({p!r})") for j, p in enumerate(phrases)]
            held.append([find_phrase(pipe, prompt, p, where, *how) for p, where in named])
        return held
