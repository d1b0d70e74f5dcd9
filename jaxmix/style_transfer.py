"""StyleID for a pipeline: inverted pictures in, controls and restyled images out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from jaxmix.controls.style_id import GAMMA, TEMPERATURE, StyleIDControl, StyleIDRowsControl, adain_latents
from jaxmix.inverted import Inverted, hold
from jaxmix.methods import up_blocks
from jaxmix.models.unet import sites
from jaxmix.types import Array, InputError

if TYPE_CHECKING:
    from jaxmix.pipeline import Pipeline


def style_id_sites(pipe: Pipeline, pairing: str = "reference") -> str:
    """Return the pattern of the attn1 that StyleID edits: those of the last two up blocks with attention.

    In SD 1 and 2 these are the authors' (up_blocks.2 and 3); the port to diffusers leaves out the first of them.
    """
    names = [s.name for s in sites(pipe.unet.config, pipe.latent_shape[:2]) if s.name.endswith(".attn1")]
    blocks = up_blocks(names)[-2:]
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
