"""DenseDiffusion (arXiv 2308.12964) as a method: prompts and masks in, controls and text states out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmix.controls import dense_diffusion as dense
from jaxmix.models.unet import sites
from jaxmix.pipeline.batches import inside
from jaxmix.pipeline.pipeline import Pipeline
from jaxmix.pipeline.request import Method, Request
from jaxmix.rows import numbers
from jaxmix.types import AnyArray, Array, InputError


class Segment(NamedTuple):
    """A part of a prompt, word for word, and where it goes: a mask (H, W) of the image's size.

    A pixel is inside where the mask is true, or at least half its full value: 0.5, or 128 in bytes.

    An empty phrase is a place without words, such as a background.
    """

    phrase: str
    mask: AnyArray


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


def place(pipe: Pipeline, prompts: Sequence[str], layouts: Sequence[Sequence[Segment]]) -> Placed:
    """Find each phrase in its prompt and shrink each mask to the latents; raises what `dense_diffusion` says."""
    if len(prompts) != len(layouts):
        raise InputError(f"layouts: found {len(layouts)}, expected one for each of the {len(prompts)} prompts")
    factor = pipe.vae.config.factor
    layouts = [[_segment(segment, i, j) for j, segment in enumerate(layout)] for i, layout in enumerate(layouts)]
    masks, owners, phrases = [], [], []
    most = max((len(layout) for layout in layouts), default=0)
    if most == 0:
        raise InputError("layouts: found no segment, expected at least one")
    if most > dense.MOST_SEGMENTS:
        raise InputError(f"layouts: found {most} segments, expected at most {dense.MOST_SEGMENTS}")
    size = np.shape(next(segment.mask for layout in layouts for segment in layout))
    ids, _ = pipe.tokenize(prompts)
    for i, layout in enumerate(layouts):
        held = np.zeros((most, size[0] // factor, size[1] // factor), bool)
        owner = np.full(ids.shape[1], -1)
        for j, segment in enumerate(layout):
            where = f"image {i}, segment {j} ({segment.phrase!r})"
            held[j] = _latent_mask(segment.mask, size, factor, where)
            if not segment.phrase.strip():
                continue
            tokens = pipe.token_ids(segment.phrase)
            start = dense.find_tokens(tokens, ids[i])
            if start is None:
                raise InputError(f"{where}: the phrase is not in the prompt {prompts[i]!r}, expected it word for word")
            owner[start : start + len(tokens)] = j
            phrases.append((i, start, segment.phrase))
        masks.append(held)
        owners.append(owner)
    return Placed(np.stack(masks), np.stack(owners), phrases)


def splice(pipe: Pipeline, context: np.ndarray, placed: Placed) -> np.ndarray:
    """Return text states (n, s, d) with those of each phrase, encoded alone, in its place in the sentence."""
    context = np.array(context)
    names = sorted({phrase for _, _, phrase in placed.phrases})
    if not names:
        return context
    alone = dict(zip(names, np.asarray(pipe.encode_prompt(names).context), strict=True))
    for i, start, phrase in placed.phrases:
        n = len(pipe.token_ids(phrase))
        context[i, start : start + n] = alone[phrase][1 : 1 + n]
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
        place(pipe, request.prompts, self.layouts)

    def sketch(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control, which needs no text encoder."""
        return request.add(controls=(self.control(pipe, place(pipe, request.prompts, self.layouts)),))

    def apply(self, pipe: Pipeline, request: Request) -> Request:
        """Add the control, and put the states of the phrases into those of the prompts."""
        placed = place(pipe, request.prompts, self.layouts)
        request = request.add(controls=(self.control(pipe, placed),))
        if not self.splice:
            return request
        text = request.states(pipe)
        context = splice(pipe, np.asarray(text.context[:, 1]), placed)
        spliced = dataclasses.replace(text, context=text.context.at[:, 1].set(context))
        return dataclasses.replace(request, text=spliced)

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


class Placed(NamedTuple):
    """Layouts at the size of the latents: masks (n, m, h, w), each token's segment (n, s), -1 for none, and where
    each phrase stands, (image, first token, phrase)."""

    masks: np.ndarray
    owners: np.ndarray
    phrases: list[tuple[int, int, str]]


def _segment(segment: Any, i: int, j: int) -> Segment:
    """Return a segment from itself, or from a pair (phrase, mask)."""
    if not isinstance(segment, (tuple, list)) or len(segment) != 2 or not isinstance(segment[0], str):
        raise InputError(f"image {i}, segment {j}: found {type(segment).__name__}, expected a Segment(phrase, mask)")
    return Segment(*segment)


def _latent_mask(mask: AnyArray, size: tuple[int, ...], factor: int, where: str) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.shape != size:
        raise InputError(f"{where}: found a mask of shape {mask.shape}, expected {size}, that of the first")
    if any(side % factor for side in size):
        raise InputError(f"{where}: found a mask of {size[0]} x {size[1]} pixels, expected multiples of {factor}")
    small = inside(mask)[::factor, ::factor]
    if not small.any():
        raise InputError(f"{where}: the mask is empty at the size of the latents, expected a pixel inside")
    return small
