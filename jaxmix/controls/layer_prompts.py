"""A prompt per layer: P+, Extended Textual Conditioning in Text-to-Image Generation (arXiv 2303.09522).

The text space P+ has one prompt for each cross-attention l of the UNet, p_1 ... p_n: layer l attends to
the text encoder's states of p_l, all else stays. The coarse layers in the middle decide what is drawn, the fine ones at
both ends how it looks. Only the conditional rows have layer prompts; keys and values are made before the loop, so no
step costs more.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxmix.control import Control, Site, Told
from jaxmix.rows import dataclass, gate, like, per_row
from jaxmix.types import AnyArray, Array


@dataclass
class LayerPromptsControl(Control):
    """Has an attn2 make its keys and values of the states of another prompt.

    ``states`` (rows, p, s, d) are those of an image's layer prompts, and ``which`` maps the name of an attn2 to the
    number (rows,) of its own among them: 0 is the image's prompt, k is ``states[:, k - 1]``.
    """

    states: Float[Array, "b p s d"] = per_row()
    which: dict[str, Int[Array, " b"]] = per_row()
    live: Float[Array, " b"] = gate(first=True)

    claims = frozenset({"places of the keys", "text states"})

    def told(self, site: Site, c: Told) -> Told:
        """Replace the states of both keys and values."""
        number = self.which[site.name]
        chosen = jnp.take_along_axis(self.states, jnp.maximum(number - 1, 0)[:, None, None, None], 1)[:, 0]
        own = like((number > 0) & (self.live > 0.5), chosen)
        return Told(*(jnp.where(own, chosen.astype(x.dtype), x) for x in c))


def bind(
    states: Float[AnyArray, "b p s d"],
    which: Mapping[str, Int[AnyArray, " b"]],
    *,
    window: tuple[float, float] = (0.0, 1.0),
) -> LayerPromptsControl:
    """Return the control; layers that are not in ``which`` attend to the image's prompt."""
    names = "|".join(name.replace(".", r"\.") for name in which)
    return LayerPromptsControl(
        states=jnp.asarray(states),
        which={name: jnp.asarray(number, jnp.int32) for name, number in which.items()},
        live=jnp.ones(len(states), jnp.float32),
        sites=f"^({names})$",
        window=window,
    )
