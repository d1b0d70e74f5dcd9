"""DenseDiffusion and StyleAligned for a pipeline: prompts, masks and groups in, controls out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmix.controls import dense_diffusion as dense
from jaxmix.controls import style_aligned as aligned
from jaxmix.models.unet import norm_sites, sites
from jaxmix.types import AnyArray, Array, InputError

if TYPE_CHECKING:
    from jaxmix.pipeline import Pipeline

ATTN1 = r"\.attn1$"


# DenseDiffusion -------------------------------------------------------------------------------------------------------


class Segment(NamedTuple):
    """A part of a prompt, word for word, and where it goes: a mask (H, W) of the image's size, true (or > 0) inside.

    An empty phrase is a place without words, such as a background.
    """

    phrase: str
    mask: AnyArray


class DenseLayout(NamedTuple):
    """What `Pipeline.generate` takes of a layout: ``controls=(layout.control,), context=layout.context``."""

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
    gets, each a number or one an image; ``window`` is the share of the steps in which they act. With ``splice`` the
    states of a phrase encoded alone stand in the place of those in the sentence, at all steps, strength or not. Masks
    are (H, W) in pixels of the image, of one size. SDXL: the pooled text knows nothing of the layout, and its authors
    found the effect weaker there.

    Raises `InputError`, naming the image and the segment, for a phrase that is not in its prompt (where the reference
    silently skips short ones), a mask that is empty or of another size than the first, and too many segments.
    """
    if len(prompts) != len(layouts):
        raise InputError(f"layouts: found {len(layouts)}, expected one for each of the {len(prompts)} prompts")
    factor = pipe.vae.config.factor
    masks, owners = [], []
    most = max((len(layout) for layout in layouts), default=0)
    if most == 0:
        raise InputError("layouts: found no segment, expected at least one")
    if most > dense.MOST_SEGMENTS:
        raise InputError(f"layouts: found {most} segments, expected at most {dense.MOST_SEGMENTS}")
    size = np.shape(next(segment.mask for layout in layouts for segment in layout))
    ids, _ = pipe.tokenize(prompts)
    context = np.array(_states(pipe, prompts))
    phrases = sorted({segment.phrase for layout in layouts for segment in layout if segment.phrase.strip()})
    alone = dict(zip(phrases, _states(pipe, phrases), strict=True)) if phrases else {}
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
            if splice:
                context[i, start : start + len(tokens)] = alone[segment.phrase][1 : 1 + len(tokens)]
        masks.append(held)
        owners.append(owner)
    hw = (size[0] // factor, size[1] // factor)
    control = dense.bind(
        np.stack(masks),
        np.stack(owners),
        _grids(pipe, hw),
        cross=cross,
        self_=self_,
        kappa=area,
        sites=sites,
        window=window,
        strict=strict,
    )
    return DenseLayout(control, jnp.asarray(context))


def _states(pipe: Pipeline, prompts: Sequence[str]) -> np.ndarray:
    encoded = pipe.encode_prompt(prompts)
    return np.asarray(encoded if pipe.text_encoder_2 is None else encoded[0])


def _latent_mask(mask: AnyArray, size: tuple[int, ...], factor: int, where: str) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.shape != size:
        raise InputError(f"{where}: found a mask of shape {mask.shape}, expected {size}, that of the first")
    if any(side % factor for side in size):
        raise InputError(f"{where}: found a mask of {size[0]} x {size[1]} pixels, expected multiples of {factor}")
    # Any value above the middle of what the type holds is inside.
    middle = 127 if mask.dtype == np.uint8 and mask.max(initial=0) > 1 else 0.5
    small = mask[::factor, ::factor] > middle if mask.dtype != bool else mask[::factor, ::factor]
    if not small.any():
        raise InputError(f"{where}: the mask is empty at the size of the latents, expected a pixel inside")
    return small


def _grids(pipe: Pipeline, hw: tuple[int, int]) -> list[tuple[int, int]]:
    return sorted({site.hw for site in sites(pipe.unet.config, hw)})


# StyleAligned ---------------------------------------------------------------------------------------------------------


def style_aligned(
    pipe: Pipeline,
    groups: Sequence[int],
    *,
    level: float = 0.0,
    share_group_norm: bool | None = None,
    sites: str | None = None,
    **options: Any,
) -> aligned.StyleAlignedControl:
    """Draw groups of images in one style, that of the first of each (arXiv 2312.02133).

    ``groups`` are the sizes of the groups, which follow each other in the prompts. ``level`` leaves about that share of
    the attn1 layers to themselves, ``sites`` chooses them by a pattern instead. ``share_group_norm`` pools the
    statistics of every GroupNorm with the reference's: None is the authors' choice, on for SD 1 and 2 and off for SDXL.
    The other ``options`` (strength, scale, shift, adain, full, swap, window) are those of
    `jaxmix.controls.style_aligned.bind`.

    ``swap`` is Visual Style Prompting (arXiv 2402.12974): keys and values are the reference's alone, queries stay as
    they are, and by default it acts in the last up block with attention.
    """
    swap = bool(options.get("swap", False))
    cfg, hw = pipe.unet.config, pipe.latent_shape[:2]
    if swap:
        options.setdefault("adain", ())
    norms = (not swap and pipe.text_encoder_2 is None) if share_group_norm is None else share_group_norm
    names = [site.name for site in _sites(pipe, hw) if site.name.endswith(".attn1")]
    if sites is None:
        if swap:
            names = [name for name in names if name.startswith(up_blocks(names)[-1] + ".")]
        else:
            # In the order in which the reference counts them: the middle block comes last.
            names.sort(key=lambda name: name.startswith("mid_block"))
            names = [n for n, alone in zip(names, aligned.unshared(len(names), level), strict=True) if not alone]
        sites = "|".join(f"^{re.escape(name)}$" for name in names) or None
        if sites is None or (level == 0 and not swap):
            sites = ATTN1
        if level == 1 and not swap and not norms:
            options["strength"] = 0.0  # nothing is shared
    elif level:
        raise InputError("level and sites: found both, expected the one or the other")
    if norms:
        sites = "|".join([sites, *(f"^{re.escape(site.name)}$" for site in norm_sites(cfg, hw))])
    return aligned.bind(groups, sites=sites, norms=norms, **options)


def _sites(pipe: Pipeline, hw: tuple[int, int]) -> Any:
    return sites(pipe.unet.config, hw)


def up_blocks(names: Sequence[str]) -> list[str]:
    """Return the up blocks that hold the named sites, in the order in which they run."""
    return sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("up_blocks.")})
