"""Composable Diffusion (arXiv 2206.01714) as a method: several weighted prompts per image, and how AND is read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmix.pipeline.batching import Batch
from jaxmix.pipeline.given import check_prompt
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import NOISE, Method, Request
from jaxmix.samplers import Composed
from jaxmix.types import InputError

AND = re.compile(r"(?:^|(?<=\s))AND(?=\s|$)")
"""The word, in capitals and between spaces. At either end of a prompt it has nothing to join, which is a mistake."""

LARGEST = float(np.finfo(np.float32).max)
"""Of a weight, which is float32 where it is at work."""

_NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|(?i:nan|inf|infinity))"
_WEIGHT = re.compile(rf"(?P<text>.*?)\s*:\s*(?P<weight>{_NUMBER})\s*", re.DOTALL)


class Part(NamedTuple):
    """One of the prompts that an image is composed of."""

    text: str
    weight: float = 1.0


def split_and(prompt: str) -> list[Part]:
    """Return the parts of a prompt such as "a cat :1.1 AND by the sea :0.8", each with its weight.

    Parts are joined by the word AND in capitals. What stands behind the last colon of a part is its weight if it is a
    number, and text otherwise; 1 is that of a part without. A prompt without AND is one part of weight 1, colons and
    all. Raises `InputError` for a part without text and a weight that is not finite.
    """
    pieces = AND.split(prompt)
    if len(pieces) == 1:
        return [Part(prompt)]
    parts = []
    for number, piece in enumerate(pieces, 1):
        found = _WEIGHT.fullmatch(piece)
        text, weight = (found["text"], float(found["weight"])) if found else (piece, 1.0)
        if not text.strip():
            raise InputError(
                f"found no text in part {number} of {len(pieces)} of {prompt!r}, expected a prompt on each side of AND"
            )
        if not abs(weight) <= LARGEST:
            raise InputError(f"found the weight {found and found['weight']} of {text.strip()!r}, expected a finite one")
        parts.append(Part(text.strip(), weight))
    return parts


@dataclasses.dataclass(frozen=True)
class ComposableDiffusion(Method):
    """Draw each image from its prompt and from further ones, all at once (arXiv 2206.01714).

    ``prompts`` has a list of further prompts an image, of any lengths. ``weights`` has a list of numbers an image, the
    first for the image's own prompt and then one for each further one; None is 1 for all. A prompt of negative weight
    is steered away from. The guidance scale multiplies all weights, so that strength grows with their sum; for the
    authors' rule, in which each weight is a guidance scale of its own, draw with ``guidance_scale=1``.

    Each prompt costs a row of the UNet an image in every step, also for the images that have fewer of them.
    """

    prompts: Sequence[Sequence[str]]
    weights: Sequence[Sequence[float]] | None = None

    when: ClassVar[int] = NOISE
    per_image: ClassVar[tuple[str, ...]] = ("prompts", "weights")

    @classmethod
    def parse(cls, prompts: Sequence[str]) -> tuple[list[str], ComposableDiffusion]:
        """Return the first part of each prompt that has parts joined by AND, and the method for the rest.

        Raises `InputError`, naming the image, as `split_and` does.
        """
        split = []
        for i, prompt in enumerate(prompts):
            try:
                split.append(split_and(prompt))
            except InputError as error:
                raise InputError(f"prompts[{i}]: {error}") from None
        further = [[part.text for part in parts[1:]] for parts in split]
        return [parts[0].text for parts in split], cls(further, [[part.weight for part in parts] for parts in split])

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse lists of another length, and weights that are not finite numbers."""
        for name, of_all in (("prompts", self.prompts), ("weights", self.weights)):
            if of_all is not None and (isinstance(of_all, str) or len(of_all) != request.n):
                raise InputError(
                    f"ComposableDiffusion.{name}: found {len(of_all)}, expected a list for each of {request.n} images"
                )
        for i, texts in enumerate(self.prompts):
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                raise InputError(f"ComposableDiffusion.prompts[{i}]: found {texts!r}, expected a list of prompts")
            for k, text in enumerate(texts):
                check_prompt(text, request.syntax, f"ComposableDiffusion.prompts[{i}][{k}]")
            self._weights(i)

    def further_prompts(self, n: int) -> list[list[str]]:
        """Return the further prompts of each image."""
        return [list(texts) for texts in self.prompts]

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the guidance without the branches that it is of."""
        return request.add(guidance=(Composed(jnp.ones((request.n, 1))),))

    def take(self, batch: Batch, n: int) -> ComposableDiffusion:
        """Return the method for the images of a batch, with as many prompts as the most of all: one program for all."""
        most = max((len(texts) for texts in self.prompts), default=0)
        lacking = [most - len(texts) for texts in self.prompts]
        prompts = [[*texts, *[""] * lack] for texts, lack in zip(self.prompts, lacking, strict=True)]
        weights = [[*self._weights(i), *[0.0] * lack] for i, lack in enumerate(lacking)]
        rows = batch.rows
        return ComposableDiffusion([prompts[i] for i in rows], [weights[i] for i in rows])

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add a branch for each further prompt, and the guidance.

        Where nothing is composed, all that is further being at weight 0, nothing is added or paid for.
        """
        weights = np.stack([self._weights(i) for i in range(request.n)])
        if (weights[:, 0] == 1).all() and not weights[:, 1:].any():
            return request
        branches = [1]
        for texts in zip(*self.prompts, strict=True):
            request, branch = request.with_branch(pipe, texts)
            branches.append(branch)
        return request.add(guidance=(Composed(jnp.asarray(weights), branches=tuple(branches)),))

    def _weights(self, i: int) -> np.ndarray:
        """Return the weights of an image, float32 (1 + its further prompts,)."""
        count = 1 + len(self.prompts[i])
        given = [1.0] * count if self.weights is None else self.weights[i]
        try:
            found = np.asarray(given, np.float64)
        except (TypeError, ValueError):
            found = np.full((), np.nan)
        if found.shape != (count,) or not (np.abs(found) <= LARGEST).all():
            raise InputError(
                f"ComposableDiffusion.weights[{i}]: found {given!r}, expected {count} finite numbers, one for the "
                "image's own prompt and one for each further one"
            )
        return found.astype(np.float32)
