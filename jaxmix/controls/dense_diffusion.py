"""DenseDiffusion: Dense Text-to-Image Generation with Attention Modulation (arXiv 2308.12964).

On the scaled scores A of the conditional rows, with R_ij true where the query pixel i and the key j (a token in attn2,
a pixel in attn1) belong to one segment::

    A'_ij = A_ij + alpha_i (max_k A_ik - A_ij)  if R_ij  else  A_ij - alpha_i (A_ij - min_k A_ik)
    alpha_i = w (t / 1000)^5 a_i,      a_i = 1 - kappa (pixels that share a segment with i) / (all pixels)

which draws each score towards an extreme of its row. This is the authors' code, not the paper's equation: the area is
that of the pixel's own segment in cross-attention as well. Three of its oddities are kept unless ``strict`` is set: a
pixel in two segments counts the pixels of both, so a_i may be negative; a pixel whose segments have no words has all
words drawn to the minimum; so does one in no segment. The caller says which tokens belong to a segment, and supplies
the states of its phrase encoded alone (`jaxmix.dense_diffusion`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt32

from jaxmix.control import Control, Site
from jaxmix.rows import dataclass, gate, numbers, per_row, static
from jaxmix.types import Array, InputError

POWER = 5
MOST_SEGMENTS = 32
"""A pixel's segments are the bits of one number, so that no (pixel, pixel) array is kept."""


@dataclass
class DenseDiffusionControl(Control):
    """Modulate attention by a layout of segments.

    ``pixels`` maps a grid ("64x64") to the segments of each of its pixels, ``tokens`` (rows, s) has those of each
    token, as bits. ``area`` maps a grid to the share of pixels (rows, h w) that a pixel shares a segment with.
    ``cross`` and ``self_`` (rows,) are the weights of the two kinds of attention, ``kappa`` (rows,) that of the area.
    ``queries`` are the pixels whose scores there are; all if None.
    """

    pixels: dict[str, UInt32[Array, "b n"]] = per_row()
    area: dict[str, Float[Array, "b n"]] = per_row()
    tokens: UInt32[Array, "b s"] = per_row()
    cross: Float[Array, " b"] = gate(first=True)  # tokens are those of one prompt
    self_: Float[Array, " b"] = gate()
    kappa: Float[Array, " b"] = per_row()
    time: Float[Array, ""] = dataclasses.field(default_factory=lambda: jnp.ones((), jnp.float32))
    queries: Int[Array, " m"] | None = None
    strict: bool = static(default=False)

    claims = frozenset({"places of the keys"})

    def at(self, step: Array, t: Array) -> DenseDiffusionControl:
        """Weaken the modulation with the noise."""
        return dataclasses.replace(self, time=(jnp.asarray(t, jnp.float32) / 1000.0) ** POWER)

    def block(self, queries: Int[Array, " m"]) -> DenseDiffusionControl:
        """Return the control for the scores of some pixels only."""
        return dataclasses.replace(self, queries=queries)

    def logits(self, site: Site, x: Float[Array, "b h n s"]) -> Float[Array, "b h n s"]:
        """Draw the scores of what belongs together up, and the others down.

        In attn1 with more keys than pixels (those of a reference after the own ones) only the own keys are modulated.
        """
        grid = "x".join(map(str, site.hw))
        pixels, area, cross = self.pixels[grid], self.area[grid], site.name.endswith(".attn2")
        keys = self.tokens if cross else pixels
        if self.queries is not None:
            pixels, area = pixels[:, self.queries], area[:, self.queries]
        count = keys.shape[1]
        own = x[..., :count]
        keys = jnp.pad(keys, ((0, 0), (0, x.shape[-1] - count)))
        together = (pixels[:, None, :, None] & keys[:, None, None, :]) != 0
        alpha = (self.cross if cross else self.self_)[:, None] * self.time * (1 - self.kappa[:, None] * area)
        if self.strict and cross:
            worded = jnp.bitwise_or.reduce(keys, axis=1)[:, None]
            alpha = jnp.where((pixels & worded) != 0, alpha, 0.0)
        extreme = jnp.where(together, own.max(-1, keepdims=True), own.min(-1, keepdims=True))
        change = alpha[:, None, :, None] * (extreme - x)
        return x + (change if x.shape[-1] == count else jnp.where(jnp.arange(x.shape[-1]) < count, change, 0.0))

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse latents of another size than the layout was made for."""
        for site in sites:
            if "x".join(map(str, site.hw)) not in self.pixels:
                raise InputError(
                    f"DenseDiffusion: {site.name} has a grid of {site.hw[0]} x {site.hw[1]}, the layout was made for "
                    f"{', '.join(self.pixels)}: expected masks of the size of the image"
                )


def bind(
    masks: np.ndarray,
    token_segments: np.ndarray,
    grids: Sequence[tuple[int, int]],
    *,
    cross: float | Sequence[float] = 1.0,
    self_: float | Sequence[float] = 0.3,
    kappa: float | Sequence[float] = 1.0,
    sites: str = r"\.attn[12]$",
    window: tuple[float, float] = (0.0, 0.3),
    strict: bool = False,
) -> DenseDiffusionControl:
    """Return the control of layouts: ``masks`` (b, m, h, w), true inside, and ``token_segments`` (b, s), -1 for none.

    Two text encoders may cut a prompt differently: then ``token_segments`` are (b, encoders, s), and a token belongs to
    its segments in either.

    ``grids`` are the sizes of the UNet's feature maps for latents of (h, w); the masks are shrunk to them by nearest
    neighbour, the upper left one, from (h, w) each time. Weights are one number, or one per row.
    """
    masks = np.asarray(masks, bool)
    b, m, h, w = masks.shape
    if m > MOST_SEGMENTS:
        raise InputError(f"segments: found {m}, expected at most {MOST_SEGMENTS}")
    bit = np.uint32(1) << np.arange(m, dtype=np.uint32)
    pixels, area = {}, {}
    for gh, gw in sorted(set(grids)):
        small = masks[:, :, np.arange(gh) * h // gh][..., np.arange(gw) * w // gw].reshape(b, m, gh * gw)
        bits = (small * bit[:, None]).sum(1, dtype=np.uint32)
        if strict:
            shared = np.stack([((row[:, None] & row[None]) != 0).sum(1) for row in bits])
        else:
            shared = (small * small.sum(-1, keepdims=True)).sum(1)
        pixels[f"{gh}x{gw}"] = jnp.asarray(bits)
        area[f"{gh}x{gw}"] = jnp.asarray(shared / (gh * gw), jnp.float32)
    segments = np.asarray(token_segments).reshape(b, -1, np.shape(token_segments)[-1])
    tokens = np.where(segments >= 0, np.uint32(1) << np.maximum(segments, 0).astype(np.uint32), 0).astype(np.uint32)
    tokens = np.bitwise_or.reduce(tokens, axis=1)

    return DenseDiffusionControl(
        pixels=pixels,
        area=area,
        tokens=jnp.asarray(tokens),
        cross=jnp.asarray(numbers("cross", cross, b)),
        self_=jnp.asarray(numbers("self", self_, b)),
        kappa=jnp.asarray(numbers("kappa", kappa, b)),
        strict=strict,
        sites=sites,
        window=window,
    )
