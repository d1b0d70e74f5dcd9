"""Paint-with-words: words get more attention where they are painted (eDiff-I, arXiv 2211.01324, section 5).

In the cross-attention of the conditional rows, Q and K those of one image::

    O = softmax((Q K^T + W) / sqrt(d)) V,      W_ij = c log(1 + sigma) max(Q K^T) sum_n f_n mask_n(i) [token j in n]

for the phrases n of the image's prompt, at every occurrence of each: mask_n is its mask at the pixels' grid, f_n its
weight (0.2 to 2). The maximum is over all heads, pixels and tokens, so no query can be edited by itself. W stands
before the 1 / sqrt(d), as does its maximum: on scaled scores A, W / sqrt(d) is c log(1 + sigma) max(A) sum_n ...

As in the open code for Stable Diffusion (github.com/cloneofsimo/paint-with-words-sd): c is 0.4, masks are resized from
the image's size by bilinear interpolation that keeps the corners, sigma = sqrt((1 - abar) / abar) of the step, and the
deviation of the scores may stand for their maximum. There the maximum is taken over all rows
of a call, which are those of one image; here each row has its own, so no image depends on its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix.control import Control, Site
from jaxmix.rows import dataclass, gate, numbers, per_row, static
from jaxmix.types import Array, InputError

BY = ("max", "std")
ATTN2 = r"\.attn2$"


@dataclass
class PaintControl(Control):
    """Raises the scores of painted words.

    ``painted`` maps a grid ("64x64") to the sum over phrases of f_n mask_n for each pixel and token (rows, h w, s).
    ``weight`` (rows,) is c, ``levels`` (T,) the log of each training timestep's sigma. ``by`` is what the scores are
    measured by, "max" or "std".
    """

    painted: dict[str, Float[Array, "b n s"]] = per_row()
    weight: Float[Array, " b"] = gate(first=True)  # words are known by their places in one prompt
    levels: Float[Array, " t"]
    time: Float[Array, ""] = dataclasses.field(default_factory=lambda: jnp.ones((), jnp.float32))
    by: str = static(default="max")

    claims = frozenset({"places of the keys"})  # what a word's place does to its scores is for one layout to say

    def at(self, step: Array, t: Array) -> PaintControl:
        """Weaken the paint with the noise; timesteps may lie between those of the training."""
        level = jnp.interp(jnp.asarray(t, jnp.float32), jnp.arange(self.levels.shape[0]), self.levels)
        return dataclasses.replace(self, time=jnp.log1p(jnp.exp(level)))

    def logits(self, site: Site, x: Float[Array, "b h n s"]) -> Float[Array, "b h n s"]:
        """Raise the scores of the painted words; keys past the prompt's, if there are any, are no words."""
        painted = self.painted["x".join(map(str, site.hw))]
        own = x[..., : painted.shape[-1]]
        if self.by == "max":
            scale = own.max((1, 2, 3))
        else:
            scale = own.std((1, 2, 3), ddof=1)
        change = (self.weight * self.time * scale)[:, None, None, None] * painted[:, None]
        return x + jnp.pad(change, ((0, 0), (0, 0), (0, 0), (0, x.shape[-1] - own.shape[-1])))

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse self-attention, and latents of another size than the masks were made for."""
        for site in sites:
            if not site.name.endswith(".attn2"):
                raise InputError(f"paint-with-words: found {site.name} among its sites, expected attn2 alone")
            if "x".join(map(str, site.hw)) not in self.painted:
                raise InputError(
                    f"paint-with-words: {site.name} has a grid of {site.hw[0]} x {site.hw[1]}, the masks were made for "
                    f"{', '.join(self.painted)}: expected masks of the size of the image"
                )


def bind(
    painted: dict[str, np.ndarray],
    sigmas: np.ndarray,
    *,
    weight: float | Sequence[float] = 0.4,
    by: str = "max",
    sites: str = ATTN2,
    window: tuple[float, float] = (0.0, 1.0),
) -> PaintControl:
    """Return the control of layouts that `paint` drew; ``sigmas`` (T,) is the noise of each training timestep.

    ``weight`` is a number or one per row. Raises `InputError` for a measure that is not one of `BY`.
    """
    if by not in BY:
        raise InputError(f"by: found {by!r}, expected one of {', '.join(BY)}")
    rows = len(next(iter(painted.values())))
    return PaintControl(
        painted={grid: jnp.asarray(x, jnp.float32) for grid, x in painted.items()},
        weight=jnp.asarray(numbers("weight", weight, rows)),
        levels=jnp.asarray(np.log(sigmas), jnp.float32),
        by=by,
        sites=sites,
        window=window,
    )


def paint(
    masks: Sequence[Float[np.ndarray, "h w"]],
    weights: Sequence[float],
    words: Sequence[np.ndarray],
    tokens: int,
    grids: Sequence[tuple[int, int]],
) -> dict[str, Float[np.ndarray, "n s"]]:
    """Return sum_n f_n mask_n of one image by grid, for each pixel and each of its ``tokens``.

    Each phrase has a mask of values from 0 to 1, a weight f and the places of its tokens, of all occurrences: a token
    that is in a phrase twice counts once.
    """
    owned = np.zeros((len(masks), tokens), np.float32)
    for row, places in zip(owned, words, strict=True):
        row[places] = 1
    drawn = {}
    for h, w in sorted(set(grids)):
        small = [resize(f * np.asarray(mask, np.float32), h, w).ravel() for mask, f in zip(masks, weights, strict=True)]
        drawn[f"{h}x{w}"] = np.stack(small).T @ owned if small else np.zeros((h * w, tokens), np.float32)
    return drawn


def resize(x: Float[np.ndarray, "h w"], height: int, width: int) -> Float[np.ndarray, "h2 w2"]:
    """Resize bilinearly so that corners fall on corners, as torch does with ``align_corners=True``."""
    for axis, size in enumerate((height, width)):
        here = np.linspace(0, x.shape[axis] - 1, size)
        low = np.minimum(here.astype(int), max(x.shape[axis] - 2, 0))
        share = np.expand_dims(here - low, 1 - axis).astype(x.dtype)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        x = np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share
    return x
