"""StyleID: Style Injection in Diffusion (arXiv 2312.09008).

In the attn1 of the decoder's finer blocks, with the q, k and v found at the same timestep when inverting a content and
a style image::

    Q = gamma Q_content + (1 - gamma) Q,    x = softmax(T Q K_style' / sqrt(d)) V_style

The run starts from the content's noise with the mean and standard deviation of the style's (`adain_latents`). Two
controls give the same numbers: `StyleIDControl` reads the features that `Pipeline.invert` recorded;
`StyleIDRowsControl` finds them in other rows of the batch, held to the inverted images at every step, and needs no
memory for them. ``strength`` is ours: 1 is the paper's and 0 the base model, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int

from jaxmix.control import QKV, Control, Site
from jaxmix.rows import dataclass, like, others, per_row, rows_back
from jaxmix.types import Array, InputError

GAMMA, TEMPERATURE = 0.75, 1.5


class _StyleID(Control):
    """What both controls do with the features."""

    claims = frozenset({"keys", "places of the keys"})

    def mix(self: Any, a: QKV, q_content: Array, k_style: Array, v_style: Array) -> QKV:
        """Mix queries, and take the keys and values of the style."""
        gamma, temperature, s = (like(x, a.q) for x in (self.gamma, self.temperature, self.strength))
        q = (gamma * q_content + (1 - gamma) * a.q) * temperature
        return QKV(*((1 - s) * x + s * y for x, y in zip(a, (q, k_style, v_style), strict=True)))


@dataclass
class StyleIDControl(_StyleID):
    """Inject stored features.

    ``q``, ``k`` and ``v`` map a site to (steps, images, n, h, d), the noisiest step first; ``content`` and ``style``
    (rows,) say from which of the images each row takes them. ``gamma`` (rows,) is the share of the content's queries.
    """

    q: dict[str, Float[Array, "t c n h d"]]
    k: dict[str, Float[Array, "t i n h d"]]
    v: dict[str, Float[Array, "t i n h d"]]
    content: Int[Array, " b"] = per_row()
    style: Int[Array, " b"] = per_row()
    gamma: Float[Array, " b"] = per_row()
    temperature: Float[Array, " b"] = per_row()
    strength: Float[Array, " b"] = per_row()

    def at(self, step: Array, t: Array) -> StyleIDControl:
        """Pick the features of the step."""
        q, k, v = ({site: y[step] for site, y in x.items()} for x in (self.q, self.k, self.v))
        return dataclasses.replace(self, q=q, k=k, v=v)

    def qkv(self, site: Site, a: QKV) -> QKV:
        """Mix the row's queries with the content's; take keys and values of the style."""
        if site.name not in self.k:
            return a
        return self.mix(
            a, self.q[site.name][self.content], self.k[site.name][self.style], self.v[site.name][self.style]
        )

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse features of other sites, or of images of a different size."""
        found = {s.name: s for s in sites}
        for name in self.k:
            if name not in found:
                raise InputError(
                    f"StyleID: found features of {name}, expected a site of this UNet that sites={self.sites!r} matches"
                )
            n = found[name].hw[0] * found[name].hw[1]
            if self.q[name].shape[-3] != n:
                raise InputError(
                    f"StyleID: found content features of {self.q[name].shape[-3]} pixels at {name}, which has {n}, "
                    "expected an image of the same size"
                )


@dataclass
class StyleIDRowsControl(_StyleID):
    """Inject the features of other rows.

    ``content`` and ``style`` (rows,) say how many samples back those are; the other fields are StyleIDControl's.
    """

    content: Int[Array, " b"] = rows_back()
    style: Int[Array, " b"] = rows_back()
    gamma: Float[Array, " b"] = per_row()
    temperature: Float[Array, " b"] = per_row()
    strength: Float[Array, " b"] = per_row()

    def qkv(self, site: Site, a: QKV) -> QKV:
        """Mix the row's queries with the content's; take keys and values of the style."""
        return self.mix(a, others(self.content, a.q), others(self.style, a.k), others(self.style, a.v))


def adain_latents(content: Float[Array, "n h w c"], style: Float[Array, "n h2 w2 c"]) -> Float[Array, "n h w c"]:
    """Give the content's noise, per image and channel, the mean and (unbiased) standard deviation of the style's."""

    def moments(z: Array) -> tuple[Array, Array]:
        return z.mean((1, 2), keepdims=True), z.std((1, 2), keepdims=True, ddof=1)

    (mean, std), (mean_style, std_style) = moments(content), moments(style)
    return std_style * (content - mean) / std + mean_style
