"""The training-free methods for a pipeline: prompts, masks and pictures in, controls out."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmix.control import QKV
from jaxmix.controls import dense_diffusion as dense
from jaxmix.controls import style_aligned as aligned
from jaxmix.controls.style_id import GAMMA, TEMPERATURE, StyleIDControl, StyleIDRowsControl, adain_latents
from jaxmix.models.unet import norm_sites, sites
from jaxmix.programs import Pinned
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
            names = [name for name in names if name.startswith(_up_blocks(names)[-1] + ".")]
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


def _up_blocks(names: Sequence[str]) -> list[str]:
    """Return the up blocks that hold the named sites, in the order in which they run."""
    return sorted({".".join(name.split(".")[:2]) for name in names if name.startswith("up_blocks.")})


# Inversion and StyleID ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Inverted:
    """The DDIM inversion of n images over S steps, as `Pipeline.invert` found it.

    ``states`` (n, S + 1, h, w, c) go from the image to the noise. ``features`` maps each recorded site to its q, k and
    v (n, S, tokens, heads, d), before controls. ``label`` is that of the inversion.
    """

    states: Array
    features: dict[str, QKV]
    label: str

    @property
    def noise(self) -> Array:
        """The noise (n, h, w, c) that would draw the images."""
        return self.states[:, -1]

    def course(self, offset: int = 0) -> Array:
        """Return the states (n, S + 1, h, w, c) before each step of a sampling run, and at its end.

        An ``offset`` starts the course so many steps ahead of the run, which then waits for it: StyleAligned's
        references are cleaner than their timestep says.
        """
        steps = self.states.shape[1] - 1
        if not 0 <= offset < steps:
            raise InputError(f"offset: found {offset}, expected 0 to {steps - 1}")
        ahead = np.maximum(np.arange(steps + 1), offset + 1)
        ahead[0] = offset
        return self.states[:, ::-1][:, ahead]

    def seen(self) -> Array:
        """Return the states on which each step of a sampling run finds the features of its timestep; last the image."""
        return jnp.concatenate([self.states[:, :-1][:, ::-1], self.states[:, :1]], 1)


def hold(courses: Array, rows: Sequence[int], n: int) -> Pinned:
    """Hold the images ``rows`` of a batch of ``n`` to their courses (len(rows), S + 1, h, w, c)."""
    states = jnp.zeros((n, *courses.shape[1:]), courses.dtype).at[jnp.asarray(rows)].set(courses)
    return Pinned(states, jnp.zeros((n,)).at[jnp.asarray(rows)].set(1.0))


def style_id_sites(pipe: Pipeline, pairing: str = "reference") -> str:
    """Return the pattern of the attn1 that StyleID edits: those of the last two up blocks with attention.

    In SD 1 and 2 these are the authors' (up_blocks.2 and 3); the port to diffusers leaves out the first of them.
    """
    names = [s.name for s in _sites(pipe, pipe.latent_shape[:2]) if s.name.endswith(".attn1")]
    blocks = _up_blocks(names)[-2:]
    names = [name for name in names if any(name.startswith(block + ".") for block in blocks)]
    if pairing == "diffusers":
        names = names[1:]
    return "|".join(f"^{re.escape(name)}$" for name in names)


def style_id(
    content: Inverted,
    style: Inverted,
    pairs: Sequence[tuple[int, int]],
    *,
    gamma: float | Sequence[float] = GAMMA,
    temperature: float | Sequence[float] = TEMPERATURE,
    strength: float | Sequence[float] = 1.0,
) -> StyleIDControl:
    """Return StyleID's control for pairs (content image, style image) of two inversions that recorded features."""
    n = len(pairs)
    if not content.features or content.features.keys() != style.features.keys():
        raise InputError("StyleID: found inversions without the same recorded sites, expected record=... in both")

    def row_numbers(name: str, value: float | Sequence[float]) -> Array:
        found = np.asarray(value, np.float32)
        if found.shape not in ((), (n,)) or not np.isfinite(found).all():
            raise InputError(f"{name}: found {value!r}, expected a number, or one for each of the {n} pairs")
        return jnp.asarray(np.broadcast_to(found, (n,)))

    def by_step(x: Array) -> Array:  # (n, steps, ...), ascending, to the order of sampling
        return jnp.swapaxes(x, 0, 1)[::-1]

    return StyleIDControl(
        q={site: by_step(x.q) for site, x in content.features.items()},
        k={site: by_step(x.k) for site, x in style.features.items()},
        v={site: by_step(x.v) for site, x in style.features.items()},
        content=jnp.asarray([c for c, _ in pairs], jnp.int32),
        style=jnp.asarray([s for _, s in pairs], jnp.int32),
        gamma=row_numbers("gamma", gamma),
        temperature=row_numbers("temperature", temperature),
        strength=row_numbers("strength", strength),
        sites="|".join(f"^{re.escape(site)}$" for site in content.features),
    )


def style_id_rows(
    pipe: Pipeline,
    pairs: Sequence[tuple[int, int]],
    *,
    gamma: float | Sequence[float] = GAMMA,
    temperature: float | Sequence[float] = TEMPERATURE,
    strength: float | Sequence[float] = 1.0,
    pairing: str = "reference",
) -> StyleIDRowsControl:
    """Return StyleID's control for rows (content, style, result) of each pair, the first two held to their courses."""
    n = len(pairs)

    def row_numbers(value: float | Sequence[float], beside: float) -> Array:
        results = np.broadcast_to(np.asarray(value, np.float32), (n,))
        return jnp.asarray(
            np.stack([np.full((n,), beside), np.full((n,), beside), results], 1).reshape(-1), jnp.float32
        )

    return StyleIDRowsControl(
        content=jnp.asarray([0, 0, 2] * n, jnp.int32),
        style=jnp.asarray([0, 0, 1] * n, jnp.int32),
        gamma=row_numbers(gamma, 0.0),
        temperature=row_numbers(temperature, 1.0),
        strength=row_numbers(strength, 0.0),
        sites=style_id_sites(pipe, pairing),
    )


def draw_pairs(
    pipe: Pipeline,
    found: Inverted,
    pairs: Sequence[tuple[int, int]],
    arguments: dict[str, Any],
    *,
    gamma: float | Sequence[float] = GAMMA,
    temperature: float | Sequence[float] = TEMPERATURE,
    strength: float | Sequence[float] = 1.0,
    adain: bool = True,
    pairing: str = "reference",
    stored: bool = True,
) -> np.ndarray:
    """Draw pairs (content, style) of inverted images by StyleID, and return what `Pipeline.generate` does.

    ``arguments`` are those of `Pipeline.generate`, one of each list a pair. ``pairing`` "reference" is the authors'
    code: features by the state at their own timestep, and the noise of the last one of all given to the second step,
    the first being skipped; "diffusers" is its port, which skips nothing. ``stored`` reads the features that the
    inversion recorded; else each pair is three rows, which compute them.
    """
    n = len(pairs)
    c, s = (jnp.asarray([pair[i] for pair in pairs]) for i in (0, 1))
    start = style_id_start(found, found, pairs) if adain else found.noise[c]
    numbers = {"gamma": gamma, "temperature": temperature, "strength": strength}
    common = {**arguments, "guided": False, "start": int(pairing == "reference")}
    more = tuple(common.pop("controls", ()))
    prompts = common.pop("prompts", None) or [""] * n
    if stored:
        control = style_id(found, found, pairs, **numbers)
        return pipe.generate(prompts, latents=start, controls=(*more, control), **common)
    if more:
        raise InputError("controls: found some beside rows of pictures, expected stored features with them")
    seen = found.seen()
    rows = jnp.stack([found.noise[c], found.noise[s], start], 1).reshape(3 * n, *start.shape[1:])
    courses = jnp.stack([seen[c], seen[s]], 1).reshape(2 * n, *seen.shape[1:])
    pinned = hold(courses, [3 * i + j for i in range(n) for j in (0, 1)], 3 * n)
    control = style_id_rows(pipe, pairs, pairing=pairing, **numbers)
    for key, value in common.items():
        if isinstance(value, (list, tuple)) and len(value) == n:
            common[key] = [x for x in value for _ in range(3)]
    prompts = [x for x in prompts for _ in range(3)]
    return pipe.generate(prompts, latents=rows, controls=(control,), pinned=pinned, **common)[2::3]


def style_id_start(content: Inverted, style: Inverted, pairs: Sequence[tuple[int, int]]) -> Array:
    """Return StyleID's start: the noise of each content with the statistics of that of its style."""
    c, s = (jnp.asarray([pair[i] for pair in pairs]) for i in (0, 1))
    return adain_latents(content.noise[c], style.noise[s])
