"""Adding Conditional Control to Text-to-Image Diffusion Models (ControlNet, arXiv 2302.05543).

A network beside the UNet, with a copy of its way down, sees the same latents, timestep and text, and a picture c. Its
outputs go through 1x1 convolutions Z that start at zero (section 3.1, equation 2)::

    skip_i = F_i(x) + s w_i Z_i(h_i),   h_0 = conv_in(x) + E(c),   middle = F_mid(x) + s w_mid Z_mid(h_mid)

The UNet's way down and its middle block run as without it; what is added reaches only the way up. With "guess" the
weights are w_i = 10^(-1 + i / (n - 1)) over the n outputs, the middle one last, which is diffusers' rule (the authors'
.825^(12 - i) differs by less than .001), and unconditional rows get nothing; otherwise all weights are 1 and both
branches of guidance are controlled. Some nets ("shuffle") ask for the means of their outputs over the picture.

Several nets add up, each by its own rules (diffusers' pipelines ask only the first whether its outputs are pooled). A
net is live in the steps that lie wholly in its window, as in diffusers; the program of the others does not hold it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxmix.control import Control, Site, whole_steps
from jaxmix.rows import Text, dataclass, gate, like, per_row, static
from jaxmix.types import AnyArray, Array, InputError, Params

_FIRST = "up_blocks.0.resnets.0"  # whose features are those of the middle block


@dataclass
class ControlNetControl(Control):
    """Add a net's outputs to the skips of the UNet and to its middle block.

    ``net`` is a `jaxmix.models.controlnet.ControlNetModel` with parameters ``params``, ``hint`` the pictures (rows, H,
    W, 3) in [0, 1], and ``scale`` is s. ``weights`` (rows, n) are those of the outputs. ``live`` is 0 on unconditional
    rows, which are controlled all the same where ``both`` is 1. The last four are what is computed from these.
    """

    net: Any = static()
    params: Params
    hint: Float[Array, "b H W 3"] = per_row()
    scale: Float[Array, " b"] = per_row()
    weights: Float[Array, "b n"] = per_row()
    both: Float[Array, " b"] = per_row()
    live: Float[Array, " b"] = gate()
    embedded: Float[Array, "b h w c"] | None = per_row(default=None)
    context: Any = per_row(default=None)
    added: Float[Array, "b e"] | None = per_row(default=None)
    residuals: tuple[Array, ...] | None = per_row(default=None)

    def span(self, steps: int) -> tuple[int, int]:
        """Return the steps that lie wholly in the window."""
        return whole_steps(self.window, steps)

    def prepare(self, text: Text, hw: tuple[int, int]) -> Control:
        """Embed the pictures, and the text for the net's own attention, which nothing else reaches."""
        context, added = self.net.embed_text(self.params, text, hw)
        embedded = self.net.embed_hint(self.params, self.hint)
        return dataclasses.replace(self, embedded=embedded, context=context, added=added)

    def see(self, x: Float[Array, "b h w c"], t: Array, text: Text) -> Control:
        """Run the net."""
        made = self.net.apply({"params": self.params}, x, t, self.context, self.embedded, self.added)
        strength = self.scale * jnp.maximum(self.live, self.both)
        outputs = []
        for i, y in enumerate((*made.skips, made.middle)):
            z = y.astype(jnp.float32)
            z = like(strength * self.weights[:, i], z) * z
            z = z.mean((1, 2), keepdims=True) if self.net.config.global_pool_conditions else z
            outputs.append(z.astype(y.dtype))
        return dataclasses.replace(self, residuals=tuple(outputs))

    def join(self, site: Site, x: Float[Array, "b h w c"], skip: Array) -> tuple[Array, Array]:
        """Add the outputs that belong here; the way up takes the skips from the last to the first."""
        assert self.residuals is not None, "see the latents first"
        on = self.scale * jnp.maximum(self.live, self.both) != 0

        def plus(x: Array, y: Array) -> Array:
            return jnp.where(like(on, x) > 0, x + y.astype(x.dtype), x)

        *skips, middle = self.residuals
        return (plus(x, middle) if site.name == _FIRST else x), plus(skip, skips[-1 - self._place(site)])

    def check(self, sites: Sequence[Site]) -> None:
        """Refuse a UNet with other skips than the net has outputs for them."""
        found, expected = max(map(self._place, sites)) + 1, self.net.config.outputs - 1
        if found > expected or (self.sites is None and found != expected):
            raise InputError(f"ControlNet: outputs for {expected} skips, expected the {found} of this UNet")

    def _place(self, site: Site) -> int:
        """Return which skip, counted from the last, an up block's resnet joins."""
        _, block, _, layer = site.name.split(".")
        return int(block) * (self.net.config.layers_per_block + 1) + int(layer)


def bind(
    net: Any,
    params: Params,
    hint: Float[AnyArray, "b H W 3"],
    *,
    scale: Float[AnyArray, " b"],
    guess: Sequence[bool] | np.ndarray,
    window: tuple[float, float] = (0.0, 1.0),
) -> ControlNetControl:
    """Return the control for pictures in [0, 1], one a row; ``guess`` says for each row whether it is in guess mode."""
    guess = np.asarray(guess, bool)
    pooled = net.config.global_pool_conditions
    # Nets with pooled outputs are shown to the conditional rows alone, but their outputs weigh the same.
    weights = np.where(guess[:, None] & (not pooled), guess_weights(net.config.outputs), 1.0)
    return ControlNetControl(
        net=net,
        params=params,
        hint=jnp.asarray(hint, jnp.float32),
        scale=jnp.asarray(scale, jnp.float32),
        weights=jnp.asarray(weights, jnp.float32),
        both=jnp.asarray(~guess & (not pooled), jnp.float32),
        live=jnp.ones(guess.shape, jnp.float32),
        window=window,
    )


def guess_weights(n: int) -> np.ndarray:
    """Return the weights of ``n`` outputs in guess mode, from 0.1 to 1 in equal ratios."""
    return np.logspace(-1.0, 0.0, n)
