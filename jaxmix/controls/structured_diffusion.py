"""Structured Diffusion: Training-Free Structured Diffusion Guidance (arXiv 2212.05032).

A prompt's phrases, encoded alone, know nothing of each other's attributes. With c_0 the states of the prompt, and c_i
those with phrase i's own in the place of its words, every attn2 of the conditional rows has one map and many values::

    O = 1 / (k + 1) sum_{i=0..k} A W_v c_i = A W_v (mean_i c_i),      A = softmax(Q (W_k c_0)^T / sqrt(d))

which is one attention with other values: they are made once, before the loop, and no step costs more. This is the
authors' default (section 3.3, equation 6). Their variant with many keys (``--conjunction``) is not here: it takes k + 1
maps of every attn2 at every step, so its programs would depend on the number of phrases.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix.control import Control, Site, Told
from jaxmix.rows import dataclass, gate, like, numbers, per_row
from jaxmix.types import Array

ATTN2 = r"\.attn2$"


@dataclass
class StructuredControl(Control):
    """Has attn2 make its values of other states than its keys.

    ``change`` (rows, s, d) is the mean of all c_i less c_0; ``strength`` (rows,) how much of it is taken.
    """

    change: Float[Array, "b s d"] = per_row()
    strength: Float[Array, " b"] = gate(first=True)  # words are known by their places in one prompt

    claims = frozenset({"text states"})

    def told(self, site: Site, c: Told) -> Told:
        """Move the states of the values; keys, and with them the map, stay those of the prompt."""
        change = self.change.astype(c.v.dtype)
        return Told(c.k, c.v + like(self.strength, change) * change)


def bind(
    change: Float[np.ndarray, "b s d"],
    *,
    strength: float | Sequence[float] = 1.0,
    sites: str = ATTN2,
    window: tuple[float, float] = (0.0, 1.0),
) -> StructuredControl:
    """Return the control of ``change`` (b, s, d); ``strength`` is a number or one per row."""
    return StructuredControl(
        change=jnp.asarray(change, jnp.float32),
        strength=jnp.asarray(numbers("strength", strength, len(change))),
        sites=sites,
        window=window,
    )
