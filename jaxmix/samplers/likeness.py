"""Guidance by what an image encoder sees: the style and content guidance of InstantStyle-Plus (arXiv 2407.00788).

Before each step the picture as it would become is decoded and described, and the noise is moved towards descriptions
that are more like those of references (unit vectors f*)::

    x^ = sqrt(1 - abar) x0 + (1 - sqrt(1 - abar)) x,   L = - s_style <f_style(x^), f*_style> - s_content <f_c(x^), f*_c>
    eps <- eps_guided + sqrt(1 - abar) dL/dx

x0 is that of the *conditional* prediction of the image's own prompt, through which the gradient goes. In the authors'
code the UNet is called with one latent and two texts, and what is scored is the first row, the negative prompt's; we
take that for an accident. The factor falls from one to nearly zero in the course of a run, so guidance fades by itself.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxmix.rows import dataclass, per_row
from jaxmix.samplers.composable import Composed
from jaxmix.samplers.guidance import Branches, ClassifierFree, Guidance
from jaxmix.samplers.loop import Solver, level
from jaxmix.schedule import prediction_to_x0
from jaxmix.types import Array, ModelFn


@dataclass
class Likeness(Guidance):
    """Guide images towards the descriptions of references; it takes a second call of the UNet a step.

    ``style`` and ``content`` (n, p) are unit vectors, ``style_scale`` and ``content_scale`` (n,) their weights; a row
    of which both are 0 stays as it is, bit for bit. ``eye`` describes scaled latents: ``eye(latents)`` returns the unit
    vectors of style and of content, and ``eye.large(hw)`` whether images of that size are to be seen one at a time.
    """

    style: Float[Array, "n p"] = per_row()
    content: Float[Array, "n p"] = per_row()
    style_scale: Float[Array, " n"] = per_row()
    content_scale: Float[Array, " n"] = per_row()
    eye: Any = None
    base: ClassifierFree | Composed | None = None

    over: ClassVar[frozenset[str]] = frozenset({"ClassifierFree", "Composed"})

    def __call__(self, model: Branches, solver: Solver, hw: tuple[int, int]) -> ModelFn:
        """Return the prediction of the guidance underneath, moved."""
        assert self.base is not None, "stack() the guidances first"
        guided, alone = self.base(model, solver, hw), model.branches((1,), hw)
        asked = ((self.style_scale != 0) | (self.content_scale != 0))[:, None, None, None]

        def predict(x: Array, t: Array, step: Array) -> Array:
            signal, sigma = level(solver, step, t)

            def expected(x: Array) -> Array:
                x0 = prediction_to_x0(solver.prediction_type, alone(x, t, step)[:, 0], x, signal, sigma)
                return sigma * x0 + (1 - sigma) * x

            seen, back = jax.vjp(expected, x)
            (slope,) = back(self.slope(seen, hw))
            # What one of eps is in the schedule's own prediction, x being what it is.
            per_eps = {"epsilon": jnp.ones(()), "v_prediction": 1 / signal, "sample": -sigma / signal}
            return guided(x, t, step) + jnp.where(asked, per_eps[solver.prediction_type] * sigma * slope, 0.0)

        return predict

    def slope(self, latents: Float[Array, "n h w c"], hw: tuple[int, int]) -> Float[Array, "n h w c"]:
        """Return the gradient of the loss of each image by its latents."""
        numbers = (self.style, self.content, self.style_scale, self.content_scale)

        def loss(z: Array, style: Array, content: Array, style_scale: Array, content_scale: Array) -> Array:
            f_style, f_content = self.eye(z)
            return -(style_scale * (f_style * style).sum(-1) + content_scale * (f_content * content).sum(-1)).sum()

        def one(row: Any) -> Array:
            return jax.grad(loss)(*(x[None] for x in row))[0]

        if len(latents) > 1 and self.eye.large(hw):
            return jax.lax.map(one, (latents, *numbers))
        return jax.grad(loss)(latents, *numbers)
