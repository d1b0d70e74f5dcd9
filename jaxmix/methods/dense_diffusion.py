"""DenseDiffusion (arXiv 2308.12964) as a method: prompts and masks in, controls and text states out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmix.controls import dense_diffusion as dense
from jaxmix.models.unet import sites
from jaxmix.pipeline import layouts as shared
from jaxmix.pipeline.batching import inside
from jaxmix.pipeline.chunks import PLAIN, Reading
from jaxmix.pipeline.layouts import Segment
from jaxmix.pipeline.phrases import Phrase, encoded_alone
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import Method, Request
from jaxmix.rows import numbers
from jaxmix.types import Array, InputError


class DenseLayout(NamedTuple):
    """What a layout is for the UNet: the control, and the prompts' text states (n, s, d) with the phrases' in them."""

    control: dense.DenseDiffusionControl
    context: Array


def dense_diffusion(
    pipe: Pipeline,
    prompts: Sequence[str],
    layouts: Sequence[Sequence[Segment]],
    *,
    cross: float | Sequence[float] = 1.0,
    self_: float | Sequence[float] = 0.3,
    area: float | Sequence[float] = 1.0,
    window: tuple[float, float] = (0.0, 0.3),
    sites: str = r"\.attn[12]$",
    splice: bool = True,
    strict: bool = False,
) -> DenseLayout:
    """Lay out each prompt by its own segments (arXiv 2308.12964); see `jaxmix.controls.dense_diffusion`.

    ``cross`` and ``self_`` weigh the modulation of cross- and self-attention, ``area`` how much less a large segment
    gets, each one number or one per image; ``window`` is the share of the steps in which they act. With ``splice`` the
    states of a phrase encoded alone stand in the place of those in the sentence, at all steps, strength or not. Masks
    are (H, W) in pixels of the image, of one size. SDXL: the pooled text knows nothing of the layout, and its authors
    found the effect weaker there.

    Raises `InputError`, naming the image and the segment, for a phrase that is not in its prompt (where the reference
    silently skips short ones), a mask that is empty or of another size than the first, and too many segments.
    """
    method = DenseDiffusion(layouts, cross, self_, area, window, sites, splice, strict)
    placed = place(pipe, prompts, layouts)
    context = np.array(pipe.encode_prompt(prompts).context)
    return DenseLayout(method.control(pipe, placed), jnp.asarray(_splice(pipe, context, placed) if splice else context))


class Placed(NamedTuple):
    """Layouts at the size of the latents: masks (n, m, h, w), the segment of each token in each text encoder
    (n, encoders, s), -1 for none, and the phrases, each with its image."""

    masks: np.ndarray
    owners: np.ndarray
    phrases: list[tuple[int, Phrase]]


def place(
    pipe: Pipeline,
    prompts: Sequence[str],
    layouts: Sequence[Sequence[Segment]],
    reading: Reading = PLAIN,
    prompts_2: Sequence[str | None] | None = None,
    tokens: int | None = None,
) -> Placed:
    """Find each phrase in its prompt and shrink each mask to the latents; raises what `dense_diffusion` says.

    Where a phrase stands more than once, the first place is meant; of segments that share tokens the last one has them.
    """
    segments = shared.place(pipe, prompts, layouts, reading, prompts_2)
    factor, most = pipe.vae.config.factor, max(map(len, segments))
    if most > dense.MOST_SEGMENTS:
        raise InputError(f"layouts: found {most} segments, expected at most {dense.MOST_SEGMENTS}")
    height, width = shared.size_of(segments)
    masks = np.zeros((len(prompts), most, height // factor, width // factor), bool)
    owners = np.full((len(prompts), 1 + (pipe.text_encoder_2 is not None), tokens or pipe.text_length), -1)
    phrases = []
    for i, layout in enumerate(segments):
        for j, (segment, phrase, where) in enumerate(layout):
            if segment.weight != 1:
                raise InputError(f"{where}: weight: found {segment.weight:g}, expected 1: DenseDiffusion weighs none")
            masks[i, j] = inside(segment.mask)[::factor, ::factor]
            if not masks[i, j].any():
                raise InputError(f"{where}: the mask is empty at the size of the latents, expected a pixel inside")
            if phrase is not None:
                phrases.append((i, phrase))
                for encoder, owner in enumerate(owners[i]):
                    owner[phrase.tokens(encoder, 1)] = j
    return Placed(masks, owners, phrases)


def splice(pipe: Pipeline, context: np.ndarray, placed: Placed, reading: Reading = PLAIN) -> np.ndarray:
    """Return text states (n, s, d) with those of each phrase, encoded alone, in its place in the sentence."""
    context = np.array(context)
    for image, tokens, channels, states in encoded_alone(pipe, placed.phrases, reading):
        context[image, tokens, channels] = states
    return context


_splice = splice  # the function below has a flag of that name


@dataclasses.dataclass(frozen=True)
class DenseDiffusion(Method):
    """Lay out each prompt by its own segments; see `dense_diffusion` for the fields.

    ``layouts`` has one list of segments per image; ``cross``, ``self_`` and ``area`` are one number, or one per image.
    """

    layouts: Sequence[Sequence[Segment]]
    cross: float | Sequence[float] = 1.0
    self_: float | Sequence[float] = 0.3
    area: float | Sequence[float] = 1.0
    window: tuple[float, float] = (0.0, 0.3)
    sites: str = r"\.attn[12]$"
    splice: bool = True
    strict: bool = False

    per_image: ClassVar[tuple[str, ...]] = ("layouts", "cross", "self_", "area")

    def check(self, pipe: Pipeline, request: Request) -> None:
        """Refuse layouts for other prompts, and masks of another size than the images."""
        if len(self.layouts) != request.n:
            raise InputError(f"layouts: found {len(self.layouts)}, expected one for each of the {request.n} prompts")
        super().check(pipe, request)
        for name in ("cross", "self_", "area"):
            numbers(name.rstrip("_"), getattr(self, name), request.n, "prompts")
        self._place(pipe, request)

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control, which needs no text encoder."""
        return request.add(controls=(self.control(pipe, self._place(pipe, request)),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control, and put the states of the phrases into those of the prompts."""
        placed = self._place(pipe, request)
        request = request.add(controls=(self.control(pipe, placed),))
        if not self.splice:
            return request
        text = request.states(pipe)
        context = splice(pipe, np.asarray(text.context[:, 1]), placed, request.reading)
        spliced = dataclasses.replace(text, context=text.context.at[:, 1].set(context))
        return dataclasses.replace(request, text=spliced)

    def _place(self, pipe: Pipeline, request: Request) -> Placed:
        return place(pipe, request.prompts, self.layouts, request.reading, request.prompts_2, request.tokens(pipe))

    def control(self, pipe: Pipeline, placed: Placed) -> dense.DenseDiffusionControl:
        """Return the control of placed layouts."""
        return dense.bind(
            placed.masks,
            placed.owners,
            sorted({site.hw for site in sites(pipe.unet.config, placed.masks.shape[2:])}),
            cross=self.cross,
            self_=self.self_,
            kappa=self.area,
            sites=self.sites,
            window=self.window,
            strict=self.strict,
        )
